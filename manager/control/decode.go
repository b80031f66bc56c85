package control

import (
	"encoding/base64"
	"encoding/json"
	"reflect"
	"strings"

	"skein/manager/api"
)

// decode reads one JSON object strictly: bounded, no unknown fields, nothing behind it.
func decode(what string, data []byte, into any) error {
	return decodeUpTo(what, data, api.MaxSpecBytes, into)
}

func decodeUpTo(what string, data []byte, limit int, into any) error {
	root := at{object: what}
	if len(data) > limit {
		return root.bad(nil, "%d bytes are more than the limit of %d: keep large data in images or configs", len(data), limit)
	}
	if err := checkStrict(what, data, reflect.TypeOf(into)); err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return root.bad(nil, "%s", strings.TrimPrefix(err.Error(), "json: "))
	}
	return nil
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
