package placement

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

// world is a store with the placement controller on a virtual clock.
type world struct {
	t       testing.TB
	st      *store.Store
	watcher *store.Watcher
	driver  *loop.Driver
	now     time.Time
}

func newWorld(t testing.TB) *world {
	st, log := storetest.New()
	w := &world{t: t, st: st, now: time.Unix(1000, 0)}
	log.SetClock(func() time.Time { return w.now })
	w.do(&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{
		Id: "c", SpecJson: []byte("{}"), OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", UlaPrefix: "fd00:1::/48", OverlayBits: 20, FeatureLevel: api.FeatureLevel}}})
	w.newTerm()
	return w
}

func (w *world) newTerm() {
	c := New()
	w.watcher, w.driver = w.st.Watch(c.Kinds()...), loop.NewDriver(w.st, c)
}

func (w *world) do(changes ...*api.Change) {
	w.t.Helper()
	if _, err := w.st.Update(w.t.Context(), func(tx store.WriteTx) error {
		for _, c := range changes {
			tx.Add(c)
		}
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
}

// settle returns the instant at which the controller wants to be called again.
func (w *world) settle() time.Time {
	w.t.Helper()
	for range 20 {
		keys, overflow := w.watcher.Take()
		w.driver.Mark(keys, overflow)
		wake, err := w.driver.Round(w.t.Context(), w.now)
		if err != nil {
			w.t.Fatal(err)
		}
		if len(keys) == 0 {
			return wake
		}
	}
	w.t.Fatal("does not come to rest")
	return time.Time{}
}

func (w *world) node(id string, memMB int64, availability string) {
	d, _ := json.Marshal(swarm.NodeDescription{Resources: swarm.Resources{MemoryBytes: memMB << 20}})
	w.do(&api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id, Hostname: id, Availability: availability, DescriptionJson: d,
		Status: &api.NodeStatus{State: "ready"}}}})
}

func (w *world) service(id string, spec swarm.ServiceSpec) {
	spec.Name = id
	text, _ := json.Marshal(spec)
	w.do(&api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: id, SpecJson: text}}})
}

func (w *world) tasks(service string, n int) {
	c := &api.TaskCreate{ServiceId: service, Revision: 1}
	for i := range n {
		c.Items = append(c.Items, &api.TaskCreate_Item{Slot: uint64(i + 1), Generation: 1})
	}
	w.do(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: c}})
}

func (w *world) show(service string) string {
	var out []string
	w.st.View(func(tx store.ReadTx) {
		for _, t := range tx.TasksByService(service) {
			if t.State < api.TaskAssigned {
				out = append(out, t.Status.GetErr())
			} else {
				out = append(out, t.NodeID)
			}
		}
	})
	return strings.Join(out, " | ")
}

func (w *world) want(service, want string) {
	w.t.Helper()
	if got := w.show(service); got != want {
		w.t.Errorf("%s: %s, want %s", service, got, want)
	}
}

func memory(mb int64) swarm.ServiceSpec {
	var s swarm.ServiceSpec
	s.TaskTemplate.Resources = &swarm.ResourceRequirements{Reservations: &swarm.Resources{MemoryBytes: mb << 20}}
	return s
}

// TestPlacement: tasks get nodes with room; what does not fit waits with the reason, and is placed when room comes.
func TestPlacement(t *testing.T) {
	w := newWorld(t)
	w.node("a", 1000, "active")
	w.node("b", 600, "active")
	w.service("s", memory(500))
	w.tasks("s", 4)
	w.settle()
	w.want("s", "a | b | a | no suitable node (insufficient resources on 2 nodes: 500 MiB memory)")

	// The same reason is not written again; another one not within a moment.
	version := w.st.Version()
	w.node("c", 100, "drain")
	wake := w.settle()
	if got := w.st.Version(); got != version+1 {
		t.Errorf("%d entries for a reason that has to wait", got-version-1)
	}
	w.now = wake
	w.settle()
	w.want("s", "a | b | a | no suitable node (insufficient resources on 2 nodes: 500 MiB memory; 1 node not available for new tasks: drained)")

	// A task that ends makes room, also for a controller that has just begun.
	w.newTerm()
	w.settle()
	w.do(&api.Change{Kind: &api.Change_ReportTask{ReportTask: &api.TaskReport{TaskId: api.TaskID("s", 2, "", 1), State: uint32(api.TaskFailed), NodeId: "b"}}})
	w.settle()
	w.want("s", "a | b | a | b")
}

