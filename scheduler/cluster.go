package scheduler

import (
	"math/bits"
	"strconv"
	"strings"
)

// maxClasses bounds the compiled sets of constraints, and maxTrees those of preferences; beyond it all are dropped and compiled again when
// asked for.
const (
	maxClasses = 4096
	maxTrees   = 256
)

// Scheduler mirrors the cluster. Nodes are small dense integers, which are not used again, their state flat arrays.
type Scheduler struct {
	index map[string]int32 // node id → number
	nodes []Node           // by number; ID "" where a node was removed

	room    []Resources // what is not reserved
	generic map[genericKey]int64
	tasks   []int32 // tasks that are meant to run there
	ready   bitset  // nodes that take tasks
	buckets buckets
	epoch   uint64 // grows when nodes become ready or stop to be, or move between classes

	services map[string]*service
	ports    map[portKey]int32 // holders of a host port
	classes  map[string]*class
	trees    map[string]*tree

	heap []uint64 // scratch
}

// service counts the tasks of one service that are meant to run, by node.
type service struct {
	count    tally
	failures map[int32]int32

	// No ready node of floorOf has fewer tasks of the service than floor, while the epoch is the same.
	floor      int32
	floorOf    *class
	floorEpoch uint64
}

type portKey struct {
	node int32
	port Port
}

type genericKey struct {
	node int32
	kind string
}

// class is a compiled set of constraints, platforms and plugins, shared by all services that have the same: the nodes that satisfy it.
type class struct {
	req   *Requirements
	nodes bitset
	size  int // nodes in it, ready or not
}

type bitset []uint64

func (b *bitset) set(i int32, on bool) {
	for int(i>>6) >= len(*b) {
		*b = append(*b, 0)
	}
	if on {
		(*b)[i>>6] |= 1 << (i & 63)
	} else {
		(*b)[i>>6] &^= 1 << (i & 63)
	}
}

func (b bitset) has(i int32) bool {
	return int(i>>6) < len(b) && b[i>>6]&(1<<(i&63)) != 0
}

// each calls f for every number in both sets, in order.
func (b bitset) each(and bitset, f func(i int32)) {
	for w := range min(len(b), len(and)) {
		for x := b[w] & and[w]; x != 0; x &= x - 1 {
			f(int32(w<<6 + bits.TrailingZeros64(x)))
		}
	}
}

// New returns a scheduler that knows no node.
func New() *Scheduler {
	return &Scheduler{
		index: map[string]int32{}, services: map[string]*service{}, ports: map[portKey]int32{}, generic: map[genericKey]int64{},
		classes: map[string]*class{}, trees: map[string]*tree{},
	}
}

// SetNode adds a node or replaces what is known of it; what tasks hold there stays.
func (s *Scheduler) SetNode(n Node) {
	i, known := s.index[n.ID]
	if !known {
		i = int32(len(s.nodes))
		s.nodes = append(s.nodes, Node{})
		s.room = append(s.room, Resources{})
		s.tasks = append(s.tasks, 0)
		s.buckets.grow()
		s.index[n.ID] = i
	}
	old := &s.nodes[i]
	s.room[i].NanoCPUs += n.Total.NanoCPUs - old.Total.NanoCPUs
	s.room[i].MemoryBytes += n.Total.MemoryBytes - old.Total.MemoryBytes
	s.changeGeneric(i, old.Generic, -1)
	s.changeGeneric(i, n.Generic, 1)
	s.nodes[i] = n
	s.setReady(i, n.State == Ready)
	for _, c := range s.classes {
		s.setClass(c, i, c.req.MatchesAll(&s.nodes[i]))
	}
	for _, t := range s.trees {
		t.set(i, &s.nodes[i])
	}
}

func (s *Scheduler) setReady(i int32, ready bool) {
	if s.ready.has(i) != ready {
		s.epoch++
	}
	s.ready.set(i, ready)
	s.buckets.put(i, max(s.tasks[i], 0), ready)
}

func (s *Scheduler) setClass(c *class, i int32, in bool) {
	if c.nodes.has(i) == in {
		return
	}
	c.nodes.set(i, in)
	s.epoch++
	if in {
		c.size++
	} else {
		c.size--
	}
}

// changeGeneric adds to what is free of generic resources.
func (s *Scheduler) changeGeneric(i int32, counts []Count, sign int64) {
	for _, c := range counts {
		k := genericKey{i, c.Kind}
		if s.generic[k] += sign * c.N; s.generic[k] == 0 {
			delete(s.generic, k)
		}
	}
}

// RemoveNode forgets a node and all that tasks hold there; a later Release of such a holding is ignored.
func (s *Scheduler) RemoveNode(id string) {
	i, known := s.index[id]
	if !known {
		return
	}
	delete(s.index, id)
	s.nodes[i], s.room[i], s.tasks[i] = Node{}, Resources{}, 0
	s.setReady(i, false)
	for _, c := range s.classes {
		s.setClass(c, i, false)
	}
	for _, t := range s.trees {
		t.remove(i)
	}
	for _, sv := range s.services {
		sv.count.add(i, -sv.count.get(i), len(s.nodes))
		delete(sv.failures, i)
	}
	for k := range s.ports {
		if k.node == i {
			delete(s.ports, k)
		}
	}
	for k := range s.generic {
		if k.node == i {
			delete(s.generic, k)
		}
	}
}

