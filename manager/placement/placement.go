// Package placement is the controller that gives pending tasks their nodes.
//
// It mirrors nodes and what tasks hold there in a scheduler, corrected by dirty keys, so that a change costs what changed. Pending tasks of
// one revision are one group; decisions go to the log as placements of several tasks, of which each may be refused alone. A task
// without a suitable node is told why, when the reason changes. Tasks of a higher priority that fit nowhere make
// room by ending less important ones. It writes nothing but placements, reasons, the ends of those, and which tasks
// shall move when nodes join.
package placement

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
	"skein/scheduler"
)

const (
	// maxItems bounds the tasks of one transaction.
	maxItems = 500
	// explainEvery bounds how often a task's reason is written again while it keeps changing.
	explainEvery = 5 * time.Second
	// failureWindow is how long a failure of a service's task makes its node less wanted for the service.
	failureWindow = 5 * time.Minute
	// maxFailures bounds the failures remembered per service and node.
	maxFailures = 16
	// A placement that was refused when it was applied, for want of an address say, is tried again after a pause that doubles between these:
	// each try is an entry in the log.
	refusedPause    = 250 * time.Millisecond
	maxRefusedPause = 16 * time.Second
)

// refusal is when a task may be decided on again.
type refusal struct {
	pause time.Duration
	until time.Time
}

// Placement is the controller's value for one leadership term.
type Placement struct {
	sched    *scheduler.Scheduler
	held     map[string]scheduler.Holding   // by task
	pending  map[string]map[string]struct{} // service → tasks
	decided  []string                       // by the last Step; whether they were placed is seen in the next
	refused  map[string]refusal             // by task
	reqs     map[revision]*requirements
	failures map[string]map[string][]int64 // service → node → times

	changed bool // all pending tasks must be looked at
	waits   waits
	joins   joins

	least      int  // the lowest priority of any service, when known
	mixed      bool // not all have it
	leastKnown bool
}

type revision struct {
	service string
	number  uint64
}

type requirements struct {
	*scheduler.Requirements
	need string // equal for revisions whose tasks find room in the same situations
	err  error
}

// New returns a controller that knows nothing yet.
func New() *Placement { return &Placement{} }

// Name implements loop.Controller.
func (p *Placement) Name() string { return "placement" }

// Kinds implements loop.Controller.
func (p *Placement) Kinds() []store.Kind {
	return []store.Kind{store.KindCluster, store.KindNode, store.KindService, store.KindTask}
}

// Step implements loop.Controller.
func (p *Placement) Step(view store.ReadTx, dirty loop.Keys, now time.Time) (loop.Changes, time.Time) {
	if dirty.All {
		p.reset(view)
	} else {
		p.update(view, dirty.Keys)
	}
	again := p.noteRefused(view, now)
	changes, wake := p.levelJoins(view, dirty, now)
	again = earlier(again, wake)
	if len(p.pending) == 0 {
		clear(p.waits.freed)
		clear(p.waits.open)
		return changes, again
	}
	look, wake := p.whoFits(view, now)
	if !look {
		return changes, earlier(again, wake)
	}
	again = earlier(again, wake)
	placed, wake := p.schedule(view, now)
	return append(changes, placed...), earlier(again, wake)
}

// earlier is the earlier of two instants, of which zero is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

// noteRefused gives those of the last Step's decisions that were not carried out a pause. It returns the end of the next one, and forgets those
// that are over.
func (p *Placement) noteRefused(view store.ReadTx, now time.Time) time.Time {
	for _, id := range p.decided {
		t := view.Task(id)
		if t == nil || t.State >= api.TaskAssigned || t.Desired > api.TaskRunning {
			delete(p.refused, id)
			continue
		}
		pause := min(max(2*p.refused[id].pause, refusedPause), maxRefusedPause)
		p.refused[id] = refusal{pause, now.Add(pause)}
	}
	p.decided = nil
	var next time.Time
	for id, r := range p.refused {
		switch t := view.Task(id); {
		case t == nil || t.State >= api.TaskAssigned || t.Desired > api.TaskRunning:
			delete(p.refused, id)
		case !now.Before(r.until):
			p.changed = true
		case next.IsZero() || r.until.Before(next):
			next = r.until
		}
	}
	return next
}

func (p *Placement) reset(view store.ReadTx) {
	*p = Placement{
		sched: scheduler.New(), held: map[string]scheduler.Holding{}, pending: map[string]map[string]struct{}{},
		reqs: map[revision]*requirements{}, failures: map[string]map[string][]int64{}, refused: map[string]refusal{}, changed: true, waits: newWaits(),
	}
	for _, n := range view.Nodes() {
		p.sched.SetNode(NodeOf(n))
	}
	view.EachTask(func(r store.TaskRef) bool { // one by one: all at once would be half a gigabyte
		t := r.Task()
		p.sync(view, t.ID, t)
		if failed(t) {
			p.failed(t)
		}
		return true
	})
}

