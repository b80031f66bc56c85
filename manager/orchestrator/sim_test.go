package orchestrator

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
	"skein/scheduler"
)

var seeds = flag.Uint64("seeds", 250, "random histories to simulate")

// TestSimulation drives the controllers through random histories on a virtual clock, with agents that are slow, fail and disappear,
// checks after every step what must always hold, and at the end what must hold once everything is quiet.
func TestSimulation(t *testing.T) {
	n := *seeds
	if testing.Short() {
		n = min(n, 60)
	}
	for seed := range n {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { simulate(t, seed) })
	}
}

type sim struct {
	script
	r       *rand.Rand
	created int
	checked uint64
	decoder *Orchestrator
	first   map[string]store.Task // as last seen
	dead    map[string]bool       // ids that were deleted
	down    map[string]bool       // nodes that ever were: what ran there meanwhile is not told to stop at once
	startup map[string]bool       // services that ever used start-first
	fails   float64               // chance that a task fails in a step
}

func simulate(t *testing.T, seed uint64) {
	s := &sim{decoder: New(), r: rand.New(rand.NewPCG(seed, 7)), first: map[string]store.Task{}, dead: map[string]bool{}, startup: map[string]bool{}, down: map[string]bool{}, fails: 0.03}
	s.script = script{world: newWorld(t), specs: map[string]*swarm.ServiceSpec{}, nodes: map[string]*api.NodeRecord{}, seen: map[string]string{}}
	for i := range 3 + s.r.IntN(3) {
		s.node(fmt.Sprint("n", i), []string{"ready", fmt.Sprintf("mem=%dG", 4+s.r.IntN(5)), fmt.Sprintf("label.zone=%d", i%2)})
	}
	for range 60 {
		s.event()
		s.step()
	}
	s.quiet()
	for range 100 {
		s.step()
	}
	s.checkEnd()
}

// step is half a second.
func (s *sim) step() {
	s.settle()
	s.check()
	s.work()
	s.loseQuorum(s.fails > 0 && s.r.IntN(10) == 0)
	s.settle()
	for s.now = s.now.Add(500 * time.Millisecond); ; {
		next := s.next()
		if next.IsZero() || next.After(s.now) {
			break
		}
		s.settle()
	}
	s.loseQuorum(false)
	s.check()
}

// work is what agents do: each task moves by one state at most, now and then.
func (s *sim) work() {
	for _, t := range s.tasks() {
		n := s.nodes[t.NodeID]
		if n == nil || n.Status.State != "ready" || !t.Live() || s.r.IntN(3) == 0 {
			continue
		}
		switch {
		case t.Desired >= api.TaskShutdown:
			s.report(t, api.TaskShutdown, "")
		case s.r.Float64() < s.fails:
			s.report(t, []api.TaskState{api.TaskFailed, api.TaskFailed, api.TaskComplete, api.TaskRejected}[s.r.IntN(4)], "bad luck")
		case t.State < api.TaskReady:
			s.report(t, api.TaskReady, "")
		case t.State < t.Desired:
			s.report(t, api.TaskRunning, "")
		case s.isJob(t.ServiceID) && s.r.IntN(3) == 0:
			s.report(t, api.TaskComplete, "")
		}
	}
}

func (s *sim) isJob(service string) bool {
	spec := s.specs[service]
	return spec != nil && (spec.Mode.ReplicatedJob != nil || spec.Mode.GlobalJob != nil)
}

func (s *sim) pick(m []string) string {
	if len(m) == 0 {
		return ""
	}
	return m[s.r.IntN(len(m))]
}

func (s *sim) event() {
	services := slices.Sorted(maps.Keys(s.specs))
	nodes := slices.Sorted(maps.Keys(s.nodes))
	node, service := s.pick(nodes), s.pick(services)
	switch x := s.r.IntN(20); {
	case x < 2 || service == "":
		s.create()
	case x < 5:
		if s.isJob(service) {
			s.service(service, []string{"label=again"})
		} else if s.specs[service].Mode.Global == nil {
			s.service(service, []string{fmt.Sprint("replicas=", s.r.IntN(7))})
		}
	case x < 9 && s.isJob(service):
		s.service(service, []string{fmt.Sprint("image=v", s.r.IntN(100))})
	case x < 9:
		args := []string{fmt.Sprint("image=v", s.r.IntN(100)), fmt.Sprint("u.parallelism=", s.r.IntN(3)), fmt.Sprint("u.delay=", s.r.IntN(3), "s"),
			"u.order=" + s.pick([]string{"stop-first", "stop-first", "start-first"}), "u.action=" + s.pick([]string{"pause", "continue", "rollback"}),
			fmt.Sprint("u.ratio=", s.pick([]string{"0", "0.5"}))}
		s.service(service, args)
	case x < 10:
		if s.hasPrevious(service) && !s.isJob(service) {
			s.rollback(service)
		}
	case x < 12:
		state := s.pick([]string{"down", "ready", "unknown"})
		s.node(node, []string{state})
		s.down[node] = s.down[node] || state == "down"
	case x < 14:
		s.node(node, []string{s.pick([]string{"drain", "active", "pause"})})
	case x < 15:
		s.node(node, []string{fmt.Sprint("label.zone=", s.r.IntN(2))})
	case x < 16 && len(nodes) > 2:
		s.node(node, []string{"remove"})
	case x < 17:
		s.node(fmt.Sprint("m", s.r.IntN(100_000)), []string{"ready", "mem=4G"})
	case x < 18:
		s.newTerm()
	case x < 19 && len(services) > 2:
		s.do(&api.Change{Kind: &api.Change_DeleteService{DeleteService: service}})
		delete(s.specs, service)
	}
	for name := range s.specs {
		s.noteOrder(name)
	}
}

