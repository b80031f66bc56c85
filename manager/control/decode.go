package control

import (
	"encoding/base64"
	"encoding/json"
	"reflect"
	"strings"

	"github.com/moby/moby/api/types/registry"

	"skein/manager/api"
)

// maxRegistryAuth is what the store keeps of credentials.
const maxRegistryAuth = 16 << 10

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

// registryAuth reads the header that clients give credentials for an image's registry in; nil without one, "{}" for none. An error does not
// repeat what is in it.
func registryAuth(encoded string) ([]byte, error) {
	if encoded == "" {
		return nil, nil
	}
	raw, err := base64.URLEncoding.DecodeString(encoded)
	if err != nil {
		raw, err = base64.RawURLEncoding.DecodeString(encoded)
	}
	var auth registry.AuthConfig
	if err != nil || json.Unmarshal(raw, &auth) != nil {
		return nil, invalid("registry auth: want base64url of a JSON object with username and password, identitytoken or registrytoken")
	}
	if auth == (registry.AuthConfig{ServerAddress: auth.ServerAddress}) {
		return []byte("{}"), nil
	}
	if auth.Auth != "" && auth.Username == "" && auth.Password == "" {
		pair, err := base64.StdEncoding.DecodeString(auth.Auth)
		name, password, ok := strings.Cut(string(pair), ":")
		if err != nil || !ok {
			return nil, invalid("registry auth: its field auth is not base64 of USERNAME:PASSWORD")
		}
		auth.Username, auth.Password = name, password
	}
	auth.Auth = ""
	b, err := json.Marshal(auth)
	if err == nil && len(b) > maxRegistryAuth {
		return nil, invalid("registry auth: %d bytes are more than the limit of %d", len(b), maxRegistryAuth)
	}
	return b, err
}
