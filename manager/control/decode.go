package control

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"strings"

	"skein/manager/api"
)

// decode reads one JSON object strictly: bounded, no unknown fields, nothing behind it.
func decode(what string, data []byte, into any) error {
	return decodeUpTo(what, data, api.MaxSpecBytes, into)
}

func decodeUpTo(what string, data []byte, limit int, into any) error {
	if len(data) > limit {
		return invalid("%s: %d bytes are more than the limit of %d", what, len(data), limit)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return invalid("%s: %s", what, jsonCause(err))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return invalid("%s: there is more after the JSON object", what)
	}
	return nil
}

// jsonCause names the field rather than Go's types.
func jsonCause(err error) string {
	var te *json.UnmarshalTypeError
	switch {
	case errors.As(err, &te) && strings.HasPrefix(te.Value, "number "):
		return "field " + strings.TrimPrefix(te.Field, "ServiceSpec.") + ": " + strings.TrimPrefix(te.Value, "number ") + " is not possible here, want a number of type " + te.Type.String()
	case errors.As(err, &te):
		return "field " + strings.TrimPrefix(te.Field, "ServiceSpec.") + ": want " + te.Type.String() + ", not " + te.Value
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "the JSON ends too early"
	}
	return "not valid JSON of this object: " + strings.TrimPrefix(err.Error(), "json: ")
}

// encode writes canonical JSON: what the store keeps and clients get.
func encode(v any) ([]byte, error) { return json.Marshal(v) }

func object(v any) (*api.Object, error) {
	b, err := encode(v)
	if err != nil {
		return nil, err
	}
	return &api.Object{Json: b}, nil
}

func objects[T any](list []T) (*api.Objects, error) {
	out := &api.Objects{Json: make([][]byte, 0, len(list))}
	for i := range list {
		b, err := encode(list[i])
		if err != nil {
			return nil, err
		}
		out.Json = append(out.Json, b)
	}
	return out, nil
}

// checkRegistryAuth refuses credentials: services have no place for them yet, and dropping them would fail later and elsewhere.
func checkRegistryAuth(encoded string) error {
	if encoded == "" {
		return nil
	}
	var auth map[string]any
	raw, err := base64.URLEncoding.DecodeString(encoded)
	if err != nil {
		raw, err = base64.RawURLEncoding.DecodeString(encoded)
	}
	if err != nil || json.Unmarshal(raw, &auth) != nil {
		return invalid("registry auth: want base64url of a JSON object")
	}
	for _, k := range []string{"username", "password", "auth", "identitytoken", "registrytoken"} {
		if v, _ := auth[k].(string); v != "" {
			return notBuilt("registry credentials of a service (--with-registry-auth)")
		}
	}
	return nil
}
