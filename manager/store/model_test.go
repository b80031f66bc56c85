package store_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// modelRounds is how many seeds TestModel tries; some hundred make a long run.
var modelRounds = flag.Int("model", 8, "seeds of TestModel")

// model is what tasks shall be like, in the plainest form: a list. It knows services, nodes and the life of tasks, no networks.
type model struct {
	tasks    []store.Task
	services map[string]bool
	nodes    map[string]bool
}

func (m *model) clone() *model {
	c := &model{services: map[string]bool{}, nodes: map[string]bool{}, tasks: slices.Clone(m.tasks)}
	for id := range m.services {
		c.services[id] = true
	}
	for id := range m.nodes {
		c.nodes[id] = true
	}
	return c
}

func (m *model) find(id string) *store.Task {
	for i := range m.tasks {
		if m.tasks[i].ID == id {
			return &m.tasks[i]
		}
	}
	return nil
}

func idNode(slot uint64, node string) string {
	if slot != 0 {
		return ""
	}
	return node
}

var errModel = errors.New("refused")

// apply does a change at a version and time; items that are refused alone are counted.
func (m *model) apply(c *api.Change, version uint64, now int64) (items int, err error) {
	touch := func(t *store.Task) { t.Version, t.Updated = version, now }
	switch k := c.Kind.(type) {
	case *api.Change_CreateTasks:
		return 0, m.create(k.CreateTasks, version, now)
	case *api.Change_PlaceTasks:
		for i, id := range k.PlaceTasks.TaskIds {
			t, reason := m.find(id), ""
			if len(k.PlaceTasks.Refused) > 0 {
				reason = k.PlaceTasks.Refused[i]
			}
			switch node := k.PlaceTasks.NodeIds[i]; {
			case t == nil || t.State >= api.TaskAssigned || t.Desired > api.TaskRunning:
				items++
			case reason != "":
				if t.Status.GetErr() != reason {
					touch(t)
					t.Status = &api.TaskReport{TaskId: id, State: uint32(t.State), Time: now, Message: "pending task scheduling", Err: reason}
				}
			case !m.nodes[node] || (t.NodeID != "" && t.NodeID != node) || !m.services[t.ServiceID]:
				items++
				if t.Status.GetErr() == "" && m.nodes[node] && (t.NodeID == "" || t.NodeID == node) {
					panic("the model has no tasks of removed services that wait")
				}
			default:
				touch(t)
				t.NodeID, t.State, t.Status = node, api.TaskAssigned, nil
			}
		}
	case *api.Change_ReportTask:
		return 0, m.report(k.ReportTask, version, now)
	case *api.Change_DesireTasks:
		for _, id := range k.DesireTasks.TaskIds {
			if t := m.find(id); t != nil && api.TaskState(k.DesireTasks.Desired) > t.Desired {
				touch(t)
				t.Desired = api.TaskState(k.DesireTasks.Desired)
			}
		}
	case *api.Change_DeleteTasks:
		for _, id := range k.DeleteTasks.TaskIds {
			if t := m.find(id); t != nil && t.Live() {
				items++
			}
			m.tasks = slices.DeleteFunc(m.tasks, func(t store.Task) bool { return t.ID == id && !t.Live() })
		}
	case *api.Change_DeleteService:
		if !m.services[k.DeleteService] {
			return 0, errModel
		}
		delete(m.services, k.DeleteService)
		m.tasks = slices.DeleteFunc(m.tasks, func(t store.Task) bool { return t.ServiceID == k.DeleteService && t.State < api.TaskAssigned })
		for i := range m.tasks {
			if t := &m.tasks[i]; t.ServiceID == k.DeleteService && t.Desired < api.TaskRemove {
				touch(t)
				t.Desired = api.TaskRemove
			}
		}
	case *api.Change_Expect:
		return 0, errModel // of what never is
	}
	return items, nil
}

