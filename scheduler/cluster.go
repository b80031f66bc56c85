package scheduler

import (
	"math/bits"
	"strings"
)

// maxClasses bounds the compiled constraint sets; beyond it all are dropped and compiled again when asked for.
const maxClasses = 4096

// Scheduler mirrors the cluster. Nodes are small dense integers, their state flat arrays.
type Scheduler struct {
	index map[string]int32 // node id → number
	nodes []Node           // by number; ID "" where a node was removed
	free  []int32          // numbers to use again

	room  []Resources // what is not reserved
	tasks []int32     // tasks that are meant to run there
	ready bitset      // nodes that take tasks

	services map[string]*service
	ports    map[portKey]int32 // holders of a host port
	classes  map[string]*class
	spreads  map[string]*spread

	count []int32 // scratch: tasks of the service in hand by node
}

// service counts the tasks of one service that are meant to run, by node.
type service struct {
	count    map[int32]int32
	failures map[int32]int32
}

type portKey struct {
	node int32
	port Port
}

// class is a compiled set of constraints and platforms, shared by all services that have the same: the nodes that satisfy it.
type class struct {
	req   *Requirements
	nodes bitset
}

// spread gives each node the number of its value of one label.
type spread struct {
	label  string
	values map[string]int32
	value  []int32
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
		index: map[string]int32{}, services: map[string]*service{}, ports: map[portKey]int32{},
		classes: map[string]*class{}, spreads: map[string]*spread{},
	}
}

// SetNode adds a node or replaces what is known of it; what tasks hold there stays.
func (s *Scheduler) SetNode(n Node) {
	i, known := s.index[n.ID]
	if !known {
		if len(s.free) > 0 {
			i = s.free[len(s.free)-1]
			s.free = s.free[:len(s.free)-1]
		} else {
			i = int32(len(s.nodes))
			s.nodes = append(s.nodes, Node{})
			s.room = append(s.room, Resources{})
			s.tasks = append(s.tasks, 0)
			s.count = append(s.count, 0)
		}
		s.index[n.ID] = i
	}
	old := s.nodes[i].Total
	s.room[i].NanoCPUs += n.Total.NanoCPUs - old.NanoCPUs
	s.room[i].MemoryBytes += n.Total.MemoryBytes - old.MemoryBytes
	s.nodes[i] = n
	s.ready.set(i, n.State == Ready)
	for _, c := range s.classes {
		c.nodes.set(i, c.req.MatchesAll(&s.nodes[i]))
	}
	for _, sp := range s.spreads {
		sp.set(i, &s.nodes[i])
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
	s.ready.set(i, false)
	for _, c := range s.classes {
		c.nodes.set(i, false)
	}
	for _, sv := range s.services {
		delete(sv.count, i)
		delete(sv.failures, i)
	}
	for k := range s.ports {
		if k.node == i {
			delete(s.ports, k)
		}
	}
	s.free = append(s.free, i)
}

// Node returns what is known of a node.
func (s *Scheduler) Node(id string) (Node, bool) {
	i, known := s.index[id]
	if !known {
		return Node{}, false
	}
	return s.nodes[i], true
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
func (s *Scheduler) Hold(h Holding) {
	if i, known := s.index[h.Node]; known {
		s.hold(i, h.Service, h.Req, h.Meant, 1)
	}
}

// Release undoes a Hold or a decision.
func (s *Scheduler) Release(h Holding) {
	if i, known := s.index[h.Node]; known {
		s.hold(i, h.Service, h.Req, h.Meant, -1)
	}
}

func (s *Scheduler) hold(i int32, svc string, req *Requirements, meant bool, sign int32) {
	s.room[i].NanoCPUs -= int64(sign) * req.Reserve.NanoCPUs
	s.room[i].MemoryBytes -= int64(sign) * req.Reserve.MemoryBytes
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
	sv := s.service(svc)
	if sv.count[i] += sign; sv.count[i] <= 0 {
		delete(sv.count, i)
	}
}

func (s *Scheduler) service(id string) *service {
	sv := s.services[id]
	if sv == nil {
		sv = &service{count: map[int32]int32{}}
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
	if sv := s.services[id]; sv != nil && len(sv.count) == 0 {
		delete(s.services, id)
	}
}

// class compiles constraints and platforms, or finds them compiled.
func (s *Scheduler) class(req *Requirements) *class {
	var key strings.Builder
	for _, c := range req.Constraints {
		key.WriteString(c.String())
		key.WriteByte(0)
	}
	for _, p := range req.Platforms {
		p = p.normalize()
		key.WriteString(p.OS + "/" + p.Arch)
		key.WriteByte(1)
	}
	if c := s.classes[key.String()]; c != nil {
		return c
	}
	if len(s.classes) >= maxClasses {
		clear(s.classes)
	}
	c := &class{req: req}
	for i := range s.nodes {
		n := &s.nodes[i]
		c.nodes.set(int32(i), n.ID != "" && req.MatchesAll(n))
	}
	s.classes[key.String()] = c
	return c
}

func (s *Scheduler) spread(label string) *spread {
	if sp := s.spreads[label]; sp != nil {
		return sp
	}
	sp := &spread{label: label, values: map[string]int32{}}
	for i := range s.nodes {
		sp.set(int32(i), &s.nodes[i])
	}
	s.spreads[label] = sp
	return sp
}

func (sp *spread) set(i int32, n *Node) {
	for int(i) >= len(sp.value) {
		sp.value = append(sp.value, 0)
	}
	text := attribute(n, sp.label)
	v, known := sp.values[text]
	if !known {
		v = int32(len(sp.values))
		sp.values[text] = v
	}
	sp.value[i] = v
}