// TestPlacementStaysExact: the mirror agrees with the store after any sequence of changes, decisions that were refused included.
func TestPlacementStaysExact(t *testing.T) {
	w := newWorld(t)
	w.node("a", 1000, "active")
	w.service("s", memory(400))
	w.tasks("s", 3)
	// The decision is made on a view in which the task is wanted, and comes too late.
	c := New()
	var changes loop.Changes
	w.st.View(func(tx store.ReadTx) { changes, _ = c.Step(tx, loop.Keys{All: true}, w.now) })
	first := api.TaskID("s", 1, "", 1)
	w.do(&api.Change{Kind: &api.Change_DesireTasks{DesireTasks: &api.TaskDesire{TaskIds: []string{first}, Desired: uint32(api.TaskRemove)}}})
	for _, ch := range changes {
		if _, _, err := w.st.Batch(t.Context(), []*api.Txn{ch.Txn}); err != nil {
			t.Fatal(err)
		}
	}
	w.st.View(func(tx store.ReadTx) {
		changes, _ = c.Step(tx, loop.Keys{Keys: []store.Key{{Kind: store.KindTask, ID: api.TaskID("s", 2, "", 1), ServiceID: "s"}}}, w.now)
	})
	if len(changes) != 1 {
		t.Fatalf("%d changes: the room of the refused task was not given to the waiting one", len(changes))
	}
	if p := changes[0].Txn.Changes[0].GetPlaceTasks(); p.NodeIds[0] != "a" || p.TaskIds[0] != api.TaskID("s", 3, "", 1) {
		t.Errorf("placement %v", p)
	}
	if len(c.held) != 2 || c.held[first].Node != "" {
		t.Errorf("held: %v", c.held)
	}
}

// TestFullNetwork: tasks for which a network has no address wait, and are tried again now and then, not with every change and every second.
func TestFullNetwork(t *testing.T) {
	w := newWorld(t)
	w.node("a", 1000, "active")
	w.do(&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: &api.NetworkRecord{Id: "net", Name: "net", Subnet4: "172.30.0.0/29", NoGrowth: true, SpecJson: []byte("{}")}}})
	spec := memory(10)
	spec.TaskTemplate.Networks = []swarm.NetworkAttachmentConfig{{Target: "net"}}
	w.service("s", spec)
	w.tasks("s", 6)
	wake := w.settle()
	if got := w.show("s"); !strings.Contains(got, "is full") {
		t.Fatal(got)
	}
	begin, version := w.now, w.st.Version()
	for w.now.Sub(begin) < 10*time.Minute && !wake.IsZero() {
		w.now = wake
		wake = w.settle()
	}
	if n := w.st.Version() - version; n > 60 {
		t.Errorf("%d entries in %v for tasks that cannot be placed", n, w.now.Sub(begin))
	}
	version = w.st.Version()
	for range 20 {
		w.node("a", 1000, "active")
		w.settle()
	}
	if n := w.st.Version() - version; n > 21 {
		t.Errorf("%d entries for 20 changes of a node", n)
	}
	// An address that is free again is found.
	w.do(&api.Change{Kind: &api.Change_ReportTask{ReportTask: &api.TaskReport{TaskId: api.TaskID("s", 1, "", 1), State: uint32(api.TaskFailed), NodeId: "a"}}})
	placed := func() int { return strings.Count(" "+w.show("s")+" ", " a ") }
	before := placed()
	for end := w.now.Add(80 * time.Second); placed() == before && w.now.Before(end); {
		w.now = w.settle()
	}
	if placed() == before {
		t.Errorf("not placed although an address is free: %s", w.show("s"))
	}
}