// Node returns what is known of a node.
func (s *Scheduler) Node(id string) (Node, bool) {
	i, known := s.index[id]
	if !known {
		return Node{}, false
	}
	return s.nodes[i], true
}

// Number is the number under which a node is held, -1 when it is not known. A node that was removed leaves its number for good.
func (s *Scheduler) Number(id string) int32 {
	if i, known := s.index[id]; known {
		return i
	}
	return -1
}

// Holding is what one task takes from its node. Meant is false for a task that still holds its resources but is told to end:
// it no longer counts for the spread.
type Holding struct {
	Service string
	Node    string
	Req     *Requirements
	Meant   bool
}

// Hold records a task that is on a node already. A node that is not known holds nothing.
func (s *Scheduler) Hold(h Holding) { s.HoldAt(s.Number(h.Node), h.Service, h.Req, h.Meant) }

// Release undoes a Hold or a decision.
func (s *Scheduler) Release(h Holding) { s.ReleaseAt(s.Number(h.Node), h.Service, h.Req, h.Meant) }

// HoldAt is Hold with the number of the node.
func (s *Scheduler) HoldAt(node int32, svc string, req *Requirements, meant bool) {
	if node >= 0 && s.nodes[node].ID != "" {
		s.hold(node, s.service(svc), req, meant, 1)
	}
}

// ReleaseAt is Release with the number of the node.
func (s *Scheduler) ReleaseAt(node int32, svc string, req *Requirements, meant bool) {
	if node >= 0 && s.nodes[node].ID != "" {
		s.hold(node, s.service(svc), req, meant, -1)
	}
}

func (s *Scheduler) hold(i int32, sv *service, req *Requirements, meant bool, sign int32) {
	s.room[i].NanoCPUs -= int64(sign) * req.Reserve.NanoCPUs
	s.room[i].MemoryBytes -= int64(sign) * req.Reserve.MemoryBytes
	s.changeGeneric(i, req.Generic, -int64(sign))
	for _, p := range req.Ports {
		k := portKey{i, p}
		if s.ports[k] += sign; s.ports[k] <= 0 {
			delete(s.ports, k)
		}
	}
	if !meant {
		return
	}
	s.tasks[i] += sign
	if s.ready.has(i) {
		s.buckets.put(i, max(s.tasks[i], 0), true)
	}
	if n := sv.count.add(i, sign, len(s.nodes)); n < sv.floor {
		sv.floor = n
	}
}

func (s *Scheduler) service(id string) *service {
	sv := s.services[id]
	if sv == nil {
		sv = &service{}
		s.services[id] = sv
	}
	return sv
}

// SetFailures tells how often tasks of the service failed on the node lately; from TooManyFailures on the node is chosen last.
func (s *Scheduler) SetFailures(svc, node string, n int) {
	i, known := s.index[node]
	if !known {
		return
	}
	sv := s.service(svc)
	if n < TooManyFailures {
		delete(sv.failures, i)
		return
	}
	if sv.failures == nil {
		sv.failures = map[int32]int32{}
	}
	sv.failures[i] = int32(n)
}

// RemoveService forgets a service that has no task left.
func (s *Scheduler) RemoveService(id string) {
	if sv := s.services[id]; sv != nil && sv.count.nodes == 0 {
		delete(s.services, id)
	}
}

// class compiles constraints, platforms and plugins, or finds them compiled.
func (s *Scheduler) class(req *Requirements) *class {
	key := req.classKey()
	if c := s.classes[key]; c != nil {
		return c
	}
	if len(s.classes) >= maxClasses {
		clear(s.classes)
	}
	c := &class{req: req}
	for i := range s.nodes {
		if n := &s.nodes[i]; n.ID != "" && req.MatchesAll(n) {
			c.nodes.set(int32(i), true)
			c.size++
		}
	}
	s.classes[key] = c
	return c
}

// classKey is equal for requirements whose classes are.
func (r *Requirements) classKey() string {
	if len(r.Constraints)+len(r.Platforms)+len(r.Plugins) == 0 {
		return ""
	}
	var key strings.Builder
	for _, c := range r.Constraints {
		key.WriteString(c.String())
		key.WriteByte(0)
	}
	for _, p := range r.Platforms {
		p = p.normalize()
		key.WriteString(p.OS + "/" + p.Arch)
		key.WriteByte(1)
	}
	for _, p := range r.Plugins {
		key.WriteString(p.Type + "/" + p.Name)
		key.WriteByte(2)
	}
	return key.String()
}

// NeedKey is equal for requirements that a node can take in the same situations: when tasks of one find no room, tasks of the other find
// none either.
func (r *Requirements) NeedKey() string {
	b := append([]byte(r.classKey()), 3)
	b = strconv.AppendInt(b, r.Reserve.NanoCPUs, 36)
	b = strconv.AppendInt(append(b, ','), r.Reserve.MemoryBytes, 36)
	for _, c := range r.Generic {
		b = strconv.AppendInt(append(append(b, 4), c.Kind...), c.N, 36)
	}
	for _, p := range r.Ports {
		b = strconv.AppendInt(append(append(b, 5), p.Protocol...), int64(p.Number), 36)
	}
	return string(b)
}
