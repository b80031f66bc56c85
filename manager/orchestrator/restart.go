package orchestrator

import (
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// replaceLost replaces tasks that ended, or whose node is down, drained or unfit, as the restart policy says.
func (p *pass) replaceLost() {
	for _, s := range p.slots {
		if s.skip || len(s.lost) == 0 {
			continue
		}
		last := s.lost[len(s.lost)-1]
		if ownEnd(last) && last.StartAfter > p.now {
			// It failed while it was prepared: the replacement would fail at once, so the delay runs out first.
			p.wakeAt(last.StartAfter)
			continue
		}
		p.shutdown(s, s.lost...)
		if p.needsReplacement(s, last) && p.mayReplace(s, last) {
			startAfter := int64(0)
			if last.StartAfter > p.now {
				startAfter = last.StartAfter
			} else if ownEnd(last) {
				startAfter = p.now + int64(max(p.policy(last).delay, crashPause(s)))
			}
			p.create(s, startAfter)
		}
		p.out.cut()
	}
}

// A slot whose tasks end by themselves within shortLife, again and again, is slowed down even if the policy's delay is shorter: after
// freeCrashes of them pauses double from firstCrashPause. The history of a slot bounds the count.
const (
	shortLife       = 10 * time.Second
	freeCrashes     = 3
	firstCrashPause = 250 * time.Millisecond
	maxCrashPause   = time.Minute
)

func crashPause(s *slot) time.Duration {
	crashes := 0
	for i := len(s.tasks) - 1; i >= 0; i-- {
		if t := s.tasks[i]; !ownEnd(t) || t.Updated-t.Created > int64(shortLife) {
			break
		}
		crashes++
	}
	if crashes <= freeCrashes {
		return 0
	}
	return min(firstCrashPause<<min(crashes-freeCrashes-1, 10), maxCrashPause)
}

// needsReplacement: beside a task that still runs (start-first) only the lost new one is tried again, and not in a paused update.
func (p *pass) needsReplacement(s *slot, last *store.Task) bool {
	if len(s.wanted) == 0 {
		return true
	}
	for _, t := range s.wanted {
		if p.clean(t) {
			return false
		}
	}
	return !p.paused && p.clean(last)
}

// policy is the restart policy that the task was made with.
func (p *pass) policy(t *store.Task) restartPolicy {
	if spec := p.svc.Revs[t.Revision]; spec != nil {
		return restartPolicyOf(spec)
	}
	return restartPolicyOf(p.svc.Spec)
}

// mayReplace asks the restart policy. A task that never got to start is replaced in any case: it had no run yet.
func (p *pass) mayReplace(s *slot, t *store.Task) bool {
	policy := p.policy(t)
	switch {
	case !ownEnd(t) && t.State < api.TaskStarting:
		return true
	case !p.conditionAllows(policy, t):
		return false
	case !ownEnd(t) || policy.maxAttempts == 0 || !p.clean(t):
		return true
	}
	return p.attempts(s, t, policy) < policy.maxAttempts
}

func (p *pass) conditionAllows(policy restartPolicy, t *store.Task) bool {
	switch policy.condition {
	case swarm.RestartPolicyConditionNone:
		return false
	case swarm.RestartPolicyConditionOnFailure:
		return t.State != api.TaskComplete
	}
	return true
}

// attempts counts how often a task of today's spec was started again in the slot after it had ended by itself, within the policy's window
// before t ended. The reaper keeps enough of the history for that.
func (p *pass) attempts(s *slot, t *store.Task, policy restartPolicy) uint64 {
	n := uint64(0)
	for i := 1; i < len(s.tasks); i++ {
		before, next := s.tasks[i-1], s.tasks[i]
		if next.Desired >= api.TaskRemove || !ownEnd(before) || !p.clean(before) || !p.clean(next) {
			continue
		}
		if policy.window == 0 || next.Created >= t.Updated-int64(policy.window) {
			n++
		}
	}
	return n
}

// finished reports whether the slot has run its course: nothing runs there and the restart policy wants nothing more. A task that ended by
// itself and may be replaced always is, in the same transaction that retires it; one without a successor was the last.
func (p *pass) finished(s *slot) bool {
	t := s.newest()
	if t == nil || len(s.wanted) > 0 || len(s.lost) > 0 || (!ownEnd(t) && t.State < api.TaskStarting) {
		return false
	}
	policy := p.policy(t)
	return !p.conditionAllows(policy, t) || (ownEnd(t) && policy.maxAttempts > 0)
}
