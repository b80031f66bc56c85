package store_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

func reserve(kind string, n int64) func(*swarm.ServiceSpec) {
	return func(s *swarm.ServiceSpec) {
		s.TaskTemplate.Resources = &swarm.ResourceRequirements{Reservations: &swarm.Resources{
			GenericResources: []swarm.GenericResource{{DiscreteResourceSpec: &swarm.DiscreteGenericResource{Kind: kind, Value: n}}}}}
	}
}

func (c *cluster) gpuNode(id string) {
	d, _ := json.Marshal(swarm.NodeDescription{Resources: swarm.Resources{GenericResources: []swarm.GenericResource{
		{NamedResourceSpec: &swarm.NamedGenericResource{Kind: "gpu", Value: "G2"}}, {NamedResourceSpec: &swarm.NamedGenericResource{Kind: "gpu", Value: "G1"}},
		{NamedResourceSpec: &swarm.NamedGenericResource{Kind: "gpu", Value: "G3"}}, {DiscreteResourceSpec: &swarm.DiscreteGenericResource{Kind: "ssd", Value: 3}}}}})
	c.do(&api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id, Hostname: id, DescriptionJson: d}}})
}

func (c *cluster) holds(task string) string {
	var out []string
	c.View(func(tx store.ReadTx) {
		for _, g := range tx.TaskExtra(task).GetGeneric() {
			out = append(out, fmt.Sprintf("%s%v%d", g.Kind, g.Ids, g.Count))
		}
	})
	return strings.Join(out, " ")
}

// TestGenericResources: each task gets ids of its own, in order; what does not suffice is refused, and an end frees it, also after a restore.
func TestGenericResources(t *testing.T) {
	c := newCluster(t)
	c.do(putCluster(&api.ClusterRecord{Id: "c", FeatureLevel: api.LevelPlacement}))
	c.gpuNode("n1")
	c.do(putService("g", spec("g", reserve("gpu", 2))))
	c.do(putService("d", spec("d", reserve("ssd", 2))))
	ids := func(service string) (a, b string) {
		c.do(createTask(service, 1, 1, "", 1), createTask(service, 1, 2, "", 1))
		return api.TaskID(service, 1, "", 1), api.TaskID(service, 2, "", 1)
	}
	for service, want := range map[string]string{"g": "gpu[G1 G2]0", "d": "ssd[]2"} {
		first, second := ids(service)
		c.do(place(first, "n1"))
		if got := c.holds(first); got != want {
			t.Errorf("%s holds %s, want %s", service, got, want)
		}
		if err := c.try(place(second, "n1")); err == nil || !strings.Contains(err.Error(), "1 of its 3") {
			t.Errorf("%s: second placement: %v", service, err)
		}
		if got := c.task(second); got.State != api.TaskPending || !strings.Contains(got.Status.GetErr(), "insufficient resources") {
			t.Errorf("%s: second task %v", service, got)
		}
		c.sameAfterRestore()
		c.do(report(first, "n1", api.TaskFailed))
		if got := c.holds(first); got != "" {
			t.Errorf("%s: ended task holds %s", service, got)
		}
		c.do(place(second, "n1"))
		if got := c.holds(second); got != want {
			t.Errorf("%s: second task holds %s, want %s", service, got, want)
		}
		c.do(deleteTasks(first))
		c.sameAfterRestore()
	}
	c.do(deleteNode("n1"))
	if a, b := c.holds(api.TaskID("g", 2, "", 1)), c.holds(api.TaskID("d", 2, "", 1)); a+b != "" {
		t.Errorf("tasks of a removed node hold %s %s", a, b)
	}
}

