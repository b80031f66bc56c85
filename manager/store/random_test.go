package store_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// generator makes transactions that are mostly sensible and sometimes stale, wrong or too much.
type generator struct {
	*rand.Rand
	*cluster
}

func (g *generator) id(kind string, n int) string { return fmt.Sprintf("%s%d", kind, g.IntN(n)) }

func (g *generator) spec(name string) []byte {
	var o []func(*swarm.ServiceSpec)
	o = append(o, image(fmt.Sprint("app:", g.IntN(3))))
	for i := range g.IntN(3) {
		o = append(o, func(s *swarm.ServiceSpec) {
			c := s.TaskTemplate.ContainerSpec
			c.Secrets = append(c.Secrets, &swarm.SecretReference{SecretID: g.id("dep", 4), SecretName: "x", File: &swarm.SecretReferenceFileTarget{Name: fmt.Sprint(i)}})
		})
		if g.IntN(3) > 0 {
			o = o[:1]
		}
	}
	for range g.IntN(3) {
		o = append(o, on(g.id("net", 5)))
	}
	for range g.IntN(3) {
		mode := swarm.PortConfigPublishMode("")
		if g.IntN(3) == 0 {
			mode = swarm.PortConfigPublishModeHost
		}
		published := uint32(0)
		if g.IntN(2) == 0 {
			published = uint32(8000 + g.IntN(6))
		}
		o = append(o, publish(uint32(80+g.IntN(3)), published, mode))
	}
	if g.IntN(4) == 0 {
		o = append(o, dnsrr)
	}
	return spec(name, o...)
}

func (g *generator) dependency() *api.Change {
	kind := []string{store.KindSecret, store.KindSecret, store.KindConfig}[g.IntN(3)]
	id := g.id("dep", 4)
	if g.IntN(4) == 0 {
		return &api.Change{Kind: &api.Change_DeleteDependency{DeleteDependency: &api.DependencyRef{Kind: kind, Id: id}}}
	}
	d := &api.DependencyRecord{Kind: kind, Id: id, Name: g.id("name", 6), SpecJson: []byte("{}"), Data: []byte("x")}
	if g.IntN(3) > 0 {
		d.Name = "name-of-" + id
	}
	return &api.Change{Kind: &api.Change_PutDependency{PutDependency: d}}
}

func (g *generator) someTask() *store.Task {
	var ts []*store.Task
	g.View(func(tx store.ReadTx) { ts = tx.Tasks() })
	if len(ts) == 0 || g.IntN(50) == 0 {
		return &store.Task{ID: "none", NodeID: "n0"}
	}
	return ts[g.IntN(len(ts))]
}

func (g *generator) change() *api.Change {
	states := []api.TaskState{api.TaskPreparing, api.TaskRunning, api.TaskRunning, api.TaskComplete, api.TaskFailed, api.TaskShutdown, api.TaskOrphaned}
	switch g.IntN(24) {
	case 0:
		return putNode(g.id("n", 6), "host")
	case 1:
		if g.IntN(4) == 0 {
			return deleteNode(g.id("n", 6))
		}
		return &api.Change{Kind: &api.Change_NodeStatus{NodeStatus: &api.NodeStatus{NodeId: g.id("n", 6), State: "ready"}}}
	case 2:
		n := &api.NetworkRecord{Id: g.id("net", 5), Internal: g.IntN(3) == 0}
		n.Name = n.Id + "-name"
		n.Attachable = g.IntN(4) > 0
		if g.IntN(3) == 0 {
			n.Subnet4 = fmt.Sprintf("192.168.%d.0/%d", g.IntN(3), 24+g.IntN(6))
		}
		n.NoGrowth, n.NoIpv6 = g.IntN(4) == 0, g.IntN(4) == 0
		if g.IntN(3) == 0 {
			n.Ranges = []*api.NetworkRange{{Subnet4: "172.20.0.0/28", Range4: "172.20.0.8/30", Gateway4: "172.20.0.9", Aux4: map[string]string{"a": "172.20.0.3"}}, {}}
			if g.IntN(2) == 0 {
				n.Ranges[0].Subnet6, n.Ranges[0].Aux6 = "fd00:5::/64", map[string]string{"b": "fd00:5::a"}
			}
		}
		return putNetwork(n)
	case 3:
		return deleteNetwork(g.id("net", 5))
	case 4, 5, 6:
		id := g.id("s", 5)
		return put(g.id("node n", 6), "", id, g.spec("svc-"+id))
	case 7:
		return deleteService(g.id("s", 5))
	case 19:
		return g.dependency()
	case 21, 22, 23:
		return g.attachment()
	case 8:
		return expect([]string{"node", "service", "network", "task"}[g.IntN(4)], g.id("s", 5), uint64(g.IntN(3)))
	case 9, 10, 11:
		svc, rev := g.id("s", 5), uint64(1)
		if s := g.service(svc); s != nil {
			rev = s.Revision
		}
		slot, node := uint64(g.IntN(6)), ""
		if slot == 0 {
			node = g.id("n", 6)
		}
		gen := uint32(g.IntN(5))
		if g.IntN(2) == 0 {
			g.View(func(tx store.ReadTx) { gen = store.NextGeneration(tx, svc, slot, node) })
		}
		c := createTask(svc, rev, slot, node, gen)
		if g.IntN(3) == 0 {
			c.GetCreateTasks().Items[0].Restarts = &api.Restarts{Attempts: uint64(gen), Crashes: 1, Times: []int64{int64(gen), 7}}
		}
		return c
	case 12, 13, 14:
		p := &api.TaskPlacement{}
		for range 1 + g.IntN(4) {
			p.TaskIds = append(p.TaskIds, g.someTask().ID)
			p.NodeIds = append(p.NodeIds, g.id("n", 6))
		}
		if g.IntN(6) == 0 {
			p.Refused = make([]string, len(p.TaskIds))
			p.Refused[0] = "no suitable node"
		}
		return &api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: p}}
	case 15, 16:
		t := g.someTask()
		return report(t.ID, t.NodeID, states[g.IntN(len(states))])
	case 17:
		return desire([]api.TaskState{api.TaskRunning, api.TaskShutdown, api.TaskRemove}[g.IntN(3)], g.someTask().ID, g.someTask().ID)
	case 18:
		return deleteTasks(g.someTask().ID, g.someTask().ID)
	default:
		return putCluster(&api.ClusterRecord{Id: "c1", UlaPrefix: "fd12:3456:789a::/48", OverlayPool: "10.0.0.0/18", OverlayBits: 20, FeatureLevel: api.FeatureLevel})
	}
}

