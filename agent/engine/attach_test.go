package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"skein/agent/dockerapi"
	"skein/manager/api"
	"skein/overlay"
)

// fakeCluster is the managers: it gives addresses as they do, and keeps them over restarts of the engine.
type fakeCluster struct {
	mu       sync.Mutex
	networks []network.Inspect
	held     map[string]*api.AttachmentRecord
	next     int
	err      error // of Attach
	lost     bool  // Attach does what it is asked, but its answer is lost
	changed  chan struct{}
}

func newFakeCluster(names ...string) *fakeCluster {
	f := &fakeCluster{held: map[string]*api.AttachmentRecord{}, changed: make(chan struct{})}
	for i, name := range names {
		var n network.Inspect
		n.Name, n.ID, n.Scope, n.Driver, n.Attachable = name, clusterNet(name), "swarm", "overlay", !strings.HasPrefix(name, "closed")
		n.IPAM.Config = []network.IPAMConfig{{Subnet: netip.MustParsePrefix(fmt.Sprintf("10.%d.0.0/24", i))}}
		f.networks = append(f.networks, n)
	}
	return f
}

// clusterNet is the id of a network of the fake cluster.
func clusterNet(name string) string { return name + strings.Repeat("0", clusterIDLength-len(name)) }

func (f *fakeCluster) Member() bool { return true }
func (f *fakeCluster) NodeNetwork(_ context.Context, ref string) (network.Inspect, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range f.networks {
		if n.Name == ref || strings.HasPrefix(n.ID, ref) {
			return n, nil
		}
	}
	return network.Inspect{}, cerrdefs.ErrNotFound
}
func (f *fakeCluster) AwaitNetworks(context.Context, string, []string, bool) error { return nil }

func (f *fakeCluster) Attach(_ context.Context, r *api.AttachRequest) (*api.AttachReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil && !f.lost {
		return nil, f.err
	}
	defer func() {
		close(f.changed)
		f.changed = make(chan struct{})
	}()
	if r.Full {
		for id := range f.held {
			if !slices.ContainsFunc(r.Set, func(w *api.AttachmentWish) bool { return w.Id == id }) {
				delete(f.held, id)
			}
		}
	}
	for _, id := range r.Removed {
		delete(f.held, id)
	}
	reply := &api.AttachReply{}
	for _, w := range r.Set {
		old := f.held[w.Id]
		rec := &api.AttachmentRecord{Id: w.Id, Name: w.Name, Active: w.Active, Gateway4: "10.192.4.9"}
		if !w.Gateway {
			rec.Gateway4 = ""
		}
		for _, n := range w.Networks {
			got := &api.AttachedNetwork{NetworkId: n.NetworkId, Names: n.Names}
			for _, o := range old.GetNetworks() {
				if o.NetworkId == n.NetworkId {
					got.Addr4 = o.Addr4
				}
			}
			if n.Addr4 != "" {
				got.Addr4 = n.Addr4 + "/24"
			}
			if got.Addr4 == "" {
				f.next++
				got.Addr4 = fmt.Sprintf("10.0.0.%d/24", f.next+1)
			}
			rec.Networks = append(rec.Networks, got)
		}
		f.held[w.Id] = rec
		reply.Attachments = append(reply.Attachments, rec)
	}
	return reply, f.err
}

func (f *fakeCluster) set(err error, lost bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err, f.lost = err, lost
}

// until waits until what is held satisfies ok.
func (f *fakeCluster) until(t *testing.T, what string, ok func(map[string]*api.AttachmentRecord) bool) {
	t.Helper()
	for {
		f.mu.Lock()
		done, changed := ok(f.held), f.changed
		f.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-t.Context().Done():
			t.Fatalf("%s: never", what)
		}
	}
}

func newClusterBench(t *testing.T, names ...string) *bench {
	b := &bench{t: t, dir: t.TempDir(), sup: newFakeSupervisor(), images: newFakeImages(t), net: newFakeNetwork(), cluster: newFakeCluster(names...)}
	b.up()
	t.Cleanup(func() { b.stop() })
	return b
}

func (n *fakeNetwork) box(id string) (overlay.Sandbox, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s, ok := n.boxes[id]
	return s, ok
}

