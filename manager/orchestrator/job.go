package orchestrator

import (
	"slices"

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
			if s.number == 0 || s.number > total {
				p.remove(s)
			}
		}
		busy := p.busySlots()
		p.replaceLost()
		p.fillJob(total, concurrent, busy)
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
		old := func(t *store.Task) bool { return t.Revision != p.svc.Revision }
		for _, t := range s.tasks {
			if old(t) && t.Desired < api.TaskRemove {
				if s.ending == nil {
					s.ending = map[*store.Task]bool{}
				}
				s.ending[t] = true
				p.out.remove = append(p.out.remove, t.ID)
				p.out.cut()
			}
		}
		s.wanted, s.lost = slices.DeleteFunc(s.wanted, old), slices.DeleteFunc(s.lost, old)
	}
}

// busySlots counts those that run, will be tried again, or have a task of an earlier execution that has not ended yet.
func (p *pass) busySlots() uint64 {
	n := uint64(0)
	for _, s := range p.slots {
		if len(s.wanted) > 0 || len(s.lost) > 0 || p.leaving(s) {
			n++
		}
	}
	return n
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
func (p *pass) fillJob(total, concurrent, busy uint64) {
	byNumber := map[uint64]*slot{}
	for _, s := range p.slots {
		byNumber[s.number] = s
	}
	created := 0
	for number := uint64(1); number <= total && busy < concurrent && created < maxCreates; number++ {
		s := byNumber[number]
		if s == nil {
			s = &slot{number: number}
		}
		if !p.vacant(s) {
			continue
		}
		if !p.leaving(s) { // else it is counted already
			busy++
		}
		p.create(s, 0)
		p.out.cut()
		created++
	}
}

// fillNodes starts a global job on the nodes that have not run it.
func (p *pass) fillNodes() {
	created := 0
	for _, s := range p.slots {
		if created < maxCreates && p.vacant(s) {
			p.create(s, 0)
			p.out.cut()
			created++
		}
	}
}
