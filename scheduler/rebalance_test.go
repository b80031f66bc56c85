package scheduler

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// TestLevel: a node that joins gets its share, rules hold, and a second plan is empty.
func TestLevel(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 5))
		s := New()
		node := func(i int) {
			s.SetNode(Node{ID: fmt.Sprint("n", i), Labels: map[string]string{"zone": fmt.Sprint(i % 3)}, Total: Resources{8e9, 8 << 30}})
		}
		for i := range 1 + r.IntN(5) {
			node(i)
		}
		var groups []Group
		at := map[string]map[string]int{}
		for k := range 1 + r.IntN(5) {
			req := &Requirements{Reserve: Resources{int64(r.IntN(3)) * 5e8, 0}}
			if r.IntN(2) == 0 {
				req.Spread = []string{"node.labels.zone"}
			}
			g := Group{Service: fmt.Sprint("s", k), Count: r.IntN(20), Req: req}
			at[g.Service] = map[string]int{}
			for _, n := range s.Place(&g) {
				at[g.Service][n]++
			}
			groups = append(groups, g)
		}
		for i := 5; i < 7; i++ {
			node(i)
		}
		for round := range 20 {
			moves := 0
			for _, g := range groups {
				for _, m := range s.Level(g, at[g.Service], 1000) {
					at[g.Service][m.To]++
					moves++
				}
			}
			if moves == 0 {
				break
			}
			if round == 19 {
				t.Fatalf("seed %d: no end", seed)
			}
		}
		for _, g := range groups {
			least, most, all := 1<<30, 0, map[string]int{}
			for i := range s.nodes {
				n := at[g.Service][s.nodes[i].ID]
				all[s.nodes[i].Labels["zone"]] += n
				if s.room[i].NanoCPUs < 0 {
					t.Fatalf("seed %d: %s is overcommitted", seed, s.nodes[i].ID)
				}
				if s.lacking(int32(i), g.Req, 0) == fits {
					least = min(least, n)
				}
				most = max(most, n)
			}
			if len(g.Req.Spread) == 0 && least < 1<<30 && most > least+1 {
				t.Fatalf("seed %d: service %s has %v", seed, g.Service, at[g.Service])
			}
		}
	}
}