// check wants nothing handed out twice and the indexes to agree with the records.
func check(t *testing.T, s *store.Store) {
	t.Helper()
	s.View(func(tx store.ReadTx) {
		held := map[string]string{}
		hold := func(what, by string) {
			if other, twice := held[what]; twice {
				t.Fatalf("%s is held by %s and by %s", what, other, by)
			}
			held[what] = by
		}
		for _, n := range tx.Nodes() {
			hold(fmt.Sprint("index ", n.Index), n.Id)
		}
		nets := tx.Networks()
		for i, n := range nets {
			hold(fmt.Sprint("vni ", n.Vni), n.Id)
			for _, o := range nets[:i] {
				noneShared(t, n, o)
			}
		}
		for _, svc := range tx.Services() {
			for _, v := range svc.Vips {
				hold(v.NetworkId+" "+v.Addr4, svc.Id)
				if v.Addr6 != "" {
					hold(v.NetworkId+" "+v.Addr6, svc.Id)
				}
			}
			for _, p := range svc.Ports {
				if p.Mode == "ingress" {
					hold(fmt.Sprintf("port %d/%s", p.Published, p.Protocol), svc.Id)
				}
			}
			for _, k := range tx.TasksByService(svc.Id) {
				if svc.Revs[k.Revision] == nil {
					t.Fatalf("task %s refers to revision %d of %s, which is gone", k.ID, k.Revision, svc.Id)
				}
			}
			if len(svc.Revs) != len(svc.Revisions) || svc.Revs[svc.Revision] != svc.Spec {
				t.Fatalf("service %s: decoded revisions do not match", svc.Id)
			}
		}
		checkAttachments(t, tx, hold)
		checkTasks(t, tx, hold)
	})
}

// noneShared wants ranges that were chosen by the allocator to be one network's alone.
func noneShared(t *testing.T, n, o *store.Network) {
	pool := netip.MustParsePrefix("10.0.0.0/8")
	for _, a := range ranges4(n) {
		for _, b := range ranges4(o) {
			if a.Overlaps(b) && (pool.Overlaps(a) || pool.Overlaps(b)) {
				t.Fatalf("networks %s and %s overlap: %s %s", n.Id, o.Id, a, b)
			}
		}
	}
}

func ranges4(n *store.Network) []netip.Prefix {
	out := []netip.Prefix{netip.MustParsePrefix(n.Subnet4)}
	for i, r := range n.Ranges {
		if i > 0 {
			out = append(out, netip.MustParsePrefix(r.Subnet4))
		}
	}
	return out
}

