package placement

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
)

// TestWhoWaitsFitsNowhere: after whatever happened, a controller that has just been made finds no node for a task that waits.
func TestWhoWaitsFitsNowhere(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w, rnd := newWorld(t), rand.New(rand.NewPCG(seed, 1))
			waited := 0
			for step := range 150 {
				w.random(rnd, step, seed%3 == 0)
				w.now = w.now.Add(time.Duration(rnd.IntN(3000)) * time.Millisecond)
				w.settle()
				waited += w.checkWaiting(step)
			}
			if waited == 0 {
				t.Error("nothing ever waited")
			}
		})
	}
}

func (w *world) random(rnd *rand.Rand, step int, priorities bool) {
	pick := func(ids []string) string {
		if len(ids) == 0 {
			return ""
		}
		return ids[rnd.IntN(len(ids))]
	}
	var services, live []string
	held := map[string]*store.Task{}
	w.st.View(func(tx store.ReadTx) {
		for _, s := range tx.Services() {
			services = append(services, s.Id)
		}
		for _, t := range tx.Tasks() {
			if t.Live() && t.NodeID != "" {
				live, held[t.ID] = append(live, t.ID), t
			}
		}
	})
	switch rnd.IntN(10) {
	case 0:
		w.node(fmt.Sprint("n", rnd.IntN(5)), int64(200+100*rnd.IntN(4)), []string{"active", "active", "drain", "pause"}[rnd.IntN(4)])
	case 1, 2, 3:
		spec := memory(int64(50 + 50*rnd.IntN(6)))
		spec.Mode.Replicated = &swarm.ReplicatedService{}
		spec.TaskTemplate.Placement = &swarm.Placement{MaxReplicas: uint64(rnd.IntN(3))}
		if rnd.IntN(3) == 0 {
			spec.TaskTemplate.Placement.Constraints = []string{fmt.Sprint("node.hostname!=n", rnd.IntN(5))}
		}
		if priorities {
			spec.Labels = map[string]string{LabelPriority: fmt.Sprint(rnd.IntN(3))}
		}
		id := fmt.Sprint("s", step)
		w.service(id, spec)
		w.tasks(id, 1+rnd.IntN(4))
	case 4:
		if id := pick(services); id != "" {
			w.do(&api.Change{Kind: &api.Change_DeleteService{DeleteService: id}})
			for _, t := range held { // a new controller does not know what they reserved
				if t.ServiceID == id {
					w.end(t)
				}
			}
		}
	default:
		if id := pick(live); id != "" {
			w.do(&api.Change{Kind: &api.Change_DesireTasks{DesireTasks: &api.TaskDesire{TaskIds: []string{id}, Desired: uint32(api.TaskShutdown)}}})
			if rnd.IntN(4) > 0 {
				w.end(held[id])
			}
		}
	}
}

func (w *world) end(t *store.Task) {
	w.t.Helper()
	w.do(&api.Change{Kind: &api.Change_ReportTask{ReportTask: &api.TaskReport{
		TaskId: t.ID, State: uint32(api.TaskShutdown), Time: w.now.UnixNano(), NodeId: t.NodeID}}})
}

// checkWaiting returns how many wait. Of several priorities the highest that waits may keep room from others.
func (w *world) checkWaiting(step int) (waiting int) {
	w.t.Helper()
	w.st.View(func(view store.ReadTx) {
		fresh := New()
		fresh.reset(view)
		for _, g := range fresh.groups(view, w.now) {
			waiting += len(g.tasks)
			if nodes := fresh.sched.Place(&g.Group); len(nodes) > 0 {
				w.t.Fatalf("step %d: %d tasks of %s wait, %v have room", step, g.Count, g.Service, nodes)
			}
			fresh.leastPriority(view)
			if fresh.mixed {
				break
			}
		}
	})
	return waiting
}

// BenchmarkFreed: 10,000 services wait, each for something else; something ends on one node, where none of them fits, again and again.
func BenchmarkFreed(b *testing.B) {
	for _, full := range []bool{true, false} {
		b.Run(fmt.Sprintf("everything=%v", full), func(b *testing.B) { benchmarkFreed(b, full) })
	}
}

func benchmarkFreed(b *testing.B, full bool) {
	const waiting, nodes = 10_000, 100
	w := newWorld(b)
	for i := range nodes {
		w.node(fmt.Sprint("n", i), 100, "active")
	}
	w.service("filler", memory(100))
	w.tasks("filler", nodes)
	for i := range waiting {
		w.service(fmt.Sprint("s", i), memory(int64(101+i))) // more than any node has
		w.tasks(fmt.Sprint("s", i), 1)
	}
	p := New()
	step := func(keys loop.Keys) {
		w.st.View(func(view store.ReadTx) { p.Step(view, keys, w.now) })
	}
	w.now = w.now.Add(time.Minute)
	step(loop.Keys{All: true})
	h := p.held[p.decided[0]]
	p.decided, p.changed = nil, false
	for b.Loop() {
		p.sched.Release(h) // what was there ended
		p.sched.Hold(h)
		p.waits.freed[h.Node] = struct{}{}
		p.changed = full
		step(loop.Keys{})
	}
}
