package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
)

// compare lists the fields in which two JSON values differ, by path.
func compare(before, after []byte) ([]revisionChange, error) {
	a, b := map[string]string{}, map[string]string{}
	for _, one := range []struct {
		text []byte
		into map[string]string
	}{{before, a}, {after, b}} {
		d := json.NewDecoder(bytes.NewReader(one.text))
		d.UseNumber()
		var v any
		if err := d.Decode(&v); err != nil {
			return nil, fmt.Errorf("the daemon sent a spec that is not JSON: %w", err)
		}
		flatten("", v, one.into)
	}
	all := maps.Clone(a)
	maps.Copy(all, b)
	out := []revisionChange{}
	for _, path := range slices.Sorted(maps.Keys(all)) {
		if a[path] != b[path] {
			out = append(out, revisionChange{path, a[path], b[path]})
		}
	}
	return out, nil
}

func flatten(path string, v any, into map[string]string) {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			if path != "" {
				k = path + "." + k
			}
			flatten(k, x, into)
		}
	case []any:
		for i, x := range v {
			flatten(fmt.Sprintf("%s[%d]", path, i), x, into)
		}
	case nil:
	default:
		into[path] = fmt.Sprint(v)
	}
}
