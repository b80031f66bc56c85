package world

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// As in package dispatcher.
const (
	lease       = 4 * time.Second
	grace       = 5 * time.Second
	orphanAfter = 24 * time.Hour
	writeRetry  = 100 * time.Millisecond
)

// session is one stream between an agent and the manager it took for the leader. Both sides learn of its end on their own.
type session struct {
	d        *dispatcher
	n        *node
	ended    bool // for the manager
	sequence uint64
	sent     map[string]sent
	deps     map[string]bool
	down, up []func() // held back while the node is cut off
	downAt   time.Duration
	upAt     time.Duration
}

// sent is what an agent was told of a task.
type sent struct {
	desired    api.TaskState
	startAfter int64
	drained    bool
}

// assignment is a task as agents know it.
type assignment struct {
	sent
	id      string
	service string
	state   api.TaskState
	image   string
	job     bool
	mesh    bool // in tables of endpoints: it is drained before it is stopped
	deps    []string
}

// dispatcher is the model of the leader's side of the sessions; see manager/dispatcher for what it stands for.
type dispatcher struct {
	t        *term
	w        *World
	watcher  *store.Watcher
	sessions map[string]*session
	fenced   map[string]bool
	drains   map[string]time.Duration // task → since when it is out of rotation everywhere
	due      bool

	// What waits to be written, and whether a batch is on its way.
	order    []string
	reports  map[string]*api.TaskReport
	statuses map[string]*api.NodeStatus
	hellos   map[string]bool
	writing  bool
	poked    bool
}

func newDispatcher(t *term) *dispatcher {
	return &dispatcher{t: t, w: t.m.w, watcher: t.m.store.Watch(), sessions: map[string]*session{}, fenced: map[string]bool{}, drains: map[string]time.Duration{},
		reports: map[string]*api.TaskReport{}, statuses: map[string]*api.NodeStatus{}, hellos: map[string]bool{}}
}

func (d *dispatcher) alive() bool { return d.t.m.term == d.t && d.t.m.up }

func (d *dispatcher) view(f func(store.ReadTx)) { d.t.m.store.View(f) }

// begin gives nodes that are not down their grace.
func (d *dispatcher) begin() {
	d.view(func(tx store.ReadTx) {
		for _, n := range tx.Nodes() {
			d.admit(n)
		}
	})
	d.orphan()
}

func (d *dispatcher) admit(n *store.Node) {
	if _, known := d.fenced[n.Id]; known {
		return
	}
	d.fenced[n.Id] = n.Status.GetState() == "down"
	if d.fenced[n.Id] {
		return
	}
	id := n.Id
	d.w.after(grace, func() {
		if d.alive() && d.sessions[id] == nil && !d.fenced[id] {
			d.lost(id, "no session with the leader within 5s")
		}
	})
}

// lost declares a node down.
func (d *dispatcher) lost(id, why string) {
	if s := d.sessions[id]; s != nil {
		s.end()
	}
	d.fenced[id] = true
	delete(d.hellos, id)
	d.statuses[id] = &api.NodeStatus{NodeId: id, State: "down", Message: why}
	d.w.note("%s: node %s is down: %s", d.t.m.name, id, why)
	d.poke()
}

// orphan gives up the tasks of nodes that have been down for a day.
func (d *dispatcher) orphan() {
	if !d.alive() {
		return
	}
	d.view(func(tx store.ReadTx) {
		for _, n := range tx.Nodes() {
			if !d.fenced[n.Id] || n.Status.GetState() != "down" || d.t.m.clock().Sub(time.Unix(0, n.Meta.GetUpdated())) < orphanAfter {
				continue
			}
			for _, t := range tx.TasksByNode(n.Id) {
				if t.Live() {
					d.report(&api.TaskReport{TaskId: t.ID, State: uint32(api.TaskOrphaned), NodeId: n.Id, Message: "orphaned"})
				}
			}
		}
	})
	d.w.after(time.Minute, d.orphan)
}

func (d *dispatcher) end() {
	d.watcher.Close()
	for _, id := range keys(d.sessions) {
		d.sessions[id].end()
	}
}

// end ends a session at the manager; the agent hears of it unless it is cut off.
func (s *session) end() {
	if s.ended {
		return
	}
	s.ended = true
	if s.d.sessions[s.n.name] == s {
		delete(s.d.sessions, s.n.name)
	}
	s.toAgent(func() { s.n.lose(s) })
}

// toAgent delivers in order, later, and not while the node is cut off.
func (s *session) toAgent(f func()) {
	w := s.d.w
	s.downAt = max(s.downAt, w.now+w.between(time.Millisecond, 20*time.Millisecond))
	w.after(s.downAt-w.now, func() {
		if s.n.cut {
			s.down = append(s.down, f)
			return
		}
		if s.n.session == s {
			f()
		}
	})
}

