package store

import (
	"math"

	"skein/manager/api"
)

// Packed kinds of changes say what plain ones say in a few bytes a task. Each is a kind of its own, from api.LevelPacked.

// needs refuses a kind of change that the cluster has not agreed on yet.
func (s *state) needs(level uint32) error {
	if s.level() < level {
		return api.Errorf(errPrecondition, "change of a kind of feature level %d: the cluster is at %d", level, s.level())
	}
	return nil
}

// slots walks through the tasks that runs name: f gets each one's slot, or its node's index and id, and its generation.
func (s *state) slots(r *api.TaskRuns, f func(slot uint64, node string, generation uint32) error) error {
	if len(r.GetRuns())%3 != 0 {
		return api.Errorf(errInvalid, "tasks of service %s: %d numbers of runs, want three each", r.GetServiceId(), len(r.GetRuns()))
	}
	slot, generation, nodes := int64(0), int64(0), r.GetByNode()
	for runs := r.GetRuns(); len(runs) > 0; runs = runs[3:] {
		slot, generation = slot+runs[0], generation+runs[2]
		count := runs[1]
		switch {
		case slot < 0 || count < 0 || count > maxRun || generation < 0 || generation > math.MaxUint32:
			return api.Errorf(errInvalid, "tasks of service %s: run of %d at slot %d, generation %d is out of bounds", r.ServiceId, count, slot, generation)
		case slot == 0:
			if count > int64(len(nodes)) {
				return api.Errorf(errInvalid, "tasks of service %s: %d by node, only %d nodes named", r.ServiceId, count, len(nodes))
			}
			for _, n := range nodes[:count] {
				if err := f(0, s.alloc.NodeAt(n), uint32(generation)); err != nil {
					return err
				}
			}
			nodes = nodes[count:]
		default:
			for range count {
				if err := f(uint64(slot), "", uint32(generation)); err != nil {
					return err
				}
				slot++
			}
		}
	}
	return nil
}

// maxRun bounds what a few damaged bytes can ask for.
const maxRun = 1 << 20

// at finds a task by its place.
func (s *state) at(service string, slot uint64, node string, generation uint32) (found rowID) {
	for id := s.tasks.lists.newest(service, slot, node); id != 0; id = s.tasks.row(id).older {
		if s.tasks.row(id).generation == generation {
			return id
		}
	}
	return 0
}

func (s *state) createPacked(c *api.PackedCreate) error {
	if err := s.needs(api.LevelPacked); err != nil {
		return err
	}
	svc, err := s.creating(c.Tasks.GetServiceId(), c.Revision)
	if err != nil {
		return err
	}
	it := &api.TaskCreate_Item{Desired: c.Desired}
	return s.slots(c.Tasks, func(slot uint64, node string, generation uint32) error {
		it.Slot, it.NodeId, it.Generation = slot, node, generation
		return s.createTask(svc, c.Revision, it, false)
	})
}

// placePacked places each task or refuses it alone.
func (s *state) placePacked(p *api.PackedPlacement) ([]ItemError, error) {
	if err := s.needs(api.LevelPacked); err != nil {
		return nil, err
	}
	var refused []ItemError
	i, reasons := 0, p.Reasons
	service := p.Tasks.GetServiceId()
	err := s.slots(p.Tasks, func(slot uint64, own string, generation uint32) error {
		if i >= len(p.Nodes) {
			return api.Errorf(errInvalid, "placement of more than %d tasks names %d nodes", i, len(p.Nodes))
		}
		index, reason := p.Nodes[i], ""
		if i++; index == 0 {
			if len(reasons) == 0 || int(reasons[0]) >= len(p.Texts) {
				return api.Errorf(errInvalid, "placement: task %d has neither node nor reason", i)
			}
			reason, reasons = p.Texts[reasons[0]], reasons[1:]
		}
		err := s.placeAt(service, slot, own, generation, s.alloc.NodeAt(index), reason)
		if err != nil {
			refused = append(refused, ItemError{api.TaskID(service, slot, own, generation), err})
		}
		return nil
	})
	if err == nil && i != len(p.Nodes) {
		err = api.Errorf(errInvalid, "placement of %d tasks names %d nodes", i, len(p.Nodes))
	}
	return refused, err
}

func (s *state) placeAt(service string, slot uint64, own string, generation uint32, node, reason string) error {
	t := s.at(service, slot, own, generation)
	if t == 0 {
		return api.Errorf(errNotFound, "task %s not found", api.TaskID(service, slot, own, generation))
	}
	return s.placeItem(t, node, reason)
}

// named calls f for the tasks that are there of those that runs name.
func (s *state) named(all []*api.TaskRuns, f func(rowID)) error {
	for _, runs := range all {
		err := s.slots(runs, func(slot uint64, node string, generation uint32) error {
			if t := s.at(runs.GetServiceId(), slot, node, generation); t != 0 {
				f(t)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *state) deletePacked(d *api.PackedDelete) ([]ItemError, error) {
	if err := s.needs(api.LevelPacked); err != nil {
		return nil, err
	}
	var refused []ItemError
	err := s.named(d.Tasks, func(t rowID) {
		id := s.tasks.row(t).id()
		if err := s.deleteTask(t); err != nil {
			refused = append(refused, ItemError{id.String(), err})
		}
	})
	return refused, err
}

func (s *state) desirePacked(d *api.PackedDesire) error {
	if err := s.needs(api.LevelPacked); err != nil {
		return err
	}
	if err := checkDesired(d.Desired); err != nil {
		return err
	}
	return s.named(d.Tasks, func(t rowID) { s.desire(t, d.Desired) })
}

// reportPacked takes many observations in; each may be refused alone.
func (s *state) reportPacked(p *api.PackedReports) ([]ItemError, error) {
	if err := s.needs(api.LevelPacked); err != nil {
		return nil, err
	}
	c, err := newReportColumns(p)
	if err != nil {
		return nil, err
	}
	var refused []ItemError
	for i := range c.n {
		id, r, container := c.next(i)
		t := s.tasks.find(id)
		r.NodeId = s.alloc.NodeAt(c.node)
		if t == 0 {
			err = api.Errorf(errNotFound, "task %s not found", id)
		} else {
			err = s.report(t, r, container)
		}
		if err != nil {
			refused = append(refused, ItemError{id.String(), err})
		}
	}
	return refused, nil
}