func (m *model) create(c *api.TaskCreate, version uint64, now int64) error {
	if !m.services[c.ServiceId] || c.Revision != 1 {
		return errModel
	}
	for _, it := range c.Items {
		if (it.Slot == 0 && it.NodeId == "") || (it.NodeId != "" && !m.nodes[it.NodeId]) {
			return errModel
		}
		for _, t := range m.tasks {
			if t.ServiceID == c.ServiceId && t.Slot == it.Slot && (it.Slot != 0 || t.NodeID == it.NodeId) && t.Generation >= it.Generation {
				return errModel
			}
		}
		t := store.Task{ID: api.TaskID(c.ServiceId, it.Slot, idNode(it.Slot, it.NodeId), it.Generation), ServiceID: c.ServiceId, Slot: it.Slot,
			Generation: it.Generation, Revision: 1, NodeID: it.NodeId, State: api.TaskPending, Desired: api.TaskState(it.Desired), Version: version,
			Created: now, Updated: now, StartAfter: it.StartAfter, Restarts: it.Restarts}
		if t.Desired == 0 {
			t.Desired = api.TaskRunning
		}
		if t.NodeID != "" {
			t.State = api.TaskAssigned
		}
		m.tasks = append(m.tasks, t)
	}
	return nil
}

func (m *model) report(r *api.TaskReport, version uint64, now int64) error {
	t := m.find(r.TaskId)
	if t == nil || t.State < api.TaskAssigned || t.NodeID != r.NodeId {
		return errModel
	}
	state := api.TaskState(r.State)
	if state < t.State {
		return nil
	}
	if state == t.State && t.Status != nil {
		a, b := proto.Clone(t.Status).(*api.TaskReport), proto.Clone(r).(*api.TaskReport)
		if a.Time, b.Time = 0, 0; proto.Equal(a, b) {
			return nil
		}
	}
	t.Version, t.Updated, t.State, t.Status = version, now, state, r
	if state == api.TaskRunning && t.Started == 0 {
		t.Started = now
	}
	return nil
}

// told renders a task.
func told(t store.Task) string {
	status := "none"
	if t.Status != nil {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(t.Status)
		status = fmt.Sprintf("%x %v", b, err)
	}
	restarts, _ := proto.MarshalOptions{Deterministic: true}.Marshal(t.Restarts)
	t.Status, t.Restarts = nil, nil
	return fmt.Sprintf("%+v said %s restarts %x", t, status, restarts)
}

func tell(list []*store.Task) string {
	var b strings.Builder
	for _, t := range list {
		b.WriteString(told(*t) + "\n")
	}
	return b.String()
}

// pick is the model's answer to a query.
func (m *model) pick(want func(*store.Task) bool, order func(a, b *store.Task) int) string {
	var out []*store.Task
	for i := range m.tasks {
		if want(&m.tasks[i]) {
			out = append(out, &m.tasks[i])
		}
	}
	slices.SortFunc(out, order)
	return tell(out)
}

func byID(a, b *store.Task) int { return strings.Compare(a.ID, b.ID) }

func bySlot(a, b *store.Task) int {
	switch {
	case a.Slot != b.Slot:
		return int(int64(a.Slot%(1<<40)) - int64(b.Slot%(1<<40)))
	case a.Slot == 0 && a.NodeID != b.NodeID:
		return strings.Compare(a.NodeID, b.NodeID)
	}
	return int(int64(a.Generation) - int64(b.Generation))
}

