package scheduler

import "math/bits"

// TooManyFailures is how many recent failures of a service on a node make it the last choice.
const TooManyFailures = 5

// Group asks for nodes for Count identical tasks.
type Group struct {
	Service  string
	Count    int
	Node     string // not empty: this node or none, as for the tasks of a global service
	Req      *Requirements
	Strategy Strategy
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
		d := Decision{Nodes: s.Place(&groups[i])}
		if len(d.Nodes) < groups[i].Count {
			d.Reason = s.Explain(&groups[i])
		}
		out[i] = d
	}
	return out
}

// Place gives nodes to as many tasks of the group as there are, and holds them at once. It costs the tasks, and for few tasks no more than
// a look at those nodes that come first.
func (s *Scheduler) Place(g *Group) []string {
	if g.Count <= 0 {
		return nil
	}
	p := placer{s: s, g: g, sv: s.service(g.Service), out: make([]string, 0, g.Count)}
	switch {
	case g.Node != "":
		i, known := s.index[g.Node]
		for known && len(p.out) < g.Count && s.refusal(i, g.Req, p.sv.count.get(i)) == fits {
			p.take(i)
		}
	case len(g.Req.Spread) > 0:
		p.class = s.class(g.Req)
		p.level()
	default:
		p.class = s.class(g.Req)
		p.fill(g.Count)
	}
	return p.out
}

// placer places one group.
type placer struct {
	s     *Scheduler
	g     *Group
	sv    *service
	class *class
	out   []string
}

func (p *placer) take(i int32) {
	p.s.hold(i, p.sv, p.g.Req, true, 1)
	p.out = append(p.out, p.s.nodes[i].ID)
}

// fill places k tasks on the best nodes of the class. A few tasks walk the nodes from the least loaded on; many, or those of a class with
// few nodes, look at the class once and keep its nodes in a heap.
func (p *placer) fill(k int) {
	if p.g.Strategy == Spread && k < p.class.size/16 && p.class.size > p.s.buckets.n/32 {
		k -= p.walk(k)
	}
	if k > 0 {
		p.fillFrom(nil, k)
	}
}

// walk places up to k tasks on nodes that have as few tasks of the service as any: the first ones found are the best.
func (p *placer) walk(k int) int { return p.walkWhere(k, nil) }

// walkWhere leaves out the nodes that want does not want; it is asked last, and the node it wants gets a task.
func (p *placer) walkWhere(k int, want func(i int32) bool) int {
	s, sv, done := p.s, p.sv, 0
	floor := int32(0)
	if sv.floorOf == p.class && sv.floorEpoch == s.epoch {
		floor = sv.floor
	}
	for b := s.buckets.lowest(); int(b) < len(s.buckets.head); b++ {
		for i := s.buckets.head[b]; i >= 0; {
			next := s.buckets.next[i]
			if p.class.nodes.has(i) && sv.failures[i] == 0 {
				if n := sv.count.get(i); n <= floor && s.lacking(i, p.g.Req, n) == fits && (want == nil || want(i)) {
					p.take(i)
					if done++; done == k {
						return done
					}
				}
			}
			i = next
		}
	}
	return done
}

// fillFrom places k tasks on the best of the members of the class (nil: all of it), and returns how many found room.
func (p *placer) fillFrom(members []int32, k int) int {
	s := p.s
	h := s.heap[:0]
	defer func() { s.heap = h[:0] }()
	low := int32(1<<31 - 1)
	consider := func(i int32) {
		n := p.sv.count.get(i)
		low = min(low, n)
		if s.lacking(i, p.g.Req, n) == fits {
			h = append(h, p.key(i, n))
		}
	}
	if members == nil {
		for w := range min(len(p.class.nodes), len(s.ready)) {
			for x := p.class.nodes[w] & s.ready[w]; x != 0; x &= x - 1 {
				consider(int32(w<<6 + bits.TrailingZeros64(x)))
			}
		}
		p.sv.floor, p.sv.floorOf, p.sv.floorEpoch = low, p.class, s.epoch
	} else {
		for _, i := range members {
			if s.ready.has(i) && p.class.nodes.has(i) {
				consider(i)
			}
		}
	}
	if k > 1 {
		for i := len(h)/2 - 1; i >= 0; i-- {
			down(h, i)
		}
	} else {
		h = keepLeast(h)
	}
	done := 0
	for done < k && len(h) > 0 {
		i := keyNode(h[0])
		p.take(i)
		done++
		n := p.sv.count.get(i)
		if s.lacking(i, p.g.Req, n) == fits {
			h[0] = p.key(i, n)
		} else {
			// Identical tasks only take more: this node is out for the rest of the group.
			h[0] = h[len(h)-1]
			h = h[:len(h)-1]
		}
		down(h, 0)
	}
	return done
}

func keepLeast(h []uint64) []uint64 {
	for i := range h {
		h[0] = min(h[0], h[i])
	}
	return h[:min(1, len(h))]
}

// A key packs the order of preference into one number: recent failures, tasks of the service, all tasks, number of the node. For Binpack it
// is failures, what is left of the scarcer resource, tasks that are not there, number.
const (
	keyNodeBits    = 20 // a million nodes
	keyTasksBits   = 20
	keyServiceBits = 18
	keyFailureBits = 6
)

func (p *placer) key(i, ofService int32) uint64 {
	k := saturate(p.sv.failures[i], keyFailureBits)
	if p.g.Strategy == Binpack {
		k = k<<keyServiceBits | p.s.unused(i)
		k = k<<keyTasksBits | (1<<keyTasksBits - 1 - saturate(p.s.tasks[i], keyTasksBits))
	} else {
		k = k<<keyServiceBits | saturate(ofService, keyServiceBits)
		k = k<<keyTasksBits | saturate(p.s.tasks[i], keyTasksBits)
	}
	return k<<keyNodeBits | uint64(i)
}

// unused is the share of a node's scarcer resource that is not reserved, out of 2^keyServiceBits-1.
func (s *Scheduler) unused(i int32) uint64 {
	const whole = 1<<keyServiceBits - 1
	left := uint64(whole)
	part := func(room, total int64) {
		if total > 0 {
			left = min(left, uint64(float64(max(room, 0))/float64(total)*whole))
		}
	}
	part(s.room[i].NanoCPUs, s.nodes[i].Total.NanoCPUs)
	part(s.room[i].MemoryBytes, s.nodes[i].Total.MemoryBytes)
	return left
}

func keyNode(k uint64) int32 { return int32(k & (1<<keyNodeBits - 1)) }

func saturate(n int32, bits uint) uint64 { return min(uint64(max(n, 0)), 1<<bits-1) }

func down(h []uint64, i int) {
	for {
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
