package scheduler

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// TestProperties checks on random clusters that nothing is overcommitted, no rule violated, services are level on nodes with room,
// all that was held can be released, and that the same calls give the same answers.
func TestProperties(t *testing.T) {
	for seed := range uint64(300) {
		first, second := randomRun(t, seed), randomRun(t, seed)
		if first != second {
			t.Fatalf("seed %d: two runs differ:\n%s\n%s", seed, first, second)
		}
	}
}

func randomRun(t *testing.T, seed uint64) string {
	r := rand.New(rand.NewPCG(seed, 1))
	s := New()
	for i := range 1 + r.IntN(40) {
		s.SetNode(Node{
			ID: fmt.Sprint("n", i), State: State(max(0, r.IntN(8)-3)), Platform: Platform{"linux", "amd64"},
			Labels: map[string]string{"zone": fmt.Sprint(r.IntN(3)), "disk": fmt.Sprint(r.IntN(2))},
			Total:  Resources{int64(r.IntN(8)) * 1e9, int64(r.IntN(8)) << 30},
		})
	}
	var held []Holding
	log := ""
	for g := range 15 {
		req := &Requirements{Reserve: Resources{int64(r.IntN(3)) * 5e8, int64(r.IntN(3)) << 29}, MaxPerNode: r.IntN(4)}
		if r.IntN(2) == 0 {
			req.Constraints = []Constraint{{Attribute: "node.labels.disk", Value: "1", Negated: r.IntN(2) == 0}}
		}
		if r.IntN(3) == 0 {
			req.Spread = []string{"node.labels.zone"}
		}
		if r.IntN(4) == 0 {
			req.Ports = []Port{{"tcp", uint16(r.IntN(2))}}
		}
		group := Group{Service: fmt.Sprint("s", g), Count: r.IntN(60), Req: req}
		d := s.Schedule([]Group{group})[0]
		log += fmt.Sprintln(d)
		for _, n := range d.Nodes {
			held = append(held, Holding{group.Service, n, req, true})
		}
		checkGroup(t, seed, s, &group, &d)
		for range r.IntN(10) {
			if len(held) > 0 {
				k := r.IntN(len(held))
				s.Release(held[k])
				held = append(held[:k], held[k+1:]...)
			}
		}
	}
	for _, h := range held {
		s.Release(h)
	}
	for i := range s.nodes {
		if s.room[i] != s.nodes[i].Total || s.tasks[i] != 0 || len(s.ports) != 0 {
			t.Fatalf("seed %d: node %s is not empty after all ended: room %v of %v, %d tasks, ports %v", seed, s.nodes[i].ID, s.room[i], s.nodes[i].Total, s.tasks[i], s.ports)
		}
	}
	return log
}

func checkGroup(t *testing.T, seed uint64, s *Scheduler, g *Group, d *Decision) {
	t.Helper()
	if (d.Reason == "") != (len(d.Nodes) == g.Count) {
		t.Fatalf("seed %d: %d of %d placed, reason %q", seed, len(d.Nodes), g.Count, d.Reason)
	}
	counts := map[string]int32{}
	for _, n := range d.Nodes {
		counts[n]++
	}
	most := int32(0)
	for _, c := range counts {
		most = max(most, c)
	}
	for i := range s.nodes {
		n, c := &s.nodes[i], counts[s.nodes[i].ID]
		if s.room[i].NanoCPUs < 0 || s.room[i].MemoryBytes < 0 {
			t.Fatalf("seed %d: node %s is overcommitted: %v", seed, n.ID, s.room[i])
		}
		if c > 0 && (n.State != Ready || !g.Req.MatchesAll(n) || (g.Req.MaxPerNode > 0 && int(c) > g.Req.MaxPerNode) || (len(g.Req.Ports) > 0 && c > 1)) {
			t.Fatalf("seed %d: node %v got %d of %+v", seed, n, c, g.Req)
		}
		room := s.refusal(int32(i), g.Req, c) == fits
		if room && d.Reason != "" {
			t.Fatalf("seed %d: refused with %q, but node %s has room", seed, d.Reason, n.ID)
		}
		if room && len(g.Req.Spread) == 0 && c < most-1 {
			t.Fatalf("seed %d: node %s has room and %d tasks, another has %d", seed, n.ID, c, most)
		}
	}
}

// BenchmarkSchedule places 1,000 services of 1,000 tasks on 10,000 nodes, a quarter of them with a zone preference.
func BenchmarkSchedule(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		s := New()
		for i := range 10_000 {
			s.SetNode(Node{ID: fmt.Sprint("n", i), Labels: map[string]string{"zone": fmt.Sprint(i % 10), "pool": fmt.Sprint(i % 7)},
				Total: Resources{64e9, 256 << 30}})
		}
		groups := make([]Group, 1000)
		for i := range groups {
			req := &Requirements{Reserve: Resources{1e8, 1 << 28}, Constraints: []Constraint{{"node.labels.pool", fmt.Sprint(i % 7), true}}}
			if i%4 == 0 {
				req.Spread = []string{"node.labels.zone"}
			}
			groups[i] = Group{Service: fmt.Sprint("s", i), Count: 1000, Req: req}
		}
		b.StartTimer()
		for _, d := range s.Schedule(groups) {
			if d.Reason != "" {
				b.Fatal(d.Reason)
			}
		}
	}
	b.ReportMetric(1e6*float64(b.N)/b.Elapsed().Seconds(), "tasks/s")
}

// FuzzParseConstraint checks that what parses is printed and parsed to the same.
func FuzzParseConstraint(f *testing.F) {
	f.Add("node.labels.zone != x")
	f.Add("node.ip==10.0.0.0/8")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseConstraint(text)
		if err != nil {
			return
		}
		again, err := ParseConstraint(c.String())
		if err != nil || again != c {
			t.Fatalf("%q: %+v, again %+v, %v", text, c, again, err)
		}
	})
}