func checkTasks(t *testing.T, tx store.ReadTx, hold func(what, by string)) {
	byNode, byService := 0, map[string]int{}
	for _, k := range tx.Tasks() {
		byService[k.ServiceID]++
		if k.NodeID != "" {
			byNode++
		}
		found := false
		for _, o := range tx.TasksBySlot(k.ServiceID, k.Slot, k.NodeID) {
			found = found || o.ID == k.ID
		}
		if !found {
			t.Fatalf("task %s is not in its slot", k.ID)
		}
		if !k.Live() {
			continue
		}
		if tx.Node(k.NodeID) == nil {
			t.Fatalf("task %s lives on node %s, which is gone", k.ID, k.NodeID)
		}
		for _, a := range k.Attachments {
			if n := tx.Network(a.NetworkId); n != nil {
				addr := netip.MustParsePrefix(a.Addr4)
				if !slices.Contains(ranges4(n), addr.Masked()) {
					continue // of a network of that id before
				}
				hold(a.NetworkId+" "+addr.Addr().String(), k.ID)
			}
		}
		if k.Gateway4.IsValid() {
			hold("gateway "+k.Gateway4.String(), k.ID)
		}
		for _, p := range k.HostPorts {
			hold(fmt.Sprintf("%s port %d/%s", k.NodeID, p.Published, p.Protocol), k.ID)
		}
	}
	for _, n := range tx.Nodes() {
		byNode -= len(tx.TasksByNode(n.Id))
	}
	for id, n := range byService {
		if got := len(tx.TasksByService(id)); got != n {
			t.Fatalf("service %s has %d tasks, its index %d", id, n, got)
		}
	}
	_ = byNode // ended tasks of removed nodes stay in no node's list
}

// TestRandomTransactions: invariants hold, refused transactions leave nothing, a copy restored from a snapshot half-way goes on
// exactly as the original, and so does a replay of the log.
func TestRandomTransactions(t *testing.T) {
	seeds := 30
	if testing.Short() {
		seeds = 8
	}
	done, partly, refused := 0, 0, 0
	for seed := range seeds {
		c := newCluster(t)
		g := &generator{rand.New(rand.NewPCG(uint64(seed), 1)), c}
		var forks []*store.Store
		for step := range 400 {
			c.clock.advance(time.Duration(g.IntN(5000)) * time.Millisecond)
			if g.IntN(40) == 0 {
				c.clock.advance(-time.Duration(g.IntN(200)) * time.Second) // another leader, another clock
			}
			n := 1 + g.IntN(3)
			changes := make([]*api.Change, n)
			for i := range changes {
				changes[i] = g.change()
			}
			before := c.tables()
			err := c.try(changes...)
			_, partial := err.(*store.PartialError)
			switch {
			case err == nil:
				done++
			case partial:
				partly++
			default:
				refused++
				if after := c.tables(); after != before {
					t.Fatalf("seed %d step %d: refused with %v, but changed\n%s\nto\n%s", seed, step, err, before, after)
				}
			}
			check(t, c.Store)
			log := c.loop.Log()
			for i, f := range forks {
				f.Apply(uint64(len(log)), log[len(log)-1])
				if f.Hash() != c.Hash() {
					t.Fatalf("seed %d step %d: copy %d went another way", seed, step, i)
				}
			}
			if step%100 == 50 {
				var buf bytes.Buffer
				if err := c.Snapshot()(&buf); err != nil {
					t.Fatal(err)
				}
				f := store.New(nil)
				if err := f.Restore(&buf); err != nil {
					t.Fatalf("seed %d step %d: restore: %v", seed, step, err)
				}
				forks = append(forks, f)
			}
		}
		replay := store.New(nil)
		for i, e := range c.loop.Log() {
			replay.Apply(uint64(i+1), e)
		}
		if replay.Hash() != c.Hash() {
			t.Errorf("seed %d: replay gives another state", seed)
		}
	}
	t.Logf("%d transactions applied, %d in part, %d refused", done, partly, refused)
}

// FuzzApply: no entry, however damaged, makes a manager panic or part from its own snapshot.
func FuzzApply(f *testing.F) {
	build := func(t testing.TB) (*store.Store, [][]byte) {
		c := newCluster(&testing.T{})
		g := &generator{rand.New(rand.NewPCG(7, 7)), c}
		for range 60 {
			_ = c.try(g.change(), g.change())
		}
		return c.Store, c.loop.Log()
	}
	_, log := build(f)
	for _, e := range log {
		f.Add(e)
	}
	f.Fuzz(func(t *testing.T, entry []byte) {
		s := store.New(nil)
		for i, e := range log {
			s.Apply(uint64(i+1), e)
		}
		s.Apply(uint64(len(log)+1), entry)
		var buf bytes.Buffer
		if err := s.Snapshot()(&buf); err != nil {
			t.Fatalf("snapshot: %v", err)
		}
		other := store.New(nil)
		if err := other.Restore(&buf); err != nil {
			t.Fatalf("restore: %v", err)
		}
		if other.Hash() != s.Hash() {
			t.Fatal("snapshot and restore gives another state")
		}
	})
}
