package scheduler

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestPreempt compares with a search of all subsets on small random nodes: a place is found whenever there is one, never at the cost of
// equals, never with a victim too many, and the worst victim is as unimportant as can be.
func TestPreempt(t *testing.T) {
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 3))
		s := New()
		running := map[string][]Running{}
		for i := range 1 + r.IntN(4) {
			id := fmt.Sprint("n", i)
			s.SetNode(Node{ID: id, Total: Resources{int64(1+r.IntN(8)) * 1e9, int64(1+r.IntN(8)) << 30}, Generic: []Count{{"gpu", int64(r.IntN(3))}}})
			for k := range r.IntN(6) {
				req := randomNeed(r)
				if s.lacking(s.Number(id), req, 0) != fits {
					continue
				}
				run := Running{ID: fmt.Sprint(id, "-", k), Priority: r.IntN(4), Req: req, Meant: r.IntN(6) > 0}
				s.Hold(Holding{fmt.Sprint("s", k), id, req, run.Meant})
				running[id] = append(running[id], run)
			}
		}
		g := Group{Service: "new", Count: 1, Req: randomNeed(r)}
		priority := r.IntN(5)
		got, ok := s.Preempt(&g, priority, func(node string) []Running { return running[node] })
		best := -1 // highest priority among victims + 1, 0 for no victims; -1 impossible
		for i := range s.nodes {
			if worst, possible := cheapest(s, int32(i), g.Req, priority, running[s.nodes[i].ID]); possible && (best < 0 || worst < best) {
				best = worst
			}
		}
		if ok != (best >= 0) {
			t.Fatalf("seed %d: found %v, the search says %d", seed, ok, best)
		}
		if !ok {
			continue
		}
		var gone []*Requirements
		worst := 0
		for _, run := range running[got.Node] {
			if victim := slices.Contains(got.Victims, run.ID); victim || !run.Meant {
				gone = append(gone, run.Req)
				if victim {
					worst = max(worst, run.Priority+1)
				}
				if victim && (run.Priority >= priority || !run.Meant) {
					t.Fatalf("seed %d: victim %v for priority %d", seed, run, priority)
				}
			}
		}
		i := s.Number(got.Node)
		if !s.fitsWithout(i, g.Req, gone) || worst != best {
			t.Fatalf("seed %d: %v costs %d and fits %v, the search says %d", seed, got, worst, s.fitsWithout(i, g.Req, gone), best)
		}
		for _, v := range got.Victims {
			var others []*Requirements
			for _, run := range running[got.Node] {
				if !run.Meant || (slices.Contains(got.Victims, run.ID) && run.ID != v) {
					others = append(others, run.Req)
				}
			}
			if s.fitsWithout(i, g.Req, others) {
				t.Fatalf("seed %d: victim %s of %v is one too many", seed, v, got)
			}
		}
	}
}

func randomNeed(r *rand.Rand) *Requirements {
	req := &Requirements{Reserve: Resources{int64(r.IntN(4)) * 1e9, int64(r.IntN(4)) << 30}}
	if r.IntN(4) == 0 {
		req.Generic = []Count{{"gpu", 1}}
	}
	if r.IntN(4) == 0 {
		req.Ports = []Port{{"tcp", 80}}
	}
	return req
}

// cheapest tries all sets of victims.
func cheapest(s *Scheduler, i int32, req *Requirements, priority int, running []Running) (worst int, possible bool) {
	for set := range 1 << len(running) {
		var gone []*Requirements
		cost, allowed := 0, true
		for k, run := range running {
			victim := set>>k&1 == 1
			if !run.Meant {
				gone = append(gone, run.Req)
				continue
			}
			if victim {
				allowed = allowed && run.Priority < priority
				gone = append(gone, run.Req)
				cost = max(cost, run.Priority+1)
			}
		}
		if allowed && s.fitsWithout(i, req, gone) && (!possible || cost < worst) {
			worst, possible = cost, true
		}
	}
	return worst, possible
}
