package store

import (
	"encoding/json"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/allocator"
	"skein/manager/api"
)

// extra is the table of what only few tasks have: generic resources, that they are to move, why they were told to end. An entry goes with
// its task.

// changeExtra stores a changed copy of a task's entry.
func (s *state) changeExtra(id string, change func(*api.TaskExtra)) {
	x := &api.TaskExtra{TaskId: id}
	if old := s.extra.get(id); old != nil {
		x = proto.Clone(old).(*api.TaskExtra)
	}
	change(x)
	if len(x.Generic) == 0 && !x.Moving && x.Reason == "" {
		s.extra.del(id)
		return
	}
	s.extra.put(id, x)
}

// TaskExtra is what the task has beside what every task has, nil for most.
func (v view) TaskExtra(id string) *api.TaskExtra { return v.s.extra.get(id) }

// genericWishes are the generic resources that tasks of a spec reserve.
func genericWishes(spec *swarm.ServiceSpec) []allocator.GenericWish {
	r := spec.TaskTemplate.Resources
	if r == nil || r.Reservations == nil {
		return nil
	}
	var out []allocator.GenericWish
	for _, g := range r.Reservations.GenericResources {
		if d := g.DiscreteResourceSpec; d != nil && d.Value > 0 {
			out = append(out, allocator.GenericWish{Kind: d.Kind, Count: d.Value})
		}
	}
	return out
}

// GenericOffer is what a node announced: the ids of named resources, the number of those without names. A description that cannot be read
// offers nothing.
func GenericOffer(n *Node) []*api.GenericResource {
	var d swarm.NodeDescription
	_ = json.Unmarshal(n.DescriptionJson, &d)
	var out []*api.GenericResource
	kind := func(name string) *api.GenericResource {
		for _, g := range out {
			if g.Kind == name {
				return g
			}
		}
		out = append(out, &api.GenericResource{Kind: name})
		return out[len(out)-1]
	}
	for _, g := range d.Resources.GenericResources {
		switch {
		case g.NamedResourceSpec != nil:
			k := kind(g.NamedResourceSpec.Kind)
			k.Ids = append(k.Ids, g.NamedResourceSpec.Value)
		case g.DiscreteResourceSpec != nil:
			kind(g.DiscreteResourceSpec.Kind).Count += g.DiscreteResourceSpec.Value
		}
	}
	return out
}

// claimSpecial gives a task what only few ask for: generic resources, a home for its volumes. Refused, the caller goes back to where it was.
func (s *state) claimSpecial(t rowID, service, node string, req *allocator.TaskRequest) error {
	if len(req.Generic)+len(req.Volumes) == 0 || s.level() < api.LevelPlacement {
		return nil
	}
	id, slot := s.tasks.row(t).id().String(), s.tasks.row(t).slot
	held, err := s.alloc.ClaimGeneric(id, node, GenericOffer(s.nodes.get(node)), req.Generic)
	if err != nil {
		return err
	}
	if len(held) > 0 {
		s.changeExtra(id, func(x *api.TaskExtra) { x.Generic = held })
	}
	if slot == 0 || len(req.Volumes) == 0 {
		return nil
	}
	return s.settle(service, slot, node, req.Volumes)
}

// freeGeneric takes back what a task holds of its node's generic resources.
func (s *state) freeGeneric(t rowID) {
	if s.extra.tree.Len() == 0 {
		return
	}
	row := s.tasks.row(t)
	id := row.id().String()
	if x := s.extra.get(id); len(x.GetGeneric()) > 0 {
		s.alloc.ReleaseGeneric(s.tasks.lists.nodes.id[row.node], x.Generic)
		s.changeExtra(id, func(x *api.TaskExtra) { x.Generic = nil })
	}
}

// dropExtra forgets the entry of a task that goes.
func (s *state) dropExtra(r *taskRow) {
	if s.extra.tree.Len() > 0 {
		s.extra.del(r.id().String())
	}
}

// moveTasks marks running tasks as to be replaced elsewhere. One that is gone or told to end needs nothing.
func (s *state) moveTasks(m *api.TaskMove) error {
	if s.level() < api.LevelPlacement {
		return api.Errorf(errPrecondition, "tasks cannot move before all managers run this version of Skein: the cluster is at feature level %d, this needs %d", s.level(), api.LevelPlacement)
	}
	for _, id := range m.TaskIds {
		t := s.tasks.findText(id)
		if t == 0 {
			continue
		}
		if r := s.tasks.row(t); !r.live() || api.TaskState(r.desired) > api.TaskRunning || s.extra.get(id).GetMoving() {
			continue
		}
		s.changeExtra(id, func(x *api.TaskExtra) { x.Moving, x.Reason = true, m.Reason })
		s.touch(t)
		s.changed(t)
	}
	return nil
}

// loadExtra takes an entry of a snapshot, whose task was there before it.
func (s *state) loadExtra(x *api.TaskExtra) error {
	t := s.tasks.findText(x.TaskId)
	if t == 0 {
		return damaged("generic resources of task %s, which is not there", x.TaskId)
	}
	s.extra.put(x.TaskId, x)
	r := s.tasks.row(t)
	if !r.live() {
		return nil
	}
	return s.alloc.RestoreGeneric(x.TaskId, s.tasks.lists.nodes.id[r.node], x.Generic)
}