// toManager is the other direction.
func (s *session) toManager(f func()) {
	w := s.d.w
	s.upAt = max(s.upAt, w.now+w.between(time.Millisecond, 20*time.Millisecond))
	w.after(s.upAt-w.now, func() {
		if s.n.cut {
			s.up = append(s.up, f)
			return
		}
		if s.d.sessions[s.n.name] == s && s.d.alive() {
			f()
		}
	})
}

// healed delivers what was held back.
func (s *session) healed() {
	down, up := s.down, s.up
	s.down, s.up = nil, nil
	for _, f := range down {
		if s.n.session == s {
			f()
		}
	}
	for _, f := range up {
		if s.d.sessions[s.n.name] == s && s.d.alive() {
			f()
		}
	}
}

// register begins a session; nil refuses the node: it was removed.
func (d *dispatcher) register(n *node, reports []*api.TaskReport) *session {
	known := false
	d.view(func(tx store.ReadTx) { known = tx.Node(n.name) != nil })
	if !known {
		return nil
	}
	if old := d.sessions[n.name]; old != nil {
		old.end()
	}
	s := &session{d: d, n: n, sent: map[string]sent{}, deps: map[string]bool{}}
	d.sessions[n.name] = s
	d.fenced[n.name] = false
	d.hellos[n.name] = true
	delete(d.statuses, n.name)
	d.intake(n.name, reports)
	d.poke()
	return s
}

// greet sends everything.
func (s *session) greet() {
	var set []*assignment
	s.d.view(func(tx store.ReadTx) {
		for _, t := range tx.TasksByNode(s.n.name) {
			if a := s.d.assignment(tx, t); a != nil {
				s.sent[t.ID] = a.sent
				s.need(a)
				set = append(set, a)
			}
		}
	})
	s.sequence = 1
	s.toAgent(func() { s.n.assign(1, true, set, nil) })
}

// need sends what a task finds as files, before it.
func (s *session) need(a *assignment) {
	for _, id := range a.deps {
		if !s.deps[id] {
			s.deps[id] = true
			s.toAgent(func() { s.n.deps[id] = true })
		}
	}
}

// poll schedules a round when something changed.
func (d *dispatcher) poll() {
	select {
	case <-d.watcher.C():
	default:
		return
	}
	if !d.due {
		d.due = true
		d.w.after(d.w.between(0, 10*time.Millisecond), d.round)
	}
}

// round sends what changed.
func (d *dispatcher) round() {
	d.due = false
	if !d.alive() {
		return
	}
	keys, overflow := d.watcher.Take()
	changed := map[string][]string{} // by node
	var gone, order []string
	d.view(func(tx store.ReadTx) {
		touch := func(node, task string) {
			if node == "" || d.sessions[node] == nil {
				return
			}
			if changed[node] == nil {
				order = append(order, node)
			}
			changed[node] = append(changed[node], task)
		}
		if overflow {
			for _, t := range tx.Tasks() {
				touch(t.NodeID, t.ID)
			}
			for _, n := range tx.Nodes() {
				d.admit(n)
			}
		}
		for _, k := range keys {
			switch k.Kind {
			case store.KindTask:
				touch(k.NodeID, k.ID)
			case store.KindNode:
				n := tx.Node(k.ID)
				if n == nil {
					gone = append(gone, k.ID)
					continue
				}
				d.admit(n)
				if d.sessions[k.ID] != nil && n.Status.GetState() == "down" && d.statuses[k.ID] == nil {
					d.statuses[k.ID] = &api.NodeStatus{NodeId: k.ID, State: "ready"} // it is here
					d.poke()
				}
			}
		}
		for _, node := range order {
			d.send(tx, d.sessions[node], changed[node])
		}
	})
	for _, id := range gone {
		if s := d.sessions[id]; s != nil {
			s.end()
		}
		delete(d.fenced, id)
	}
}

// send tells an agent of changed tasks.
func (d *dispatcher) send(tx store.ReadTx, s *session, ids []string) {
	var set []*assignment
	var removed []string
	for _, id := range ids {
		a := d.assignment(tx, tx.Task(id))
		before, known := s.sent[id]
		switch {
		case a == nil && known:
			delete(s.sent, id)
			removed = append(removed, id)
		case a != nil && (!known || before != a.sent):
			s.sent[id] = a.sent
			s.need(a)
			set = append(set, a)
		}
	}
	if d.w.cfg.Hooks.SecretsEverywhere {
		for _, dep := range tx.Dependencies(store.KindSecret) {
			s.need(&assignment{deps: []string{dep.Id}})
		}
	}
	if len(set)+len(removed) == 0 {
		return
	}
	s.sequence++
	sequence := s.sequence
	s.toAgent(func() { s.n.assign(sequence, false, set, removed) })
}