// TestVolumeHomes: the first placement decides where a slot's volume lives, until the service goes or gives up homes.
func TestVolumeHomes(t *testing.T) {
	c := newCluster(t)
	c.do(putCluster(&api.ClusterRecord{Id: "c", FeatureLevel: api.LevelPlacement}), putNode("n1", "n1"), putNode("n2", "n2"))
	volume := func(s *swarm.ServiceSpec) {
		s.Mode.Replicated = &swarm.ReplicatedService{}
		s.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Mounts: []mount.Mount{
			{Type: mount.TypeVolume, Source: "data"}, {Type: mount.TypeVolume, Source: ""}, {Type: mount.TypeBind, Source: "/b"},
			{Type: mount.TypeVolume, Source: "nfs", VolumeOptions: &mount.VolumeOptions{DriverConfig: &mount.Driver{Name: "local", Options: map[string]string{"type": "nfs"}}}}}}
	}
	c.do(putService("db", spec("db", volume)))
	c.do(createTask("db", 1, 1, "", 1), createTask("db", 1, 2, "", 1))
	c.do(place(api.TaskID("db", 1, "", 1), "n1"), place(api.TaskID("db", 2, "", 1), "n2"))
	home := func(slot uint64) (node string) {
		c.View(func(tx store.ReadTx) { node = tx.VolumeHome("db", slot, "data") + tx.VolumeHome("db", slot, "nfs") })
		return node
	}
	if home(1) != "n1" || home(2) != "n2" {
		t.Fatalf("homes %q %q, want n1 n2", home(1), home(2))
	}
	c.sameAfterRestore()
	c.do(createTask("db", 1, 1, "", 2))
	next := api.TaskID("db", 1, "", 2)
	if err := c.try(place(next, "n2")); err == nil || !strings.Contains(err.Error(), "volume data of this task lives on node n1") {
		t.Errorf("placement away from home: %v", err)
	}
	c.do(putService("db", spec("db", volume, func(s *swarm.ServiceSpec) { s.Labels = map[string]string{store.LabelVolumeHome: "off"} })))
	c.do(place(next, "n2"))
	if home(1) != "" || home(2) != "n2" {
		t.Errorf("homes %q %q after the slot gave it up, want none and n2", home(1), home(2))
	}
	c.do(deleteService("db"))
	if home(2) != "" {
		t.Errorf("a removed service has a home on %s", home(2))
	}
	c.sameAfterRestore()
}

// TestMoveAndDefer: a task is marked once, reasons stay with their tasks, and tasks of nodes wait for the controller when they are told to.
func TestMoveAndDefer(t *testing.T) {
	c := newCluster(t)
	c.do(putCluster(&api.ClusterRecord{Id: "c", FeatureLevel: api.LevelPlacement}), putNode("n1", "n1"))
	c.do(putService("s", spec("s")))
	c.do(createTask("s", 1, 1, "", 1))
	id := api.TaskID("s", 1, "", 1)
	move := &api.Change{Kind: &api.Change_MoveTasks{MoveTasks: &api.TaskMove{TaskIds: []string{id, "gone"}, Reason: "level"}}}
	c.do(move) // not placed yet: nothing
	c.do(place(id, "n1"))
	c.do(move)
	version := c.task(id).Version
	c.do(move)
	extra := func() (x *api.TaskExtra) {
		c.View(func(tx store.ReadTx) { x = tx.TaskExtra(id) })
		return x
	}
	if x := extra(); !x.GetMoving() || x.Reason != "level" || c.task(id).Version != version {
		t.Errorf("extra %v, version %d, want moving once at %d", x, c.task(id).Version, version)
	}
	c.do(&api.Change{Kind: &api.Change_DesireTasks{DesireTasks: &api.TaskDesire{TaskIds: []string{id}, Desired: uint32(api.TaskShutdown), Reason: "preempted"}}})
	c.sameAfterRestore()
	c.do(report(id, "n1", api.TaskShutdown))
	if x := extra(); x.GetReason() != "preempted" {
		t.Errorf("extra %v after the end", x)
	}
	c.do(deleteTasks(id))
	if x := extra(); x != nil {
		t.Errorf("extra %v of a deleted task", x)
	}
	deferred := createTask("s", 1, 0, "n1", 1)
	deferred.GetCreateTasks().Defer = true
	c.do(deferred)
	if got := c.task(api.TaskID("s", 0, "n1", 1)); got.State != api.TaskPending || got.NodeID != "n1" {
		t.Errorf("deferred task %v", got)
	}
	c.do(place(api.TaskID("s", 0, "n1", 1), "n1"))
}