func (p *Placement) update(view store.ReadTx, keys []store.Key) {
	var gone []string
	for _, k := range keys {
		if k.Kind != store.KindNode {
			continue
		}
		p.changed = true
		if n := view.Node(k.ID); n != nil {
			p.sched.SetNode(NodeOf(n))
		} else {
			gone = append(gone, k.ID)
		}
	}
	for _, k := range keys {
		switch k.Kind {
		case store.KindService:
			p.waits.open[k.ID] = struct{}{}
			p.forget(view, k.ID)
		case store.KindTask:
			p.sync(view, k.ID, view.Task(k.ID))
		}
	}
	for _, id := range p.decided {
		p.sync(view, id, view.Task(id))
	}
	for _, id := range gone {
		p.sched.RemoveNode(id)
	}
}

// forget drops what is cached of revisions that are gone.
func (p *Placement) forget(view store.ReadTx, id string) {
	p.leastKnown, p.changed = false, p.changed || p.mixed
	svc := view.Service(id)
	for r := range p.reqs {
		if r.service == id && (svc == nil || svc.Revs[r.number] == nil) {
			delete(p.reqs, r)
		}
	}
	if svc == nil {
		delete(p.failures, id)
		p.sched.RemoveService(id)
	}
}

// sync makes the mirror agree with one task.
func (p *Placement) sync(view store.ReadTx, id string, t *store.Task) {
	old, had := p.held[id]
	var now scheduler.Holding
	live := t != nil && t.Live()
	if live {
		now = scheduler.Holding{Service: t.ServiceID, Node: t.NodeID, Meant: t.Desired <= api.TaskRunning, Req: old.Req}
		if now.Req == nil {
			now.Req = p.requirements(view, t).Requirements
		}
	}
	if now != old {
		if had {
			p.sched.Release(old)
			delete(p.held, id)
			p.waits.freed[old.Node] = struct{}{}
			if t != nil && failed(t) {
				p.failed(t)
			}
		}
		if live {
			p.sched.Hold(now)
			p.held[id] = now
		}
	}
	p.setPending(old.Service, id, t)
}

func (p *Placement) setPending(service, id string, t *store.Task) {
	if t != nil && t.State < api.TaskAssigned && t.Desired <= api.TaskRunning {
		tasks := p.pending[t.ServiceID]
		if tasks == nil {
			tasks = map[string]struct{}{}
			p.pending[t.ServiceID] = tasks
		}
		if _, known := tasks[id]; !known {
			tasks[id] = struct{}{}
			p.waits.open[t.ServiceID] = struct{}{}
		}
		return
	}
	if t != nil {
		service = t.ServiceID
	}
	if tasks := p.pending[service]; tasks != nil {
		delete(tasks, id)
		if len(tasks) == 0 {
			delete(p.pending, service)
			delete(p.waits.groups, service)
		}
	}
}

// requirements are cached per revision. A revision that is gone (its service was deleted) asks for nothing that could be known.
func (p *Placement) requirements(view store.ReadTx, t *store.Task) *requirements {
	key := revision{t.ServiceID, t.Revision}
	if r := p.reqs[key]; r != nil {
		return r
	}
	r := &requirements{Requirements: &scheduler.Requirements{}}
	svc := view.Service(t.ServiceID)
	if svc == nil || svc.Revs[t.Revision] == nil {
		return r
	}
	if req, err := RequirementsOf(svc.Revs[t.Revision]); err != nil {
		r.err = err
	} else {
		r.Requirements = encrypting(view, svc.Revs[t.Revision], req)
	}
	if r.need = r.NeedKey(); r.MaxPerNode > 0 {
		r.need += t.ServiceID
	}
	p.reqs[key] = r
	return r
}

func failed(t *store.Task) bool {
	return t.NodeID != "" && (t.State == api.TaskFailed || t.State == api.TaskRejected)
}

func (p *Placement) failed(t *store.Task) {
	nodes := p.failures[t.ServiceID]
	if nodes == nil {
		nodes = map[string][]int64{}
		p.failures[t.ServiceID] = nodes
	}
	times := append(nodes[t.NodeID], t.Updated)
	nodes[t.NodeID] = times[max(0, len(times)-maxFailures):]
}

// group is the pending tasks of one revision, or one task that belongs to a node.
type group struct {
	scheduler.Group
	tasks    []*store.Task
	need     string
	home     string // volume that the node is the home of
	priority int
	err      error
}

