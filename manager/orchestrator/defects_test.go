package orchestrator

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// play runs commands of a script (see TestScripts).
func play(t *testing.T, commands ...string) *script {
	t.Helper()
	sc := &script{world: newWorld(t), specs: map[string]*swarm.ServiceSpec{}, nodes: map[string]*api.NodeRecord{}, seen: map[string]string{}}
	sc.play(commands...)
	return sc
}

func (sc *script) play(commands ...string) {
	sc.t.Helper()
	for _, c := range commands {
		sc.command(c)
		sc.settle()
	}
}

// count counts the tasks of a service that f agrees to.
func (sc *script) count(service string, f func(*store.Task) bool) (n int) {
	for _, t := range sc.tasks() {
		if t.ServiceID == service && f(t) {
			n++
		}
	}
	return n
}

func running(t *store.Task) bool { return t.State == api.TaskRunning && t.Desired == api.TaskRunning }

func (sc *script) state(service string) (s string) {
	sc.view(func(tx store.ReadTx) { s = tx.Service(service).UpdateStatus.GetState() })
	return s
}

// A rollback that fails is paused, and stays so: nothing marks it completed.
func TestFailingRollbackStaysPaused(t *testing.T) {
	sc := play(t, "node a", "service web replicas=2 delay=0s u.action=rollback r.monitor=5s", "agents",
		"service web image=bad", "agents", "status web.1 FAILED x", "agents")
	if got := sc.state("web"); got != string(swarm.UpdateStateRollbackStarted) {
		t.Fatalf("state %s", got)
	}
	sc.play("agents", "status web.1 FAILED y")
	for range 20 {
		sc.play("advance 10s agents", "leader")
		if got := sc.state("web"); got != string(swarm.UpdateStateRollbackPaused) {
			t.Fatalf("state %s", got)
		}
	}
}

// The attempts of a global service's, and of a global job's, tasks count per node.
func TestMaxAttemptsOfGlobals(t *testing.T) {
	for _, mode := range []string{"global restart=any", "globaljob restart=any"} {
		sc := play(t, "node a", "node b", "service g "+mode+" delay=0s attempts=2", "agents")
		for range 6 {
			for _, task := range sc.tasks() {
				if task.NodeID == "a" && task.Live() {
					sc.report(task, api.TaskFailed, "x")
				}
			}
			sc.play("leader", "advance 20s agents")
		}
		on := func(node string) int { return sc.count("g", func(t *store.Task) bool { return t.NodeID == node }) }
		if on("a") != 3 || on("b") != 1 {
			t.Errorf("%s: %d tasks were made on the node where they fail, %d on the other: want 3 and 1", mode, on("a"), on("b"))
		}
	}
}

// A node that lost memory keeps what still fits; one task that does not matter does not hide the others.
func TestEnforcerLooksAtEveryTask(t *testing.T) {
	sc := play(t, "node a mem=4G", "node b mem=4G pause", "service big replicas=3 mem=1G delay=0s", "service small replicas=2 delay=0s", "agents",
		"node b active", "node a mem=1G", "agents", "agents", "agents")
	on := func(service, node string) int {
		return sc.count(service, func(t *store.Task) bool { return running(t) && t.NodeID == node })
	}
	if on("big", "a") != 1 || on("big", "b") != 2 || on("small", "a") != 2 {
		t.Errorf("big %d and %d, small %d: want 1, 2 and 2", on("big", "a"), on("big", "b"), on("small", "a"))
	}
	sc.play("node a label.x=1", "agents")
	if on("big", "a") != 1 || on("small", "a") != 2 {
		t.Error("tasks that fit were moved")
	}
}

