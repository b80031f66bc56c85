package store

import (
	"skein/manager/api"
)

// What the Docker API shows of a task that waits.
const pendingMessage = "pending task scheduling"

// touch returns a copy of a task with the version and time of the entry.
func (s *state) touch(t *Task) *Task {
	c := *t
	c.Version, c.Updated = s.version, s.time
	return &c
}

// createTasks makes the tasks of one revision. Tasks that name a node (global services) are placed at once; one for which that
// node has no room waits there with the reason.
func (s *state) createTasks(c *api.TaskCreate) error {
	svc := s.services.get(c.ServiceId)
	if svc == nil {
		return api.Errorf(errNotFound, "service %s not found", c.ServiceId)
	}
	if svc.Revs[c.Revision] == nil {
		return api.Errorf(errConflict, "service %s has no revision %d any more: it was updated meanwhile", svc.Name, c.Revision)
	}
	for _, it := range c.Items {
		if err := s.createTask(svc, c.Revision, it); err != nil {
			return err
		}
	}
	return nil
}

func (s *state) createTask(svc *Service, revision uint64, it *api.TaskCreate_Item) error {
	if it.Slot == 0 && it.NodeId == "" {
		return api.Errorf(errInvalid, "service %s: a task needs a slot or a node", svc.Name)
	}
	if it.NodeId != "" && s.nodes.get(it.NodeId) == nil {
		return api.Errorf(errNotFound, "service %s: node %s not found", svc.Name, it.NodeId)
	}
	idNode := it.NodeId
	if it.Slot != 0 {
		idNode = ""
	}
	t := &Task{
		ID: api.TaskID(svc.Id, it.Slot, idNode, it.Generation), ServiceID: svc.Id, Slot: it.Slot, Generation: it.Generation,
		Revision: revision, NodeID: it.NodeId, State: api.TaskPending, Desired: api.TaskState(it.Desired),
		Version: s.version, Created: s.time, Updated: s.time, StartAfter: it.StartAfter,
		Restarts: it.Restarts,
	}
	if t.Desired == api.TaskNew {
		t.Desired = api.TaskRunning
	}
	if ts := s.tasksOfSlot(svc.Id, it.Slot, it.NodeId); len(ts) > 0 && ts[len(ts)-1].Generation >= it.Generation {
		return api.Errorf(errConflict, "service %s: slot %d%s has generation %d already", svc.Name, it.Slot, idNode, ts[len(ts)-1].Generation)
	}
	if t.NodeID == "" {
		s.putTask(t)
		return nil
	}
	if placed, err := s.place(t, t.NodeID); err == nil {
		t = placed
	} else {
		t.Status = s.waiting(t, err.Error())
	}
	s.putTask(t)
	return nil
}

func (s *state) waiting(t *Task, reason string) *api.TaskReport {
	return &api.TaskReport{TaskId: t.ID, State: uint32(t.State), Time: s.time, Message: pendingMessage, Err: reason}
}

// place gives a task its node and all it needs there. It stores nothing.
func (s *state) place(t *Task, node string) (*Task, error) {
	svc := s.services.get(t.ServiceID)
	if svc == nil || svc.Revs[t.Revision] == nil {
		return nil, api.Errorf(errNotFound, "service %s or its revision %d is gone", t.ServiceID, t.Revision)
	}
	internal := func(id string) bool { return s.networks.get(id).GetInternal() }
	g, err := s.alloc.PlaceTask(taskRequest(t, node, svc.Revs[t.Revision], internal))
	if err != nil {
		return nil, err
	}
	c := s.touch(t)
	c.NodeID, c.State, c.Status = node, api.TaskAssigned, nil
	c.Attachments, c.Gateway4, c.Gateway6, c.HostPorts = g.Attachments, g.Gateway4, g.Gateway6, g.HostPorts
	return c, nil
}

// placeTasks places each task or refuses it alone. What could not be allocated is said on the task.
func (s *state) placeTasks(p *api.TaskPlacement) ([]ItemError, error) {
	if len(p.NodeIds) != len(p.TaskIds) || (len(p.Refused) != 0 && len(p.Refused) != len(p.TaskIds)) {
		return nil, api.Errorf(errInvalid, "placement of %d tasks names %d nodes and %d reasons", len(p.TaskIds), len(p.NodeIds), len(p.Refused))
	}
	var refused []ItemError
	for i, id := range p.TaskIds {
		reason := ""
		if len(p.Refused) > 0 {
			reason = p.Refused[i]
		}
		if err := s.placeItem(id, p.NodeIds[i], reason); err != nil {
			refused = append(refused, ItemError{id, err})
		}
	}
	return refused, nil
}