// agree wants the store to say of all tasks what the model says, however it is asked.
func (m *model) agree(s *store.Store) (err error) {
	check := func(what, got, want string) {
		if got != want && err == nil {
			err = fmt.Errorf("%s: the store says\n%sthe model\n%s", what, got, want)
		}
	}
	s.View(func(tx store.ReadTx) {
		check("all tasks", tell(tx.Tasks()), m.pick(func(*store.Task) bool { return true }, byID))
		if tx.CountTasks() != len(m.tasks) {
			err = fmt.Errorf("%d tasks, want %d", tx.CountTasks(), len(m.tasks))
		}
		for i := range 5 {
			id := fmt.Sprint("s", i)
			check(id, tell(tx.TasksByService(id)), m.pick(func(t *store.Task) bool { return t.ServiceID == id }, bySlot))
			for slot := range uint64(4) {
				check(fmt.Sprint(id, " ", slot), tell(tx.TasksBySlot(id, slot, "n1")), m.pick(func(t *store.Task) bool {
					return t.ServiceID == id && t.Slot == slot && (slot != 0 || t.NodeID == "n1")
				}, bySlot))
			}
			node := fmt.Sprint("n", i)
			check(node, tell(tx.TasksByNode(node)), m.pick(func(t *store.Task) bool { return t.NodeID == node }, byID))
		}
		for i := range m.tasks {
			t := &m.tasks[i]
			got, ferr := tx.FindTask(t.ID[:20])
			if ferr != nil {
				err = errors.Join(err, ferr)
				continue
			}
			check("by the beginning of its id", told(*got), told(*t))
			ref, ok := tx.TaskRef(t.ID)
			if !ok || ref.ID() != t.ID || ref.State() != t.State || ref.NodeID() != t.NodeID || ref.StartAfter() != t.StartAfter || ref.HasStatus() != (t.Status != nil) {
				err = errors.Join(err, fmt.Errorf("reference to task %s differs", t.ID))
			}
		}
	})
	return err
}

type modelGen struct{ *rand.Rand }

func (g modelGen) task(m *model) *store.Task {
	if len(m.tasks) == 0 || g.IntN(40) == 0 {
		return &store.Task{ID: api.TaskID("s9", 1, "", 1), NodeID: "n0"}
	}
	return &m.tasks[g.IntN(len(m.tasks))]
}

func (g modelGen) change(m *model) *api.Change {
	switch g.IntN(12) {
	case 0, 1, 2:
		c := &api.TaskCreate{ServiceId: fmt.Sprint("s", g.IntN(6)), Revision: 1}
		for i := range 1 + g.IntN(6) {
			it := &api.TaskCreate_Item{Slot: uint64(g.IntN(4)*10 + i), Generation: uint32(1 + g.IntN(6))}
			switch {
			case it.Slot == 0:
				it.NodeId = fmt.Sprint("n", g.IntN(5))
			case g.IntN(20) == 0:
				it.Slot += 1 << 33
			}
			if g.IntN(8) == 0 {
				it.StartAfter, it.Desired = g.Int64N(1<<60), uint32(api.TaskReady)
			}
			if g.IntN(8) == 0 {
				it.Restarts = &api.Restarts{Attempts: g.Uint64N(9), Times: []int64{g.Int64()}}
			}
			c.Items = append(c.Items, it)
		}
		return &api.Change{Kind: &api.Change_CreateTasks{CreateTasks: c}}
	case 3, 4, 5:
		p := &api.TaskPlacement{}
		for range 1 + g.IntN(6) {
			t := g.task(m)
			p.TaskIds, p.NodeIds = append(p.TaskIds, t.ID), append(p.NodeIds, fmt.Sprint("n", g.IntN(6)))
			p.Refused = append(p.Refused, []string{"", "", "", "no suitable node"}[g.IntN(4)])
		}
		return &api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: p}}
	case 6, 7, 8:
		return &api.Change{Kind: &api.Change_ReportTask{ReportTask: g.report(g.task(m))}}
	case 9:
		return desire([]api.TaskState{api.TaskRunning, api.TaskShutdown, api.TaskRemove}[g.IntN(3)], g.task(m).ID, g.task(m).ID, g.task(m).ID)
	case 10:
		return deleteTasks(g.task(m).ID, g.task(m).ID)
	}
	if g.IntN(4) == 0 {
		return &api.Change{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "service", Id: "s9", Version: 7}}}
	}
	return desire(api.TaskRunning, g.task(m).ID)
}

