package orchestrator

import (
	"time"

	"skein/manager/api"
	"skein/manager/store"
	"skein/scheduler"
)

// maxCreates bounds the tasks one pass creates for a service; the next pass, which their keys cause, goes on.
const maxCreates = 10_000

// pass is one look at one service.
type pass struct {
	o       *Orchestrator
	view    store.ReadTx
	svc     *store.Service
	now     int64
	slots   []*slot
	classes map[uint64]class
	paused  bool // a rolling update stands still
	out     writer
	wake    int64
}

// slot is the place of one replica, or of a global service's task on one node.
type slot struct {
	number uint64
	node   string
	tasks  []*store.Task // every generation that still exists, oldest first
	wanted []*store.Task // shall run or wait to run, and can
	lost   []*store.Task // should run but ended, or its node is down, drained or unfit
	ending map[*store.Task]bool
	done   bool // of a job: completed in its current execution
	skip   bool // left as it is in this pass: dealt with already, or its node takes part in nothing
	paused bool // its node keeps what it has, also what waits there to run, and gets nothing new
}

// load groups the service's tasks by slot.
func (p *pass) load() {
	var s *slot
	for _, t := range p.view.TasksByService(p.svc.Id) {
		node := ""
		if t.Slot == 0 {
			node = t.NodeID
		}
		if s == nil || s.number != t.Slot || s.node != node {
			s = &slot{number: t.Slot, node: node}
			p.slots = append(p.slots, s)
		}
		s.tasks = append(s.tasks, t)
		switch {
		case t.Desired > api.TaskRunning:
		case p.completed(t):
			s.done = true
		case p.isLost(t):
			s.lost = append(s.lost, t)
		default:
			s.wanted = append(s.wanted, t)
		}
	}
}

// completed reports whether the task is one that the current execution of a job need not run again.
func (p *pass) completed(t *store.Task) bool {
	return t.State == api.TaskComplete && t.Revision == p.svc.Revision && p.svc.Job()
}

func (p *pass) isLost(t *store.Task) bool {
	if t.State.Terminal() {
		return true
	}
	if t.NodeID == "" {
		return false
	}
	n := p.o.node(p.view, t.NodeID)
	return n == nil || n.State == scheduler.Down || n.State == scheduler.Drained || !p.matches(t.Revision, n)
}

// matches reports whether the node satisfies the constraints of a revision; labels and roles change under running tasks.
func (p *pass) matches(revision uint64, n *scheduler.Node) bool {
	spec := p.svc.Revs[revision]
	if spec == nil {
		return true
	}
	for _, c := range p.o.facts(spec).constraints {
		if !c.Matches(n) {
			return false
		}
	}
	return true
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

// leaving reports whether a task of the slot was told to end and still runs, or may: its successor must not run beside it. What a dead
// node does is not waited for.
func (p *pass) leaving(s *slot) bool {
	for _, t := range s.tasks {
		if !t.Live() || (t.Desired <= api.TaskRunning && !s.ending[t]) {
			continue
		}
		if n := p.o.node(p.view, t.NodeID); n != nil && n.State != scheduler.Down {
			return true
		}
	}
	return false
}

// ownEnd reports whether the task ended by itself, not because it was told to.
func ownEnd(t *store.Task) bool {
	return t.State == api.TaskComplete || t.State == api.TaskFailed || t.State == api.TaskRejected
}

// create makes the slot's next task, of the current revision. It waits at READY, with its image and network prepared, for startAfter and
// for the end of those that leave.
func (p *pass) create(s *slot, startAfter int64) {
	item := &api.TaskCreate_Item{Slot: s.number, NodeId: s.node, Desired: uint32(api.TaskRunning), StartAfter: startAfter,
		Generation: store.NextGeneration(p.view, p.svc.Id, s.number, s.node)}
	if startAfter > p.now || p.leaving(s) {
		item.Desired = uint32(api.TaskReady)
	}
	p.out.revision = p.svc.Revision
	p.out.create = append(p.out.create, item)
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
				p.wakeAt(t.StartAfter)
			case !p.leaving(s):
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

func (p *pass) wakeTime() time.Time {
	if p.wake == 0 {
		return time.Time{}
	}
	return time.Unix(0, p.wake)
}
