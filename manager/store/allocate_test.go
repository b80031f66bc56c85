package store_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// How the allocator behaves through Apply.

func TestSubnets(t *testing.T) {
	c := newCluster(t)
	subnet := func(id, cidr string) *api.Change {
		return putNetwork(&api.NetworkRecord{Id: id, Name: id, Subnet4: cidr})
	}
	c.do(putCluster(&api.ClusterRecord{Id: "c1", OverlayPool: "10.0.0.0/18", MeshPool: "10.192.0.0/16", OverlayBits: 20, UlaPrefix: "fd12:3456:789a::/48"}))
	c.do(subnet("a", ""), subnet("b", "10.0.20.0/24"), subnet("c", ""), subnet("d", "172.20.0.0/16"))
	for id, want := range map[string]string{"a": "10.0.0.0/20 4097 fd12:3456:789a:1::/64", "b": "10.0.20.0/24 4098 fd12:3456:789a:2::/64",
		"c": "10.0.32.0/20 4099 fd12:3456:789a:3::/64", "d": "172.20.0.0/16 4100 fd12:3456:789a:4::/64"} {
		n := c.network(id)
		if got := fmt.Sprint(n.Subnet4, " ", n.Vni, " ", n.Subnet6); got != want {
			t.Errorf("network %s: got %s, want %s", id, got, want)
		}
	}
	c.do(subnet("e", ""))
	c.refused(errdefs.IsResourceExhausted, []string{`"f"`, "10.0.0.0/18", "/20", "remove unused networks"}, subnet("f", ""))
	for cidr, parts := range map[string][]string{
		"10.0.5.0/24":     {"10.0.0.0/20", `network "a"`},
		"172.20.9.0/24":   {`network "d"`},
		"10.192.7.0/24":   {"mesh pool 10.192.0.0/16"},
		"10.128.0.1/24":   {"did you mean 10.128.0.0/24"},
		"127.0.0.0/24":    {"reserved"},
		"10.128.0.0/30":   {"8..29"},
		"fd00::/64":       {"not an IPv4 range"},
		"10.128.0.300/24": {"not an IPv4 range"},
	} {
		c.refused(func(error) bool { return true }, parts, subnet("f", cidr))
	}
	c.do(deleteNetwork("a"))
	c.refused(errdefs.IsResourceExhausted, []string{"10.0.0.0/18"}, subnet("f", "")) // rests
	c.clock.advance(time.Minute)
	c.do(subnet("f", ""))
	if n := c.network("f"); n.Subnet4 != "10.0.0.0/20" || n.Vni != 4102 {
		t.Errorf("after the rest: %v", n)
	}
	c.refused(errdefs.IsAlreadyExists, []string{"network with name f already exists"}, putNetwork(&api.NetworkRecord{Id: "g", Name: "f"}))
	c.refused(errdefs.IsInvalidArgument, []string{"bridge", "overlay"}, putNetwork(&api.NetworkRecord{Id: "g", Name: "g", Driver: "bridge"}))
}

