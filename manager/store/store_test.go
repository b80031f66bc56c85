package store_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

// clock is a test's time: entries carry it.
type clock struct{ now time.Time }

func (c *clock) advance(d time.Duration) { c.now = c.now.Add(d) }

type cluster struct {
	*testing.T
	*store.Store
	loop  *storetest.Loopback
	clock *clock
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	s, l := storetest.New()
	c := &cluster{T: t, Store: s, loop: l, clock: &clock{now: time.Unix(1_800_000_000, 0)}}
	l.SetClock(func() time.Time { return c.clock.now })
	return c
}

// do applies changes as one transaction and wants no error.
func (c *cluster) do(changes ...*api.Change) {
	c.Helper()
	if err := c.try(changes...); err != nil {
		c.Fatalf("apply: %v", err)
	}
}

func (c *cluster) try(changes ...*api.Change) error {
	_, err := c.Update(context.Background(), func(tx store.WriteTx) error {
		for _, ch := range changes {
			tx.Add(ch)
		}
		return nil
	})
	return err
}

// refused wants an error of a kind, whose text holds all parts, and no change at all.
func (c *cluster) refused(is func(error) bool, parts []string, changes ...*api.Change) {
	c.Helper()
	before := c.tables()
	err := c.try(changes...)
	if err == nil || !is(err) {
		c.Fatalf("got error %v of the wrong kind", err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			c.Errorf("error %q does not say %q", err, p)
		}
	}
	if after := c.tables(); after != before {
		c.Errorf("a refused transaction changed something:\nbefore %s\nafter  %s", before, after)
	}
	c.sameAfterRestore()
}

// tables renders everything but the version and time.
func (c *cluster) tables() string {
	var b strings.Builder
	c.View(func(tx store.ReadTx) {
		fmt.Fprintln(&b, tx.Cluster())
		fmt.Fprintln(&b, tx.Nodes(), tx.Networks())
		for _, s := range tx.Services() {
			fmt.Fprintln(&b, s.ServiceRecord)
		}
		for _, t := range tx.Tasks() {
			fmt.Fprintf(&b, "%+v\n", *t)
		}
	})
	return strings.ReplaceAll(b.String(), "  ", " ") // protobuf text has unstable spaces
}

// sameAfterRestore wants a snapshot to give the same store, and the same next values, back.
func (c *cluster) sameAfterRestore() {
	c.Helper()
	var buf bytes.Buffer
	if err := c.Snapshot()(&buf); err != nil {
		c.Fatal(err)
	}
	other := store.New(nil)
	if err := other.Restore(&buf); err != nil {
		c.Fatalf("restore: %v", err)
	}
	if other.Hash() != c.Hash() {
		c.Fatal("hash differs after snapshot and restore")
	}
}

func (c *cluster) service(id string) (s *store.Service) {
	c.View(func(tx store.ReadTx) { s = tx.Service(id) })
	return s
}

func (c *cluster) task(id string) (t *store.Task) {
	c.View(func(tx store.ReadTx) { t = tx.Task(id) })
	return t
}

func (c *cluster) network(id string) (n *store.Network) {
	c.View(func(tx store.ReadTx) { n = tx.Network(id) })
	return n
}

