package orchestrator

import (
	"strings"
	"testing"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// A start-first update where each node has as many replicas as it may comes to an end, one slot after the other, and never has more on a node.
func TestStartFirstWithinMaxPerNode(t *testing.T) {
	sc := play(t, "node a", "node b", "service web replicas=4 maxpernode=2 u.order=start-first u.delay=0s u.monitor=0s", "agents", "agents")
	sc.play("service web force=1")
	for step := 0; sc.state("web") != string(swarm.UpdateStateCompleted); step++ {
		if step == 100 {
			t.Fatalf("the update is %s, %d tasks run", sc.state("web"), sc.count("web", running))
		}
		on := map[string]int{}
		for _, task := range sc.tasks() {
			if task.Live() && task.Desired <= api.TaskRunning && task.NodeID != "" {
				on[task.NodeID]++
			}
		}
		if n := sc.count("web", running); on["a"] > 2 || on["b"] > 2 || n < 3 {
			t.Fatalf("step %d: %v shall run, %d do", step, on, n)
		}
		sc.oneAgentStep()
		sc.play("advance 1s")
	}
	if n := sc.count("web", func(t *store.Task) bool { return running(t) && t.Revision == 2 }); n != 4 {
		t.Errorf("%d tasks of the new revision run", n)
	}
}

// What would find no room in the place of the old task either ends nothing.
func TestStartFirstKeepsWhatCannotBeReplaced(t *testing.T) {
	for _, change := range []string{"constraint=node.hostname==elsewhere", "mem=900G"} {
		sc := play(t, "node a", "service web replicas=2 maxpernode=2 u.order=start-first", "agents", "agents", "service web "+change)
		for range 5 {
			sc.oneAgentStep()
			sc.play("advance 10s")
		}
		if n := sc.count("web", running); n < 2 {
			t.Errorf("%s: %d tasks run", change, n)
		}
		waits := sc.count("web", func(t *store.Task) bool { return strings.HasPrefix(t.Status.GetErr(), "no suitable node") })
		if waits != 1 {
			t.Errorf("%s: %d tasks wait with the reason", change, waits)
		}
	}
}
