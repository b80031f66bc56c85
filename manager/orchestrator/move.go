package orchestrator

import (
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
	"skein/scheduler"
)

// A running task whose node is drained keeps running until its successor is ready elsewhere, or, with the order start-first, runs. Only so
// many slots of a service are on their way at once.

const (
	// movePatience is how long a slot that cannot be placed elsewhere, or whose new task fails before it runs, holds up the others. Then
	// its task is ended all the same: a drained node ends with no tasks.
	movePatience = 30 * time.Second
	// moveLimit bounds the wait for a new task that is being prepared.
	moveLimit = 10 * time.Minute
	// defaultMoves is the share of its slots, one in so many, that a service without update settings moves at once.
	defaultMoves = 4
)

// shallLeave reports whether a task runs where it shall not stay.
func (p *pass) shallLeave(t *store.Task) bool {
	if t.NodeID == "" || t.State != api.TaskRunning {
		return false
	}
	n := p.o.node(p.view, t.NodeID)
	return n != nil && ((n.node.State == scheduler.Drained && p.movesGently(t, n)) || (n.node.State == scheduler.Ready && p.asked(t)))
}

// asked reports whether the task is to be replaced elsewhere to level the nodes. Such a task runs until its successor does, however long
// that takes.
func (p *pass) asked(t *store.Task) bool {
	return t.Slot != 0 && !p.svc.Job() && p.view.TaskExtra(t.ID).GetMoving() && p.conditionAllows(p.policy(t), t)
}

// movesGently: what runs on a drained node is replaced before it ends, unless nothing could replace it or all shall go at once.
func (p *pass) movesGently(t *store.Task, n *knownNode) bool {
	return t.State == api.TaskRunning && t.Slot != 0 && !p.svc.Job() && n.downSince() == 0 && p.movesAtOnce(n) > 0 &&
		p.conditionAllows(p.policy(t), t)
}

// goOnMoving: a move that has begun is not taken back when its node takes tasks again, if the task would have to be replaced anyway.
func (p *pass) goOnMoving(s *slot) {
	n := len(s.wanted)
	if n < 2 || s.wanted[n-1].Restarts.GetMoved() == 0 || s.wanted[n-1].Desired == api.TaskRunning {
		return
	}
	wanted := s.wanted
	s.wanted = nil
	for i, t := range wanted {
		if i < n-1 && t.State == api.TaskRunning && !p.clean(t) {
			s.leave = append(s.leave, t)
		} else {
			s.wanted = append(s.wanted, t)
		}
	}
}

// movesAtOnce is how many slots of the service may be on their way off the node; 0 is all of them.
func (p *pass) movesAtOnce(n *knownNode) int {
	for _, set := range []*int{n.opts.drainParallelism, p.opts.drainParallelism, p.o.cluster.drainParallelism} {
		if set != nil {
			return *set
		}
	}
	if c := p.svc.Spec.UpdateConfig; c != nil {
		return int(min(c.Parallelism, 1<<31))
	}
	return max(1, p.replicas()/defaultMoves)
}

// startFirst: the new task of a slot may run beside the one it replaces.
func (p *pass) startFirst() bool {
	if p.opts.drainOrder != "" {
		return p.opts.drainOrder == swarm.UpdateOrderStartFirst
	}
	return updateConfig(p.svc.Spec.UpdateConfig).Order == swarm.UpdateOrderStartFirst
}

// mustWait: a task of the slot still runs on the node it leaves, and the new one must not run beside it.
func (p *pass) mustWait(s *slot) bool {
	for _, t := range s.leave {
		if !s.ending[t] {
			return !p.startFirst() && !p.asked(t)
		}
	}
	return false
}

// moveSlots brings the slots on that are on their way, and begins with others as far as the budget goes.
func (p *pass) moveSlots() {
	for _, s := range p.slots {
		sh := p.sum.shares[s.place]
		sh.leave, sh.moving = p.move(s)
		p.sum.set(s.place, sh)
	}
	for p.sum.leaving > 0 {
		if p.full() {
			return
		}
		at, ok := p.sum.leave.next(func(at place) bool { return p.sum.shares[at].leave })
		if !ok {
			return
		}
		s := p.at(at)
		if !p.mayMove(s) {
			p.sum.leave.add(at)
			return
		}
		if len(s.leave) == 0 {
			continue // its turn was noted before it changed; the key of that change is on its way
		}
		inherited := p.inherit(s.newest())
		if inherited == nil {
			inherited = &api.Restarts{}
		}
		inherited.Moved = p.now
		p.create(s, 0, inherited)
		p.out.cut()
		sh := p.sum.shares[at]
		sh.leave, sh.moving = false, true
		p.sum.set(at, sh)
	}
}

// mayMove asks the budget. Slots that a rolling update has taken down count, too, but an update that does not come to an end does not
// hold a drain up for ever.
func (p *pass) mayMove(s *slot) bool {
	for _, t := range s.leave {
		n := p.o.node(p.view, t.NodeID)
		if n == nil {
			continue
		}
		busy := p.sum.moving
		if until := n.rec.Meta.GetUpdated() + int64(movePatience); p.updating() && until > p.now {
			busy += p.sum.busy
			p.wakeAt(until)
		}
		limit := p.movesAtOnce(n)
		if limit == 0 { // of a node that is drained all go at once; who is only asked to move has time
			limit = max(1, p.replicas()/defaultMoves)
		}
		return busy < limit
	}
	return true
}

// move brings one slot on. It reports whether the slot waits for its turn, and whether it is on its way.
func (p *pass) move(s *slot) (waits, moving bool) {
	if s.skip {
		return false, false
	}
	p.leaveOne(s)
	if len(s.wanted) == 0 {
		return len(s.leave) > 0 && len(s.lost) == 0, len(s.lost) > 0 && p.onItsWay(s, s.lost[len(s.lost)-1])
	}
	next := s.wanted[len(s.wanted)-1]
	if next.State == api.TaskRunning || (next.State >= api.TaskReady && p.mustWait(s)) || (len(s.leave) > 0 && !p.onItsWay(s, next) && !p.asked(s.leave[0])) {
		p.shutdown(s, s.leave...)
		p.out.cut()
	}
	return false, next.State < api.TaskRunning && p.onItsWay(s, next)
}

// movesBeside: the slot's only other task waits to take over.
func (p *pass) movesBeside(s *slot) bool {
	return len(s.wanted) == 1 && len(s.leave) == 0 && s.wanted[0].Desired < api.TaskRunning && s.wanted[0].Restarts.GetMoved() != 0 &&
		s.wanted[0].Generation > s.lost[len(s.lost)-1].Generation
}

// leaveOne: of several that run side by side for a moment, start-first, one is enough to wait for its successor.
func (p *pass) leaveOne(s *slot) {
	if len(s.leave) < 2 {
		return
	}
	keep := len(s.leave) - 1
	for i, t := range s.leave {
		if p.clean(t) {
			keep = i
		}
	}
	for i, t := range s.leave {
		if i != keep {
			p.shutdown(s, t)
		}
	}
	s.leave = s.leave[keep : keep+1]
}

// onItsWay reports whether the slot's next task is still worth waiting for.
func (p *pass) onItsWay(s *slot, next *store.Task) bool {
	began := next.Restarts.GetMoved()
	if began == 0 {
		return false
	}
	until := began + int64(movePatience)
	if next.State >= api.TaskAssigned && !next.State.Terminal() {
		until = began + int64(moveLimit)
	}
	if p.now >= until {
		return false
	}
	s.wakeAt(until)
	return true
}