func putCluster(c *api.ClusterRecord) *api.Change {
	return &api.Change{Kind: &api.Change_PutCluster{PutCluster: c}}
}
func putNode(id, host string) *api.Change {
	return &api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id, Hostname: host, Role: "worker", Availability: "active"}}}
}
func putNetwork(n *api.NetworkRecord) *api.Change {
	return &api.Change{Kind: &api.Change_PutNetwork{PutNetwork: n}}
}
func network(id string) *api.Change { return putNetwork(&api.NetworkRecord{Id: id, Name: id + "-net"}) }
func deleteNetwork(id string) *api.Change {
	return &api.Change{Kind: &api.Change_DeleteNetwork{DeleteNetwork: id}}
}
func deleteNode(id string) *api.Change {
	return &api.Change{Kind: &api.Change_DeleteNode{DeleteNode: id}}
}
func deleteService(id string) *api.Change {
	return &api.Change{Kind: &api.Change_DeleteService{DeleteService: id}}
}
func expect(kind, id string, version uint64) *api.Change {
	return &api.Change{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: kind, Id: id, Version: version}}}
}
func place(task, node string) *api.Change {
	return &api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: &api.TaskPlacement{TaskIds: []string{task}, NodeIds: []string{node}}}}
}
func report(task, node string, state api.TaskState) *api.Change {
	return &api.Change{Kind: &api.Change_ReportTask{ReportTask: &api.TaskReport{TaskId: task, NodeId: node, State: uint32(state)}}}
}
func desire(state api.TaskState, tasks ...string) *api.Change {
	return &api.Change{Kind: &api.Change_DesireTasks{DesireTasks: &api.TaskDesire{TaskIds: tasks, Desired: uint32(state)}}}
}
func deleteTasks(tasks ...string) *api.Change {
	return &api.Change{Kind: &api.Change_DeleteTasks{DeleteTasks: &api.TaskDelete{TaskIds: tasks}}}
}
func createTask(service string, revision, slot uint64, node string, gen uint32) *api.Change {
	return &api.Change{Kind: &api.Change_CreateTasks{CreateTasks: &api.TaskCreate{ServiceId: service, Revision: revision,
		Items: []*api.TaskCreate_Item{{Slot: slot, NodeId: node, Generation: gen, Desired: uint32(api.TaskRunning)}}}}}
}

// spec makes a service's spec; options change it.
func spec(name string, options ...func(*swarm.ServiceSpec)) []byte {
	s := swarm.ServiceSpec{Annotations: swarm.Annotations{Name: name}}
	s.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Image: "app:1"}
	for _, o := range options {
		o(&s)
	}
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return b
}
func image(v string) func(*swarm.ServiceSpec) {
	return func(s *swarm.ServiceSpec) { s.TaskTemplate.ContainerSpec.Image = v }
}
func on(networks ...string) func(*swarm.ServiceSpec) {
	return func(s *swarm.ServiceSpec) {
		for _, n := range networks {
			s.TaskTemplate.Networks = append(s.TaskTemplate.Networks, swarm.NetworkAttachmentConfig{Target: n})
		}
	}
}
func dnsrr(s *swarm.ServiceSpec) {
	if s.EndpointSpec == nil {
		s.EndpointSpec = &swarm.EndpointSpec{}
	}
	s.EndpointSpec.Mode = swarm.ResolutionModeDNSRR
}
func publish(target, published uint32, mode swarm.PortConfigPublishMode) func(*swarm.ServiceSpec) {
	return func(s *swarm.ServiceSpec) {
		if s.EndpointSpec == nil {
			s.EndpointSpec = &swarm.EndpointSpec{}
		}
		s.EndpointSpec.Ports = append(s.EndpointSpec.Ports,
			swarm.PortConfig{Protocol: "tcp", TargetPort: target, PublishedPort: published, PublishMode: mode})
	}
}
func putService(id string, spec []byte) *api.Change {
	return &api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: id, SpecJson: spec}}}
}

