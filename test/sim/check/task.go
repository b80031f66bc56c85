package check

import (
	"fmt"
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// release takes from a task what it does not hold any more, and forgets one that is gone.
func (c *Checker) release(tx store.ReadTx, id string) {
	s, t := c.tasks[id], tx.Task(id)
	if s == nil {
		return
	}
	if t == nil || !live(t) {
		for _, a := range s.holds {
			c.free(a, id)
		}
		s.holds = nil
	}
	if t == nil {
		if live(s.Task) {
			c.bad("I1", "task %s was deleted while it was %s on node %s", id, s.State, s.NodeID)
		}
		c.forget(s)
	}
}

func (c *Checker) forget(s *seen) {
	delete(c.tasks, s.ID)
	c.dead[s.ID] = struct{}{}
	delete(c.slotOf(keyOf(s.Task)).tasks, s.ID)
	delete(c.serviceOf(s.ServiceID).tasks, s.ID)
	if n := c.nodes[s.NodeID]; n != nil {
		delete(n.tasks, s.ID)
	}
}

// task looks at one that was made or changed; nil when it is gone.
func (c *Checker) task(tx store.ReadTx, id string) *seen {
	t := tx.Task(id)
	if t == nil {
		return nil
	}
	s := c.tasks[id]
	if s == nil {
		s = c.created(t)
	}
	old := s.Task
	if old != t {
		c.grows(old, t)
		if t.NodeID != old.NodeID && old.NodeID == "" {
			c.nodeOf(t.NodeID).tasks[id] = s
		}
	}
	placed := live(t) && !live(old)
	running := t.Desired == api.TaskRunning && old.Desired < api.TaskRunning
	s.Task = t
	if placed {
		s.placed = c.now
		c.placement(s)
	}
	if live(t) && len(s.holds) == 0 {
		c.takes(s)
	}
	if t.State == api.TaskRunning && old.State < api.TaskRunning && t.Desired < api.TaskRunning {
		c.bad("I15", "task %s is said to run and shall not yet", id)
	}
	s.ran = s.ran || t.State == api.TaskRunning
	if ended(t.State) && s.ended.IsZero() {
		s.ended = c.now
		s.own = t.Desired <= api.TaskRunning && (t.State == api.TaskComplete || t.State == api.TaskFailed || t.State == api.TaskRejected)
		c.completed(s)
	}
	if running {
		c.delayed(s)
	}
	return s
}

// created: the id is new for ever, and the restart policy allowed it.
func (c *Checker) created(t *store.Task) *seen {
	if _, was := c.dead[t.ID]; was {
		c.bad("I1", "task %s: the id of a deleted task came back", t.ID)
	}
	svc := c.serviceOf(t.ServiceID)
	s := &seen{made: c.now, Task: &store.Task{ID: t.ID, ServiceID: t.ServiceID, Slot: t.Slot, NodeID: "", State: api.TaskNew, Desired: api.TaskNew}}
	if svc.rec != nil {
		s.spec = svc.rec.Revs[t.Revision]
	}
	if t.NodeID != "" {
		c.nodeOf(t.NodeID).tasks[t.ID] = s
	}
	c.tasks[t.ID] = s
	svc.tasks[t.ID] = s
	slot := c.slotOf(keyOf(t))
	c.attempts(slot, s, t)
	slot.tasks[t.ID] = s
	return s
}

// attempts is I11: a task of a revision is not started again more often than the policy allows.
func (c *Checker) attempts(slot *slotSeen, s *seen, t *store.Task) {
	if c.level < api.LevelHistory {
		return // a cluster of that level does not count restarts
	}
	var last *seen
	for _, o := range slot.tasks {
		if o.Desired < api.TaskRemove && o.Revision == t.Revision && (last == nil || o.Generation > last.Generation) {
			last = o
		}
	}
	if last != nil && !last.own && t.Slot == 0 {
		delete(slot.replaced, t.Revision) // somebody drained the node, or it was lost: it begins anew there
	}
	if last == nil || !last.own || s.spec == nil || s.spec.TaskTemplate.RestartPolicy == nil {
		return
	}
	for _, o := range slot.tasks {
		if o.ended.After(last.ended) {
			return // another is replaced, of an older revision that asks for the same
		}
	}
	p := s.spec.TaskTemplate.RestartPolicy
	slot.replaced[t.Revision] = append(slot.replaced[t.Revision], c.now)
	switch {
	case p.Condition == swarm.RestartPolicyConditionNone && last.ran:
		c.bad("I11", "task %s follows %s in its slot, although the restart condition is none", t.ID, last.ID)
	case p.Condition == swarm.RestartPolicyConditionOnFailure && last.State == api.TaskComplete && last.Desired > api.TaskRunning && !last.isForced(t):
		c.bad("I11", "task %s follows %s, which completed, although the restart condition is on-failure", t.ID, last.ID)
	}
	if p.MaxAttempts == nil || *p.MaxAttempts == 0 {
		return
	}
	n := uint64(0)
	for _, at := range slot.replaced[t.Revision] {
		if p.Window == nil || *p.Window == 0 || last.ended.Sub(at) <= *p.Window-skew {
			n++
		}
	}
	if n > *p.MaxAttempts {
		c.bad("I11", "task %s is the restart number %d of revision %d in its slot, the policy allows %d", t.ID, n, t.Revision, *p.MaxAttempts)
	}
}

func (s *seen) isForced(t *store.Task) bool { return t.Revision != s.Revision }

// grows is I1 and I2.
func (c *Checker) grows(old, t *store.Task) {
	switch {
	case t.State < old.State || t.Desired < old.Desired:
		c.bad("I1", "task %s went back to %s (desired %s) from %s (desired %s)", t.ID, t.State, t.Desired, old.State, old.Desired)
	case old.NodeID != "" && t.NodeID != old.NodeID:
		c.bad("I2", "task %s moved from node %s to %q", t.ID, old.NodeID, t.NodeID)
	}
}

// placement is I6, I7 and the half of I13 about paused nodes, at the moment a task gets its node.
func (c *Checker) placement(s *seen) {
	n := c.nodeOf(s.NodeID)
	if n.rec == nil {
		c.bad("I7", "task %s was placed on node %s, which does not exist", s.ID, s.NodeID)
		return
	}
	// A decision takes a moment to be committed, and what it was based on may change meanwhile.
	if c.now.Sub(n.changed) > notice {
		switch {
		case n.rec.Availability != "active":
			c.bad("I13", "task %s was placed on node %s, whose availability is %s", s.ID, s.NodeID, n.rec.Availability)
		case s.spec != nil && !c.fits(s.spec, n):
			c.bad("I7", "task %s was placed on node %s, which does not meet its constraints %v", s.ID, s.NodeID, s.spec.TaskTemplate.Placement)
		}
	}
	if state := n.rec.Status.GetState(); c.now.Sub(n.state) > notice && state != "ready" {
		c.bad("I7", "task %s was placed on node %s, which is %s", s.ID, s.NodeID, state)
	}
	if s.spec == nil {
		return
	}
	cpu, memory := c.reserved(n)
	r := reserve(s.spec)
	for _, t := range n.tasks {
		if c.level < api.LevelPlacement && live(t.Task) && t.Slot == 0 {
			return // with managers of older versions tasks of global services get their nodes without a look at reservations
		}
	}
	if (r.NanoCPUs > 0 && cpu > n.total.NanoCPUs) || (r.MemoryBytes > 0 && memory > n.total.MemoryBytes) {
		if c.now.Sub(n.changed) > notice {
			c.bad("I6", "node %s: %d nano CPUs of %d and %d bytes of %d are reserved since task %s is there", s.NodeID, cpu, n.total.NanoCPUs, memory, n.total.MemoryBytes, s.ID)
		}
	}
	if p := s.spec.TaskTemplate.Placement; p != nil && p.MaxReplicas > 0 && s.spec.Mode.Replicated != nil {
		if have := n.count(s); have > p.MaxReplicas {
			c.bad("I6", "node %s has %d tasks of service %s that shall run, %d may", s.NodeID, have, s.ServiceID, p.MaxReplicas)
		}
	}
}

// reserved is what a node's tasks reserve. What tasks of a removed service reserved until they have ended is not known to a new leader: the
// service's specs went with it.
func (c *Checker) reserved(n *nodeSeen) (cpu, memory int64) {
	for _, t := range n.tasks {
		if svc := c.specs[t.ServiceID]; live(t.Task) && t.spec != nil && svc != nil && svc.rec != nil {
			r := reserve(t.spec)
			cpu, memory = cpu+r.NanoCPUs, memory+r.MemoryBytes
		}
	}
	return cpu, memory
}

func (n *nodeSeen) count(s *seen) (have uint64) {
	for _, t := range n.tasks {
		if t.ServiceID == s.ServiceID && live(t.Task) && t.Desired <= api.TaskRunning {
			have++
		}
	}
	return have
}

func reserve(spec *swarm.ServiceSpec) swarm.Resources {
	if r := spec.TaskTemplate.Resources; r != nil && r.Reservations != nil {
		return *r.Reservations
	}
	return swarm.Resources{}
}

// takes is I8 for a task's addresses and host ports.
func (c *Checker) takes(s *seen) {
	for _, a := range s.Attachments {
		for _, addr := range []string{a.Addr4, a.Addr6} {
			if addr != "" {
				s.holds = append(s.holds, a.NetworkId+"|"+bare(addr))
			}
		}
	}
	if s.Gateway4.IsValid() {
		s.holds = append(s.holds, "mesh|"+s.Gateway4.String())
	}
	for _, p := range s.HostPorts {
		s.holds = append(s.holds, fmt.Sprintf("port|%s|%s/%d", s.NodeID, p.Protocol, p.Published))
	}
	if len(s.holds) == 0 {
		s.holds = append(s.holds, "port|none|"+s.ID) // nothing to hold, and looked at
	}
	for _, a := range s.holds {
		c.hold(a, s.ID)
	}
}

func bare(addr string) string {
	a, _, _ := strings.Cut(addr, "/")
	return a
}

// delayed is I11: the restart delay lies between the end of a task and the start of its successor.
func (c *Checker) delayed(s *seen) {
	if s.spec == nil || s.spec.TaskTemplate.RestartPolicy == nil || s.spec.TaskTemplate.RestartPolicy.Delay == nil {
		return
	}
	var last *seen
	for _, o := range c.slotOf(keyOf(s.Task)).tasks {
		if o == s || o.Generation > s.Generation {
			continue
		}
		if !ended(o.State) || o.ended.After(s.made) {
			return // it is what is replaced: its node was lost or drained, or an update goes on
		}
		if last == nil || o.Generation > last.Generation {
			last = o
		}
	}
	if last == nil || !last.own || last.Revision != s.Revision || last.ended.IsZero() || last.Desired >= api.TaskRemove {
		return
	}
	for _, o := range c.slotOf(keyOf(s.Task)).tasks {
		if o != s && o.ended.After(last.ended) {
			return // that one is replaced: its node was lost or drained while an update of its slot had failed
		}
	}
	delay, between := *s.spec.TaskTemplate.RestartPolicy.Delay, c.now.Sub(last.ended)
	if c.term.After(last.ended) {
		delay -= skew // told by clocks of two leaders
	}
	if between < delay-clockStep {
		c.bad("I11", "task %s shall run %v after %s ended, the restart delay is %v", s.ID, between, last.ID, delay)
	}
}

// completed: a slot of a job completes once in an execution.
func (c *Checker) completed(s *seen) {
	if s.State != api.TaskComplete || s.spec == nil || (s.spec.Mode.ReplicatedJob == nil && s.spec.Mode.GlobalJob == nil) || s.Desired > api.TaskRunning {
		return
	}
	slot := c.slotOf(keyOf(s.Task))
	if other := slot.done[s.Revision]; other != "" {
		c.bad("I4", "tasks %s and %s of a job completed in the same slot and execution", other, s.ID)
	}
	slot.done[s.Revision] = s.ID
}

// slot is I4: one task of a slot shall run; two while a start-first update is on.
func (c *Checker) slot(k slotKey) {
	slot, svc := c.slotOf(k), c.serviceOf(k.service)
	var ids []string
	for _, s := range slot.tasks {
		if s.Desired != api.TaskRunning || ended(s.State) {
			continue
		}
		if n := c.nodes[s.NodeID]; s.NodeID != "" && (n == nil || n.rec == nil || n.rec.Status.GetState() == "down") {
			continue
		}
		ids = append(ids, s.ID)
	}
	most := 1
	if !svc.startFirst.IsZero() {
		most = 2
	}
	if len(ids) > most {
		c.bad("I4", "slot %d%s of service %s: %d tasks shall run: %v", k.slot, k.node, k.service, len(ids), ids)
	}
}