func TestPorts(t *testing.T) {
	c := newCluster(t)
	c.do(putService("s1", spec("web", publish(80, 8080, ""), publish(443, 0, ""))))
	if p := c.service("s1").Ports; p[0].Published != 8080 || p[1].Published != 30000 {
		t.Fatalf("ports %v", p)
	}
	c.refused(errdefs.IsConflict, []string{`service "api"`, "port 8080/tcp", `in use by service "web"`, "publish another port"},
		putService("s2", spec("api", publish(80, 8080, ""))))
	c.refused(errdefs.IsConflict, []string{"port 8080/tcp", `"web"`}, putService("s2", spec("api", publish(80, 8080, "host"))))
	c.refused(errdefs.IsInvalidArgument, []string{"published twice"}, putService("s2", spec("api", publish(80, 81, ""), publish(82, 81, ""))))
	c.refused(errdefs.IsInvalidArgument, []string{"70000"}, putService("s2", spec("api", publish(80, 70000, ""))))
	c.do(putService("s2", spec("api", publish(1, 0, ""), publish(2, 30001, "")))) // a named port goes before a dynamic one
	if p := c.service("s2").Ports; p[0].Published != 30002 || p[1].Published != 30001 {
		t.Errorf("ports %v", p)
	}
	c.do(putService("s1", spec("web", publish(443, 0, ""), publish(9000, 0, "")))) // keeps its dynamic port, gives 8080 back
	if p := c.service("s1").Ports; p[0].Published != 30000 || p[1].Published != 30003 {
		t.Errorf("ports %v", p)
	}
	c.do(putService("s3", spec("host1", publish(80, 8080, "host"))), putService("s4", spec("host2", publish(80, 8080, "host"))))
	c.refused(errdefs.IsConflict, []string{`"host1"`, "host mode"}, putService("s5", spec("x", publish(80, 8080, ""))))
	c.do(deleteService("s3"), deleteService("s4"), putService("s5", spec("x", publish(80, 8080, ""))))
}

func TestAddressesRest(t *testing.T) {
	c := newCluster(t)
	c.do(putNode("n1", "host1"), putNetwork(&api.NetworkRecord{Id: "net", Name: "small", Subnet4: "192.168.1.0/29"}))
	c.do(putService("s1", spec("app", on("net")))) // .2 is its VIP, .3 to .6 are for tasks
	run := func(slot uint64, gen uint32) (string, error) {
		id := api.TaskID("s1", slot, "", gen)
		c.do(createTask("s1", 1, slot, "", gen))
		return id, c.try(place(id, "n1"))
	}
	for slot := uint64(1); slot <= 4; slot++ {
		if _, err := run(slot, 1); err != nil {
			t.Fatal(err)
		}
	}
	id, err := run(5, 1)
	if !errdefs.IsResourceExhausted(err) {
		t.Fatalf("a full pool: %v", err)
	}
	t.Log(err)
	if k := c.task(id); k.State != api.TaskPending || k.Status.GetErr() == "" {
		t.Errorf("the task that waits: %+v", k)
	}
	c.do(report(api.TaskID("s1", 2, "", 1), "n1", api.TaskComplete))
	if err := c.try(place(id, "n1")); !errdefs.IsResourceExhausted(err) {
		t.Errorf("an address that rests was given out: %v", err)
	}
	version := c.task(id).Version
	c.clock.advance(59 * time.Second)
	if err := c.try(place(id, "n1")); err == nil {
		t.Error("too early")
	}
	if v := c.task(id).Version; v > version+1 { // the count of resting addresses may have changed the reason once
		t.Errorf("the same reason changed the task again: version %d, then %d", version, v)
	}
	c.sameAfterRestore()
	c.clock.advance(time.Second)
	c.do(place(id, "n1"))
	if a := c.task(id).Attachments[0].Addr4; a != "192.168.1.4/29" {
		t.Errorf("got %s", a)
	}
	// The clock of a new leader is behind: nothing rests longer than a minute of it.
	c.do(report(id, "n1", api.TaskFailed))
	c.clock.advance(-time.Hour)
	id, err = run(6, 1)
	if err == nil {
		t.Error("too early")
	}
	c.clock.advance(61 * time.Second)
	c.do(place(id, "n1"))
}

