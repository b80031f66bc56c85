package store

import (
	"strings"

	"skein/manager/allocator"
	"skein/manager/api"
)

// state is everything that is replicated, with its indexes. It is changed by Apply and Restore only; every change is journaled, so that
// a transaction can be refused after part of it was done.
type state struct {
	j       *allocator.Journal
	alloc   *allocator.State
	version uint64 // Raft index of the newest entry
	time    int64  // its time

	cluster  *Cluster
	nodes    table[string, *Node]
	services table[string, *Service]
	networks table[string, *Network]
	tasks    table[string, *Task]
	deps     table[string, *Dependency]
	past     table[revKey, *api.PastRevision] // of the services, oldest first

	pastSize  map[string]int // bytes by service
	pastTotal int

	depNames     map[depName]string // → id
	serviceNames map[string]string  // name → id
	networkNames map[string]string
	slots        table[slotKey, *Task]
	onNode       table[pair, *Task]    // node, task
	usedBy       table[pair, struct{}] // network, service
	revisions    map[revKey]int        // number of tasks that refer to a revision

	dirty []Key // what the entry being applied changed
}

func newState() *state {
	j := &allocator.Journal{}
	return &state{
		j:            j,
		alloc:        allocator.New(j),
		nodes:        newTable[string, *Node](j, strings.Compare),
		services:     newTable[string, *Service](j, strings.Compare),
		networks:     newTable[string, *Network](j, strings.Compare),
		tasks:        newTable[string, *Task](j, strings.Compare),
		deps:         newTable[string, *Dependency](j, strings.Compare),
		past:         newTable[revKey, *api.PastRevision](j, compareRevision),
		pastSize:     map[string]int{},
		depNames:     map[depName]string{},
		serviceNames: map[string]string{},
		networkNames: map[string]string{},
		slots:        newTable[slotKey, *Task](j, compareSlot),
		onNode:       newTable[pair, *Task](j, comparePair),
		usedBy:       newTable[pair, struct{}](j, comparePair),
		revisions:    map[revKey]int{},
	}
}

func slotOf(t *Task) slotKey {
	k := slotKey{service: t.ServiceID, slot: t.Slot, gen: t.Generation}
	if t.Slot == 0 {
		k.node = t.NodeID
	}
	return k
}

func taskKey(t *Task) Key {
	return Key{Kind: KindTask, ID: t.ID, ServiceID: t.ServiceID, Slot: t.Slot, NodeID: t.NodeID}
}

// putTask stores a task in all indexes. A task's service, slot and generation never change, its node does once.
func (s *state) putTask(t *Task) {
	if old := s.tasks.get(t.ID); old == nil {
		k := revKey{t.ServiceID, t.Revision}
		allocator.Set(s.j, s.revisions, k, s.revisions[k]+1)
	}
	s.tasks.put(t.ID, t)
	s.slots.put(slotOf(t), t)
	if t.NodeID != "" {
		s.onNode.put(pair{t.NodeID, t.ID}, t)
	}
	s.dirty = append(s.dirty, taskKey(t))
}

// removeTask takes a task out of all indexes and drops its revision when nothing refers to it any more.
func (s *state) removeTask(t *Task) {
	s.tasks.del(t.ID)
	s.slots.del(slotOf(t))
	s.onNode.del(pair{t.NodeID, t.ID})
	s.dirty = append(s.dirty, taskKey(t))
	k := revKey{t.ServiceID, t.Revision}
	if n := s.revisions[k] - 1; n > 0 {
		allocator.Set(s.j, s.revisions, k, n)
		return
	}
	allocator.Unset(s.j, s.revisions, k)
	if svc := s.services.get(t.ServiceID); svc != nil && t.Revision != svc.Revision && t.Revision != svc.ServiceRecord.Previous {
		s.services.put(svc.Id, svc.withRevisions(func(n uint64) bool { return n != t.Revision }))
	}
}

// endTask stores a task that holds nothing any more.
func (s *state) endTask(t *Task, held bool, now int64) {
	if held {
		s.alloc.ReleaseTask(t.NodeID, grantOf(t), now)
	}
	s.putTask(t)
}

func grantOf(t *Task) allocator.TaskGrant {
	return allocator.TaskGrant{Attachments: t.Attachments, Gateway4: t.Gateway4, Gateway6: t.Gateway6, HostPorts: t.HostPorts}
}

// putService stores a service and its name and networks.
func (s *state) putService(v *Service) {
	if old := s.services.get(v.Id); old != nil {
		for _, id := range networkTargets(old.Spec) {
			s.usedBy.del(pair{id, v.Id})
		}
	}
	for _, id := range networkTargets(v.Spec) {
		s.usedBy.put(pair{id, v.Id}, struct{}{})
	}
	allocator.Set(s.j, s.serviceNames, v.Name, v.Id)
	s.services.put(v.Id, v)
	s.dirty = append(s.dirty, Key{Kind: KindService, ID: v.Id})
}

func (s *state) removeService(v *Service) {
	for _, id := range networkTargets(v.Spec) {
		s.usedBy.del(pair{id, v.Id})
	}
	allocator.Unset(s.j, s.serviceNames, v.Name)
	s.services.del(v.Id)
	s.dirty = append(s.dirty, Key{Kind: KindService, ID: v.Id})
}

func (s *state) tasksOfService(id string) []*Task {
	var out []*Task
	s.slots.from(slotKey{service: id}, func(k slotKey, t *Task) bool {
		if k.service != id {
			return false
		}
		out = append(out, t)
		return true
	})
	return out
}

func (s *state) tasksOfNode(id string) []*Task {
	var out []*Task
	s.onNode.from(pair{a: id}, func(k pair, t *Task) bool {
		if k.a != id {
			return false
		}
		out = append(out, t)
		return true
	})
	return out
}

func (s *state) tasksOfSlot(service string, slot uint64, node string) []*Task {
	if slot != 0 {
		node = ""
	}
	var out []*Task
	s.slots.from(slotKey{service: service, slot: slot, node: node}, func(k slotKey, t *Task) bool {
		if k.service != service || k.slot != slot || k.node != node {
			return false
		}
		out = append(out, t)
		return true
	})
	return out
}

func (s *state) servicesUsing(network string) []string {
	var out []string
	s.usedBy.from(pair{a: network}, func(k pair, _ struct{}) bool {
		if k.a != network {
			return false
		}
		out = append(out, k.b)
		return true
	})
	return out
}

func nextMeta(old *api.Meta, version uint64, now int64) *api.Meta {
	m := &api.Meta{Version: version, Created: now, Updated: now}
	if old != nil {
		m.Created = old.Created
	}
	return m
}