// Restart attempts survive leader changes and a history of nothing.
func TestAttemptsNeedNoHistory(t *testing.T) {
	sc := play(t, "history 0", "node a", "service web delay=1s attempts=4 window=1m", "agents")
	fail := func() {
		for _, task := range sc.tasks() {
			if task.Live() {
				sc.report(task, api.TaskFailed, "x")
			}
		}
		sc.play("leader", "advance 3s agents")
	}
	for range 8 {
		fail()
	}
	if n := sc.count("web", func(*store.Task) bool { return true }); n != 1 {
		t.Errorf("%d tasks are kept", n)
	}
	if n := sc.count("web", running); n != 0 {
		t.Fatal("it was started more than 4 times again in a minute")
	}
	last := sc.tasks()[0]
	if last.Restarts.GetAttempts() != 4 || len(last.Restarts.GetTimes()) != 4 {
		t.Errorf("restarts %v", last.Restarts)
	}
	sc.play("service web image=v2", "advance 10s agents")
	if sc.count("web", running) != 1 || sc.tasks()[0].Restarts.GetAttempts() != 0 {
		t.Error("a new spec does not begin anew")
	}
}

// The pauses of a crash loop grow beyond what the history could tell, across leaders.
func TestCrashLoopSlowsDown(t *testing.T) {
	sc := play(t, "history 1", "node a", "service web delay=0s", "agents")
	starts, began := 0, sc.now
	for sc.now.Sub(began) < 10*time.Minute {
		for _, task := range sc.tasks() {
			if running(task) {
				starts++
				sc.report(task, api.TaskFailed, "x")
			}
		}
		sc.play("leader", "agents", "advance 250ms")
	}
	if starts < 12 || starts > 30 {
		t.Errorf("a task that crashes at once was started %d times in 10 minutes", starts)
	}
}

// A leader change moves nothing and creates nothing, whatever state the nodes are in.
func TestLeaderChangeMovesNothing(t *testing.T) {
	sc := play(t, "node a", "node b", "node c", "service web replicas=7", "service g global", "agents", "node c unknown")
	before := len(sc.tasks())
	version := sc.store.Version()
	for range 3 {
		sc.play("leader", "advance 1m")
	}
	if got := sc.store.Version(); got != version || len(sc.tasks()) != before {
		t.Errorf("%d entries were written by leader changes, %d tasks made", got-version, len(sc.tasks())-before)
	}
}

// A leader that is cut off in the middle of replacing a task leaves no second one behind.
func TestNoSecondTaskAfterLeaderChange(t *testing.T) {
	sc := play(t, "node a", "node b", "service web replicas=4 delay=0s", "agents")
	for i := range 20 {
		for _, task := range sc.tasks() {
			if running(task) && task.Slot == uint64(1+i%4) {
				sc.report(task, api.TaskFailed, "x")
			}
		}
		sc.loseQuorum(i%2 == 0)
		sc.settle()
		sc.loseQuorum(false)
		sc.play("leader", "advance 1m agents")
		if n := sc.count("web", running); n != 4 {
			t.Fatalf("%d tasks run", n)
		}
	}
}

// What a timer of a leader of before was about is forgotten with it: a node that came back is not given up.
func TestNodeTimersEndWithTheirLeader(t *testing.T) {
	sc := play(t, "node a", "node b", "cluster skein.node.orphan-after=1h", "service web replicas=2", "agents", "node a down", "advance 59m")
	sc.play("leader", "node a ready", "advance 2h", "node a down", "advance 59m", "leader")
	orphaned := func(t *store.Task) bool { return t.State == api.TaskOrphaned }
	if n := sc.count("web", orphaned); n != 0 {
		t.Fatalf("%d tasks were given up early", n)
	}
	sc.play("advance 2m")
	if n := sc.count("web", orphaned); n == 0 {
		t.Error("what ran on a node that is down for more than an hour is still held")
	}
}