// assignment is a task as its node has to know it; nil: it has not.
func (d *dispatcher) assignment(tx store.ReadTx, t *store.Task) *assignment {
	if t == nil || t.NodeID == "" || t.State < api.TaskAssigned || t.State == api.TaskOrphaned || tx.Node(t.NodeID) == nil {
		return nil
	}
	a := &assignment{sent: sent{desired: t.Desired, startAfter: t.StartAfter}, id: t.ID, service: t.ServiceID, state: t.State}
	a.mesh = len(t.Attachments) > 0 || len(t.HostPorts) > 0
	if svc := tx.Service(t.ServiceID); svc != nil {
		if spec := svc.Revs[t.Revision]; spec != nil {
			a.image, a.job, a.deps = spec.TaskTemplate.ContainerSpec.Image, svc.Job(), store.DependencyIDs(spec)
		}
	}
	if t.Live() && t.Desired >= api.TaskShutdown {
		at, known := d.drains[t.ID]
		if !known {
			at = d.w.now + d.w.between(5*time.Millisecond, 300*time.Millisecond)
			if d.w.chance(0.05) {
				at += lease // a node that has a say is silent
			}
			d.drains[t.ID] = at
			node, id := t.NodeID, t.ID
			d.w.after(at-d.w.now, func() {
				if s := d.sessions[node]; s != nil && d.alive() {
					d.view(func(tx store.ReadTx) { d.send(tx, s, []string{id}) })
				}
			})
		}
		a.drained = d.w.now >= at
	}
	return a
}

// intake takes reports in, as package dispatcher does.
func (d *dispatcher) intake(node string, reports []*api.TaskReport) {
	d.view(func(tx store.ReadTx) {
		for _, r := range reports {
			t := tx.Task(r.TaskId)
			state := api.TaskState(r.State)
			if t == nil || t.NodeID != node || t.State < api.TaskAssigned || state < t.State || state < api.TaskAccepted || state > api.TaskRejected {
				continue
			}
			switch state {
			case api.TaskAccepted, api.TaskPreparing, api.TaskStarting:
				continue // soft
			}
			if s := t.Status; s == nil || s.State != r.State || s.Message != r.Message || s.Err != r.Err {
				d.report(r)
			}
		}
	})
}

func (d *dispatcher) report(r *api.TaskReport) {
	old := d.reports[r.TaskId]
	if old == nil {
		d.order = append(d.order, r.TaskId)
	} else if old.State > r.State {
		return
	}
	d.reports[r.TaskId] = r
	d.poke()
}

// poke has what waits written soon.
func (d *dispatcher) poke() {
	if d.poked {
		return
	}
	d.poked = true
	d.w.after(d.w.between(0, 5*time.Millisecond), func() {
		d.poked = false
		d.write()
	})
}

// write sends one batch to the log; while it is on its way the next one gathers.
func (d *dispatcher) write() {
	if d.writing || !d.alive() {
		return
	}
	var txns []*api.Txn
	var back []func()
	add := func(again func(), cs ...*api.Change) {
		txns, back = append(txns, &api.Txn{Changes: cs}), append(back, again)
	}
	d.view(func(tx store.ReadTx) {
		for _, id := range keys(d.hellos) {
			if rec := tx.Node(id); rec != nil && d.w.nodes[id] != nil {
				add(func() {
					if d.statuses[id] == nil {
						d.hellos[id] = true
					}
				}, hello(rec, d.w.nodes[id])...)
			}
		}
	})
	for _, id := range keys(d.statuses) {
		s := d.statuses[id]
		add(func() {
			if d.statuses[id] == nil && !d.hellos[id] {
				d.statuses[id] = s
			}
		}, &api.Change{Kind: &api.Change_NodeStatus{NodeStatus: s}})
	}
	for _, id := range d.order {
		r := d.reports[id]
		add(func() { d.report(r) }, &api.Change{Kind: &api.Change_ReportTask{ReportTask: r}})
	}
	if len(txns) == 0 {
		return
	}
	clear(d.hellos)
	clear(d.statuses)
	clear(d.reports)
	d.order = nil
	d.writing = true
	_, results, err := d.t.m.store.Batch(context.Background(), txns)
	d.writing = false
	if err != nil {
		for _, again := range back {
			again()
		}
		d.w.after(writeRetry, d.write)
		return
	}
	for i, err := range results {
		if len(txns[i].Changes) == 2 && err != nil && errdefs.IsConflict(err) {
			back[i]()
			d.poke()
		}
	}
}

// hello makes a node's record agree with what its agent says.
func hello(rec *store.Node, n *node) []*api.Change {
	ready := &api.NodeStatus{NodeId: rec.Id, State: "ready"}
	next := proto.Clone(rec).(*api.NodeRecord)
	next.DescriptionJson = n.description()
	if proto.Equal(next, rec) {
		return []*api.Change{{Kind: &api.Change_NodeStatus{NodeStatus: ready}}}
	}
	next.Status = ready
	return []*api.Change{
		{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "node", Id: rec.Id, Version: rec.Meta.GetVersion()}}},
		{Kind: &api.Change_PutNode{PutNode: next}},
	}
}

func keys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
