package control

import (
	"slices"
	"strings"

	"skein/manager/api"
)

// filters are those of a list request: values of one key are alternatives, keys must all agree.
type filters map[string][]string

// newFilters refuses keys that the list does not know.
func newFilters(in map[string]*api.StringList, known ...string) (filters, error) {
	f := filters{}
	for k, v := range in {
		if !slices.Contains(known, k) {
			return nil, invalid("invalid filter '%s'", k)
		}
		if len(v.GetValues()) > 0 {
			f[k] = v.Values
		}
	}
	return f, nil
}

func (f filters) match(key string, ok func(want string) bool) bool {
	want := f[key]
	return len(want) == 0 || slices.ContainsFunc(want, ok)
}

func (f filters) exact(key string, have ...string) bool {
	return f.match(key, func(want string) bool { return slices.Contains(have, want) })
}

func (f filters) prefix(key string, have ...string) bool {
	return f.match(key, func(want string) bool {
		return slices.ContainsFunc(have, func(h string) bool { return strings.HasPrefix(h, want) })
	})
}

func (f filters) substring(key, have string) bool {
	return f.match(key, func(want string) bool { return strings.Contains(have, want) })
}

// labels: all given ones must be there, as "key" or "key=value".
func (f filters) labels(key string, have map[string]string) bool {
	for _, want := range f[key] {
		k, v, withValue := strings.Cut(want, "=")
		got, ok := have[k]
		if !ok || (withValue && got != v) {
			return false
		}
	}
	return true
}

// oneOf refuses values other than the known ones.
func (f filters) oneOf(key string, known ...string) error {
	for _, v := range f[key] {
		if !slices.Contains(known, v) {
			return invalid("invalid filter '%s=%s': want one of %s", key, v, strings.Join(known, ", "))
		}
	}
	return nil
}