// Without a setting it takes a day until what a dead node held is given up; what was told to go goes with it.
func TestDeadNodeIsGivenUpAfterADay(t *testing.T) {
	sc := play(t, "node a", "node b", "service web replicas=1", "agents", "node a down", "remove web", "agents", "advance 23h")
	if n := sc.count("web", (*store.Task).Live); n != 1 {
		t.Fatalf("%d tasks are held after 23 hours", n)
	}
	sc.play("leader", "advance 1h1m")
	if n := len(sc.tasks()); n != 0 {
		t.Errorf("%d tasks are left after a day", n)
	}
}

// After an automatic rollback there is no previous spec, as with Swarm: a rollback by hand must not bring back what failed.
func TestNothingToRollBackToAfterAutomaticRollback(t *testing.T) {
	sc := play(t, "node a", "service web delay=0s u.action=rollback", "agents", "service web image=bad", "agents", "status web.1 FAILED x", "advance 1m agents")
	sc.view(func(tx store.ReadTx) {
		svc := tx.Service("web")
		if svc.Previous != nil || svc.Spec.TaskTemplate.ContainerSpec.Image != "v1" || svc.UpdateStatus.State != string(swarm.UpdateStateRollbackCompleted) {
			t.Errorf("previous %v, image %s, %v", svc.Previous, svc.Spec.TaskTemplate.ContainerSpec.Image, svc.UpdateStatus)
		}
		tx.Revisions("web", func(r *api.Revision) bool {
			if r.Number == 3 && (r.Author != authorSkein || !strings.HasPrefix(r.Note, "update rolled back due to failure")) {
				t.Errorf("revision %v", r)
			}
			return true
		})
	})
}

// Tasks stay for the grace of their service, of their node, or of the cluster; a node that returns in time keeps them.
func TestDownGrace(t *testing.T) {
	sc := play(t, "node a", "node b", "cluster skein.node.down-grace=30s", "service web replicas=2", "service db replicas=2 option=skein.node.down-grace=0s", "agents", "agents")
	onB := func(t *store.Task) bool { return t.NodeID == "b" && t.Desired == api.TaskRunning }
	sc.play("node a down", "advance 29s agents", "leader")
	if sc.count("web", onB) != 1 || sc.count("db", onB) != 2 {
		t.Fatalf("after 29 s: web %d, db %d on b, want 1 and 2", sc.count("web", onB), sc.count("db", onB))
	}
	sc.play("node a ready", "advance 1m agents")
	if sc.count("web", running) != 2 || sc.count("web", onB) != 1 {
		t.Error("the node returned in time, its task was moved")
	}
	sc.play("node a down", "advance 31s agents", "agents")
	if sc.count("web", onB) != 2 {
		t.Error("the grace is over, the task was not moved")
	}
	sc.play("node a ready", "agents", "agents")
	if n := sc.count("web", func(t *store.Task) bool { return t.State == api.TaskRunning }); n != 2 {
		t.Errorf("%d tasks run after the node returned", n)
	}
}

// A drain takes no more slots down than its budget, and ends.
func TestDrainHasABudget(t *testing.T) {
	for _, order := range []string{"stop-first", "start-first"} {
		sc := play(t, "node a", "node b pause", "service web replicas=12 u.parallelism=2 u.order="+order, "agents", "agents", "node b active")
		least, up := 12, 0
		sc.play("node a drain")
		for range 80 {
			sc.oneAgentStep()
			sc.play("leader")
			up = sc.count("web", running)
			least = min(least, up)
		}
		if want := map[string]int{"stop-first": 10, "start-first": 12}[order]; least < want || up != 12 {
			t.Errorf("%s: at least %d tasks ran, want %d; in the end %d", order, least, want, up)
		}
		if n := sc.count("web", func(t *store.Task) bool { return t.NodeID == "a" && t.Live() }); n != 0 {
			t.Errorf("%s: %d tasks are left on the drained node", order, n)
		}
	}
}

