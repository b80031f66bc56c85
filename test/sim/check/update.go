package check

import (
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// progress is how far a rolling update of a service was before an entry.
type progress struct {
	service string
	healthy map[string]*seen // tasks that nothing but an update or the user ends
	coming  []*seen          // new tasks that have not come up yet
}

// updatesBefore looks at the services whose tasks an entry changed, as they were.
func (c *Checker) updatesBefore(keys []store.Key) []progress {
	var out []progress
	done := map[string]bool{}
	for _, k := range keys {
		svc := c.specs[k.ServiceID]
		if k.Kind != store.KindTask || done[k.ServiceID] || svc == nil || svc.rec == nil || svc.rec.Job() {
			continue
		}
		done[k.ServiceID] = true
		p := progress{service: k.ServiceID, healthy: map[string]*seen{}}
		for id, s := range svc.tasks {
			n := c.nodes[s.NodeID]
			if s.Desired == api.TaskRunning && s.State == api.TaskRunning && s.Revision != svc.rec.Revision && n != nil && n.rec != nil &&
				n.rec.Status.GetState() == "ready" && n.rec.Availability != "drain" && s.spec != nil && c.fits(s.spec, n) && c.now.Sub(n.changed) > notice {
				p.healthy[id] = s
			}
			if s.Desired <= api.TaskRunning && s.Revision == svc.rec.Revision && !ended(s.State) && c.firstTry(s) {
				p.coming = append(p.coming, s)
			}
		}
		out = append(out, p)
	}
	return out
}

// firstTry: the update made the task, and none of its revision was up in the slot before, or failed. A slot without older tasks comes from
// scaling up, and one that was updated and then lost its node is not down because of the update.
func (c *Checker) firstTry(s *seen) bool {
	older := false
	for _, o := range c.slotOf(keyOf(s.Task)).tasks {
		older = older || o.Revision < s.Revision
		if o.Revision == s.Revision && (o.ran || ended(o.State)) {
			return false
		}
	}
	return older
}

// updatesAfter is I10: a stop-first update never has more than its parallelism of slots down.
func (c *Checker) updatesAfter(before []progress) {
	for _, p := range before {
		svc := c.specs[p.service]
		if svc.rec == nil {
			continue
		}
		cfg := svc.rec.Spec.UpdateConfig
		if svc.rec.UpdateStatus.GetState() == string(swarm.UpdateStateRollbackStarted) {
			cfg = svc.rec.Spec.RollbackConfig
		}
		parallelism := uint64(1)
		if cfg != nil {
			parallelism = cfg.Parallelism
		}
		if parallelism == 0 || (cfg != nil && cfg.Order == swarm.UpdateOrderStartFirst) {
			continue
		}
		coming, slots := 0, map[slotKey]bool{}
		for _, s := range p.coming {
			n := c.nodeOf(s.NodeID)
			if s.Desired <= api.TaskRunning && !ended(s.State) && (n.rec == nil || n.rec.Availability != "pause") {
				coming++ // else its node is lost, or takes part in nothing, or the slot is gone
			}
		}
		for id, was := range p.healthy {
			// An update replaces: a slot that only ends was scaled away.
			if s := c.tasks[id]; s != nil && s.Desired == api.TaskShutdown && was == s && c.replacedBy(s, svc.rec.Revision) && !c.runs(keyOf(s.Task)) {
				slots[keyOf(s.Task)] = true
			}
		}
		if retired := len(slots); retired > 0 && uint64(coming+retired) > parallelism {
			c.bad("I10", "the update of service %s takes %d running slots down while %d slots are not up yet, %d may be at once", p.service, retired, coming, parallelism)
		}
	}
}

// runs reports whether the slot still has a task that runs and shall.
func (c *Checker) runs(k slotKey) bool {
	for _, o := range c.slotOf(k).tasks {
		if o.State == api.TaskRunning && o.Desired == api.TaskRunning {
			return true
		}
	}
	return false
}

func (c *Checker) replacedBy(s *seen, revision uint64) bool {
	for _, o := range c.slotOf(keyOf(s.Task)).tasks {
		if o.Revision == revision && o.Generation > s.Generation {
			return true
		}
	}
	return false
}
