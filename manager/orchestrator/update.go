package orchestrator

import (
	"fmt"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// survey is how far a rolling update is, read from the tasks: those of the current revision were made by it.
type survey struct {
	dirty  []*slot // still to be updated
	made   int     // slots the update has dealt with
	busy   int     // of these, not yet up, or within the delay before the next may begin
	coming int     // not yet up
	failed int     // whose new task ended within the monitor period, or never ran
	task   string  // one that failed
	lastUp int64   // when the last one came up
	next   int64   // when the next delay is over
}

// rollout drives the rolling update. It returns true when the spec is rolled back: everything else waits for the next pass.
func (p *pass) rollout() bool {
	st := p.svc.UpdateStatus
	state := swarm.UpdateState(st.GetState())
	void := p.superseded(state)
	if !void && (state == swarm.UpdateStatePaused || state == swarm.UpdateStateRollbackPaused) {
		p.paused = true
		return false
	}
	config := p.svc.Spec.UpdateConfig
	if state == swarm.UpdateStateRollbackStarted {
		config = p.svc.Spec.RollbackConfig
	}
	cfg := updateConfig(config)
	sv := p.survey(&cfg)
	active := state == swarm.UpdateStateUpdating || state == swarm.UpdateStateRollbackStarted
	if !active || void {
		// An update that was superseded by a spec which leaves nothing to do still has to be called complete.
		if len(sv.dirty) == 0 && (!void || state == swarm.UpdateStateCompleted) {
			return false
		}
		state = swarm.UpdateStateUpdating
		st = &api.UpdateStatus{Started: max(p.now, p.revisionCreated())}
		p.setStatus(st, state, "update in progress")
	}
	if p.tooManyFailures(&cfg, &sv) {
		return p.react(&cfg, &sv, st, state)
	}
	p.startSlots(&cfg, &sv)
	p.complete(&cfg, &sv, st, state)
	return false
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

func (p *pass) survey(cfg *swarm.UpdateConfig) survey {
	var sv survey
	for _, s := range p.slots {
		if s.skip || s.newest() == nil {
			continue
		}
		fresh := p.fresh(s)
		if len(fresh) > 0 && fresh[0] != s.tasks[0] { // a slot without older tasks comes from scaling up
			sv.made++
			p.surveyMade(&sv, fresh, cfg)
		}
		switch {
		case p.isDirty(s):
			sv.dirty = append(sv.dirty, s)
		case len(s.lost) > 0 && len(s.wanted) == 0:
			sv.coming++ // replaced in this pass
		}
	}
	return sv
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

func (p *pass) surveyMade(sv *survey, fresh []*store.Task, cfg *swarm.UpdateConfig) {
	up, failed := int64(0), ""
	for _, t := range fresh {
		at := t.Started
		if ownEnd(t) {
			if at == 0 {
				at = t.Updated
			}
			if t.Started == 0 || t.Updated-t.Started <= int64(cfg.Monitor) {
				failed = t.ID
			}
		}
		if at != 0 && (up == 0 || at < up) {
			up = at
		}
	}
	if failed != "" {
		sv.failed++
		sv.task = failed
	}
	switch over := up + int64(cfg.Delay); {
	case up == 0:
		sv.busy++
		sv.coming++
	case over > p.now:
		sv.busy++
		if sv.next == 0 || over < sv.next {
			sv.next = over
		}
	}
	sv.lastUp = max(sv.lastUp, up)
}

// isDirty: no task of the slot is what the spec asks for, and this update has not tried yet. What is lost is replaced anyway.
func (p *pass) isDirty(s *slot) bool {
	newest := s.newest()
	for _, t := range s.wanted {
		if p.clean(t) {
			return false
		}
	}
	if newest.Revision == p.svc.Revision {
		return false
	}
	if len(s.wanted) == 0 {
		return len(s.lost) == 0 && p.finished(s) && !p.clean(newest)
	}
	return true
}

func (p *pass) tooManyFailures(cfg *swarm.UpdateConfig, sv *survey) bool {
	return cfg.FailureAction != swarm.UpdateFailureActionContinue && sv.failed > 0 &&
		float32(sv.failed)/float32(sv.made+len(sv.dirty)) > cfg.MaxFailureRatio
}

// react pauses, or rolls back. A rollback is never rolled back.
func (p *pass) react(cfg *swarm.UpdateConfig, sv *survey, st *api.UpdateStatus, state swarm.UpdateState) bool {
	p.paused = true
	because := fmt.Sprintf("due to failure or early termination of task %s", sv.task)
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

// rollBack makes the previous spec the current one, as a new revision; tasks that still have it are clean again.
func (p *pass) rollBack(message string) {
	rec := proto.Clone(p.svc.ServiceRecord).(*api.ServiceRecord)
	rec.SpecJson = rec.PreviousSpecJson
	rec.PendingRollback = ""
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
func (p *pass) startSlots(cfg *swarm.UpdateConfig, sv *survey) {
	for i, s := range sv.dirty {
		if cfg.Parallelism > 0 && uint64(sv.busy) >= cfg.Parallelism {
			if sv.next != 0 {
				p.wakeAt(sv.next)
			}
			sv.dirty = sv.dirty[i:]
			return
		}
		p.startSlot(s, cfg.Order)
		sv.busy++
		sv.coming++
	}
	sv.dirty = nil
}

// startSlot makes the slot's new task. Stop-first ends the old ones now; the new one is prepared meanwhile and runs when they ended.
// Start-first keeps one of them until the new one runs.
func (p *pass) startSlot(s *slot, order swarm.UpdateOrder) {
	keep := (*store.Task)(nil)
	if order == swarm.UpdateOrderStartFirst {
		for _, t := range s.wanted {
			if keep == nil || (t.State == api.TaskRunning && keep.State != api.TaskRunning) {
				keep = t
			}
		}
	}
	for _, t := range s.wanted {
		if t != keep {
			p.shutdown(s, t)
		}
	}
	p.shutdown(s, s.lost...)
	p.create(s, 0)
	s.skip = true
	p.out.cut()
}

// complete ends the update when every slot is up and was watched for the monitor period.
func (p *pass) complete(cfg *swarm.UpdateConfig, sv *survey, st *api.UpdateStatus, state swarm.UpdateState) {
	if len(sv.dirty) > 0 || sv.coming > 0 {
		return
	}
	if over := sv.lastUp + int64(cfg.Monitor); cfg.FailureAction != swarm.UpdateFailureActionContinue && sv.lastUp > 0 && over > p.now {
		p.wakeAt(over)
		return
	}
	if state == swarm.UpdateStateRollbackStarted {
		p.setStatus(st, swarm.UpdateStateRollbackCompleted, "rollback completed")
	} else {
		p.setStatus(st, swarm.UpdateStateCompleted, "update completed")
	}
}