// A drain with nowhere to go keeps what runs for a while, and empties the node all the same.
func TestDrainWithoutRoomEnds(t *testing.T) {
	sc := play(t, "node a", "service web replicas=3", "agents", "node a drain", "advance 10s agents")
	if n := sc.count("web", running); n != 3 {
		t.Fatalf("%d tasks run, 3 could", n)
	}
	sc.play("advance 5m agents")
	if n := sc.count("web", func(t *store.Task) bool { return t.Live() }); n != 0 {
		t.Errorf("%d tasks are left on the drained node", n)
	}
	sc.play("node b", "advance 1s agents", "agents")
	if n := sc.count("web", running); n != 3 {
		t.Errorf("%d tasks run once there is room", n)
	}
}

// Without a budget all go at once, as docker's do.
func TestImmediateDrain(t *testing.T) {
	sc := play(t, "node a option=skein.drain.parallelism=0", "node b pause", "service web replicas=6", "agents", "agents", "node b active", "node a drain")
	if n := sc.count("web", running); n != 0 {
		t.Errorf("%d tasks shall still run", n)
	}
}

// So many tasks of a service are replaced in a second, and all in the end.
func TestReplacementsAreCapped(t *testing.T) {
	sc := play(t, "node a", "node b pause", "service web replicas=100 option=skein.replace.rate=10", "agents", "agents", "node b active")
	onB := func(t *store.Task) bool { return t.NodeID == "b" }
	sc.play("node a down")
	last := 0
	for i := range 12 {
		n := sc.count("web", onB)
		if n-last > 20 {
			t.Fatalf("second %d: %d tasks were replaced", i, n-last)
		}
		last = n
		sc.play("advance 1s")
	}
	if last < 95 || last > 100 {
		t.Errorf("%d tasks were replaced after 11 s", last)
	}
	sc.play("advance 5s")
	if n := sc.count("web", onB); n != 100 {
		t.Errorf("%d tasks were replaced in the end", n)
	}
}

// A task that shall move stays until its successor runs.
func TestAskedToMove(t *testing.T) {
	sc := play(t, "node a", "node b pause", "service web replicas=4", "agents", "agents", "node b active")
	var ids []string
	for _, task := range sc.tasks()[:2] {
		ids = append(ids, task.ID)
	}
	sc.do(&api.Change{Kind: &api.Change_MoveTasks{MoveTasks: &api.TaskMove{TaskIds: ids, Reason: "level"}}})
	for i := range 12 {
		sc.oneAgentStep()
		if n := sc.count("web", func(t *store.Task) bool { return t.State == api.TaskRunning }); n < 4 {
			t.Fatalf("step %d: %d tasks run", i, n)
		}
	}
	if n := sc.count("web", func(t *store.Task) bool { return running(t) && t.NodeID == "b" }); n != 2 || sc.count("web", running) != 4 {
		t.Errorf("%d tasks moved, %d run", n, sc.count("web", running))
	}
}

// oneAgentStep brings every task one state on.
func (sc *script) oneAgentStep() {
	sc.settle()
	for _, t := range sc.tasks() {
		n := sc.nodes[t.NodeID]
		switch {
		case n == nil || n.Status.State == "down" || !t.Live():
		case t.Desired >= api.TaskShutdown:
			sc.report(t, api.TaskShutdown, "")
		case t.State < api.TaskReady:
			sc.report(t, api.TaskReady, "")
		case t.State < t.Desired:
			sc.report(t, t.Desired, "")
		}
	}
	sc.now = sc.now.Add(100 * time.Millisecond)
	sc.settle()
}

func TestNumbers(t *testing.T) {
	var s numbers
	for i := uint64(1); i < 500; i++ {
		s.set(i, true)
		s.set(i, true)
	}
	for _, i := range []uint64{3, 64, 65, 127, 400} {
		s.set(i, false)
	}
	var free []uint64
	for n := s.free(0); n < 502; n = s.free(n + 1) {
		free = append(free, n)
	}
	if fmt.Sprint(free) != "[3 64 65 127 400 500 501]" || s.count != 494 {
		t.Errorf("free %v, %d in the set", free, s.count)
	}
}