func (g modelGen) report(t *store.Task) *api.TaskReport {
	states := []api.TaskState{api.TaskReady, api.TaskRunning, api.TaskRunning, api.TaskComplete, api.TaskFailed}
	r := &api.TaskReport{TaskId: t.ID, NodeId: t.NodeID, State: uint32(states[g.IntN(len(states))]), Time: g.Int64N(1 << 61), Message: []string{"", "started", "odd"}[g.IntN(3)]}
	if g.IntN(2) == 0 {
		b := make([]byte, 32)
		for i := range b {
			b[i] = byte(g.Uint32())
		}
		r.ContainerId, r.Pid = hex.EncodeToString(b), g.Int32N(1<<22)
	}
	switch g.IntN(12) {
	case 0:
		r.ContainerId = "short"
	case 1:
		r.Err, r.ExitCode = "it broke", int32(g.IntN(256)-2)
	case 2:
		r.Ports = []*api.PortConfig{{Protocol: "tcp", Target: 80, Published: uint32(g.IntN(9)), Mode: "host"}}
	}
	return r
}

// TestModel: random changes do to the store what they do to a plain list of tasks, at the level before packed changes and from it on;
// refused transactions do nothing; and a copy restored from a snapshot half-way goes on as the original.
func TestModel(t *testing.T) {
	for seed := range *modelRounds {
		c := newCluster(t)
		g := modelGen{rand.New(rand.NewPCG(uint64(seed), 3))}
		m := &model{services: map[string]bool{}, nodes: map[string]bool{}}
		c.do(putCluster(&api.ClusterRecord{Id: "c1", FeatureLevel: api.LevelPacked - uint32(seed%2)}))
		for i := range 5 {
			c.do(putNode(fmt.Sprint("n", i), fmt.Sprint("host", i)))
			c.do(putService(fmt.Sprint("s", i), spec(fmt.Sprint("service", i), on(store.NetworkNone))))
			m.nodes[fmt.Sprint("n", i)], m.services[fmt.Sprint("s", i)] = true, true
		}
		var copies []*store.Store
		for step := range 150 {
			c.clock.advance(time.Duration(g.IntN(3000)) * time.Millisecond)
			var changes []*api.Change
			next, items, refused := m.clone(), 0, error(nil)
			if step == 100 { // late, since tasks of a removed service that wait are gone
				changes = append(changes, deleteService("s3"))
			}
			for range 1 + g.IntN(4) {
				changes = append(changes, g.change(m))
			}
			for _, ch := range changes {
				n, err := next.apply(ch, c.Version()+1, c.clock.now.UnixNano())
				items += n
				if refused = err; err != nil {
					break
				}
			}
			err := c.try(changes...)
			partial := &store.PartialError{}
			switch {
			case errors.As(err, &partial) && refused == nil && len(partial.Items) == items:
				m = next
			case err == nil && refused == nil && items == 0:
				m = next
			case err == nil || refused == nil:
				t.Fatalf("seed %d step %d: the store says %v, the model %v and %d items\n%v", seed, step, err, refused, items, changes)
			}
			if step%4 == 0 {
				if err := m.agree(c.Store); err != nil {
					t.Fatalf("seed %d step %d: %v", seed, step, err)
				}
			}
			log := c.loop.Log()
			for _, o := range copies {
				o.Apply(uint64(len(log)), log[len(log)-1])
			}
			if step%50 == 49 {
				copies = append(copies, restoredCopy(t, c.Store))
			}
		}
		for _, o := range copies {
			if err := m.agree(o); err != nil || o.Hash() != c.Hash() {
				t.Fatalf("seed %d: a copy went another way: %v", seed, err)
			}
		}
	}
}

func restoredCopy(t *testing.T, s *store.Store) *store.Store {
	t.Helper()
	var buf bytes.Buffer
	if err := s.Snapshot()(&buf); err != nil {
		t.Fatal(err)
	}
	o := store.New(nil)
	if err := o.Restore(&buf); err != nil {
		t.Fatal(err)
	}
	return o
}