// TestFailingNode: a node where a service keeps failing is its last choice.
func TestFailingNode(t *testing.T) {
	w := newWorld(t)
	w.node("a", 1000, "active")
	w.service("s", memory(10))
	for i := range uint32(6) {
		w.do(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: &api.TaskCreate{ServiceId: "s", Revision: 1,
			Items: []*api.TaskCreate_Item{{Slot: 1, Generation: i + 1}}}}})
		w.settle()
		if i == 4 {
			w.node("b", 1000, "active")
			w.service("other", memory(10))
			w.tasks("other", 5) // b is the fuller one
			w.settle()
		}
		if i < 5 {
			w.do(&api.Change{Kind: &api.Change_ReportTask{ReportTask: &api.TaskReport{TaskId: api.TaskID("s", 1, "", i+1), State: uint32(api.TaskFailed), NodeId: "a"}}})
		}
	}
	w.want("s", "a | a | a | a | a | b")
}

// TestRequirements: what a spec says reaches the scheduler, what it must not say is refused by name.
func TestRequirements(t *testing.T) {
	good := memory(5)
	good.TaskTemplate.Resources.Reservations.GenericResources = []swarm.GenericResource{{DiscreteResourceSpec: &swarm.DiscreteGenericResource{Kind: "gpu", Value: 2}}}
	good.TaskTemplate.LogDriver = &swarm.Driver{Name: "local"}
	good.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Mounts: []mount.Mount{
		{Type: mount.TypeVolume, Source: "d"}, {Type: mount.TypeVolume, VolumeOptions: &mount.VolumeOptions{DriverConfig: &mount.Driver{Name: "nfs"}}}}}
	good.TaskTemplate.Placement = &swarm.Placement{Constraints: []string{"node.role==manager"}, MaxReplicas: 2,
		Platforms: []swarm.Platform{{OS: "linux", Architecture: "amd64"}}, Preferences: []swarm.PlacementPreference{{Spread: &swarm.SpreadOver{SpreadDescriptor: "node.labels.dc"}}}}
	good.EndpointSpec = &swarm.EndpointSpec{Ports: []swarm.PortConfig{{PublishedPort: 80, PublishMode: swarm.PortConfigPublishModeHost}, {PublishedPort: 81}}}
	req, err := RequirementsOf(&good)
	if err != nil || fmt.Sprint(*req) != "{{0 5242880} [{gpu 2}] [node.role == manager] [{linux amd64}] [{Log local} {Volume nfs}] [{tcp 80}] 2 [node.labels.dc]}" {
		t.Errorf("requirements %v, %v", req, err)
	}
	for want, change := range map[string]func(*swarm.ServiceSpec){
		"constraint": func(s *swarm.ServiceSpec) { s.TaskTemplate.Placement = &swarm.Placement{Constraints: []string{"x"}} },
		"without a strategy": func(s *swarm.ServiceSpec) {
			s.TaskTemplate.Placement = &swarm.Placement{Preferences: []swarm.PlacementPreference{{}}}
		},
		"generic resource 0": func(s *swarm.ServiceSpec) {
			s.TaskTemplate.Resources.Reservations.GenericResources = []swarm.GenericResource{{}}
		},
		"memory is negative": func(s *swarm.ServiceSpec) { s.TaskTemplate.Resources.Reservations.MemoryBytes = -1 },
	} {
		bad := memory(1)
		change(&bad)
		if _, err := RequirementsOf(&bad); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want an error about %s, got %v", want, err)
		}
	}
}

func labelled(s swarm.ServiceSpec, labels ...string) swarm.ServiceSpec {
	s.Labels = map[string]string{}
	for i := 0; i < len(labels); i += 2 {
		s.Labels[labels[i]] = labels[i+1]
	}
	return s
}

// TestWishes: a service's labels choose how it is placed and who comes first.
func TestWishes(t *testing.T) {
	w := newWorld(t)
	w.node("a", 1000, "active")
	w.node("b", 1000, "active")
	w.service("packed", labelled(memory(300), LabelStrategy, "binpack"))
	w.tasks("packed", 4)
	w.settle()
	w.want("packed", "a | a | a | b")
	w.service("low", labelled(memory(600), LabelPriority, "-1"))
	w.service("high", labelled(memory(600), LabelPriority, "5"))
	w.tasks("low", 1)
	w.tasks("high", 1)
	w.settle()
	w.want("high", "b")
	w.want("low", "no suitable node (insufficient resources on 2 nodes: 600 MiB memory)")
	for text, want := range map[string]bool{"": true, "0": true, "1000": true, "-1000": true, "1001": false, "x": false} {
		if _, ok := ParsePriority(text); ok != want {
			t.Errorf("priority %q: %v, want %v", text, ok, want)
		}
	}
}

