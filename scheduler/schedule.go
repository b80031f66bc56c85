package scheduler

// TooManyFailures is how many recent failures of a service on a node make it the last choice.
const TooManyFailures = 5

// Group asks for nodes for Count identical tasks.
type Group struct {
	Service string
	Count   int
	Node    string // not empty: this node or none, as for the tasks of a global service
	Req     *Requirements
}

// Decision answers one group.
type Decision struct {
	Nodes  []string // of the tasks that got one, at most Count; held for the group from now on
	Reason string   // why the others got none; empty when all did
}

// Schedule places groups in the order given. What it decides is held at once.
func (s *Scheduler) Schedule(groups []Group) []Decision {
	out := make([]Decision, len(groups))
	for i := range groups {
		out[i] = s.place(&groups[i])
	}
	return out
}

func (s *Scheduler) place(g *Group) Decision {
	if g.Node != "" {
		return s.placePinned(g)
	}
	sv := s.service(g.Service)
	for i, n := range sv.count {
		s.count[i] = n
	}
	p := placer{s: s, g: g, sv: sv}
	root := p.tree()
	d := Decision{Nodes: make([]string, 0, g.Count)}
	for len(d.Nodes) < g.Count {
		i, ok := p.next(root)
		if !ok {
			break
		}
		d.Nodes = append(d.Nodes, s.nodes[i].ID)
	}
	for i := range sv.count {
		s.count[i] = 0
	}
	if len(d.Nodes) < g.Count {
		d.Reason = s.explain(g)
	}
	return d
}

func (s *Scheduler) placePinned(g *Group) Decision {
	var d Decision
	i, known := s.index[g.Node]
	for known && len(d.Nodes) < g.Count && s.refusal(i, g, s.service(g.Service).count[i]).kind == fits {
		s.hold(i, g.Service, g.Req, true, 1)
		d.Nodes = append(d.Nodes, g.Node)
	}
	if len(d.Nodes) < g.Count {
		d.Reason = s.explain(g)
	}
	return d
}

// placer places one group.
type placer struct {
	s  *Scheduler
	g  *Group
	sv *service
}

// branch is a value of a spread label, or the root; a leaf has its nodes in a heap.
type branch struct {
	tasks    int // of the service, in this branch
	children []*branch
	byValue  map[int32]*branch
	heap     []uint64
}

// tree sorts the candidates of the group's class into branches. A preference is soft: branches level out by their tasks, and one
// without room gives its share to the others.
func (p *placer) tree() *branch {
	s, root := p.s, &branch{}
	spreads := make([]*spread, 0, len(p.g.Req.Spread))
	for _, label := range p.g.Req.Spread {
		spreads = append(spreads, s.spread(label))
	}
	leaf := func(i int32, grow bool) *branch {
		b := root
		for _, sp := range spreads {
			if b = b.child(sp.value[i], grow); b == nil {
				return nil
			}
		}
		return b
	}
	s.class(p.g.Req).nodes.each(s.ready, func(i int32) {
		b := leaf(i, true)
		b.heap = append(b.heap, p.key(i))
	})
	// A branch's load counts the tasks on all its nodes, also on those that take no more.
	if len(spreads) > 0 {
		for i, n := range p.sv.count {
			b := root
			for _, sp := range spreads {
				if b = b.child(sp.value[i], false); b == nil {
					break
				}
				b.tasks += int(n)
			}
		}
	}
	root.heapify()
	return root
}

func (b *branch) child(value int32, grow bool) *branch {
	c := b.byValue[value]
	if c == nil && grow {
		if b.byValue == nil {
			b.byValue = map[int32]*branch{}
		}
		c = &branch{}
		b.byValue[value] = c
		b.children = append(b.children, c)
	}
	return c
}

// next gives one task to the least loaded node of the least loaded branch that has room.
func (p *placer) next(b *branch) (int32, bool) {
	for len(b.children) > 0 {
		best := 0
		for c := range b.children {
			if b.children[c].tasks < b.children[best].tasks {
				best = c
			}
		}
		if i, ok := p.next(b.children[best]); ok {
			b.tasks++
			return i, true
		}
		b.children = append(b.children[:best], b.children[best+1:]...)
	}
	for len(b.heap) > 0 {
		i := keyNode(b.heap[0])
		if !p.s.hasRoom(i, p.g.Req, p.s.count[i]) {
			// Identical tasks only take more: this node is out for the rest of the group.
			last := len(b.heap) - 1
			b.heap[0] = b.heap[last]
			b.heap = b.heap[:last]
			b.down(0)
			continue
		}
		p.s.hold(i, p.g.Service, p.g.Req, true, 1)
		p.s.count[i]++
		b.tasks++
		b.heap[0] = p.key(i)
		b.down(0)
		return i, true
	}
	return 0, false
}

// A key packs the order of preference into one number: recent failures, tasks of the service, all tasks, number of the node.
const (
	keyNodeBits    = 20 // a million nodes
	keyTasksBits   = 20
	keyServiceBits = 18
	keyFailureBits = 6
)

func (p *placer) key(i int32) uint64 {
	k := saturate(p.sv.failures[i], keyFailureBits)
	k = k<<keyServiceBits | saturate(p.s.count[i], keyServiceBits)
	k = k<<keyTasksBits | saturate(p.s.tasks[i], keyTasksBits)
	return k<<keyNodeBits | uint64(i)
}

func keyNode(k uint64) int32 { return int32(k & (1<<keyNodeBits - 1)) }

func saturate(n int32, bits uint) uint64 { return min(uint64(max(n, 0)), 1<<bits-1) }

func (b *branch) heapify() {
	for _, c := range b.children {
		c.heapify()
	}
	for i := len(b.heap)/2 - 1; i >= 0; i-- {
		b.down(i)
	}
}

func (b *branch) down(i int) {
	for h := b.heap; ; {
		least := i
		if l := 2*i + 1; l < len(h) && h[l] < h[least] {
			least = l
		}
		if r := 2*i + 2; r < len(h) && h[r] < h[least] {
			least = r
		}
		if least == i {
			return
		}
		h[i], h[least] = h[least], h[i]
		i = least
	}
}

// hasRoom checks what depends on the other tasks of a node: resources, ports, replicas of the service.
func (s *Scheduler) hasRoom(i int32, req *Requirements, ofService int32) bool {
	return s.lacking(i, req, ofService).kind == fits
}
