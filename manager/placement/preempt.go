package placement

import (
	"fmt"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
	"skein/scheduler"
)

// maxWaits bounds the tasks that wait at one time for others of a lower priority to end, and with it how many are told to end at once.
const maxWaits = 32

// preemption makes room for tasks that fit nowhere by ending tasks of a lower priority. All it knows is in the store: a task that ends
// already counts as room to come, so that a second look, or another leader, ends nothing more.
type preemption struct {
	p     *Placement
	view  store.ReadTx
	w     *writer
	waits int
	kept  []scheduler.Holding // room for tasks that wait, kept from those that come after them in this pass
}

// makeRoom tells as few and as unimportant tasks as possible to end, for up to missing tasks of a group. It reports whether any of the group
// waits for room now.
func (m *preemption) makeRoom(g *group, missing int) (waits bool) {
	for range missing {
		if m.waits >= maxWaits || g.priority <= m.p.leastPriority(m.view) {
			break
		}
		one := g.Group
		one.Count = 1
		found, ok := m.p.sched.Preempt(&one, g.priority, m.running)
		if !ok {
			break
		}
		m.waits++
		waits = true
		for _, id := range found.Victims {
			m.end(id, g, found.Node)
		}
		h := scheduler.Holding{Service: g.Service, Node: found.Node, Req: g.Req, Meant: true}
		m.p.sched.Hold(h)
		m.kept = append(m.kept, h)
	}
	return waits
}

// end tells a victim to end, and why.
func (m *preemption) end(id string, g *group, node string) {
	t := m.view.Task(id)
	reason := fmt.Sprintf("preempted: service %s (priority %d) needs its room on node %s", m.name(g.Service), g.priority, m.hostname(node))
	txn := &api.Txn{Changes: []*api.Change{
		{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "task", Id: id, Version: t.Version}}},
		{Kind: &api.Change_DesireTasks{DesireTasks: &api.TaskDesire{TaskIds: []string{id}, Desired: uint32(api.TaskShutdown), Reason: reason}}},
	}}
	m.w.changes = append(m.w.changes, loop.Change{Txn: txn, Key: store.Key{Kind: store.KindService, ID: t.ServiceID}})
	h := m.p.held[id]
	m.p.sched.Release(h)
	h.Meant = false
	m.p.sched.Hold(h)
	m.p.held[id] = h
	m.p.decided = append(m.p.decided, id) // the next step sees whether it was carried out
}

// running lists what a node runs.
func (m *preemption) running(node string) []scheduler.Running {
	var out []scheduler.Running
	m.view.EachTaskOfNode(node, func(r store.TaskRef) bool {
		if !r.Live() {
			return true
		}
		id := r.ID()
		if h, known := m.p.held[id]; known {
			_, priority := wishes(m.view.Service(r.ServiceID()))
			out = append(out, scheduler.Running{ID: id, Priority: priority, Req: h.Req, Meant: h.Meant})
		}
		return true
	})
	return out
}

// done gives back what was kept.
func (m *preemption) done() {
	for _, h := range m.kept {
		m.p.sched.Release(h)
	}
}

func (m *preemption) name(service string) string {
	if svc := m.view.Service(service); svc != nil {
		return svc.Name
	}
	return service
}

func (m *preemption) hostname(node string) string {
	if n := m.view.Node(node); n != nil && n.Hostname != "" {
		return n.Hostname
	}
	return node
}

// leastPriority is the lowest that any service has: tasks of this priority preempt nothing.
func (p *Placement) leastPriority(view store.ReadTx) int {
	if !p.leastKnown {
		p.least, p.leastKnown = MaxPriority, true
		most := -MaxPriority
		for _, svc := range view.Services() {
			_, priority := wishes(svc)
			p.least, most = min(p.least, priority), max(most, priority)
		}
		p.mixed = p.least < most
	}
	return p.least
}
