package allocator

import (
	"cmp"
	"slices"

	"skein/manager/api"
)

// Generic resources are what nodes announce beside CPU and memory: named ones (gpu=GPU-1), of which each goes to one task, or a number of
// equal ones (ssd=3).

// GenericWish is how many of a kind a task reserves.
type GenericWish struct {
	Kind  string
	Count int64
}

type genericID struct{ node, kind, id string }

type genericKind struct{ node, kind string }

// genericUse is what is held. The maps hold no more than tasks do.
type genericUse struct {
	named map[genericID]string // task id
	count map[genericKind]int64
}

func newGenericUse() genericUse {
	return genericUse{named: map[genericID]string{}, count: map[genericKind]int64{}}
}

// ClaimGeneric gives a task what it reserves of what its node offers, or nothing: of named resources the first free ones in order of
// their ids.
func (s *State) ClaimGeneric(taskID, nodeID string, offer []*api.GenericResource, wishes []GenericWish) ([]*api.GenericResource, error) {
	var held []*api.GenericResource
	mark := s.j.Mark()
	for _, w := range wishes {
		g, err := s.claimGeneric(taskID, nodeID, offer, w)
		if err != nil {
			s.j.Rollback(mark)
			return nil, err
		}
		held = append(held, g)
	}
	return held, nil
}

func (s *State) claimGeneric(taskID, nodeID string, offer []*api.GenericResource, w GenericWish) (*api.GenericResource, error) {
	at := slices.IndexFunc(offer, func(g *api.GenericResource) bool { return g.Kind == w.Kind })
	if at < 0 {
		return nil, exhausted("insufficient resources on this node: it has no %s", w.Kind)
	}
	if len(offer[at].Ids) == 0 {
		k := genericKind{nodeID, w.Kind}
		if free := offer[at].Count - s.generic.count[k]; free < w.Count {
			return nil, exhausted("insufficient resources on this node: %d of its %d %s are free, the task reserves %d", max(free, 0), offer[at].Count, w.Kind, w.Count)
		}
		Set(s.j, s.generic.count, k, s.generic.count[k]+w.Count)
		return &api.GenericResource{Kind: w.Kind, Count: w.Count}, nil
	}
	got := &api.GenericResource{Kind: w.Kind}
	for _, id := range slices.SortedFunc(slices.Values(offer[at].Ids), cmp.Compare[string]) {
		k := genericID{nodeID, w.Kind, id}
		if _, taken := s.generic.named[k]; !taken && int64(len(got.Ids)) < w.Count {
			Set(s.j, s.generic.named, k, taskID)
			got.Ids = append(got.Ids, id)
		}
	}
	if free := int64(len(got.Ids)); free < w.Count {
		return nil, exhausted("insufficient resources on this node: %d of its %d %s are free, the task reserves %d", free, len(offer[at].Ids), w.Kind, w.Count)
	}
	return got, nil
}

// ReleaseGeneric frees what an ended task held.
func (s *State) ReleaseGeneric(nodeID string, held []*api.GenericResource) {
	for _, g := range held {
		for _, id := range g.Ids {
			Unset(s.j, s.generic.named, genericID{nodeID, g.Kind, id})
		}
		if len(g.Ids) > 0 {
			continue
		}
		k := genericKind{nodeID, g.Kind}
		if left := s.generic.count[k] - g.Count; left > 0 {
			Set(s.j, s.generic.count, k, left)
		} else {
			Unset(s.j, s.generic.count, k)
		}
	}
}

// RestoreGeneric takes over what a living task's record says it holds.
func (s *State) RestoreGeneric(taskID, nodeID string, held []*api.GenericResource) error {
	for _, g := range held {
		for _, id := range g.Ids {
			k := genericID{nodeID, g.Kind, id}
			if other, taken := s.generic.named[k]; taken {
				return dataLoss("task %s: %s %s of node %s is held by task %s", taskID, g.Kind, id, nodeID, other)
			}
			Set(s.j, s.generic.named, k, taskID)
		}
		if len(g.Ids) == 0 {
			k := genericKind{nodeID, g.Kind}
			Set(s.j, s.generic.count, k, s.generic.count[k]+g.Count)
		}
	}
	return nil
}