func (s *sim) hasPrevious(service string) (has bool) {
	s.view(func(tx store.ReadTx) { has = tx.Service(service).Previous != nil })
	return has
}

// noteOrder remembers which services may have two tasks to a slot.
func (s *sim) noteOrder(name string) {
	s.view(func(tx store.ReadTx) {
		svc := tx.Service(name)
		for _, spec := range svc.Revs {
			for _, c := range []*swarm.UpdateConfig{spec.UpdateConfig, spec.RollbackConfig} {
				if c != nil && c.Order == swarm.UpdateOrderStartFirst {
					s.startup[name] = true
				}
			}
		}
	})
}

func (s *sim) create() {
	s.created++
	name := fmt.Sprint("s", s.created)
	args := []string{fmt.Sprint("replicas=", 1+s.r.IntN(5)), fmt.Sprint("delay=", s.r.IntN(3), "s"), fmt.Sprintf("mem=%dM", s.r.IntN(3)*100)}
	switch s.r.IntN(8) {
	case 0, 1:
		args = append(args[1:2], "global")
	case 2:
		args = append(args[1:], fmt.Sprintf("job=%d/%d", 1+s.r.IntN(3), s.r.IntN(7)))
	case 3:
		args = append(args[1:2], "globaljob")
	}
	if s.r.IntN(3) == 0 {
		args = append(args, fmt.Sprint("constraint=node.labels.zone!=", s.r.IntN(2)))
	}
	if s.r.IntN(3) == 0 {
		args = append(args, "restart=on-failure")
	}
	if s.r.IntN(4) == 0 {
		args = append(args, "attempts=3", "window=20s")
	}
	s.service(name, args)
}

// quiet ends all trouble: every node is there, nothing fails, and no service waits for a human.
func (s *sim) quiet() {
	s.fails = 0
	for _, name := range slices.Sorted(maps.Keys(s.nodes)) {
		s.node(name, []string{"ready", "active", "mem=100G"})
	}
	s.node("last0", []string{"ready", "mem=100G", "label.zone=0"})
	s.node("last1", []string{"ready", "mem=100G", "label.zone=1"})
	for _, name := range slices.Sorted(maps.Keys(s.specs)) {
		s.service(name, []string{"force=4242", "u.parallelism=0", "u.delay=0s"})
	}
}

// check asserts what always holds.
func (s *sim) check() {
	s.t.Helper()
	if s.checked == s.store.Version() {
		return
	}
	s.checked = s.store.Version()
	now := map[string]store.Task{}
	reserved := map[string]int64{}
	wanted, running := map[string]int{}, map[string]int{}
	completed, busy := map[string]int{}, map[string]uint64{}
	s.view(func(tx store.ReadTx) {
		for _, t := range tx.Tasks() {
			now[t.ID] = *t
			s.checkTask(tx, t)
			if t.Live() {
				reserved[t.NodeID] += memory(tx, t)
			}
			slot := fmt.Sprintf("%s.%d", t.ServiceID, t.Slot)
			if t.Slot == 0 {
				slot += t.NodeID
			}
			if svc := tx.Service(t.ServiceID); svc != nil && svc.Job() {
				s.checkJob(svc, t, slot, completed, busy)
			}
			if t.State == api.TaskRunning && !s.startup[t.ServiceID] && !s.down[t.NodeID] {
				if running[slot]++; running[slot] > 1 {
					s.t.Fatalf("%s: two tasks run in the slot", slot)
				}
			}
			if n := tx.Node(t.NodeID); t.Desired == api.TaskRunning && !t.State.Terminal() && (t.NodeID == "" || n.GetStatus().GetState() != "down") {
				if wanted[slot]++; wanted[slot] > 1 && (!s.startup[t.ServiceID] || wanted[slot] > 2) {
					s.t.Fatalf("%s: %d tasks shall run in the slot", slot, wanted[slot])
				}
			}
		}
		for _, n := range tx.Nodes() {
			if total := (s.decoder.at(tx, n.Id).Total.MemoryBytes); reserved[n.Id] > total {
				s.t.Fatalf("node %s: %d bytes are reserved, it has %d", n.Id, reserved[n.Id], total)
			}
		}
	})
	for id := range s.first {
		if _, still := now[id]; !still {
			s.dead[id] = true
		}
	}
	s.first = now
}

