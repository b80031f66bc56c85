package engine

import (
	"fmt"
	"strings"
	"testing"

	"skein/manager/api"
)

// TestGenericResources: what the flag says, and what tasks are told.
func TestGenericResources(t *testing.T) {
	got, err := ParseGenericResources([]string{"gpu=GPU-1", "ssd=3", "gpu=GPU-2"})
	text := string(mustJSON(got))
	if want := `[{"NamedResourceSpec":{"Kind":"gpu","Value":"GPU-1"}},{"DiscreteResourceSpec":{"Kind":"ssd","Value":3}},{"NamedResourceSpec":{"Kind":"gpu","Value":"GPU-2"}}]`; err != nil || text != want {
		t.Errorf("got %s, %v, want %s", text, err, want)
	}
	for _, bad := range []struct {
		texts []string
		want  string
	}{
		{[]string{"gpu"}, "want KIND=ID or KIND=NUMBER"}, {[]string{"=1"}, "want KIND"}, {[]string{"gpu="}, "want KIND"}, {[]string{"gpu=0"}, "not in 1.."},
		{[]string{"gpu=a,b"}, "want KIND"}, {[]string{"gpu=1", "gpu=a"}, "both ids and a number"}, {[]string{"gpu=1", "gpu=2"}, "given twice"}, {[]string{"gpu=a", "gpu=a"}, "given twice"},
	} {
		if _, err := ParseGenericResources(bad.texts); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%q: %v, want %q", bad.texts, err, bad.want)
		}
	}
	env := genericEnv([]*api.GenericResource{{Kind: "gpu", Ids: []string{"GPU-1", "GPU-2"}}, {Kind: "ssd", Count: 2}})
	if want := "[DOCKER_RESOURCE_GPU=GPU-1,GPU-2 DOCKER_RESOURCE_SSD=2]"; fmt.Sprint(env) != want {
		t.Errorf("environment %v, want %s", env, want)
	}
}
