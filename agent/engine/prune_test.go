package engine

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"skein/agent/dockerapi"
)

func TestPruneFilters(t *testing.T) {
	labels, made := map[string]string{"a": "1", "b": "2"}, time.Now().Add(-time.Hour)
	for _, tc := range []struct {
		filter string // space separated key:value
		keeps  bool
		err    string
	}{
		{"", false, ""},
		{"label:a", false, ""},
		{"label:a=1 label:b", false, ""},
		{"label:a label:c", true, ""},
		{"label:a=2", true, ""},
		{"label!:c", false, ""},
		{"label!:c label!:b", true, ""},
		{"until:30m", false, ""},
		{"until:2h", true, ""},
		{"until:2006-01-02", true, ""},
		{"until:2006-01-02T15:04:05", true, ""},
		{fmt.Sprint("until:", time.Now().Unix()), false, ""},
		{"until:1h until:2h", false, "more than one until filter"},
		{"until:soon", false, "soon"},
	} {
		f := dockerapi.Filters{}
		for _, kv := range strings.Fields(tc.filter) {
			k, v, _ := strings.Cut(kv, ":")
			f[k] = append(f[k], v)
		}
		p, err := pruneFilters(f)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%s: %v, want %q", tc.filter, err, tc.err)
			}
		} else if got := p.keeps(labels, made); err != nil || got != tc.keeps {
			t.Errorf("%s: keeps %v, %v, want %v", tc.filter, got, err, tc.keeps)
		}
	}
}
