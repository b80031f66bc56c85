package store

import (
	"skein/manager/allocator"
	"skein/manager/api"
)

// What the Docker API shows of a task that waits.
const pendingMessage = "pending task scheduling"

// touch is a task's row to change, with the version and time of the entry.
func (s *state) touch(id rowID) *taskRow {
	r := s.tasks.mut(id)
	r.version, r.updated = s.version, s.time
	return r
}

// createTasks makes the tasks of one revision. Tasks that name a node (global services) are placed at once, unless the placement controller
// has to see first whether what they reserve is there; one for which that node has no room waits there with the reason.
func (s *state) createTasks(c *api.TaskCreate) error {
	svc, err := s.creating(c.ServiceId, c.Revision)
	if err != nil {
		return err
	}
	for _, it := range c.Items {
		if err := s.createTask(svc, c.Revision, it, c.Defer); err != nil {
			return err
		}
	}
	return nil
}

// creating is the service of which tasks of a revision are to be made.
func (s *state) creating(service string, revision uint64) (*Service, error) {
	svc := s.services.get(service)
	if svc == nil {
		return nil, api.Errorf(errNotFound, "service %s not found", service)
	}
	if svc.Revs[revision] == nil {
		return nil, api.Errorf(errConflict, "service %s has no revision %d any more: it was updated meanwhile", svc.Name, revision)
	}
	return svc, nil
}

func (s *state) createTask(svc *Service, revision uint64, it *api.TaskCreate_Item, later bool) error {
	slot, node, generation, desired := it.Slot, it.NodeId, it.Generation, it.Desired
	if slot == 0 && node == "" {
		return api.Errorf(errInvalid, "service %s: a task needs a slot or a node", svc.Name)
	}
	if node != "" && !s.alloc.HasNode(node) {
		return api.Errorf(errNotFound, "service %s: node %s not found", svc.Name, node)
	}
	idNode := node
	if slot != 0 {
		idNode = ""
	}
	if t := s.tasks.lists.newest(svc.Id, slot, node); t != 0 && s.tasks.row(t).generation >= generation {
		return api.Errorf(errConflict, "service %s: slot %d%s has generation %d already", svc.Name, slot, idNode, s.tasks.row(t).generation)
	}
	if desired == uint32(api.TaskNew) {
		desired = uint32(api.TaskRunning)
	}
	id := api.TaskIDOf(svc.Id, slot, idNode, generation)
	t := s.tasks.create(taskRow{
		idTop: id.Top, idHi: id.Hi, idLo: id.Lo, slot: slot, generation: generation, revision: uint32(revision), state: uint16(api.TaskPending),
		desired: desired, version: s.version, created: s.time, updated: s.time,
	}, svc.Id, s.tasks.lists.node(node))
	if it.StartAfter != 0 || it.Restarts != nil {
		s.side = s.tasks.forms.appendFixed(s.side[:0], it.StartAfter, extraOf(&api.TaskRecord{Restarts: it.Restarts}), nil)
		s.tasks.setSide(t, s.side)
	}
	if node != "" && !(later && s.level() >= api.LevelPlacement) {
		if err := s.place(t, node); err != nil {
			s.setStatus(t, s.waiting(t, err.Error()), nil)
		}
	}
	s.changed(t)
	return nil
}

func (s *state) waiting(id rowID, reason string) *api.TaskReport {
	r := s.tasks.row(id)
	return &api.TaskReport{TaskId: r.id().String(), State: uint32(r.state), Time: s.time, Message: pendingMessage, Err: reason}
}

// setStatus replaces what was said of a task; its state is set before. container, if there is one, stands for the report's container id.
func (s *state) setStatus(id rowID, r *api.TaskReport, container []byte) {
	row := s.tasks.row(id)
	d := readSide(s.tasks.sideOf(id))
	s.side = append(append(s.side[:0], d.flags&^(sideStatus|sideRaw)), d.fixed...)
	s.side = appendStatus(s.side, row, s.tasks.lists.nodes.id[row.node], r, container)
	if len(s.side) == 1 {
		s.side = s.side[:0]
	}
	s.tasks.setSide(id, s.side)
}