func (s *state) placeItem(id, node, reason string) error {
	t := s.tasks.get(id)
	switch {
	case t == nil:
		return api.Errorf(errNotFound, "task %s not found", id)
	case t.State >= api.TaskAssigned:
		return api.Errorf(errConflict, "task %s is placed on node %s already", id, t.NodeID)
	case t.Desired > api.TaskRunning:
		return api.Errorf(errConflict, "task %s is not wanted any more", id)
	case reason != "":
		s.explain(t, reason)
		return nil
	case t.NodeID != "" && t.NodeID != node:
		return api.Errorf(errConflict, "task %s belongs to node %s", id, t.NodeID)
	case s.nodes.get(node) == nil:
		return api.Errorf(errNotFound, "node %s not found", node)
	}
	placed, err := s.place(t, node)
	if err != nil {
		s.explain(t, err.Error())
		return err
	}
	s.putTask(placed)
	return nil
}

// explain says on a waiting task why it waits; the same reason twice changes nothing.
func (s *state) explain(t *Task, reason string) {
	if t.Status.GetErr() == reason {
		return
	}
	c := s.touch(t)
	c.Status = s.waiting(t, reason)
	s.putTask(c)
}

// reportTask takes an observation in. The state never goes back; an ended task frees what it held.
func (s *state) reportTask(r *api.TaskReport) error {
	t := s.tasks.get(r.TaskId)
	state := api.TaskState(r.State)
	switch {
	case t == nil:
		return api.Errorf(errNotFound, "task %s not found", r.TaskId)
	case state.String() == "unknown":
		return api.Errorf(errInvalid, "task %s: state %d is not known", r.TaskId, r.State)
	case t.State < api.TaskAssigned:
		return api.Errorf(errDenied, "task %s is not placed on any node: report of node %s refused", t.ID, r.NodeId)
	case t.NodeID != r.NodeId:
		return api.Errorf(errDenied, "task %s belongs to node %s: report of node %s refused", t.ID, t.NodeID, r.NodeId)
	case state < t.State || (state == t.State && sameReport(t.Status, r)):
		return nil
	}
	c := s.touch(t)
	c.State, c.Status = state, r
	if state == api.TaskRunning && c.Started == 0 {
		c.Started = s.time
	}
	if t.Live() && !c.Live() {
		s.endTask(c, true, s.time)
		return nil
	}
	s.putTask(c)
	return nil
}

// sameReport reports whether b says nothing that a did not say; the time alone is nothing new.
func sameReport(a, b *api.TaskReport) bool {
	if a == nil || len(a.Ports) != len(b.Ports) {
		return false
	}
	for i, p := range a.Ports {
		if q := b.Ports[i]; p.Published != q.Published || p.Target != q.Target || p.Protocol != q.Protocol || p.Mode != q.Mode {
			return false
		}
	}
	return a.State == b.State && a.Message == b.Message && a.Err == b.Err && a.ContainerId == b.ContainerId && a.Pid == b.Pid && a.ExitCode == b.ExitCode
}

func (s *state) orphan(t *Task, why string) {
	c := s.touch(t)
	c.State = api.TaskOrphaned
	c.Status = &api.TaskReport{TaskId: t.ID, State: uint32(api.TaskOrphaned), Time: s.time, Message: why, NodeId: t.NodeID}
	s.endTask(c, t.Live(), s.time)
}

// desireTasks raises what tasks shall reach. A task that is gone, or wanted no longer anyway, needs nothing.
func (s *state) desireTasks(d *api.TaskDesire) error {
	desired := api.TaskState(d.Desired)
	if desired.String() == "unknown" {
		return api.Errorf(errInvalid, "desired state %d is not known", d.Desired)
	}
	for _, id := range d.TaskIds {
		if t := s.tasks.get(id); t != nil && desired > t.Desired {
			c := s.touch(t)
			c.Desired = desired
			s.putTask(c)
		}
	}
	return nil
}

// deleteTasks forgets tasks that ended or never started; one that holds its node's resources is refused alone.
func (s *state) deleteTasks(d *api.TaskDelete) ([]ItemError, error) {
	var refused []ItemError
	for _, id := range d.TaskIds {
		t := s.tasks.get(id)
		switch {
		case t == nil:
		case t.Live():
			err := api.Errorf(errPrecondition, "task %s is %s on node %s: it must end before it can be deleted", id, t.State, t.NodeID)
			refused = append(refused, ItemError{id, err})
		default:
			s.removeTask(t)
		}
	}
	return refused, nil
}
