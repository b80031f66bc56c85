package manager

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/events"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

// Objects of the cluster are told of as docker tells it: what is new, what changed and how, what is gone; not what was before.
func TestEvents(t *testing.T) {
	st, _ := storetest.New()
	put := func(c *api.Change) {
		t.Helper()
		if _, err := st.Update(context.Background(), func(tx store.WriteTx) error { tx.Add(c); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	id := func(name string) string { return name + strings.Repeat("0", 25-len(name)) }
	service := func(name, image string, replicas int) *api.Change {
		return &api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: id(name), Name: name,
			SpecJson: fmt.Appendf(nil, `{"Name":%q,"TaskTemplate":{"ContainerSpec":{"Image":%q}},"Mode":{"Replicated":{"Replicas":%d}}}`, name, image, replicas)}}}
	}
	put(&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{Id: id("c"), SpecJson: []byte("{}"), OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", OverlayBits: 20}}})
	put(service("old", "a", 1))
	w := st.Watch(store.KindService, store.KindNode, store.KindNetwork, store.KindDependency)
	defer w.Close()
	start := time.Now()
	var got []string
	h := &herald{since: start, now: func() time.Time { return start.Add(time.Minute) }, known: map[store.Key]aspect{}, tell: func(e events.Message) {
		text := fmt.Sprint(e.Scope, " ", e.Type, " ", e.Action, " ", e.Actor.ID[:3])
		for _, k := range slices.Sorted(maps.Keys(e.Actor.Attributes)) {
			text += " " + k + "=" + e.Actor.Attributes[k]
		}
		if e.TimeNano < start.UnixNano() || e.Time != e.TimeNano/int64(time.Second) {
			t.Errorf("%s has the time %d, %d", text, e.Time, e.TimeNano)
		}
		got = append(got, text)
	}}
	h.look(st, nil, true)
	for _, step := range []struct {
		change *api.Change
		want   []string
	}{
		{nil, nil},
		{service("web", "a", 1), []string{"swarm service create web name=web"}},
		{service("web", "b", 3), []string{"swarm service update web image.new=b image.old=a name=web replicas.new=3 replicas.old=1"}},
		{&api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id("nod"), Hostname: "h", Role: api.RoleWorker, Availability: "active", UnderlayAddr: "192.0.2.1", Status: &api.NodeStatus{State: "ready"}}}}, []string{"swarm node create nod name=h"}},
		{&api.Change{Kind: &api.Change_NodeStatus{NodeStatus: &api.NodeStatus{NodeId: id("nod"), State: "down"}}}, []string{"swarm node update nod name=h state.new=down state.old=ready"}},
		{&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: &api.NetworkRecord{Id: id("net"), Name: "front", Driver: "overlay"}}}, []string{"swarm network create net name=front"}},
		{&api.Change{Kind: &api.Change_DeleteNetwork{DeleteNetwork: id("net")}}, []string{"swarm network remove net name=front"}},
		{&api.Change{Kind: &api.Change_PutDependency{PutDependency: &api.DependencyRecord{Id: id("sec"), Kind: "secret", Name: "s", SpecJson: []byte("{}"), Data: []byte("x")}}}, []string{"swarm secret create sec name=s"}},
		{&api.Change{Kind: &api.Change_DeleteDependency{DeleteDependency: &api.DependencyRef{Kind: "secret", Id: id("sec")}}}, []string{"swarm secret remove sec name=s"}},
		{&api.Change{Kind: &api.Change_DeleteService{DeleteService: id("web")}}, []string{"swarm service remove web name=web"}},
		{&api.Change{Kind: &api.Change_DeleteService{DeleteService: id("old")}}, []string{"swarm service remove old name=old"}},
	} {
		if step.change != nil {
			put(proto.Clone(step.change).(*api.Change))
			keys, overflow := w.Take()
			h.look(st, keys, overflow)
		}
		if !slices.Equal(got, step.want) {
			t.Errorf("%v: told %q, want %q", step.change, got, step.want)
		}
		got = nil
	}
	// A manager that has just begun hears of the past: it is not told.
	h = &herald{since: time.Now().Add(time.Hour), now: time.Now, known: map[store.Key]aspect{}, tell: h.tell}
	h.look(st, nil, true)
	put(service("new", "a", 1))
	h.look(st, nil, true)
	put(&api.Change{Kind: &api.Change_DeleteService{DeleteService: id("new")}})
	if h.look(st, nil, true); len(got) > 0 {
		t.Errorf("told of the past: %q", got)
	}
}
