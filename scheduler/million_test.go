package scheduler

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var million = flag.Bool("million", false, "run TestMillion: 1,000,000 tasks on 10,000 nodes, checked, with figures")

// plant is the cluster of the figures: nodes of 64 cores and 256 GiB in 10 zones, six constraint classes, three sizes of CPU times three of
// memory, a quarter of the services with a preference for zones. A checker that shares nothing with the scheduler looks at the result.
type plant struct {
	s      *Scheduler
	nodes  []Node
	groups []Group
	at     [][]string // by group: the nodes of its tasks
	dead   map[string]bool
}

func newPlant(nodes, tasks, services int) *plant {
	p := &plant{s: New(), dead: map[string]bool{}}
	for i := range nodes {
		n := Node{ID: fmt.Sprint("n", i), Platform: Platform{"linux", "amd64"}, Total: Resources{64e9, 256 << 30},
			Labels: map[string]string{"zone": fmt.Sprint(i % 10), "ssd": fmt.Sprint(i % 2), "pool": fmt.Sprint(i % 100)}}
		if i%4 == 1 {
			n.Platform.Arch = "arm64"
		}
		p.nodes = append(p.nodes, n)
		p.s.SetNode(n)
	}
	is := func(label, value string) Constraint {
		return Constraint{Attribute: "node.labels." + label, Value: value}
	}
	classes := []Requirements{
		{}, {Constraints: []Constraint{is("ssd", "0")}}, {Platforms: []Platform{{"linux", "arm64"}}},
		{Constraints: []Constraint{is("ssd", "0"), {Attribute: "node.labels.zone", Value: "3", Negated: true}}}, {Constraints: []Constraint{is("zone", "5")}},
		{Constraints: []Constraint{is("pool", "7")}},
	}
	weights := []int{40, 20, 15, 15, 9, 1}
	r := rand.New(rand.NewPCG(1, 1))
	for k := range services {
		c, w := 0, r.IntN(100)
		for w >= weights[c] {
			w -= weights[c]
			c++
		}
		req := classes[c]
		req.Reserve = Resources{[]int64{1e8, 25e7, 5e8}[r.IntN(3)], []int64{128 << 20, 512 << 20, 1 << 30}[r.IntN(3)]}
		if r.IntN(4) == 0 && c < 4 {
			req.Spread = []string{"node.labels.zone"}
		}
		p.groups = append(p.groups, Group{Service: fmt.Sprint("s", k), Count: tasks / services, Req: &req})
	}
	return p
}

func (p *plant) place() (placed int) {
	for k := range p.groups {
		p.at = append(p.at, p.s.Place(&p.groups[k]))
		placed += len(p.at[k])
	}
	return placed
}

// check looks at the result alone: nothing overcommitted, constraints hold, tasks of a service differ by at most one on nodes with room,
// zones are level where they have room, and what was not placed has room nowhere.
func (p *plant) check(t testing.TB, level bool) {
	used := map[string]Resources{}
	byID := map[string]*Node{}
	for i := range p.nodes {
		byID[p.nodes[i].ID] = &p.nodes[i]
	}
	for k, g := range p.groups {
		for _, id := range p.at[k] {
			n := byID[id]
			if p.dead[id] || !admits(n, g.Req) {
				t.Fatalf("service %d: a task on %s, against its constraints or dead", k, id)
			}
			u := used[id]
			used[id] = Resources{u.NanoCPUs + g.Req.Reserve.NanoCPUs, u.MemoryBytes + g.Req.Reserve.MemoryBytes}
		}
	}
	for id, u := range used {
		if n := byID[id]; u.NanoCPUs > n.Total.NanoCPUs || u.MemoryBytes > n.Total.MemoryBytes {
			t.Fatalf("node %s is overcommitted: %v", id, u)
		}
	}
	for k := 0; level && k < len(p.groups); k += max(1, len(p.groups)/1000) {
		p.checkLevel(t, k, used)
	}
}

// admits is the checker's own idea of the plant's constraints.
func admits(n *Node, r *Requirements) bool {
	if len(r.Platforms) > 0 && n.Platform.Arch != r.Platforms[0].Arch {
		return false
	}
	for _, c := range r.Constraints {
		if (n.Labels[c.Attribute[len("node.labels."):]] == c.Value) == c.Negated {
			return false
		}
	}
	return true
}