// TestVolumeHome: a slot whose volume lives on a node waits for it with the reason, and goes elsewhere only when it is told to.
func TestVolumeHome(t *testing.T) {
	w := newWorld(t)
	w.node("a", 1000, "active")
	w.node("b", 2000, "active")
	db := memory(10)
	db.Mode.Replicated = &swarm.ReplicatedService{}
	db.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Mounts: []mount.Mount{{Type: mount.TypeVolume, Source: "data"}}}
	w.service("db", db)
	w.tasks("db", 1)
	w.settle()
	w.want("db", "a")
	w.node("a", 1000, "drain")
	w.do(&api.Change{Kind: &api.Change_DesireTasks{DesireTasks: &api.TaskDesire{TaskIds: []string{api.TaskID("db", 1, "", 1)}, Desired: uint32(api.TaskShutdown)}}},
		&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: &api.TaskCreate{ServiceId: "db", Revision: 1, Items: []*api.TaskCreate_Item{{Slot: 1, Generation: 2}}}}})
	w.settle()
	w.want("db", "a | no suitable node (1 node not available for new tasks: drained; volume data of this task lives on node a and would be empty elsewhere)")
	db.Name = "db"
	text, _ := json.Marshal(labelled(db, store.LabelVolumeHome, "off"))
	w.do(&api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: "db", SpecJson: text}}})
	w.settle()
	w.want("db", "a | b")
}

// TestPreemption: of the least important tasks as few as needed end, each with the reason; what ends already is not made to end twice, also
// by a new leader, and equals are never touched.
func TestPreemption(t *testing.T) {
	w := newWorld(t)
	w.node("a", 1000, "active")
	for _, s := range []struct {
		name, priority string
		mb             int64
		n              int
	}{{"low", "-5", 300, 2}, {"mid", "1", 300, 1}} {
		w.service(s.name, labelled(memory(s.mb), LabelPriority, s.priority))
		w.tasks(s.name, s.n)
		w.settle()
	}
	w.service("equal", labelled(memory(300), LabelPriority, "-5"))
	w.tasks("equal", 1)
	w.settle()
	w.want("equal", "no suitable node (insufficient resources on 1 node: 300 MiB memory)")
	w.service("high", labelled(memory(350), LabelPriority, "7"))
	w.tasks("high", 1)
	w.settle()
	told := func() (out []string) {
		w.st.View(func(tx store.ReadTx) {
			for _, t := range tx.Tasks() {
				if t.Desired == api.TaskShutdown {
					out = append(out, t.ServiceID+": "+tx.TaskExtra(t.ID).GetReason())
				}
			}
		})
		return out
	}
	want := []string{"low: preempted: service high (priority 7) needs its room on node a"}
	if got := told(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("told to end: %q, want %q", got, want)
	}
	w.want("high", "no suitable node (insufficient resources on 1 node: 350 MiB memory); tasks of a lower priority end to make room")
	w.newTerm()
	w.settle()
	w.node("b", 10, "active")
	w.now = w.now.Add(time.Minute)
	w.settle()
	if got := told(); len(got) != 1 {
		t.Fatalf("told to end after a change of leaders: %q", got)
	}
	var victim string
	w.st.View(func(tx store.ReadTx) {
		for _, t := range tx.TasksByService("low") {
			if t.Desired == api.TaskShutdown {
				victim = t.ID
			}
		}
	})
	w.do(&api.Change{Kind: &api.Change_ReportTask{ReportTask: &api.TaskReport{TaskId: victim, State: uint32(api.TaskShutdown), NodeId: "a"}}})
	w.settle()
	w.want("high", "a")
	w.want("mid", "a")
	w.want("equal", "no suitable node (insufficient resources on 2 nodes: 300 MiB memory)")
}
