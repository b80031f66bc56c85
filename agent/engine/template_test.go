package engine

import (
	"strings"
	"testing"

	"skein/manager/api"
)

// Contents of configs and secrets know no more than other templates do, and a secret's is not in the error.
func TestContentTemplatesAreBounded(t *testing.T) {
	lookup := func(string, string) (string, error) { return "", nil }
	for _, secret := range []bool{false, true} {
		x := expander{a: &api.Assignment{Slot: 1}, lookup: lookup, secret: secret}
		x.expand(`hunter2 {{range .Task}}{{range $.Task}}hunter3{{end}}{{end}}`)
		if x.err == nil {
			t.Fatalf("a loop was expanded (secret: %v)", secret)
		}
		if got := strings.Contains(x.err.Error(), "hunter3"); got == secret || strings.Contains(x.err.Error(), "hunter2") {
			t.Errorf("secret: %v, error: %v", secret, x.err)
		}
	}
}
