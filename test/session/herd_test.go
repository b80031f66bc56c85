package session_test

import (
	"flag"
	"fmt"
	"testing"
	"time"

	"skein/manager/api"
)

// agentCount is for long runs: go test ./test/session -run Herd -agents 1000 -v
var agentCount = flag.Int("agents", 300, "agents of TestHerd")

// TestHerd: a leader change with many agents moves nothing, and all are back soon.
func TestHerd(t *testing.T) {
	agents := *agentCount
	if testing.Short() {
		agents = 100
	}
	bubble(t, func(c *cluster) {
		var names []string
		for i := range agents {
			names = append(names, fmt.Sprintf("w%d", i))
			c.worker(names[i])
		}
		c.eventually("all connected", 15*time.Second, func() bool { return c.connected(names...) })
		tasks := c.service("web", append(names, names...)...)
		took := c.eventually("all tasks run", 20*time.Second, func() bool { return c.running(tasks...) })
		t.Logf("%d tasks on %d nodes ran after %v", len(tasks), agents, took)
		took = c.eventually("all nodes know all endpoints", 20*time.Second, func() bool {
			for _, n := range names {
				last, _ := c.agents[n].net.Last()
				if len(last.Mesh.Endpoints) != len(tasks) || last.Mesh.Endpoints[tasks[0]].State != "ready" {
					return false
				}
			}
			return true
		})
		before := map[string]uint64{}
		for _, id := range tasks {
			before[id] = c.task(id).Version
		}
		c.unlead()
		time.Sleep(2 * time.Second)
		c.lead("m2")
		took = c.eventually("all back", 15*time.Second, func() bool { return c.connected(names...) })
		t.Logf("%d agents were back %v after the new leader", agents, took)
		time.Sleep(10 * time.Second)
		for _, n := range names {
			if s := c.nodeState(n); s != "ready" {
				t.Fatalf("%s is %s", n, s)
			}
		}
		for _, id := range tasks {
			if got := c.task(id); got.State != api.TaskRunning || got.Version != before[id] {
				t.Fatalf("task %s: %s, version %d, before %d", id, got.State, got.Version, before[id])
			}
		}
	})
}
