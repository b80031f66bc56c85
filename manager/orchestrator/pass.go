package orchestrator

import (
	"slices"

	"skein/manager/api"
	"skein/manager/store"
	"skein/scheduler"
)

// pass is one look at a service: at all its slots, or at some.
type pass struct {
	o       *Orchestrator
	view    store.ReadTx
	svc     *store.Service
	sum     *summary
	now     int64
	whole   bool
	slots   []*slot // looked at, sorted up to loaded
	loaded  int
	classes map[uint64]class
	opts    serviceOptions
	counts  bool // the log takes what tasks inherit
	paused  bool // a rolling update stands still
	monitor int64
	out     writer
	wake    int64 // for the service as such
}

// slot is the place of one replica, or of a global service's task on one node.
type slot struct {
	place
	tasks  []*store.Task // every generation that still exists, oldest first
	wanted []*store.Task // shall run or wait to run, and can
	leave  []*store.Task // run on a node that they shall leave once another runs elsewhere
	lost   []*store.Task // should run but ended, or their node is down, drained or unfit
	ending map[*store.Task]bool
	done   bool // of a job: completed in its current execution
	skip   bool // left as it is in this pass: dealt with already, or its node takes part in nothing
	paused bool // its node keeps what it has, also what waits there to run, and gets nothing new
	wake   int64
}

func (o *Orchestrator) newPass(view store.ReadTx, svc *store.Service, sum *summary, now int64) *pass {
	p := &pass{o: o, view: view, svc: svc, sum: sum, now: now, classes: map[uint64]class{}, opts: o.facts(svc.Spec).opts}
	p.counts = view.Cluster().GetFeatureLevel() >= api.LevelHistory
	p.out.expect = &api.Expect{Kind: "service", Id: svc.Id, Version: svc.Meta.Version}
	return p
}

// loadAll groups all the service's tasks by slot.
func (p *pass) loadAll() {
	p.whole = true
	tasks := p.view.TasksByService(p.svc.Id)
	for i := 0; i < len(tasks); {
		at := p.placeOf(tasks[i])
		j := i + 1
		for j < len(tasks) && tasks[j].Slot == at.slot && (at.slot != 0 || tasks[j].NodeID == at.node) {
			j++
		}
		p.slots = append(p.slots, p.classify(at, tasks[i:j:j]))
		i = j
	}
	p.loaded = len(p.slots)
	p.sum.top = 0
	if n := len(p.slots); n > 0 {
		p.sum.top = p.slots[n-1].slot
	}
	p.note()
}

// loadSlots looks at some slots. It reports false when what it finds asks for a look at all of them.
func (p *pass) loadSlots(at []place) bool {
	for _, a := range at {
		p.slots = append(p.slots, p.classify(a, p.view.TasksBySlot(a.service, a.slot, a.node)))
		p.sum.top = max(p.sum.top, a.slot)
	}
	p.loaded = len(p.slots)
	p.note()
	if p.svc.Job() {
		return true
	}
	if !p.updating() && !p.standsStill() && slices.ContainsFunc(p.slots, p.isDirty) {
		return false // an update begins
	}
	return p.svc.Spec.Mode.Global != nil || p.sum.filled.count <= p.replicas()
}

// note keeps the set of slots up that need no task.
func (p *pass) note() {
	job := p.svc.Spec.Mode.ReplicatedJob != nil
	for _, s := range p.slots {
		if s.slot != 0 {
			p.sum.filled.set(s.slot, (job && !p.vacant(s)) || (!job && s.newest() != nil))
		}
	}
}

func (p *pass) placeOf(t *store.Task) place {
	if t.Slot == 0 {
		return place{service: p.svc.Id, node: t.NodeID}
	}
	return place{service: p.svc.Id, slot: t.Slot}
}

// at is a slot, looked at by this pass already or not.
func (p *pass) at(a place) *slot {
	i, found := slices.BinarySearchFunc(p.slots[:p.loaded], a, func(s *slot, a place) int { return s.place.compare(a) })
	switch {
	case found:
		return p.slots[i]
	case p.whole || a.slot > p.sum.top:
		return &slot{place: a}
	}
	return p.classify(a, p.view.TasksBySlot(a.service, a.slot, a.node))
}