func TestServiceLife(t *testing.T) {
	c := newCluster(t)
	c.do(putCluster(&api.ClusterRecord{Id: "c1", UlaPrefix: "fd12:3456:789a::/48"}))
	c.do(putNode("n1", "host1"), putNode("n2", "host2"), network("web"))
	c.do(putService("s1", spec("app", on("web"), publish(80, 8080, ""))))
	svc := c.service("s1")
	if svc.Revision != 1 || svc.ServiceRecord.Previous != 0 || svc.Name != "app" || svc.Spec.Name != "app" || svc.Previous != nil {
		t.Fatalf("service %+v", svc)
	}
	if len(svc.Vips) != 1 || svc.Vips[0].Addr4 != "10.0.0.2" || svc.Vips[0].Addr6 != "fd12:3456:789a:1::2" {
		t.Errorf("vips %v", svc.Vips)
	}
	if len(svc.Ports) != 1 || svc.Ports[0].Published != 8080 || svc.Ports[0].Mode != "ingress" || svc.Ports[0].Protocol != "tcp" {
		t.Errorf("ports %v", svc.Ports)
	}

	id := api.TaskID("s1", 1, "", 1)
	c.do(createTask("s1", 1, 1, "", 1))
	if k := c.task(id); k.State != api.TaskPending || k.Desired != api.TaskRunning || k.Live() {
		t.Errorf("created task %+v", k)
	}
	c.do(place(id, "n2"))
	k := c.task(id)
	if k.State != api.TaskAssigned || k.NodeID != "n2" || !k.Live() {
		t.Errorf("placed task %+v", k)
	}
	if len(k.Attachments) != 1 || k.Attachments[0].Addr4 != "10.0.0.3/20" || k.Attachments[0].Addr6 != "fd12:3456:789a:1::3/64" {
		t.Errorf("attachments %v", k.Attachments)
	}
	if k.Gateway4.String() != "10.192.8.2" || k.Gateway6.String() != "fd12:3456:789a::2:2" {
		t.Errorf("gateway %v %v", k.Gateway4, k.Gateway6)
	}
	c.do(report(id, "n2", api.TaskRunning))
	c.do(report(id, "n2", api.TaskPreparing)) // late: ignored
	if k := c.task(id); k.State != api.TaskRunning {
		t.Errorf("state went back: %v", k.State)
	}
	c.refused(errdefs.IsPermissionDenied, []string{id, "n2", "n1"}, report(id, "n1", api.TaskFailed))
	c.do(report(id, "n2", api.TaskFailed))
	if k := c.task(id); k.Live() || k.Attachments == nil {
		t.Errorf("ended task %+v", k)
	}
	c.sameAfterRestore()
	c.do(deleteTasks(id), deleteService("s1"), deleteNetwork("web"))
	if c.task(id) != nil || c.service("s1") != nil || c.network("web") != nil {
		t.Error("something is left")
	}
	c.sameAfterRestore()
}

func TestUpdateOutOfSequence(t *testing.T) {
	c := newCluster(t)
	c.do(putService("s1", spec("app")))
	v := c.service("s1").Meta.Version
	c.do(expect("service", "s1", v), putService("s1", spec("app", image("app:2"))))
	c.refused(errdefs.IsConflict, []string{"update out of sequence", "app"}, expect("service", "s1", v), putService("s1", spec("app", image("app:3"))))
	c.refused(errdefs.IsNotFound, []string{"service", "s9"}, expect("service", "s9", 7))
	c.refused(errdefs.IsAlreadyExists, []string{"service", "app"}, expect("service", "s1", 0))
	c.refused(errdefs.IsAlreadyExists, []string{"name conflicts", "app"}, putService("s2", spec("app")))
}

func TestPartialPlacement(t *testing.T) {
	c := newCluster(t)
	c.do(putNode("n1", "host1"), putService("s1", spec("app", publish(80, 8080, "host"))))
	c.do(createTask("s1", 1, 1, "", 1), createTask("s1", 1, 2, "", 1))
	a, b := api.TaskID("s1", 1, "", 1), api.TaskID("s1", 2, "", 1)
	err := c.try(&api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: &api.TaskPlacement{TaskIds: []string{a, b, "gone"}, NodeIds: []string{"n1", "n1", "n1"}}}})
	var partial *store.PartialError
	if !errors.As(err, &partial) || len(partial.Items) != 2 || !errdefs.IsConflict(partial.Items[0].Err) || !errdefs.IsNotFound(partial.Items[1].Err) {
		t.Fatalf("got %v", err)
	}
	if k := c.task(a); k.State != api.TaskAssigned {
		t.Errorf("the good item was not applied: %+v", k)
	}
	if k := c.task(b); k.State != api.TaskPending || !strings.Contains(k.Status.GetErr(), "8080/tcp") {
		t.Errorf("the refused item: %+v", k)
	}
	c.sameAfterRestore()
	c.do(report(a, "n1", api.TaskComplete))
	c.do(place(b, "n1"))
}
