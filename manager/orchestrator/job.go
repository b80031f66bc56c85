package orchestrator

import (
	"skein/manager/api"
	"skein/manager/store"
)

// runJob brings a job on: each slot (replicated job) or each node that may run it (global job) completes once per revision. What failed is
// tried again as the restart policy says, where "any" means "on failure". Rolling updates are not for jobs: a new revision ends the
// execution before it.
func (p *pass) runJob() {
	p.endExecutions()
	if p.svc.Spec.Mode.GlobalJob != nil {
		p.admitNodes()
		p.replaceLost()
		p.fillNodes()
	} else {
		total, concurrent := p.completions()
		for _, s := range p.slots {
			if s.slot == 0 || s.slot > total {
				p.remove(s)
			}
		}
		p.shareBusy()
		p.replaceLost()
		p.fillJob(total, concurrent)
	}
	p.promote()
}

// completions says how many slots a replicated job has, and how many of them may run at once.
func (p *pass) completions() (total, concurrent uint64) {
	j := p.svc.Spec.Mode.ReplicatedJob
	total, concurrent = 1, 0
	if j.MaxConcurrent != nil {
		concurrent = *j.MaxConcurrent
	}
	switch {
	case j.TotalCompletions != nil:
		total = *j.TotalCompletions
	case concurrent > 0:
		total = concurrent
	}
	if concurrent == 0 {
		concurrent = total
	}
	return total, concurrent
}

// endExecutions removes the tasks of earlier executions.
func (p *pass) endExecutions() {
	for _, s := range p.slots {
		for _, t := range s.tasks {
			if t.Revision != p.svc.Revision && t.Desired < api.TaskRemove {
				if s.ending == nil {
					s.ending = map[*store.Task]bool{}
				}
				s.ending[t] = true
				p.out.remove = append(p.out.remove, t.ID)
				p.out.cut()
			}
		}
	}
}

// shareBusy counts the slots that run, will be tried again, or have a task of an earlier execution that has not ended yet.
func (p *pass) shareBusy() {
	for _, s := range p.slots {
		p.sum.set(s.place, share{busy: len(s.wanted) > 0 || len(s.lost) > 0 || p.leaving(s)})
	}
}

// vacant reports whether the slot still has to run in this execution and nothing is under way.
func (p *pass) vacant(s *slot) bool {
	if s.skip || s.done || len(s.wanted) > 0 || len(s.lost) > 0 {
		return false
	}
	newest := s.newest()
	return newest == nil || newest.Revision != p.svc.Revision || !p.finished(s)
}

// fillJob starts slots of a replicated job, the lowest numbers first, as long as fewer than concurrent are busy.
func (p *pass) fillJob(total, concurrent uint64) {
	for number := p.sum.filled.free(0); number <= total; number = p.sum.filled.free(number + 1) {
		if uint64(p.sum.busy) >= concurrent || p.full() {
			return
		}
		at := place{service: p.svc.Id, slot: number}
		p.create(p.at(at), 0, nil)
		p.sum.set(at, share{busy: true})
		p.out.cut()
	}
}

// fillNodes starts a global job on the nodes that have not run it.
func (p *pass) fillNodes() {
	for _, s := range p.slots {
		if !p.vacant(s) {
			continue
		}
		if p.full() {
			return
		}
		p.create(s, 0, nil)
		p.out.cut()
	}
}