// request is what tasks of a revision need; nil if the revision is gone.
func (s *state) request(service string, revision uint64) *allocator.TaskRequest {
	k := revKey{service, revision}
	if r := s.requests[k]; r != nil {
		return r
	}
	svc := s.services.get(service)
	if svc == nil || svc.Revs[revision] == nil {
		return nil
	}
	r := taskRequest(svc.Revs[revision], func(id string) bool { return s.networks.get(id).GetInternal() })
	s.requests[k] = r
	return r
}

// place gives a task its node and all it needs there.
func (s *state) place(t rowID, node string) error {
	r := s.tasks.row(t)
	service := s.tasks.lists.services.id[r.service]
	known := s.request(service, uint64(r.revision))
	if known == nil {
		return api.Errorf(errNotFound, "service %s or its revision %d is gone", service, r.revision)
	}
	req := *known
	req.NodeID = node
	if len(req.HostPorts) > 0 {
		req.TaskID = r.id().String()
	}
	mark := s.j.Mark()
	if err := s.claimSpecial(t, service, node, known); err != nil {
		s.j.Rollback(mark)
		return err
	}
	if err := s.alloc.PlaceTask(&req, &s.grant); err != nil {
		s.j.Rollback(mark)
		return err
	}
	number := s.tasks.lists.node(node)
	r = s.touch(t)
	r.state = uint16(api.TaskAssigned)
	s.tasks.place(t, number)
	d := readSide(s.tasks.sideOf(t))
	s.side = s.tasks.forms.appendFixed(s.side[:0], d.startAfter, d.extra, &s.grant)
	if len(s.side) == 1 {
		s.side = s.side[:0]
	}
	s.tasks.setSide(t, s.side)
	return nil
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
		t := s.tasks.findText(id)
		if t == 0 {
			refused = append(refused, ItemError{id, api.Errorf(errNotFound, "task %s not found", id)})
		} else if err := s.placeItem(t, p.NodeIds[i], reason); err != nil {
			refused = append(refused, ItemError{id, err})
		}
	}
	return refused, nil
}

func (s *state) placeItem(t rowID, node, reason string) error {
	r := s.tasks.row(t)
	switch own := s.tasks.lists.nodes.id[r.node]; {
	case api.TaskState(r.state) >= api.TaskAssigned:
		return api.Errorf(errConflict, "task %s is placed on node %s already", r.id(), own)
	case api.TaskState(r.desired) > api.TaskRunning:
		return api.Errorf(errConflict, "task %s is not wanted any more", r.id())
	case reason != "":
		s.explain(t, reason)
		return nil
	case own != "" && own != node:
		return api.Errorf(errConflict, "task %s belongs to node %s", r.id(), own)
	case !s.alloc.HasNode(node):
		return api.Errorf(errNotFound, "node %s not found", node)
	}
	if err := s.place(t, node); err != nil {
		s.explain(t, err.Error())
		return err
	}
	s.changed(t)
	return nil
}

// explain says on a waiting task why it waits; the same reason twice changes nothing.
func (s *state) explain(t rowID, reason string) {
	if s.status(t).GetErr() == reason {
		return
	}
	s.touch(t)
	s.setStatus(t, s.waiting(t, reason), nil)
	s.changed(t)
}

// status is what was said of a task, nil if nothing.
func (s *state) status(t rowID) *api.TaskReport {
	d := readSide(s.tasks.sideOf(t))
	if d.flags&sideStatus == 0 {
		return nil
	}
	r, row := &api.TaskReport{}, s.tasks.row(t)
	if err := readStatus(r, d, row, row.id().String(), s.tasks.lists.nodes.id[row.node], plainText); err != nil {
		panic(err) // it was encoded here
	}
	return r
}

// reportTask takes an observation in. The state never goes back; an ended task frees what it held.
func (s *state) reportTask(r *api.TaskReport) error {
	t := s.tasks.findText(r.TaskId)
	if t == 0 {
		return api.Errorf(errNotFound, "task %s not found", r.TaskId)
	}
	return s.report(t, r, nil)
}