// TestAttachedContainer: its address stays over stop, start and a restart of the daemon, and goes with it.
func TestAttachedContainer(t *testing.T) {
	b := newClusterBench(t, "web")
	id := b.run("one", container.HostConfig{NetworkMode: "web"})
	sb, _ := b.net.box(id)
	if len(sb.Legs) != 1 || sb.Legs[0].NetworkID != clusterNet("web") || !sb.DNS || !sb.Gateway4.IsValid() {
		t.Fatalf("sandbox %+v", sb)
	}
	addr := sb.Legs[0].Addr4
	if s := b.record(id).Networks["web"]; s.IPAddress != addr.Addr() || s.NetworkID != clusterNet("web") {
		t.Errorf("settings %+v", s)
	}
	active := func(want bool) {
		t.Helper()
		b.cluster.until(t, fmt.Sprint("active ", want), func(held map[string]*api.AttachmentRecord) bool { return held[id].GetActive() == want })
	}
	active(true)
	if err := b.e.ContainerStop(t.Context(), id, dockerapi.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	active(false)
	b.restart()
	if err := b.e.ContainerStart(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	active(true)
	b.restart()
	active(true)
	if sb, _ := b.net.box(id); sb.Legs[0].Addr4 != addr {
		t.Errorf("its address was %s, is %s", addr, sb.Legs[0].Addr4)
	}
	if err := b.e.ContainerRename(t.Context(), id, "two"); err != nil {
		t.Fatal(err)
	}
	b.cluster.until(t, "its new name", func(held map[string]*api.AttachmentRecord) bool { return held[id].Networks[0].Names[0] == "two" })
	if err := b.e.ContainerRemove(t.Context(), id, true, true); err != nil {
		t.Fatal(err)
	}
	b.cluster.until(t, "gone", func(held map[string]*api.AttachmentRecord) bool { return len(held) == 0 })
}

// TestAttachLeaksNothing: whatever happens between the managers' word and the container's record, no address stays behind.
func TestAttachLeaksNothing(t *testing.T) {
	b := newClusterBench(t, "web")
	empty := func(why string) {
		t.Helper()
		b.cluster.until(t, why, func(held map[string]*api.AttachmentRecord) bool { return len(held) == 0 })
	}
	start := func(name string) error {
		return b.e.ContainerStart(t.Context(), b.create(name, container.HostConfig{NetworkMode: "web", AutoRemove: true}))
	}
	b.cluster.set(errors.New("connection lost"), true)
	if err := start("lost"); err == nil {
		t.Error("started without an address")
	}
	b.cluster.set(nil, false)
	empty("the answer was lost")
	b.sup.set("create", errors.New("no"))
	if err := start("failed"); err == nil {
		t.Error("started in spite of it all")
	}
	b.sup.set("create", nil)
	empty("the start failed")
	b.stop() // the daemon dies between the managers' word and the record
	b.cluster.held["leaked"] = &api.AttachmentRecord{Id: "leaked"}
	b.up()
	empty("the daemon died")
}

func TestAttachRefusals(t *testing.T) {
	b := newClusterBench(t, "web", "closed")
	create := func(nets map[string]*network.EndpointSettings, mode string) error {
		_, err := b.e.ContainerCreate(t.Context(), "", container.CreateRequest{Config: &container.Config{Image: "busybox"},
			HostConfig: &container.HostConfig{NetworkMode: container.NetworkMode(mode)}, NetworkingConfig: &network.NetworkingConfig{EndpointsConfig: nets}}, "")
		return err
	}
	if err := create(nil, "closed"); !cerrdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "not manually attachable") {
		t.Errorf("a network that is not attachable: %v", err)
	}
	if err := create(nil, "nowhere"); !cerrdefs.IsInvalidArgument(err) {
		t.Errorf("no network: %v", err)
	}
	wrong := map[string]*network.EndpointSettings{"web": {IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: netip.MustParseAddr("192.168.1.1")}}}
	if err := create(wrong, "web"); !cerrdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "192.168.1.1") {
		t.Errorf("an address of another network: %v", err)
	}
	if err := create(nil, clusterNet("web")[:5]); err != nil {
		t.Errorf("by the beginning of its id: %v", err)
	}
}

// TestAttachLive: a running container joins and leaves networks of the cluster, beside its bridge and without.
func TestAttachLive(t *testing.T) {
	b := newClusterBench(t, "web", "db")
	id := b.run("one", container.HostConfig{})
	connect := func(name string, s *network.EndpointSettings) error {
		return b.e.NetworkConnect(t.Context(), name, network.ConnectRequest{Container: id, EndpointConfig: s})
	}
	disconnect := func(name string) error {
		return b.e.NetworkDisconnect(t.Context(), name, network.DisconnectRequest{Container: "one"})
	}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(connect("web", &network.EndpointSettings{Aliases: []string{"www"}, IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: netip.MustParseAddr("10.0.0.77")}}))
	sb, _ := b.net.box(id)
	if len(sb.Legs) != 1 || sb.Legs[0].Addr4.String() != "10.0.0.77/24" || len(sb.Bridges) != 1 || sb.Gateway4.IsValid() || !sb.DNS {
		t.Errorf("beside a bridge: %+v", sb)
	}
	if got := b.cluster.held[id].Networks[0].Names; !slices.Equal(got, []string{"one", "www", id[:12]}) {
		t.Errorf("names %v", got)
	}
	if err := connect("web", nil); !cerrdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "already exists in network web") {
		t.Errorf("twice: %v", err)
	}
	if err := disconnect("db"); !cerrdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "not connected to network db") {
		t.Errorf("a network it is not on: %v", err)
	}
	if err := b.e.NetworkConnect(t.Context(), "web", network.ConnectRequest{Container: "nobody"}); !cerrdefs.IsNotFound(err) || !strings.Contains(err.Error(), "nobody") {
		t.Errorf("no container: %v", err)
	}
	ok(connect("db", nil))
	ok(disconnect("bridge"))
	sb, _ = b.net.box(id)
	if len(sb.Legs) != 2 || len(sb.Bridges) != 0 || !sb.Gateway4.IsValid() {
		t.Errorf("on networks of the cluster alone: %+v", sb)
	}
	b.cluster.set(errors.New("no"), false)
	if err := connect("bridge", nil); err == nil {
		t.Error("connected though the managers refused to take the way out back")
	}
	b.cluster.set(nil, false)
	if sb, _ := b.net.box(id); len(sb.Legs) != 2 || len(sb.Bridges) != 0 {
		t.Errorf("after a failure: %+v", sb)
	}
	b.cluster.set(cerrdefs.ErrUnavailable, false) // nobody's consent is needed to leave
	ok(disconnect("web"))
	if sb, _ := b.net.box(id); len(sb.Legs) != 1 {
		t.Errorf("left while the managers did not answer: %+v", sb)
	}
	b.cluster.set(nil, false)
	b.cluster.until(t, "left web", func(held map[string]*api.AttachmentRecord) bool {
		return len(held[id].GetNetworks()) == 1 && held[id].Networks[0].NetworkId == clusterNet("db") && held[id].Active
	})
	ok(disconnect(clusterNet("db")[:6]))
	b.cluster.until(t, "left db", func(held map[string]*api.AttachmentRecord) bool { return len(held) == 0 })
	if sb, _ := b.net.box(id); len(sb.Legs) != 0 || sb.Gateway4.IsValid() {
		t.Errorf("off all networks: %+v", sb)
	}
}

