package dispatcher

import (
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// A task's container is known by its name, its short id and the host name that its revision chose.
func TestTaskNames(t *testing.T) {
	node := &store.Node{Hostname: "blue", DescriptionJson: []byte(`{"Platform":{"Architecture":"arm64","OS":"linux"}}`)}
	task := &store.Task{ID: "t1", Slot: 3, NodeID: "n1", Revision: 2, Status: &api.TaskReport{ContainerId: strings.Repeat("0123456789abcdef", 4)}}
	for _, c := range []struct {
		hostname string
		slot     uint64
		want     string
	}{
		{"", 3, "web.3.t1 0123456789ab"},
		{"db", 3, "web.3.t1 0123456789ab db"},
		{"0123456789ab", 3, "web.3.t1 0123456789ab"},
		{"{{.Service.Name}}-{{.Task.Slot}}", 3, "web.3.t1 0123456789ab web-3"},
		{"{{.Node.Hostname}}-{{.Node.Platform.Architecture}}", 0, "web.n1.t1 0123456789ab blue-arm64"},
		{"{{.Nothing}}", 3, "web.3.t1 0123456789ab"},
	} {
		spec := &swarm.ServiceSpec{}
		spec.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Hostname: c.hostname}
		svc := &store.Service{ServiceRecord: &api.ServiceRecord{Id: "s1", Name: "web"}, Revs: map[uint64]*swarm.ServiceSpec{2: spec}}
		task.Slot = c.slot
		if got := strings.Join(taskNames(task, svc, node), " "); got != c.want {
			t.Errorf("host name %q: %s, want %s", c.hostname, got, c.want)
		}
	}
	if got := taskNames(task, nil, node); !slices.Equal(got, []string{"0123456789ab"}) {
		t.Errorf("without its service: %v", got)
	}
}

// Tables of networks carry the ports that have names, and no others.
func TestNamedPorts(t *testing.T) {
	svc := &store.Service{Spec: &swarm.ServiceSpec{}, ServiceRecord: &api.ServiceRecord{Id: "s1", Name: "web", Ports: []*api.PortConfig{{Name: "http", Protocol: "tcp", Target: 80, Published: 8080}, {Protocol: "tcp", Target: 81}}}}
	svc.Spec.TaskTemplate.Networks = []swarm.NetworkAttachmentConfig{{Target: "net"}}
	recs := serviceRecords(svc)
	if p := recs["net"].Ports; len(p) != 1 || p[0].Name != "http" || len(recs[api.MeshTable].Ports) != 2 {
		t.Errorf("records %v", recs)
	}
}
