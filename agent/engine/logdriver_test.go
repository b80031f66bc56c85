package engine

import (
	"maps"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
)

func TestPlanLog(t *testing.T) {
	for _, tc := range []struct {
		driver, opts string
		want         logPlan
		err          string
	}{
		{"", "", logPlan{driver: "json-file", maxFiles: 1}, ""},
		{"none", "", logPlan{driver: "none", maxFiles: 1}, ""},
		{"local", "", logPlan{driver: "local", maxSize: 20 << 20, maxFiles: 5, compress: true}, ""},
		{"local", "max-size=1m max-file=2 compress=false", logPlan{driver: "local", maxSize: 1 << 20, maxFiles: 2}, ""},
		{"json-file", "max-size=10k max-file=3 compress=true", logPlan{driver: "json-file", maxSize: 10 << 10, maxFiles: 3, compress: true}, ""},
		{"json-file", "mode=non-blocking max-buffer-size=4m", logPlan{driver: "json-file", maxFiles: 1, nonBlocking: true, buffer: 4 << 20}, ""},
		{"json-file", "mode=blocking labels=a,b labels-regex=^c env=X env-regex=^Y tag={{.Name}}/{{.ID}}", logPlan{driver: "json-file", maxFiles: 1}, ""},
		{"syslog", "", logPlan{}, "logger: no log driver named 'syslog' is registered"},
		{"json-file", "colour=red", logPlan{}, "unknown log opt 'colour' for json-file log driver"},
		{"local", "tag=x", logPlan{}, "unknown log opt 'tag' for local log driver"},
		{"none", "max-size=1m", logPlan{}, "unknown log opt 'max-size' for none log driver"},
		{"json-file", "max-size=big", logPlan{}, "max-size"},
		{"json-file", "max-file=0", logPlan{}, "max-file"},
		{"json-file", "compress=true", logPlan{}, "compress cannot be true"},
		{"json-file", "mode=sometimes", logPlan{}, "logging mode not supported: sometimes"},
		{"json-file", "max-buffer-size=4m", logPlan{}, "only supported with 'mode=non-blocking'"},
		{"json-file", "tag={{.Nope}}", logPlan{}, "invalid log option tag"},
		{"json-file", "env-regex=(", logPlan{}, "invalid log option env-regex"},
	} {
		lc := container.LogConfig{Type: tc.driver, Config: map[string]string{}}
		for _, kv := range strings.Fields(tc.opts) {
			k, v, _ := strings.Cut(kv, "=")
			lc.Config[k] = v
		}
		got, err := planLog(lc)
		switch {
		case tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)):
			t.Errorf("%s %s: %v, want %q", tc.driver, tc.opts, err, tc.err)
		case tc.err == "" && (err != nil || got != tc.want):
			t.Errorf("%s %s: %+v %v, want %+v", tc.driver, tc.opts, got, err, tc.want)
		}
	}
}

func TestLogDetails(t *testing.T) {
	r := record{ID: "0123456789abcdef", Name: "web", Image: "sha256:abc", Config: &container.Config{Image: "app", Env: []string{"X=1", "YY=2", "Z=3"},
		Labels: map[string]string{"a": "b", "c.d": "e", "f": "g"}}, HostConfig: &container.HostConfig{LogConfig: container.LogConfig{Config: map[string]string{
		"labels": "a,missing", "labels-regex": "^c", "env": "X", "env-regex": "^Y", "tag": "{{.ImageName}}/{{.Name}}/{{.ID}}"}}}}
	want := map[string]string{"a": "b", "c.d": "e", "X": "1", "YY": "2", "tag": "app/web/0123456789ab"}
	if got := logDetails(r); !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