func (p *pass) classify(at place, tasks []*store.Task) *slot {
	s := &slot{place: at, tasks: tasks}
	for i, t := range tasks {
		one := tasks[i : i+1 : i+1]
		switch {
		case t.Desired > api.TaskRunning:
		case t.Revision != p.svc.Revision && p.svc.Job(): // of an earlier execution
		case p.completed(t):
			s.done = true
		case p.isLost(s, t):
			s.lost = join(s.lost, one)
		case p.shallLeave(t):
			s.leave = join(s.leave, one)
		default:
			s.wanted = join(s.wanted, one)
		}
	}
	p.goOnMoving(s)
	return s
}

func join(a, b []*store.Task) []*store.Task {
	if a == nil {
		return b
	}
	return append(a, b...)
}

// completed reports whether the task is one that the current execution of a job need not run again.
func (p *pass) completed(t *store.Task) bool {
	return t.State == api.TaskComplete && t.Revision == p.svc.Revision && p.svc.Job()
}

func (p *pass) isLost(s *slot, t *store.Task) bool {
	if t.State.Terminal() {
		return true
	}
	if t.NodeID == "" {
		return false
	}
	n := p.o.node(p.view, t.NodeID)
	if n == nil {
		return true
	}
	switch n.node.State {
	case scheduler.Down:
		if until := n.downSince() + int64(p.downGrace(n)); until > p.now {
			s.wakeAt(until)
			return false
		}
		return true
	case scheduler.Drained:
		return !p.movesGently(t, n)
	}
	return !p.fits(t, n)
}

// fits reports whether a task may stay on its node: labels, roles and resources of nodes change under running tasks. What a later
// revision, of otherwise the same tasks, asks for instead of its own constraints is enough.
func (p *pass) fits(t *store.Task, n *knownNode) bool {
	if slices.Contains(p.o.unfit[t.NodeID], t.ID) {
		return false
	}
	return p.matches(t.Revision, &n.node) || (p.classOf(t.Revision) == otherConstraint && p.matches(p.svc.Revision, &n.node))
}

// matches reports whether the node satisfies constraints and platforms of a revision.
func (p *pass) matches(revision uint64, n *scheduler.Node) bool {
	spec := p.svc.Revs[revision]
	if spec == nil {
		return true
	}
	req := p.o.facts(spec).req
	return req == nil || req.MatchesAll(n)
}

// newest is the newest task of the slot that is part of the service, nil when there is none.
func (s *slot) newest() *store.Task {
	for i := len(s.tasks) - 1; i >= 0; i-- {
		if s.tasks[i].Desired < api.TaskRemove {
			return s.tasks[i]
		}
	}
	return nil
}

func (s *slot) wakeAt(at int64) {
	if s.wake == 0 || at < s.wake {
		s.wake = at
	}
}

// leaving reports whether a task of the slot was told to end and still runs, or may: its successor must not run beside it. What a dead
// node does is not waited for.
func (p *pass) leaving(s *slot) bool {
	for _, t := range s.tasks {
		if !t.Live() || (t.Desired <= api.TaskRunning && !s.ending[t]) {
			continue
		}
		if n := p.o.node(p.view, t.NodeID); n != nil && n.node.State != scheduler.Down {
			return true
		}
	}
	return false
}

// ownEnd reports whether the task ended by itself, not because it was told to.
func ownEnd(t *store.Task) bool {
	return t.State == api.TaskComplete || t.State == api.TaskFailed || t.State == api.TaskRejected
}

// run does all that is to be done about the slots that were loaded.
func (p *pass) run() {
	switch mode := p.svc.Spec.Mode; {
	case p.svc.Job():
		p.runJob()
		return
	case mode.Global != nil:
		p.admitNodes()
	case p.whole:
		p.scaleDown()
	}
	if p.rollout() {
		return
	}
	p.replaceLost()
	p.moveSlots()
	p.fill()
	p.giveWay()
	p.endSurplus()
	p.promote()
}

