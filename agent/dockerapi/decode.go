package dockerapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/registry"
)

const (
	maxJSONBody  = 8 << 20          // of a request; the largest objects (specs) are bounded to 1 MiB by the managers
	bodyTimeout  = 30 * time.Second // for the whole JSON body to arrive
	maxFilters   = 1 << 16          // bytes of the filters query
	maxNameBytes = 4096             // of a name, id or reference in a path or query
)

// readJSON decodes a request's JSON body into v. Unknown fields are tolerated, as docker does: newer clients send them.
func readJSON(w http.ResponseWriter, r *http.Request, v any) error {
	raw, err := readBody(w, r)
	if err != nil {
		return err
	}
	return decodeJSON(raw, v)
}

// readOptionalJSON is readJSON for requests that may come without a body.
func readOptionalJSON(w http.ResponseWriter, r *http.Request, v any) error {
	if r.Body == nil || r.ContentLength == 0 {
		return nil
	}
	raw, err := readBody(w, r)
	if err != nil || len(bytes.TrimSpace(raw)) == 0 {
		return err
	}
	return decodeJSON(raw, v)
}

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if ct := r.Header.Get("Content-Type"); ct != "" || r.ContentLength > 0 {
		if mt, _, err := mime.ParseMediaType(ct); err != nil || mt != "application/json" {
			return nil, invalid("unsupported Content-Type header (%s): must be 'application/json'", ct)
		}
	}
	rc := http.NewResponseController(w)
	// Errors mean a transport without deadlines (tests); the size is bounded anyway.
	_ = rc.SetReadDeadline(time.Now().Add(bodyTimeout))
	defer func() { _ = rc.SetReadDeadline(time.Time{}) }()
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxJSONBody))
	var tooLarge *http.MaxBytesError
	if err != nil && !errors.As(err, &tooLarge) {
		err = invalid("the request's body cannot be read: %v", err)
	}
	if err != nil {
		return nil, err
	}
	return raw, nil
}

func decodeJSON(raw []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(raw))
	err := dec.Decode(v)
	if errors.Is(err, io.EOF) {
		return invalid("invalid JSON: got EOF while reading request body")
	}
	if err != nil {
		return invalid("invalid JSON: %v", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) { // More would take a closing bracket for an end
		return invalid("unexpected content after JSON")
	}
	return nil
}

// boolQuery is docker's notion of a true query value.
func boolQuery(q url.Values, key string) bool {
	switch strings.ToLower(strings.TrimSpace(q.Get(key))) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

// filtersQuery decodes the filters of a request in both of docker's forms and refuses unknown keys; no keys: any.
func filtersQuery(q url.Values, keys ...string) (Filters, error) {
	s := q.Get("filters")
	if s == "" {
		return Filters{}, nil
	}
	if len(s) > maxFilters {
		return nil, invalid("invalid filter: longer than %d bytes", maxFilters)
	}
	f, err := decodeFilters([]byte(s))
	if err != nil {
		return nil, err
	}
	for _, k := range slices.Sorted(maps.Keys(f)) {
		if len(keys) > 0 && !slices.Contains(keys, k) {
			return nil, invalid("invalid filter '%s'", k)
		}
	}
	return f, nil
}

func decodeFilters(raw []byte) (Filters, error) {
	var sets map[string]map[string]bool
	if err := json.Unmarshal(raw, &sets); err == nil {
		f := make(Filters, len(sets))
		for k, set := range sets {
			f[k] = slices.Sorted(maps.Keys(set))
		}
		return f, nil
	}
	var lists map[string][]string
	if err := json.Unmarshal(raw, &lists); err != nil {
		return nil, invalid("invalid filter: %v", err)
	}
	return lists, nil
}

// timeQuery reads docker's timestamps: Unix seconds with an optional fraction, or RFC 3339.
func timeQuery(q url.Values, key string) (time.Time, error) {
	s := q.Get(key)
	if s == "" || s == "0" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	sec, frac, _ := strings.Cut(s, ".")
	secs, err := strconv.ParseInt(sec, 10, 64)
	if err != nil {
		return time.Time{}, invalid("invalid value for %q: %q is neither Unix seconds nor RFC 3339", key, s)
	}
	var nanos int64
	if frac != "" {
		nanos, err = strconv.ParseInt((frac + "000000000")[:9], 10, 64)
		if err != nil || nanos < 0 {
			return time.Time{}, invalid("invalid value for %q: %q has a broken fraction", key, s)
		}
	}
	return time.Unix(secs, nanos), nil
}

// uintQuery reads a required unsigned number.
func uintQuery(q url.Values, key string, bits int) (uint64, error) {
	n, err := strconv.ParseUint(q.Get(key), 10, bits)
	if err != nil {
		return 0, invalid("invalid value for %q: %q is no number", key, q.Get(key))
	}
	return n, nil
}

// intQuery reads an optional number.
func intQuery(q url.Values, key string) (*int, error) {
	s := q.Get(key)
	if s == "" {
		return nil, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		return nil, invalid("invalid value for %q: %q is no number", key, s)
	}
	return &n, nil
}

// pathRef is a name or id from the path, bounded.
func pathRef(r *http.Request, key string) (string, error) {
	ref := r.PathValue(key)
	if ref == "" || len(ref) > maxNameBytes {
		return "", invalid("invalid name or id: must have 1 to %d bytes", maxNameBytes)
	}
	return ref, nil
}

// registryAuth decodes X-Registry-Auth; nil without one. A broken header counts as none, as docker does for old clients.
func registryAuth(r *http.Request) *registry.AuthConfig {
	s := r.Header.Get(registry.AuthHeader)
	if s == "" {
		return nil
	}
	auth, err := authconfig.Decode(s)
	if err != nil || *auth == (registry.AuthConfig{}) {
		return nil
	}
	return auth
}

// checkObject refuses what is no JSON object. What is in it is checked by the managers, who name the field.
func checkObject(raw []byte) error {
	var o map[string]json.RawMessage
	if err := decodeJSON(raw, &o); err != nil {
		return err
	}
	if o == nil {
		return invalid("invalid JSON: want an object, not null")
	}
	return nil
}

// updateParameters are the parameters of updates; no field of a spec is called so.
var updateParameters = []string{"version", "registryAuthFrom", "rollback", "rotateWorkerToken", "rotateManagerToken", "rotateManagerUnlockKey"}

// withoutParameters takes out of a spec what the client said in the query and repeats in the body: dockerode sends its options as both. Every
// other unknown field must reach the managers, who refuse it by name.
func withoutParameters(raw []byte) []byte { return without(raw, updateParameters...) }

// without takes fields out of a JSON object.
func without(raw []byte, names ...string) []byte {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return raw
	}
	n := len(fields)
	for _, p := range names {
		delete(fields, p)
	}
	if len(fields) == n {
		return raw
	}
	if b, err := json.Marshal(fields); err == nil {
		return b
	}
	return raw
}