func TestNodeIndexRests(t *testing.T) {
	c := newCluster(t)
	index := func(id string) (i uint32) {
		c.View(func(tx store.ReadTx) { i = tx.Node(id).Index })
		return i
	}
	c.do(putNode("n1", "a"), putNode("n2", "b"), putNode("n3", "c"))
	c.do(putService("s1", spec("app")), createTask("s1", 1, 0, "n2", 1))
	id := api.TaskID("s1", 0, "n2", 1)
	if k := c.task(id); k.State != api.TaskAssigned || k.Gateway4.String() != "10.192.8.2" {
		t.Fatalf("global task %+v", k)
	}
	c.do(deleteNode("n2"))
	if k := c.task(id); k.State != api.TaskOrphaned {
		t.Errorf("task of a removed node: %+v", k)
	}
	c.do(putNode("n4", "d"))
	if i := index("n4"); i != 4 {
		t.Errorf("index %d", i)
	}
	c.clock.advance(24 * time.Hour)
	c.do(putNode("n5", "e"))
	if i := index("n5"); i != 2 {
		t.Errorf("index %d after the rest", i)
	}
	c.do(putNode("n5", "renamed"))
	if i := index("n5"); i != 2 {
		t.Errorf("index %d after an update", i)
	}
	c.sameAfterRestore()
}

func TestGateway(t *testing.T) {
	c := newCluster(t)
	c.do(putNode("n1", "a"), network("open"), putNetwork(&api.NetworkRecord{Id: "closed", Name: "closed", Internal: true}))
	for i, k := range []struct {
		name    string
		spec    []byte
		gateway bool
		nets    int
	}{
		{"alone", spec("s0"), true, 0},
		{"open", spec("s1", on("open")), true, 1},
		{"closed", spec("s2", on("closed")), false, 1},
		{"both", spec("s3", on("closed", "open", "open")), true, 2},
		{"closed and published", spec("s4", on("closed"), publish(80, 0, "")), true, 1},
		{"host", spec("s5", on("host")), false, 0},
		{"none", spec("s6", on("none")), false, 0},
	} {
		svc := fmt.Sprint("id", i)
		c.do(putService(svc, k.spec), createTask(svc, 1, 1, "", 1), place(api.TaskID(svc, 1, "", 1), "n1"))
		got := c.task(api.TaskID(svc, 1, "", 1))
		if got.Gateway4.IsValid() != k.gateway || len(got.Attachments) != k.nets {
			t.Errorf("%s: gateway %v, %d attachments, want gateway %v, %d", k.name, got.Gateway4, len(got.Attachments), k.gateway, k.nets)
		}
	}
	c.refused(errdefs.IsNotFound, []string{"network nope not found"}, putService("x", spec("x", on("nope"))))
	c.refused(errdefs.IsFailedPrecondition, []string{"network open-net", "service s1"}, deleteNetwork("open"))
}

func TestRevisions(t *testing.T) {
	c := newCluster(t)
	revs := func() string {
		s := c.service("s1")
		var out []uint64
		for _, r := range s.Revisions {
			out = append(out, r.Number)
		}
		return fmt.Sprint(s.Revision, s.ServiceRecord.Previous, out)
	}
	want := func(w string) {
		t.Helper()
		if got := revs(); got != w {
			t.Errorf("got revision, previous, kept = %s, want %s", got, w)
		}
		c.sameAfterRestore()
	}
	c.do(putNode("n1", "a"), putService("s1", spec("app", image("v1"))))
	want("1 0 [1]")
	c.do(createTask("s1", 1, 1, "", 1), place(api.TaskID("s1", 1, "", 1), "n1"))
	c.do(putService("s1", spec("app", image("v1")))) // the same: no revision
	want("1 0 [1]")
	c.do(putService("s1", spec("app", image("v2"))))
	want("2 1 [1 2]")
	if s := c.service("s1"); s.Previous.TaskTemplate.ContainerSpec.Image != "v1" || string(s.PreviousSpecJson) != string(spec("app", image("v1"))) {
		t.Errorf("previous %+v", s.Previous)
	}
	c.do(putService("s1", spec("app", image("v3"))))
	want("3 2 [1 2 3]") // a task is of revision 1
	c.do(report(api.TaskID("s1", 1, "", 1), "n1", api.TaskShutdown), deleteTasks(api.TaskID("s1", 1, "", 1)))
	want("3 2 [2 3]")
	c.do(putService("s1", spec("app", image("v2")))) // roll back: a new revision with the old spec
	want("4 3 [3 4]")
	rec := &api.ServiceRecord{Id: "s1", SpecJson: spec("app", image("v2")), ForceUpdate: 1}
	c.do(&api.Change{Kind: &api.Change_PutService{PutService: rec}})
	want("5 4 [4 5]")
	c.refused(errdefs.IsConflict, []string{"app", "revision 1"}, createTask("s1", 1, 1, "", 2))
	c.refused(errdefs.IsInvalidArgument, []string{"renaming services is not supported"}, putService("s1", spec("other")))
}

