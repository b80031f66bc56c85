package orchestrator

import (
	"slices"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

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
		if ownEnd(last) && p.movesBeside(s) {
			// What was about to move ended by itself: that is a failure like any other, and the policy's delay and attempts hold.
			p.shutdown(s, s.wanted...)
			s.wanted = nil
		}
		if ownEnd(last) && last.StartAfter > p.now {
			// It failed while it was prepared: the replacement would fail at once, so the delay runs out first.
			s.wakeAt(last.StartAfter)
			continue
		}
		replace := p.needsReplacement(s, last) && p.mayReplace(last)
		if replace {
			if later, ok := p.sum.rate.take(p.now, p.replaceRate()); !ok {
				s.wakeAt(later)
				continue
			}
		}
		p.shutdown(s, s.lost...)
		if replace {
			inherited := p.inherit(s.newest())
			startAfter := int64(0)
			if last.StartAfter > p.now {
				startAfter = last.StartAfter
			} else if ownEnd(last) {
				startAfter = p.now + int64(max(p.policy(last).delay, crashPause(inherited)))
			}
			p.create(s, startAfter, inherited)
		}
		p.out.cut()
	}
}

// A slot whose tasks end by themselves within shortLife, again and again, is slowed down even if the policy's delay is shorter: after
// freeCrashes of them pauses double from firstCrashPause.
const (
	shortLife       = 10 * time.Second
	freeCrashes     = 3
	firstCrashPause = 250 * time.Millisecond
	maxCrashPause   = time.Minute
)

func crashPause(r *api.Restarts) time.Duration {
	crashes := int(min(r.GetCrashes(), 100))
	if crashes <= freeCrashes {
		return 0
	}
	return min(firstCrashPause<<min(crashes-freeCrashes-1, 10), maxCrashPause)
}

// maxTimes bounds the restarts whose times a task carries. Of more attempts than that only every n-th is noted, and counts for n.
const maxTimes = 256

func stride(policy restartPolicy) uint64 { return (policy.maxAttempts + maxTimes - 1) / maxTimes }

// inherit is what the successor of a task in its slot takes over. Restarts count as long as the spec is the same; a task that was moved, or
// whose node died, uses up none.
func (p *pass) inherit(t *store.Task) *api.Restarts {
	if t == nil {
		return nil
	}
	r := &api.Restarts{}
	if old := t.Restarts; old != nil && p.clean(t) {
		r = proto.Clone(old).(*api.Restarts)
	}
	if t.Revision != p.svc.Revision { // what was read of an update is over; the next one is this replacement
		r.Updated, r.Failed, r.Up = true, false, 0
	} else {
		p.inheritUpdate(r, t)
	}
	if t.State == api.TaskRunning || t.Started != 0 {
		r.Moved = 0
	}
	if ownEnd(t) && p.clean(t) {
		p.countRestart(r, t)
	}
	if proto.Size(r) == 0 {
		return nil
	}
	return r
}

func (p *pass) inheritUpdate(r *api.Restarts, t *store.Task) {
	up, failed := p.outcome(t)
	r.Failed = r.Failed || failed
	if r.Up == 0 {
		r.Up = up
	}
}

func (p *pass) countRestart(r *api.Restarts, t *store.Task) {
	r.Attempts++
	if t.Started != 0 && t.Updated-t.Started > int64(shortLife) {
		r.Crashes = 0
	} else {
		r.Crashes++
	}
	policy := p.policy(t)
	if policy.window == 0 || policy.maxAttempts == 0 {
		r.Times = nil
		return
	}
	since := p.now - int64(policy.window)
	r.Times = slices.DeleteFunc(r.Times, func(at int64) bool { return at < since })
	if r.Attempts%stride(policy) == 0 {
		r.Times = append(r.Times, p.now)
	}
	if n := len(r.Times); n > maxTimes {
		r.Times = r.Times[n-maxTimes:]
	}
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
func (p *pass) mayReplace(t *store.Task) bool {
	policy := p.policy(t)
	switch {
	case !ownEnd(t) && t.State < api.TaskStarting:
		return true
	case !p.conditionAllows(policy, t):
		return false
	case !ownEnd(t) || policy.maxAttempts == 0 || !p.clean(t):
		return true
	}
	return p.attempts(t, policy) < policy.maxAttempts
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
// before t ended.
func (p *pass) attempts(t *store.Task, policy restartPolicy) uint64 {
	if t.Restarts == nil || !p.clean(t) {
		return 0
	}
	if policy.window == 0 {
		return t.Restarts.Attempts
	}
	n := uint64(0)
	for _, at := range t.Restarts.Times {
		if at >= t.Updated-int64(policy.window) {
			n += stride(policy)
		}
	}
	return n
}

// finished reports whether the slot has run its course: nothing runs there and the restart policy wants nothing more. A task that ended by
// itself and may be replaced always is, in the same transaction that retires it; one without a successor was the last.
func (p *pass) finished(s *slot) bool {
	t := s.newest()
	if t == nil || len(s.wanted) > 0 || len(s.leave) > 0 || len(s.lost) > 0 || (!ownEnd(t) && t.State < api.TaskStarting) {
		return false
	}
	policy := p.policy(t)
	return !p.conditionAllows(policy, t) || (ownEnd(t) && policy.maxAttempts > 0)
}