func (p *Placement) schedule(view store.ReadTx, now time.Time) (loop.Changes, time.Time) {
	w := writer{now: now}
	groups := p.groups(view, now)
	p.waits.begin(p.changed)
	blocked := map[string]string{} // need → why nothing of it found room
	room := preemption{p: p, view: view, w: &w}
	for _, g := range groups {
		var nodes []string
		reason, full := blocked[g.need]
		if !full && g.err == nil {
			p.rankFailures(g.Service, now)
			if nodes = p.sched.Place(&g.Group); len(nodes) < g.Count {
				reason = p.sched.Explain(&g.Group)
				blocked[g.need] = reason
			}
		}
		why := g.why(reason)
		if missing := g.Count - len(nodes); missing > 0 && g.err == nil && room.makeRoom(g, missing) {
			why += "; tasks of a lower priority end to make room"
		}
		if len(nodes) < g.Count {
			p.waits.add(g)
		}
		for k, t := range g.tasks {
			if k < len(nodes) {
				p.held[t.ID] = scheduler.Holding{Service: t.ServiceID, Node: nodes[k], Req: g.Req, Meant: true}
				p.decided = append(p.decided, t.ID)
				w.add(t, nodes[k], "")
			} else {
				w.refuse(t, why)
			}
		}
	}
	room.done()
	w.flush()
	p.changed = !w.wake.IsZero() // reasons held back for now
	return w.changes, w.wake
}

// why completes the reason for which no node was found.
func (g *group) why(reason string) string {
	switch {
	case g.err != nil:
		return "no suitable node (" + g.err.Error() + ")"
	case g.home != "":
		return strings.TrimSuffix(reason, ")") + "; volume " + g.home + " of this task lives on node " + g.Node + " and would be empty elsewhere)"
	}
	return reason
}

func (p *Placement) rankFailures(service string, now time.Time) {
	for node, times := range p.failures[service] {
		times = slices.DeleteFunc(times, func(at int64) bool { return now.UnixNano()-at > int64(failureWindow) })
		p.sched.SetFailures(service, node, len(times))
		if p.failures[service][node] = times; len(times) == 0 {
			delete(p.failures[service], node)
		}
	}
}

// groups are in the order of their priority, then of their oldest task, so that nothing waits for ever behind what comes new.
func (p *Placement) groups(view store.ReadTx, now time.Time) []*group {
	type key struct {
		revision
		node string
	}
	byKey := map[key]*group{}
	var out []*group
	for service, ids := range p.pending {
		if _, open := p.waits.open[service]; !open && !p.changed {
			continue
		}
		for id := range ids {
			t := view.Task(id)
			if t == nil || t.State >= api.TaskAssigned || t.Desired > api.TaskRunning {
				continue // its key is on the way
			}
			if now.Before(p.refused[id].until) {
				continue
			}
			node, volume := t.NodeID, ""
			if node == "" {
				node, volume = home(view, t)
			}
			k := key{revision{t.ServiceID, t.Revision}, node}
			g := byKey[k]
			if g == nil {
				r := p.requirements(view, t)
				g = &group{err: r.err, need: r.need + "\x00" + node, home: volume, Group: scheduler.Group{Service: t.ServiceID, Node: node, Req: r.Requirements}}
				g.Strategy, g.priority = wishes(view.Service(t.ServiceID))
				byKey[k] = g
				out = append(out, g)
			}
			g.tasks = append(g.tasks, t)
			g.Count++
		}
	}
	for _, g := range out {
		slices.SortFunc(g.tasks, func(a, b *store.Task) int {
			return cmp.Or(cmp.Compare(a.Slot, b.Slot), cmp.Compare(a.Generation, b.Generation))
		})
	}
	slices.SortFunc(out, func(a, b *group) int {
		x, y := a.tasks[0], b.tasks[0]
		return cmp.Or(cmp.Compare(b.priority, a.priority), cmp.Compare(x.Created, y.Created), cmp.Compare(x.ServiceID, y.ServiceID), cmp.Compare(x.Revision, y.Revision), cmp.Compare(x.NodeID, y.NodeID))
	})
	return out
}

// writer gathers placements into bounded transactions.
type writer struct {
	now     time.Time
	changes loop.Changes
	txn     *api.TaskPlacement
	service string
	wake    time.Time
}

func (w *writer) add(t *store.Task, node, reason string) {
	if w.txn != nil && (len(w.txn.TaskIds) >= maxItems || w.service != t.ServiceID) {
		w.flush()
	}
	if w.txn == nil {
		w.txn, w.service = &api.TaskPlacement{}, t.ServiceID
	}
	w.txn.TaskIds = append(w.txn.TaskIds, t.ID)
	w.txn.NodeIds = append(w.txn.NodeIds, node)
	w.txn.Refused = append(w.txn.Refused, reason)
}

// refuse tells a task why it waits, unless it knows, or was told something else a moment ago.
func (w *writer) refuse(t *store.Task, reason string) {
	if t.Status.GetErr() == reason {
		return
	}
	if at := time.Unix(0, t.Updated).Add(explainEvery); t.Status != nil && w.now.Before(at) {
		if w.wake.IsZero() || at.Before(w.wake) {
			w.wake = at
		}
		return
	}
	w.add(t, "", reason)
}

func (w *writer) flush() {
	if w.txn == nil {
		return
	}
	txn := &api.Txn{Changes: []*api.Change{{Kind: &api.Change_PlaceTasks{PlaceTasks: w.txn}}}}
	w.changes = append(w.changes, loop.Change{Txn: txn, Key: store.Key{Kind: store.KindService, ID: w.service}})
	w.txn = nil
}