func TestTaskRules(t *testing.T) {
	c := newCluster(t)
	c.do(putNode("n1", "a"), putNode("n2", "b"), putService("s1", spec("app")))
	id := api.TaskID("s1", 1, "", 4)
	c.do(createTask("s1", 1, 1, "", 4))
	c.refused(errdefs.IsConflict, []string{"app", "generation 4"}, createTask("s1", 1, 1, "", 4))
	c.refused(errdefs.IsConflict, nil, createTask("s1", 1, 1, "", 3))
	c.refused(errdefs.IsPermissionDenied, []string{id}, report(id, "n1", api.TaskRunning))
	c.do(place(id, "n1"))
	if err := c.try(place(id, "n2")); !errdefs.IsConflict(err) {
		t.Errorf("placed twice: %v", err)
	}
	if err := c.try(deleteTasks(id)); !errdefs.IsFailedPrecondition(err) || c.task(id) == nil {
		t.Errorf("a living task was deleted: %v", err)
	}
	c.do(desire(api.TaskShutdown, id))
	c.do(desire(api.TaskRunning, id))
	if k := c.task(id); k.Desired != api.TaskShutdown {
		t.Errorf("desired state shrank: %v", k.Desired)
	}
	c.do(deleteService("s1"))
	if k := c.task(id); k.Desired != api.TaskRemove {
		t.Errorf("task of a removed service: %+v", k)
	}
	c.refused(errdefs.IsFailedPrecondition, []string{"choose a new id"}, putService("s1", spec("app")))
	c.do(report(id, "n1", api.TaskShutdown), deleteTasks(id, "never-was"))
	var gen uint32
	c.do(putService("s2", spec("app")))
	c.View(func(tx store.ReadTx) { gen = store.NextGeneration(tx, "s2", 1, "") })
	if uint64(gen) != c.Version() {
		t.Errorf("generation %d of an empty slot at version %d", gen, c.Version())
	}
	c.do(createTask("s2", 1, 1, "", gen))
	c.View(func(tx store.ReadTx) {
		if next := store.NextGeneration(tx, "s2", 1, ""); next != gen+1 {
			t.Errorf("next generation %d after %d", next, gen)
		}
	})
}

func TestClusterPools(t *testing.T) {
	c := newCluster(t)
	for pools, parts := range map[[3]string][]string{
		{"10.0.0.0/8", "10.192.0.0/10", ""}:           {"overlap"},
		{"10.0.0.0/9", "10.192.0.0/22", ""}:           {"too small"},
		{"10.0.0.1/9", "10.192.0.0/10", ""}:           {"overlay pool"},
		{"10.0.0.0/9", "fd00::/48", ""}:               {"mesh pool"},
		{"10.0.0.0/9", "10.192.0.0/10", "fd00::/64"}:  {"/48"},
		{"10.0.0.0/9", "10.192.0.0/10", "nonsense::"}: {"/48"},
	} {
		c.refused(errdefs.IsInvalidArgument, parts, putCluster(&api.ClusterRecord{Id: "c1", OverlayPool: pools[0], MeshPool: pools[1], UlaPrefix: pools[2]}))
	}
	c.do(putCluster(&api.ClusterRecord{Id: "c1"}), putNode("n1", "a"))
	c.refused(errdefs.IsFailedPrecondition, []string{"mesh pool", "1 nodes"}, putCluster(&api.ClusterRecord{Id: "c1", MeshPool: "10.128.0.0/10"}))
	c.refused(errdefs.IsFailedPrecondition, []string{"c1"}, putCluster(&api.ClusterRecord{Id: "c2"}))
}

