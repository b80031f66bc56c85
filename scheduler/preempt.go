package scheduler

import (
	"cmp"
	"slices"
)

// maxPreemptLook bounds the nodes whose tasks are looked at for one task that waits: those that lack least come first.
const maxPreemptLook = 256

// Running is a task that holds something on a node.
type Running struct {
	ID       string
	Priority int
	Req      *Requirements
	Meant    bool // false: it was told to end already
}

// Preemption is how one more task gets a place: on Node, when those that end there and the Victims have ended.
type Preemption struct {
	Node    string
	Victims []string // none: those that end already leave enough
}

// Preempt looks for the node where one more task of the group fits once tasks of a lower priority than its own have ended, as few of them
// as possible and the least important first: the highest priority among the victims counts first, then their number, then the sum of their
// priorities. No victim is more than is needed. on lists what a node runs. Nothing is held.
func (s *Scheduler) Preempt(g *Group, priority int, on func(node string) []Running) (Preemption, bool) {
	var best Preemption
	var bestCost [3]int
	found := false
	for _, i := range s.preemptable(g) {
		victims, cost, ok := s.victims(i, g, priority, on(s.nodes[i].ID))
		if ok && (!found || slices.Compare(cost[:], bestCost[:]) < 0) {
			found, bestCost = true, cost
			best = Preemption{Node: s.nodes[i].ID, Victims: victims}
			if len(victims) == 0 {
				break
			}
		}
	}
	return best, found
}

// preemptable lists the nodes that might take the group's task if they were emptier, those that lack least first.
func (s *Scheduler) preemptable(g *Group) []int32 {
	type candidate struct {
		node     int32
		shortage float64
	}
	var all []candidate
	sv, want := s.service(g.Service), g.Req.Reserve
	s.class(g.Req).nodes.each(s.ready, func(i int32) {
		n := &s.nodes[i]
		if (g.Node != "" && g.Node != n.ID) || want.NanoCPUs > n.Total.NanoCPUs || want.MemoryBytes > n.Total.MemoryBytes ||
			(g.Req.MaxPerNode > 0 && int(sv.count.get(i)) >= g.Req.MaxPerNode) {
			return
		}
		short := 0.0
		if d := want.NanoCPUs - s.room[i].NanoCPUs; want.NanoCPUs > 0 && d > 0 {
			short += float64(d) / float64(n.Total.NanoCPUs)
		}
		if d := want.MemoryBytes - s.room[i].MemoryBytes; want.MemoryBytes > 0 && d > 0 {
			short += float64(d) / float64(n.Total.MemoryBytes)
		}
		all = append(all, candidate{i, short})
	})
	slices.SortFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.shortage, b.shortage), cmp.Compare(a.node, b.node))
	})
	out := make([]int32, 0, min(len(all), maxPreemptLook))
	for _, c := range all[:cap(out)] {
		out = append(out, c.node)
	}
	return out
}

// victims chooses those of a node's tasks that have to end for one task of the group: the least important first, until it fits, and then
// without those that turned out to be more than is needed, the most important first.
func (s *Scheduler) victims(i int32, g *Group, priority int, running []Running) (ids []string, cost [3]int, ok bool) {
	var lower []Running
	var free []*Requirements // of those that go
	for _, r := range running {
		switch {
		case !r.Meant:
			free = append(free, r.Req)
		case r.Priority < priority:
			lower = append(lower, r)
		}
	}
	slices.SortStableFunc(lower, func(a, b Running) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(b.Req.Reserve.MemoryBytes, a.Req.Reserve.MemoryBytes), cmp.Compare(b.Req.Reserve.NanoCPUs, a.Req.Reserve.NanoCPUs))
	})
	ending := len(free)
	var chosen []Running
	for !s.fitsWithout(i, g.Req, free) {
		if len(lower) == 0 {
			return nil, cost, false
		}
		chosen, free, lower = append(chosen, lower[0]), append(free, lower[0].Req), lower[1:]
	}
	for k := len(chosen) - 1; k >= 0; k-- {
		if without := slices.Delete(slices.Clone(free), ending+k, ending+k+1); s.fitsWithout(i, g.Req, without) {
			free, chosen = without, slices.Delete(chosen, k, k+1)
		}
	}
	for _, v := range chosen {
		ids = append(ids, v.ID)
		cost[2] += v.Priority
	}
	if cost[1] = len(chosen); cost[1] > 0 {
		cost[0] = chosen[len(chosen)-1].Priority + 1<<20 // any victim is worse than none
	}
	return ids, cost, true
}

// fitsWithout reports whether the node has what a task needs once others have ended.
func (s *Scheduler) fitsWithout(i int32, req *Requirements, gone []*Requirements) bool {
	cpu, memory := s.room[i].NanoCPUs, s.room[i].MemoryBytes
	generic, ports := map[string]int64{}, map[Port]int32{}
	for _, r := range gone {
		cpu += r.Reserve.NanoCPUs
		memory += r.Reserve.MemoryBytes
		for _, c := range r.Generic {
			generic[c.Kind] += c.N
		}
		for _, p := range r.Ports {
			ports[p]++
		}
	}
	if (req.Reserve.NanoCPUs > 0 && req.Reserve.NanoCPUs > cpu) || (req.Reserve.MemoryBytes > 0 && req.Reserve.MemoryBytes > memory) {
		return false
	}
	for _, c := range req.Generic {
		if s.generic[genericKey{i, c.Kind}]+generic[c.Kind] < c.N {
			return false
		}
	}
	for _, p := range req.Ports {
		if s.ports[portKey{i, p}]-ports[p] > 0 {
			return false
		}
	}
	return true
}