// remember notes when the service and its slots want to be looked at again.
func (p *pass) remember() {
	for _, s := range p.slots {
		p.o.agenda.SetNano(s.place, s.wake)
	}
	p.o.agenda.SetNano(place{service: p.svc.Id}, p.wake)
}

// create makes the slot's next task, of the current revision. It waits at READY, with its image and network prepared, for startAfter, for
// the end of those that leave, and of those it must not run beside.
func (p *pass) create(s *slot, startAfter int64, inherited *api.Restarts) {
	item := &api.TaskCreate_Item{Slot: s.slot, NodeId: s.node, Desired: uint32(api.TaskRunning), StartAfter: startAfter, Restarts: inherited,
		Generation: max(1, uint32(p.view.Version()))}
	if n := len(s.tasks); n > 0 {
		item.Generation = max(item.Generation, s.tasks[n-1].Generation+1)
	}
	if startAfter > p.now || p.leaving(s) || p.mustWait(s) {
		item.Desired = uint32(api.TaskReady)
	}
	if !p.counts {
		item.Restarts = nil
	}
	p.out.revision = p.svc.Revision
	if req := p.o.facts(p.svc.Spec).req; s.node != "" && req != nil {
		p.out.later = req.Reserve != (scheduler.Resources{}) || len(req.Generic) > 0
	}
	p.out.create = append(p.out.create, item)
	p.o.room--
	if s.slot != 0 {
		p.sum.filled.set(s.slot, true)
		p.sum.top = max(p.sum.top, s.slot)
	}
}

// full reports whether this step has created as many tasks as it may; the next goes on with this service.
func (p *pass) full() bool {
	if p.o.room > 0 {
		return false
	}
	p.o.again[p.svc.Id] = p.svc.Spec.Mode.Global != nil || p.svc.Spec.Mode.GlobalJob != nil
	return true
}

func (p *pass) shutdown(s *slot, tasks ...*store.Task) {
	for _, t := range tasks {
		if s.ending == nil {
			s.ending = map[*store.Task]bool{}
		}
		s.ending[t] = true
		p.out.shutdown = append(p.out.shutdown, t.ID)
	}
}

// remove ends the slot: all its tasks go, history too.
func (p *pass) remove(s *slot) {
	s.skip = true
	for _, t := range s.tasks {
		if t.Desired < api.TaskRemove {
			p.out.remove = append(p.out.remove, t.ID)
		}
	}
	if s.slot != 0 {
		p.sum.filled.set(s.slot, false)
	}
	p.sum.set(s.place, share{})
	p.out.cut()
}

// promote lets tasks that waited at READY run.
func (p *pass) promote() {
	for _, s := range p.slots {
		if s.skip && !s.paused {
			continue
		}
		for _, t := range s.wanted {
			switch {
			case t.Desired >= api.TaskRunning || s.ending[t]:
			case t.StartAfter > p.now:
				s.wakeAt(t.StartAfter)
			case !p.leaving(s) && !p.mustWait(s):
				p.out.run = append(p.out.run, t.ID)
				p.out.cut()
			}
		}
	}
}

// endSurplus leaves one task to a slot once the right one runs.
func (p *pass) endSurplus() {
	for _, s := range p.slots {
		if s.skip || len(s.wanted) < 2 {
			continue
		}
		keep := -1
		clean := 0
		for i, t := range s.wanted {
			if !p.clean(t) {
				continue
			}
			clean++
			if keep < 0 || t.State >= s.wanted[keep].State {
				keep = i
			}
		}
		if keep < 0 {
			continue
		}
		runs := s.wanted[keep].State == api.TaskRunning
		for i, t := range s.wanted {
			if i != keep && (runs || (clean > 1 && p.clean(t))) {
				p.shutdown(s, t)
			}
		}
		p.out.cut()
	}
}

func (p *pass) wakeAt(at int64) {
	if p.wake == 0 || at < p.wake {
		p.wake = at
	}
}