// TestAttachFollows: what the managers lost and gave anew, a running container gets.
func TestAttachFollows(t *testing.T) {
	b := newClusterBench(t, "web")
	id := b.run("one", container.HostConfig{NetworkMode: "web"})
	b.cluster.until(t, "active", func(held map[string]*api.AttachmentRecord) bool { return held[id].GetActive() })
	b.cluster.mu.Lock()
	clear(b.cluster.held) // the node was removed, and joined again
	b.cluster.next = 100
	b.cluster.mu.Unlock()
	b.e.SyncAttachments()
	c := b.e.byID(id)
	for {
		r, _, _, changed := c.watch()
		if sb, _ := b.net.box(id); sb.Legs[0].Addr4.String() == "10.0.0.102/24" && r.Networks["web"].IPAddress.String() == "10.0.0.102" {
			return
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Millisecond): // the network comes after the record
		case <-t.Context().Done():
			t.Fatal("it kept the old address")
		}
	}
}

// TestAttachPublishes: ports of a container that is on networks of the cluster alone are published by the gateway bridge, as long as it has no other.
func TestAttachPublishes(t *testing.T) {
	b := newClusterBench(t, "web", "db")
	web := network.MustParsePort("80/tcp")
	id := b.run("one", container.HostConfig{NetworkMode: "web", PortBindings: network.PortMap{web: {{HostPort: "8080"}}}})
	bridge := func(name string, ports int) {
		t.Helper()
		l, err := b.e.nets.find(name)
		if err != nil {
			t.Fatal(err)
		}
		sb, _ := b.net.box(id)
		if len(sb.Bridges) != 1 || sb.Bridges[0].BridgeID != l.ID || len(sb.Bridges[0].Ports) < ports || sb.Gateway4.IsValid() {
			t.Errorf("on %s: %+v", name, sb)
		}
	}
	bridge(gatewayBridge, 1)
	before, _ := b.net.box(id)
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	do(b.e.NetworkConnect(t.Context(), "db", network.ConnectRequest{Container: id}))
	bridge(gatewayBridge, 1)
	if sb, _ := b.net.box(id); len(sb.Legs) != 2 || sb.Bridges[0].Addr4 != before.Bridges[0].Addr4 {
		t.Errorf("its bridge address changed: %+v", sb)
	}
	b.e.SyncAttachments()
	do(b.e.NetworkConnect(t.Context(), "bridge", network.ConnectRequest{Container: id}))
	bridge("bridge", 1)
	do(b.e.NetworkDisconnect(t.Context(), "bridge", network.DisconnectRequest{Container: id}))
	bridge(gatewayBridge, 1)
	do(b.e.ContainerRemove(t.Context(), id, true, true))
	if n := b.e.nets.inUse(); n != 0 {
		t.Errorf("%d addresses are left", n)
	}
}

// TestAttachLeavesWithTheNode: a node that leaves takes its running containers off the cluster's networks; they go on.
func TestAttachLeavesWithTheNode(t *testing.T) {
	b := newClusterBench(t, "web")
	id := b.run("one", container.HostConfig{})
	if err := b.e.NetworkConnect(t.Context(), "web", network.ConnectRequest{Container: id}); err != nil {
		t.Fatal(err)
	}
	b.cluster.set(cerrdefs.ErrUnavailable, false)
	if err := b.e.LeaveNetworks(t.Context()); err != nil {
		t.Fatal(err)
	}
	if sb, _ := b.net.box(id); len(sb.Legs) != 0 || len(sb.Bridges) != 1 || len(onCluster(b.record(id))) != 0 {
		t.Errorf("%+v", sb)
	}
}
