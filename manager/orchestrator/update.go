package orchestrator

import (
	"fmt"
	"slices"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// rollout drives the rolling update. It returns true when the spec is rolled back: everything else waits for the next pass. How far the
// update is, is read from the tasks: those of the current revision in slots that had older ones were made by it.
func (p *pass) rollout() bool {
	st := p.svc.UpdateStatus
	state := swarm.UpdateState(st.GetState())
	void := p.superseded(state)
	config := p.svc.Spec.UpdateConfig
	if state == swarm.UpdateStateRollbackStarted || state == swarm.UpdateStateRollbackPaused {
		config = p.svc.Spec.RollbackConfig
	}
	cfg := updateConfig(config)
	p.monitor = int64(cfg.Monitor)
	if !void && p.standsStill() {
		p.paused = true
		return false
	}
	if !p.updating() || void {
		// An update that was superseded by a spec which leaves nothing to do still has to be called complete.
		if !slices.ContainsFunc(p.slots, p.isDirty) && (!void || state == swarm.UpdateStateCompleted) {
			return false
		}
		state = swarm.UpdateStateUpdating
		st = &api.UpdateStatus{Started: max(p.now, p.revisionCreated())}
		p.setStatus(st, state, "update in progress")
	}
	for _, s := range p.slots {
		p.sum.set(s.place, p.shareOf(s))
	}
	if p.tooManyFailures(&cfg) {
		return p.react(&cfg, st, state)
	}
	p.startSlots(&cfg)
	p.complete(&cfg, st, state)
	return false
}

// standsStill reports whether a rolling update or rollback waits for the next change.
func (p *pass) standsStill() bool {
	state := swarm.UpdateState(p.svc.UpdateStatus.GetState())
	return state == swarm.UpdateStatePaused || state == swarm.UpdateStateRollbackPaused
}

// updating reports whether a rolling update or rollback is under way.
func (p *pass) updating() bool {
	state := swarm.UpdateState(p.svc.UpdateStatus.GetState())
	return state == swarm.UpdateStateUpdating || state == swarm.UpdateStateRollbackStarted
}

// superseded: a spec written after an update began or ended makes its status void.
func (p *pass) superseded(state swarm.UpdateState) bool {
	switch state {
	case swarm.UpdateStateUpdating, swarm.UpdateStatePaused, swarm.UpdateStateCompleted:
		return p.revisionCreated() > p.svc.UpdateStatus.Started
	}
	return false
}

func (p *pass) revisionCreated() int64 {
	for _, r := range p.svc.Revisions {
		if r.Number == p.svc.Revision {
			return r.Created
		}
	}
	return 0
}

// shareOf is what a slot contributes to a rolling update.
func (p *pass) shareOf(s *slot) share {
	sh := share{leave: p.sum.shares[s.place].leave, moving: p.sum.shares[s.place].moving}
	if (s.skip && !s.paused) || s.newest() == nil {
		return sh
	}
	fresh := p.fresh(s)
	if len(fresh) > 0 && (fresh[0] != s.tasks[0] || fresh[0].Restarts.GetUpdated()) { // else the slot comes from scaling up
		sh.made = true
		for _, t := range fresh {
			up, failed := p.outcome(t)
			if r := t.Restarts; r != nil {
				failed = failed || r.Failed
				if r.Up != 0 {
					up = r.Up
				}
			}
			if failed {
				sh.failed = t.ID
			}
			if up != 0 && (sh.up == 0 || up < sh.up) {
				sh.up = up
			}
		}
		if sh.up == 0 && (p.finished(s) || p.needless(s, fresh)) { // told to end before it ran, or lost with its node, and no other is wanted
			sh.up = fresh[len(fresh)-1].Updated
		}
		sh.busy, sh.coming = sh.up == 0, sh.up == 0
	}
	if s.paused && !slices.ContainsFunc(s.wanted, func(t *store.Task) bool { return t.State >= api.TaskAssigned }) {
		sh.busy, sh.coming = false, false // nothing comes up there
	}
	switch {
	case s.paused:
	case p.isDirty(s):
		sh.dirty = true
	case len(s.lost) > 0 && len(s.wanted) == 0:
		sh.coming = true // replaced in this pass
	}
	return sh
}

// needless reports whether the slot's new tasks were all told to end, because one of an earlier revision that asks for the same runs there
// again: its node was drained, and then was not.
func (p *pass) needless(s *slot, fresh []*store.Task) bool {
	return !slices.ContainsFunc(fresh, func(t *store.Task) bool { return t.Desired <= api.TaskRunning }) && slices.ContainsFunc(s.wanted, p.clean)
}

// outcome says of a task when it came up, or ended without having, and whether it failed in the eyes of an update.
func (p *pass) outcome(t *store.Task) (up int64, failed bool) {
	if !ownEnd(t) {
		return t.Started, false
	}
	if t.Started == 0 {
		return t.Updated, true
	}
	return t.Started, t.Updated-t.Started <= p.monitor
}

// fresh are the slot's tasks of the current revision.
func (p *pass) fresh(s *slot) []*store.Task {
	for i, t := range s.tasks {
		if t.Revision == p.svc.Revision {
			return s.tasks[i:]
		}
	}
	return nil
}

// isDirty: no task of the slot is what the spec asks for, and this update has not tried yet. What is lost is replaced anyway.
func (p *pass) isDirty(s *slot) bool {
	newest := s.newest()
	if s.skip || newest == nil {
		return false
	}
	for _, t := range s.wanted {
		if p.clean(t) {
			return false
		}
	}
	if newest.Revision == p.svc.Revision {
		return false
	}
	for _, t := range s.leave {
		if p.clean(t) {
			return false // it is replaced when it moves
		}
	}
	if len(s.wanted) == 0 && len(s.leave) == 0 {
		return len(s.lost) == 0 && p.finished(s) && !p.clean(newest)
	}
	return true
}

// busy counts the slots that the update has begun with and that are not yet up, or within the delay before the next may begin.
func (p *pass) busy(cfg *swarm.UpdateConfig) (n uint64, next int64) {
	n = uint64(p.sum.busy)
	for at, up := range p.sum.recent {
		over := up + int64(cfg.Delay)
		if over <= p.now {
			delete(p.sum.recent, at)
			continue
		}
		if !p.sum.shares[at].busy {
			n++
		}
		if next == 0 || over < next {
			next = over
		}
	}
	return n, next
}

func (p *pass) tooManyFailures(cfg *swarm.UpdateConfig) bool {
	return cfg.FailureAction != swarm.UpdateFailureActionContinue && p.sum.failed > 0 &&
		float32(p.sum.failed)/float32(p.sum.made+p.sum.dirtySlots) > cfg.MaxFailureRatio
}

// react pauses, or rolls back. A rollback is never rolled back.
func (p *pass) react(cfg *swarm.UpdateConfig, st *api.UpdateStatus, state swarm.UpdateState) bool {
	p.paused = true
	because := fmt.Sprintf("due to failure or early termination of task %s", p.sum.failedTask)
	switch {
	case state == swarm.UpdateStateRollbackStarted:
		p.setStatus(st, swarm.UpdateStateRollbackPaused, "rollback paused "+because)
	case cfg.FailureAction != swarm.UpdateFailureActionRollback:
		p.setStatus(st, swarm.UpdateStatePaused, "update paused "+because)
	case len(p.svc.PreviousSpecJson) == 0:
		p.setStatus(st, swarm.UpdateStatePaused, "update paused "+because+"; there is no previous spec to roll back to")
	default:
		p.rollBack("update rolled back " + because)
		return true
	}
	return false
}

// authorSkein is the author of what managers write by themselves.
const authorSkein = "skein"

// rollBack makes the previous spec the current one, as a new revision; tasks that still have it are clean again.
func (p *pass) rollBack(message string) {
	rec := proto.Clone(p.svc.ServiceRecord).(*api.ServiceRecord)
	rec.SpecJson = rec.PreviousSpecJson
	rec.PendingRollback = ""
	if p.counts { // as with Swarm: what failed is not what a rollback by hand returns to
		rec.Author, rec.Note, rec.ForgetPrevious = authorSkein, message, true
	}
	if p.svc.Previous != nil {
		rec.ForceUpdate = p.svc.Previous.TaskTemplate.ForceUpdate
	}
	rec.UpdateStatus = &api.UpdateStatus{
		ServiceId: rec.Id, State: string(swarm.UpdateStateRollbackStarted), Started: p.now, Message: message,
	}
	p.out.last = []*api.Change{{Kind: &api.Change_PutService{PutService: rec}}}
}

func (p *pass) setStatus(old *api.UpdateStatus, state swarm.UpdateState, message string) {
	st := &api.UpdateStatus{ServiceId: p.svc.Id, State: string(state), Started: old.GetStarted(), Message: message}
	if state == swarm.UpdateStateCompleted || state == swarm.UpdateStateRollbackCompleted {
		st.Completed = p.now
	}
	p.out.last = []*api.Change{{Kind: &api.Change_UpdateStatus{UpdateStatus: st}}}
}

// startSlots begins as many dirty slots as the parallelism leaves room for.
func (p *pass) startSlots(cfg *swarm.UpdateConfig) {
	busy, next := p.busy(cfg)
	for p.sum.dirtySlots > 0 {
		if cfg.Parallelism > 0 && busy >= cfg.Parallelism {
			if next != 0 {
				p.wakeAt(next)
			}
			return
		}
		if p.full() {
			return
		}
		at, ok := p.sum.dirty.next(func(at place) bool { return p.sum.shares[at].dirty })
		if !ok {
			return
		}
		p.startSlot(p.at(at), cfg.Order)
		p.sum.set(at, share{made: true, busy: true, coming: true})
		busy++
	}
}

// startSlot makes the slot's new task. Stop-first ends the old ones now; the new one is prepared meanwhile and runs when they ended.
// Start-first keeps one of them until the new one runs.
func (p *pass) startSlot(s *slot, order swarm.UpdateOrder) {
	keep := (*store.Task)(nil)
	if order == swarm.UpdateOrderStartFirst {
		for _, t := range slices.Concat(s.wanted, s.leave) {
			if keep == nil || (t.State == api.TaskRunning && keep.State != api.TaskRunning) {
				keep = t
			}
		}
	}
	for _, t := range slices.Concat(s.wanted, s.leave) {
		if t != keep {
			p.shutdown(s, t)
		}
	}
	p.shutdown(s, s.lost...)
	p.create(s, 0, &api.Restarts{Updated: true})
	s.skip = true
	p.out.cut()
}

// complete ends the update when every slot is up and was watched for the monitor period.
func (p *pass) complete(cfg *swarm.UpdateConfig, st *api.UpdateStatus, state swarm.UpdateState) {
	if p.sum.dirtySlots > 0 || p.sum.coming > 0 {
		return
	}
	if over := p.sum.lastUp + int64(cfg.Monitor); cfg.FailureAction != swarm.UpdateFailureActionContinue && p.sum.lastUp > 0 && over > p.now {
		p.wakeAt(over)
		return
	}
	if state == swarm.UpdateStateRollbackStarted {
		p.setStatus(st, swarm.UpdateStateRollbackCompleted, "rollback completed")
	} else {
		p.setStatus(st, swarm.UpdateStateCompleted, "update completed")
	}
}
