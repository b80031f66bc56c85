package engine

import (
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"

	"skein/agent"
	"skein/manager/api"
)

// A task that is about to be ready is not dealt to, but may be reached here: another node may apply the table first.
func TestMeshConfigByState(t *testing.T) {
	ep := func(id string, node uint32, state string) *api.TaskEndpoint {
		return &api.TaskEndpoint{TaskId: id, ServiceId: "s", NodeIndex: node, Addr4: "10.192.4." + id, State: state}
	}
	m := meshConfig(agent.Table{
		Services: map[string]*api.ServiceEndpoint{"s": {ServiceId: "s", Ports: []*api.PortConfig{{Protocol: "tcp", Published: 80, Target: 8080, Mode: "ingress"}}}},
		Endpoints: map[string]*api.TaskEndpoint{
			"2": ep("2", 1, "ready"), "3": ep("3", 2, "ready"), "4": ep("4", 1, "starting"), "5": ep("5", 2, "starting"), "6": ep("6", 1, "draining"),
		},
	}, 1)
	if len(m.Ports) != 1 {
		t.Fatalf("ports %+v", m.Ports)
	}
	p := m.Ports[0]
	if len(p.Backends) != 2 || p.Backends[0].EndpointID != "2" || p.Backends[1].EndpointID != "3" {
		t.Errorf("backends %+v, want the two ready ones", p.Backends)
	}
	if len(p.Soon) != 1 || p.Soon[0].EndpointID != "4" {
		t.Errorf("soon %+v, want this node's starting one", p.Soon)
	}
}

func TestMergeHealth(t *testing.T) {
	image := &container.HealthConfig{Test: []string{"CMD", "check"}, Interval: time.Second, Retries: 4}
	if got := mergeHealth(image, nil); got != image {
		t.Errorf("without a wish: %+v, want the image's", got)
	}
	if got := mergeHealth(nil, image); got != image {
		t.Errorf("without an image's: %+v, want the wish", got)
	}
	got := mergeHealth(image, &container.HealthConfig{Retries: 2})
	if len(got.Test) != 2 || got.Interval != time.Second || got.Retries != 2 {
		t.Errorf("merged %+v", got)
	}
	if got := mergeHealth(image, &container.HealthConfig{Test: []string{"NONE"}}); got.Test[0] != "NONE" {
		t.Errorf("switched off: %+v", got)
	}
}

// TestMergeEnv: also of lists as long as an image may have, in no time.
func TestMergeEnv(t *testing.T) {
	for _, c := range []struct{ a, b, want []string }{
		{nil, nil, nil},
		{[]string{"A=1", "B=2"}, []string{"B=3", "C=4"}, []string{"A=1", "B=3", "C=4"}},
		{[]string{"A=1", "B=2", "C=3"}, []string{"B", "D", "C=5"}, []string{"A=1", "C=5"}},
		{[]string{"A=1"}, []string{"A", "A=2", "A=3"}, []string{"A=3"}},
		{[]string{"A"}, []string{"A=1"}, []string{"A=1"}},
	} {
		if got := mergeEnv(c.a, c.b); !slices.Equal(got, c.want) {
			t.Errorf("mergeEnv(%q, %q) = %q, want %q", c.a, c.b, got, c.want)
		}
	}
	many := make([]string, 300_000)
	for i := range many {
		many[i] = strconv.Itoa(i) + "="
	}
	begun := time.Now()
	if got := mergeEnv(many, many); len(got) != len(many) {
		t.Errorf("%d variables", len(got))
	}
	if d := time.Since(begun); d > 10*time.Second { // pairwise comparison takes minutes
		t.Errorf("300,000 variables took %v", d)
	}
}

func TestCheckHealth(t *testing.T) {
	for _, c := range []struct {
		h    container.HealthConfig
		want string
	}{
		{container.HealthConfig{Interval: 1}, "Interval in Healthcheck cannot be less than 1ms"}, {container.HealthConfig{Timeout: -time.Hour}, "Timeout in"},
		{container.HealthConfig{Retries: -1}, "Retries in"}, {container.HealthConfig{Interval: time.Millisecond}, ""},
	} {
		if err := checkHealth(&c.h); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.h, err, c.want)
		}
	}
}