// checkLevel compares nodes, or zones and the nodes of each. Rooms have only shrunk: what has room now had it always.
func (p *plant) checkLevel(t testing.TB, k int, used map[string]Resources) {
	g, counts := &p.groups[k], map[string]int{}
	for _, id := range p.at[k] {
		counts[id]++
	}
	type span struct{ least, most, all int } // least: on a node with room
	zones := map[string]*span{}
	for i := range p.nodes {
		n := &p.nodes[i]
		if !admits(n, g.Req) || p.dead[n.ID] {
			continue
		}
		name := ""
		if len(g.Req.Spread) > 0 {
			name = n.Labels["zone"]
		}
		z := zones[name]
		if z == nil {
			z = &span{least: 1 << 30}
			zones[name] = z
		}
		u, c := used[n.ID], counts[n.ID]
		z.all += c
		z.most = max(z.most, c)
		if u.NanoCPUs+g.Req.Reserve.NanoCPUs <= n.Total.NanoCPUs && u.MemoryBytes+g.Req.Reserve.MemoryBytes <= n.Total.MemoryBytes {
			z.least = min(z.least, c)
		}
	}
	if z := zones[""]; len(p.at[k]) < g.Count && (z == nil || z.least < 1<<30) {
		t.Fatalf("service %d: %d of %d tasks placed, though there is room", k, len(p.at[k]), g.Count)
	}
	fewest, most := 1<<30, 0
	for name, z := range zones {
		if z.least < 1<<30 && z.most > z.least+1 {
			t.Fatalf("service %d, zone %q: %d tasks on one node, %d on one with room", k, name, z.most, z.least)
		}
		if z.least < 1<<30 {
			fewest = min(fewest, z.all)
		}
		most = max(most, z.all)
	}
	if fewest < 1<<30 && most > fewest+1 {
		t.Fatalf("service %d: %d tasks in one zone, %d in one with room", k, most, fewest)
	}
}

func cpuTime() time.Duration { return cpuOf(unix.CLOCK_PROCESS_CPUTIME_ID) }

func cpuOf(clock int32) time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(clock, &ts)
	return time.Duration(ts.Nano())
}

// churn ends one task and places it again, n times, and returns the sorted times of the decisions, in CPU time of the thread: others want
// the machine, too.
func (p *plant) churn(t testing.TB, n int) []time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r := rand.New(rand.NewPCG(2, 2))
	times := make([]time.Duration, 0, n)
	for range n {
		k := r.IntN(len(p.groups))
		g := p.groups[k]
		if len(p.at[k]) == 0 {
			continue
		}
		i := r.IntN(len(p.at[k]))
		p.s.Release(Holding{g.Service, p.at[k][i], g.Req, true})
		g.Count = 1
		begin := cpuOf(unix.CLOCK_THREAD_CPUTIME_ID)
		nodes := p.s.Place(&g)
		times = append(times, cpuOf(unix.CLOCK_THREAD_CPUTIME_ID)-begin)
		if len(nodes) != 1 {
			t.Fatal("a task that ended found no place again")
		}
		p.at[k][i] = nodes[0]
	}
	slices.Sort(times)
	return times
}

// kill takes every hundredth node away and places its tasks again, service by service. It returns how many.
func (p *plant) kill(t testing.TB) (moved int) {
	for i := 0; i < len(p.nodes); i += 100 {
		n := p.nodes[i]
		n.State = Down
		p.dead[n.ID] = true
		p.s.SetNode(n)
	}
	for k, g := range p.groups {
		kept := p.at[k][:0]
		for _, id := range p.at[k] {
			if p.dead[id] {
				p.s.Release(Holding{g.Service, id, g.Req, true})
			} else {
				kept = append(kept, id)
			}
		}
		g.Count = len(p.at[k]) - len(kept)
		nodes := p.s.Place(&g)
		moved += len(nodes)
		if len(nodes) < g.Count && p.s.Explain(&g) == "" {
			t.Fatalf("service %d: tasks of dead nodes wait without a reason", k)
		}
		p.at[k] = append(kept, nodes...)
	}
	return moved
}

// TestMillion prints the figures of DESIGN.md, and checks them all. Without -million it is a tenth of the size and says nothing.
func TestMillion(t *testing.T) {
	scale := 10
	services := []int{100}
	if *million {
		scale, services = 1, []int{100, 1000, 10_000, 100_000}
	}
	for _, n := range services {
		p := newPlant(10_000/scale, 1_000_000/scale, n/scale)
		begin := cpuTime()
		placed := p.place()
		cpu := cpuTime() - begin
		p.check(t, true)
		times := p.churn(t, 20_000/scale)
		p.check(t, false)
		begin = cpuTime()
		moved := p.kill(t)
		killed := cpuTime() - begin
		p.check(t, false)
		if *million {
			fmt.Printf("%6d services: %d tasks in %v of CPU; one replacement p50 %v, p99 %v, most %v; 1 %% of nodes dead: %d tasks in %v of CPU\n",
				n, placed, cpu.Round(time.Millisecond), times[len(times)/2], times[len(times)*99/100], times[len(times)-1], moved, killed.Round(time.Millisecond))
		}
	}
}

// BenchmarkPlacement places 1,000,000 tasks of 1,000 services on 10,000 nodes.
func BenchmarkPlacement(b *testing.B) {
	var cpu time.Duration
	for b.Loop() {
		b.StopTimer()
		p := newPlant(10_000, 1_000_000, 1000)
		b.StartTimer()
		begin := cpuTime()
		p.place()
		cpu += cpuTime() - begin
	}
	b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s/op")
}
