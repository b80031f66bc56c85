package check

import (
	"fmt"
	"slices"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// Machine is what really is on a node.
type Machine struct {
	Node    string
	Running []string // tasks whose container runs
	Kept    []string // tasks of which there is a container, running or not
	Secrets []string // ids of secrets and configs that the node holds
}

// Calm looks at a cluster in which nothing went wrong for long: I3, I5, I9, I12, I13, I14, I15 and the end of updates. With strict, users
// asked for every service anew with room for all: exactly what was asked for must run.
func (c *Checker) Calm(tx store.ReadTx, machines []Machine, history int, strict bool) []Violation {
	c.found = nil
	for _, n := range tx.Nodes() {
		if n.Status.GetState() != "ready" {
			c.bad("I3", "node %s is %s although it is there", n.Id, n.Status.GetState())
		}
	}
	for _, svc := range tx.Services() {
		c.calmService(tx, svc, strict)
	}
	ended := map[slotKey]int{}
	for _, t := range tx.Tasks() {
		c.calmTask(tx, t)
		if t.State.Terminal() && t.Desired > api.TaskRunning && tx.Service(t.ServiceID) != nil {
			ended[keyOf(t)]++
		}
	}
	for k, n := range ended {
		if n > c.history(tx.Service(k.service), history) {
			c.bad("I12", "slot %d%s of service %s keeps %d ended tasks, the limit is %d", k.slot, k.node, k.service, n, history)
		}
	}
	for _, m := range machines {
		c.machine(tx, m)
	}
	return c.found
}

// history is what a slot may keep: enough to count restart attempts, too.
func (c *Checker) history(svc *store.Service, limit int) int {
	if p := svc.Spec.TaskTemplate.RestartPolicy; p != nil && p.MaxAttempts != nil && *p.MaxAttempts > 0 {
		return max(limit, int(*p.MaxAttempts)+1)
	}
	return limit
}

func (c *Checker) calmTask(tx store.ReadTx, t *store.Task) {
	svc, n := tx.Service(t.ServiceID), tx.Node(t.NodeID)
	switch {
	case svc == nil:
		c.bad("I14", "task %s (%s, desired %s) belongs to service %s, which does not exist", t.ID, t.State, t.Desired, t.ServiceID)
	case t.State.Terminal():
	case t.Desired > api.TaskRunning:
		c.bad("I3", "task %s on node %s is %s and shall be %s, for long", t.ID, t.NodeID, t.State, t.Desired)
	case n != nil && n.Availability == "drain":
		c.bad("I13", "task %s is %s on node %s, which is drained", t.ID, t.State, t.NodeID)
	case t.State < api.TaskAssigned:
		c.waits(tx, svc, t)
	case t.State != api.TaskRunning:
		c.bad("I3", "task %s on node %s is %s and shall be %s, for long", t.ID, t.NodeID, t.State, t.Desired)
	}
}

// waits: a task without a node has a reason, and there is no node for it.
func (c *Checker) waits(tx store.ReadTx, svc *store.Service, t *store.Task) {
	if t.Status.GetErr() == "" {
		c.bad("I3", "task %s waits for a node and does not say why", t.ID)
	}
	spec := svc.Revs[t.Revision]
	if spec == nil || len(spec.TaskTemplate.Networks) > 0 { // their addresses may be used up
		return
	}
	for _, rec := range tx.Nodes() {
		if n := c.nodeOf(rec.Id); c.room(svc, spec, n) && (t.NodeID == "" || t.NodeID == rec.Id) {
			c.bad("I3", "task %s waits (%s) although node %s has room for it", t.ID, t.Status.GetErr(), rec.Id)
			return
		}
	}
}

// room reports whether a node could take a task.
func (c *Checker) room(svc *store.Service, spec *swarm.ServiceSpec, n *nodeSeen) bool {
	if n.rec == nil || n.rec.Availability != "active" || n.rec.Status.GetState() != "ready" || !c.fits(spec, n) {
		return false
	}
	cpu, memory := c.reserved(n)
	r := reserve(spec)
	if (r.NanoCPUs > 0 && cpu+r.NanoCPUs > n.total.NanoCPUs) || (r.MemoryBytes > 0 && memory+r.MemoryBytes > n.total.MemoryBytes) {
		return false
	}
	have := uint64(0)
	for _, t := range n.tasks {
		if t.ServiceID == svc.Id && live(t.Task) {
			have++
		}
	}
	if p := spec.TaskTemplate.Placement; p != nil && p.MaxReplicas > 0 && have >= p.MaxReplicas {
		return false
	}
	if spec.EndpointSpec != nil {
		for _, p := range spec.EndpointSpec.Ports {
			if p.PublishMode != swarm.PortConfigPublishModeHost {
				continue
			}
			if _, taken := c.held[fmt.Sprintf("port|%s|%s/%d", n.rec.Id, p.Protocol, p.PublishedPort)]; taken {
				return false
			}
		}
	}
	return true
}

// calmService compares a service with its tasks.
func (c *Checker) calmService(tx store.ReadTx, svc *store.Service, strict bool) {
	state := swarm.UpdateState(svc.UpdateStatus.GetState())
	switch state {
	case "", swarm.UpdateStateCompleted, swarm.UpdateStateRollbackCompleted:
	case swarm.UpdateStatePaused, swarm.UpdateStateRollbackPaused:
		if strict {
			c.bad("I10", "the update of service %s is %s although nothing fails", svc.Name, state)
		}
		return
	default:
		if c.stuck(tx, svc) {
			return // it waits for a node
		}
		c.bad("I10", "the update of service %s is %s, for long:%s", svc.Name, state, c.list(tx, svc))
		return
	}
	want, newest := c.wanted(tx, svc), 0
	slots := map[slotKey]bool{} // one that is updated start-first has two tasks
	for _, t := range tx.TasksByService(svc.Id) {
		done := svc.Job() && t.State == api.TaskComplete && t.Desired <= api.TaskRunning && t.Revision == svc.Revision
		if t.Desired <= api.TaskRunning && (!t.State.Terminal() || done) {
			slots[keyOf(t)] = true
			if t.State == api.TaskRunning || done {
				newest++
			}
		}
	}
	got := len(slots)
	if !strict {
		if !svc.Job() && got > want {
			c.bad("I3", "service %s has %d tasks that shall run, wants %d:%s", svc.Name, got, want, c.list(tx, svc))
		}
		if got < want && c.mustRun(svc) {
			c.bad("I3", "service %s has %d tasks that shall run, wants %d:%s", svc.Name, got, want, c.list(tx, svc))
		}
		return
	}
	if newest != want || got != want {
		c.bad("I3", "service %s (%s, revision %d): %d tasks run or are done, %d shall, %d are wanted:%s", svc.Name, svc.Id, svc.Revision, newest, got, want, c.list(tx, svc))
	}
}

// list tells a service's tasks.
func (c *Checker) list(tx store.ReadTx, svc *store.Service) string {
	out := ""
	for _, t := range tx.TasksByService(svc.Id) {
		out += fmt.Sprintf("\n      %s slot %d on %q, revision %d: %s, desired %s %s", t.ID, t.Slot, t.NodeID, t.Revision, t.State, t.Desired, t.Status.GetErr())
	}
	return out
}

// stuck: some task of the service waits for a node.
func (c *Checker) stuck(tx store.ReadTx, svc *store.Service) bool {
	return slices.ContainsFunc(tx.TasksByService(svc.Id), func(t *store.Task) bool { return t.State < api.TaskAssigned && t.Desired <= api.TaskRunning })
}

// mustRun: the restart policies of all revisions there are never give a slot up.
func (c *Checker) mustRun(svc *store.Service) bool {
	if svc.Job() {
		return false
	}
	for _, spec := range svc.Revs {
		p := spec.TaskTemplate.RestartPolicy
		if p != nil && (p.Condition != swarm.RestartPolicyConditionAny || (p.MaxAttempts != nil && *p.MaxAttempts > 0)) {
			return false
		}
	}
	return true
}

// wanted is how many tasks shall run, or be done.
func (c *Checker) wanted(tx store.ReadTx, svc *store.Service) int {
	switch m := svc.Spec.Mode; {
	case m.ReplicatedJob != nil:
		if m.ReplicatedJob.TotalCompletions == nil {
			return 1
		}
		return int(*m.ReplicatedJob.TotalCompletions)
	case m.Replicated != nil:
		if m.Replicated.Replicas == nil {
			return 1
		}
		return int(*m.Replicated.Replicas)
	}
	n := 0
	for _, rec := range tx.Nodes() {
		node := c.nodeOf(rec.Id)
		switch rec.Availability {
		case "active":
			if c.fits(svc.Spec, node) {
				n++
			}
		case "pause": // what is there stays, whatever it is
			if c.hasOn(svc, rec.Id) {
				n++
			}
		}
	}
	return n
}

func (c *Checker) hasOn(svc *store.Service, node string) bool {
	for _, t := range c.nodeOf(node).tasks {
		if t.ServiceID == svc.Id && t.Desired <= api.TaskRunning && (!ended(t.State) || (t.State == api.TaskComplete && svc.Job())) {
			return true
		}
	}
	return false
}

// machine is I9 and I15: what the store says of a node is what is there, and the reverse.
func (c *Checker) machine(tx store.ReadTx, m Machine) {
	really, secrets := map[string]bool{}, map[string]bool{}
	for _, id := range m.Running {
		really[id] = true
		if t := tx.Task(id); t == nil || t.NodeID != m.Node || t.State != api.TaskRunning {
			c.bad("I15", "a container of task %s runs on node %s, the store says %s", id, m.Node, stateOf(t))
		}
	}
	for _, id := range m.Kept {
		if tx.Task(id) == nil {
			c.bad("I15", "node %s keeps a container of task %s, which does not exist", m.Node, id)
		}
	}
	for _, t := range tx.TasksByNode(m.Node) {
		if t.State == api.TaskRunning && !really[t.ID] {
			c.bad("I15", "task %s is said to run on node %s, no container of it does", t.ID, m.Node)
		}
		svc := tx.Service(t.ServiceID)
		if svc == nil || svc.Revs[t.Revision] == nil {
			continue
		}
		for _, id := range store.DependencyIDs(svc.Revs[t.Revision]) {
			secrets[id] = true
		}
	}
	for _, id := range m.Secrets {
		if !secrets[id] {
			c.bad("I9", "node %s holds secret %s, which no task there needs", m.Node, id)
		}
	}
}

func stateOf(t *store.Task) string {
	if t == nil {
		return "nothing of it"
	}
	return fmt.Sprintf("%s on node %s", t.State, t.NodeID)
}

// Empty looks at a cluster whose services were all removed: nothing may be left, and everything be free.
func (c *Checker) Empty(tx store.ReadTx, machines []Machine) []Violation {
	c.found = nil
	for _, t := range tx.Tasks() {
		c.bad("I14", "task %s (%s on node %s, desired %s) is left of service %s", t.ID, t.State, t.NodeID, t.Desired, t.ServiceID)
	}
	for a, who := range c.held {
		c.bad("I14", "%s is still held by %s", a, who)
	}
	for _, m := range machines {
		c.machine(tx, m)
	}
	return c.found
}

// Overlap is told that a container was started beside another of the same slot, and says whether that was right: one of the two is on a
// node that was given up, or an update starts the new one first.
func (c *Checker) Overlap(started, other string) []Violation {
	c.found = nil
	a, b := c.tasks[started], c.tasks[other]
	if a == nil || b == nil {
		return nil // one of them is gone for the managers
	}
	if keyOf(a.Task) != keyOf(b.Task) {
		return nil
	}
	for _, s := range []*seen{a, b} {
		if n := c.nodes[s.NodeID]; n == nil || n.rec == nil || !n.down.IsZero() && n.down.After(s.placed) || s.State == api.TaskOrphaned || ended(s.State) {
			return nil
		}
	}
	if svc := c.specs[a.ServiceID]; svc == nil || svc.rec == nil || !svc.startFirst.IsZero() {
		return nil
	}
	c.bad("I4", "containers of tasks %s (%s on %s) and %s (%s on %s) of one slot run side by side", a.ID, a.State, a.NodeID, b.ID, b.State, b.NodeID)
	return c.found
}

// SlotMates lists the other tasks of a task's slot.
func (c *Checker) SlotMates(id string) []string {
	s := c.tasks[id]
	if s == nil {
		return nil
	}
	var out []string
	for other := range c.slotOf(keyOf(s.Task)).tasks {
		if other != id {
			out = append(out, other)
		}
	}
	slices.Sort(out)
	return out
}