// TestNodesOfAPool: as many nodes join as the mesh pool has blocks for, and the next one is told which pool is full.
func TestNodesOfAPool(t *testing.T) {
	for pool, room := range map[string]int{"10.128.0.0/20": 3, "10.0.0.0/10": 4094, "10.0.0.0/9": 8190} {
		c := newCluster(t)
		c.do(putCluster(&api.ClusterRecord{Id: "c1", OverlayPool: "100.64.0.0/10", MeshPool: pool, FeatureLevel: api.LevelMembers}))
		var join []*api.Change
		for i := range room {
			join = append(join, putNode(fmt.Sprint("n", i), fmt.Sprint("h", i)))
		}
		c.do(join...)
		c.refused(errdefs.IsResourceExhausted, []string{pool, fmt.Sprint(room)}, putNode("more", "more"))
		if room < 10 {
			c.sameAfterRestore()
		}
	}
}

// TestManyTasksOfANode: a node whose block of the mesh pool is full gets a further one from the pool's end, and leaves it when it goes.
func TestManyTasksOfANode(t *testing.T) {
	c := newCluster(t)
	c.do(putCluster(&api.ClusterRecord{Id: "c1", OverlayPool: "100.64.0.0/10", MeshPool: "10.128.0.0/17", UlaPrefix: "fd12:3456:789a::/48", FeatureLevel: api.LevelNetworks}), putNode("a", "alpha"), putNode("b", "beta"))
	c.do(putService("s", spec("web", publish(80, 8080, ""))))
	const many = 2*1022 + 300
	seen := map[string]string{}
	for slot := uint64(1); slot <= many; slot++ {
		id := api.TaskID("s", slot, "", 1)
		c.do(createTask("s", 1, slot, "", 1), place(id, "a"))
		task := c.task(id)
		for _, a := range []string{task.Gateway4.String(), task.Gateway6.String()} {
			if other := seen[a]; other != "" {
				t.Fatalf("%s and %s have both %s", other, id, a)
			}
			seen[a] = id
		}
	}
	node := func() (n *store.Node) {
		c.View(func(tx store.ReadTx) { n = tx.Node("a") })
		return n
	}
	if got := node().Blocks; !slices.Equal(got, []uint32{31, 30}) {
		t.Errorf("further blocks %v, want the last two", got)
	}
	c.sameAfterRestore()
	stale := proto.Clone(node()).(*api.NodeRecord)
	stale.Blocks = nil
	c.do(&api.Change{Kind: &api.Change_PutNode{PutNode: stale}})
	if len(node().Blocks) != 2 {
		t.Error("a new spec took the node's blocks")
	}
	c.do(&api.Change{Kind: &api.Change_DeleteNode{DeleteNode: "a"}})
	c.sameAfterRestore()
}

// TestNodesOfOldClusters: managers of older versions know 4,094 indexes, so there are no more before all are upgraded.
func TestNodesOfOldClusters(t *testing.T) {
	c := newCluster(t)
	old := &api.ClusterRecord{Id: "c1", OverlayPool: "100.64.0.0/10", MeshPool: "10.0.0.0/9", FeatureLevel: api.LevelMembers - 1}
	c.do(putCluster(old))
	var join []*api.Change
	for i := range 4094 {
		join = append(join, putNode(fmt.Sprint("n", i), fmt.Sprint("h", i)))
	}
	c.do(join...)
	c.refused(errdefs.IsResourceExhausted, []string{"4094", "upgrade all managers"}, putNode("more", "more"))
	next := proto.Clone(old).(*api.ClusterRecord)
	next.FeatureLevel = api.LevelMembers
	c.do(putCluster(next), putNode("more", "more"))
}