// report takes what was said of a task. container, if there is one, stands for the report's container id.
func (s *state) report(t rowID, r *api.TaskReport, container []byte) error {
	row := s.tasks.row(t)
	state, before := api.TaskState(r.State), api.TaskState(row.state)
	switch own := s.tasks.lists.nodes.id[row.node]; {
	case state.String() == "unknown":
		return api.Errorf(errInvalid, "task %s: state %d is not known", row.id(), r.State)
	case before < api.TaskAssigned:
		return api.Errorf(errDenied, "task %s is not placed on any node: report of node %s refused", row.id(), r.NodeId)
	case own != r.NodeId:
		return api.Errorf(errDenied, "task %s belongs to node %s: report of node %s refused", row.id(), own, r.NodeId)
	case state < before || (state == before && sameReport(s.status(t), r, container)):
		return nil
	}
	s.observe(t, r, container)
	return nil
}

// observe stores what was said of a task, and with it its state.
func (s *state) observe(t rowID, r *api.TaskReport, container []byte) {
	row := s.touch(t)
	held := row.live()
	row.state = uint16(r.State)
	if api.TaskState(r.State) == api.TaskRunning && row.started == 0 {
		row.started = s.time
	}
	s.setStatus(t, r, container)
	if held && !row.live() {
		s.release(t, s.time)
	}
	s.changed(t)
}

// sameReport reports whether b says nothing that a did not say; the time alone is nothing new.
func sameReport(a, b *api.TaskReport, container []byte) bool {
	if a == nil || len(a.Ports) != len(b.Ports) {
		return false
	}
	for i, p := range a.Ports {
		if q := b.Ports[i]; p.Published != q.Published || p.Target != q.Target || p.Protocol != q.Protocol || p.Mode != q.Mode {
			return false
		}
	}
	id := b.ContainerId
	if len(container) > 0 {
		id = plainText(container, nil)
	}
	return a.State == b.State && a.Message == b.Message && a.Err == b.Err && a.ContainerId == id && a.Pid == b.Pid && a.ExitCode == b.ExitCode
}

func (s *state) orphan(t rowID, why string) {
	row := s.tasks.row(t)
	s.observe(t, &api.TaskReport{TaskId: row.id().String(), State: uint32(api.TaskOrphaned), Time: s.time, Message: why,
		NodeId: s.tasks.lists.nodes.id[row.node]}, nil)
}

// desireTasks raises what tasks shall reach. A task that is gone, or wanted no longer anyway, needs nothing.
func (s *state) desireTasks(d *api.TaskDesire) error {
	if err := checkDesired(d.Desired); err != nil {
		return err
	}
	for _, id := range d.TaskIds {
		if t := s.tasks.findText(id); t != 0 {
			if d.Reason != "" && s.level() >= api.LevelPlacement && d.Desired > s.tasks.row(t).desired {
				s.changeExtra(id, func(x *api.TaskExtra) { x.Reason = d.Reason })
			}
			s.desire(t, d.Desired)
		}
	}
	return nil
}

func checkDesired(desired uint32) error {
	if api.TaskState(desired).String() == "unknown" {
		return api.Errorf(errInvalid, "desired state %d is not known", desired)
	}
	return nil
}

func (s *state) desire(t rowID, desired uint32) {
	if desired > s.tasks.row(t).desired {
		s.touch(t).desired = desired
		s.changed(t)
	}
}

// deleteTasks forgets tasks that ended or never started; one that holds its node's resources is refused alone.
func (s *state) deleteTasks(d *api.TaskDelete) ([]ItemError, error) {
	var refused []ItemError
	for _, id := range d.TaskIds {
		if t := s.tasks.findText(id); t != 0 {
			if err := s.deleteTask(t); err != nil {
				refused = append(refused, ItemError{id, err})
			}
		}
	}
	return refused, nil
}

func (s *state) deleteTask(t rowID) error {
	if r := s.tasks.row(t); r.live() {
		return api.Errorf(errPrecondition, "task %s is %s on node %s: it must end before it can be deleted", r.id(), api.TaskState(r.state),
			s.tasks.lists.nodes.id[r.node])
	}
	s.removeTask(t)
	return nil
}