// checkJob: a slot completes once in an execution, and no more of them run than may at once.
func (s *sim) checkJob(svc *store.Service, t *store.Task, slot string, completed map[string]int, busy map[string]uint64) {
	s.t.Helper()
	if key := fmt.Sprint(slot, " in revision ", t.Revision); t.State == api.TaskComplete && t.Desired <= api.TaskRunning {
		if completed[key]++; completed[key] > 1 {
			s.t.Fatalf("%s: completed twice", key)
		}
	}
	if j := svc.Spec.Mode.ReplicatedJob; j != nil && t.State == api.TaskRunning && !s.down[t.NodeID] {
		if busy[svc.Id]++; busy[svc.Id] > *j.MaxConcurrent {
			s.t.Fatalf("job %s: %d tasks run, %d may", svc.Id, busy[svc.Id], *j.MaxConcurrent)
		}
	}
}

func (s *sim) checkTask(tx store.ReadTx, t *store.Task) {
	s.t.Helper()
	old, known := s.first[t.ID]
	if s.dead[t.ID] {
		s.t.Fatalf("task %s: the id of a deleted task came back", s.name(t))
	}
	if known && (t.State < old.State || t.Desired < old.Desired || (old.NodeID != "" && t.NodeID != old.NodeID)) {
		s.t.Fatalf("task %s went back: %s, was %s", s.name(t), describe(t), describe(&old))
	}
	placed := t.State >= api.TaskAssigned && (!known || old.State < api.TaskAssigned)
	if svc, n := tx.Service(t.ServiceID), tx.Node(t.NodeID); placed && svc != nil && n != nil && !t.State.Terminal() {
		o := s.decoder
		facts := o.facts(svc.Revs[t.Revision])
		if node := o.at(tx, t.NodeID); !facts.req.MatchesAll(node) || node.State != 0 {
			s.t.Fatalf("task %s was placed on %s, which is %+v, constraints %v", s.name(t), t.NodeID, node, facts.constraints)
		}
	}
}

func memory(tx store.ReadTx, t *store.Task) int64 {
	svc := tx.Service(t.ServiceID)
	if svc == nil || svc.Revs[t.Revision] == nil || svc.Revs[t.Revision].TaskTemplate.Resources == nil {
		return 0
	}
	return svc.Revs[t.Revision].TaskTemplate.Resources.Reservations.MemoryBytes
}

// checkEnd asserts what holds when nothing happened for long: exactly the tasks that were asked for run, of the newest spec.
func (s *sim) checkEnd() {
	s.view(func(tx store.ReadTx) {
		total := 0
		for _, svc := range tx.Services() {
			want := 0
			if j := svc.Spec.Mode.ReplicatedJob; j != nil {
				want = int(*j.TotalCompletions)
			} else if svc.Spec.Mode.Global != nil || svc.Job() {
				o := s.decoder
				for _, n := range tx.Nodes() {
					if o.facts(svc.Spec).req.MatchesAll(o.at(tx, n.Id)) {
						want++
					}
				}
			} else {
				want = int(*svc.Spec.Mode.Replicated.Replicas)
			}
			runs, ended := 0, map[string]int{}
			for _, t := range tx.TasksByService(svc.Id) {
				total++
				switch {
				case svc.Job() && t.State == api.TaskComplete && t.Desired <= api.TaskRunning && t.Revision == svc.Revision:
					runs++
				case t.State == api.TaskRunning && t.Desired == api.TaskRunning && t.Revision == svc.Revision:
					runs++
				case t.State.Terminal() && t.Desired >= api.TaskShutdown:
					ended[fmt.Sprint(t.Slot, t.NodeID[:len(t.NodeID)*b2i(t.Slot == 0)])]++
				default:
					s.t.Errorf("task %s is left over: %s", s.name(t), describe(t))
				}
			}
			if runs != want {
				s.t.Errorf("service %s: %d tasks of revision %d run, want %d", svc.Id, runs, svc.Revision, want)
			}
			for slot, n := range ended {
				if n > defaultHistory {
					s.t.Errorf("service %s: slot %s keeps %d ended tasks", svc.Id, slot, n)
				}
			}
			if st := svc.UpdateStatus.GetState(); st != "completed" && st != "" {
				s.t.Errorf("service %s: update is %q", svc.Id, st)
			}
		}
		if all := len(tx.Tasks()); all != total {
			s.t.Errorf("%d tasks belong to no service", all-total)
		}
	})
	if s.t.Failed() {
		for _, t := range s.tasks() {
			s.t.Log(s.name(t), describe(t))
		}
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// at is a node as of now.
func (o *Orchestrator) at(tx store.ReadTx, id string) *scheduler.Node {
	o.step++
	return &o.node(tx, id).node
}
