package store

import (
	"strings"

	"google.golang.org/protobuf/proto"

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

	cluster     *Cluster
	nodes       table[string, *Node]
	services    table[string, *Service]
	networks    table[string, *Network]
	tasks       *taskTable
	deps        table[string, *Dependency]
	past        table[revKey, *api.PastRevision] // of the services, oldest first
	extra       table[string, *api.TaskExtra]    // by task
	homes       table[homeKey, string]           // node ids
	attachments table[string, *api.AttachmentRecord]

	pastSize  map[string]int // bytes by service
	pastTotal int

	depNames     map[depName]string // → id
	serviceNames map[string]string  // name → id
	networkNames map[string]string
	usedBy       table[pair, struct{}] // network, service
	attachedTo   table[pair, struct{}] // network, or node behind nodePair; container

	requests map[revKey]*allocator.TaskRequest // what tasks of a revision need; forgotten when services or networks change
	grant    allocator.TaskGrant               // scratch
	side     []byte                            // scratch

	dirty []dirtyKey // what the entry being applied changed
}

func newState() *state {
	j := &allocator.Journal{}
	s := &state{
		j:            j,
		nodes:        newTable[string, *Node](j, strings.Compare),
		services:     newTable[string, *Service](j, strings.Compare),
		networks:     newTable[string, *Network](j, strings.Compare),
		tasks:        newTaskTable(),
		deps:         newTable[string, *Dependency](j, strings.Compare),
		past:         newTable[revKey, *api.PastRevision](j, compareRevision),
		pastSize:     map[string]int{},
		extra:        newTable[string, *api.TaskExtra](j, strings.Compare),
		homes:        newTable[homeKey, string](j, compareHome),
		attachments:  newTable[string, *api.AttachmentRecord](j, strings.Compare),
		attachedTo:   newTable[pair, struct{}](j, comparePair),
		depNames:     map[depName]string{},
		serviceNames: map[string]string{},
		networkNames: map[string]string{},
		usedBy:       newTable[pair, struct{}](j, comparePair),
		requests:     map[revKey]*allocator.TaskRequest{},
	}
	s.alloc = allocator.New(j, s.growNetwork, s.growNode)
	return s
}

// growNetwork has a network's record hold the range that it was given because the others are full.
func (s *state) growNetwork(id string, r *api.NetworkRange) {
	n := proto.Clone(s.networks.get(id)).(*api.NetworkRecord)
	if len(n.Ranges) == 0 {
		n.Ranges = []*api.NetworkRange{{Subnet4: n.Subnet4, Subnet6: n.Subnet6}}
	}
	n.Ranges = append(n.Ranges, r)
	n.Meta = nextMeta(n.Meta, s.version, s.time)
	s.networks.put(id, n)
	s.changedObject(KindNetwork, id)
}

// growNode has a node's record hold the further block that it was given because the others are full.
func (s *state) growNode(id string, index uint32) {
	n := proto.Clone(s.nodes.get(id)).(*api.NodeRecord)
	n.Blocks = append(n.Blocks, index)
	n.Meta = nextMeta(n.Meta, s.version, s.time)
	s.storeNode(n)
}

// changed notes that a task changed, or goes.
func (s *state) changed(id rowID) {
	r := s.tasks.row(id)
	s.dirty = append(s.dirty, dirtyKey{task: r.id(), Key: Key{Kind: KindTask, ServiceID: s.tasks.lists.services.id[r.service],
		Slot: r.slot, NodeID: s.tasks.lists.nodes.id[r.node]}})
}

func (s *state) changedObject(kind Kind, id string) {
	k := Key{Kind: kind, ID: id}
	if kind == KindNode {
		k.NodeID = id
	}
	s.dirty = append(s.dirty, dirtyKey{Key: k})
}

// removeTask takes a task out of all indexes and drops its revision when nothing refers to it any more.
func (s *state) removeTask(id rowID) {
	s.changed(id)
	r := s.tasks.row(id)
	service, revision := s.tasks.lists.services.id[r.service], uint64(r.revision)
	s.dropExtra(r)
	s.tasks.remove(id)
	if s.tasks.lists.used(service, revision) > 0 {
		return
	}
	if svc := s.services.get(service); svc != nil && revision != svc.Revision && revision != svc.ServiceRecord.Previous {
		s.services.put(svc.Id, svc.withRevisions(func(n uint64) bool { return n != revision }))
	}
}

// release frees what a task that ended held.
func (s *state) release(id rowID, now int64) {
	r := s.tasks.row(id)
	s.tasks.forms.grant(readSide(s.tasks.sideOf(id)), &s.grant)
	s.alloc.ReleaseTask(s.tasks.lists.nodes.id[r.node], &s.grant, now)
	s.freeGeneric(id)
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
	clear(s.requests)
	s.changedObject(KindService, v.Id)
}

func (s *state) removeService(v *Service) {
	for _, id := range networkTargets(v.Spec) {
		s.usedBy.del(pair{id, v.Id})
	}
	allocator.Unset(s.j, s.serviceNames, v.Name)
	s.services.del(v.Id)
	s.forgetHomes(v.Id, 0)
	clear(s.requests)
	s.changedObject(KindService, v.Id)
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
