package session_test

import (
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"skein/agent"
	"skein/agent/task"
	"skein/manager/api"
)

// TestPropagation measures, on the real clock, how long a change of one endpoint takes until 50 agents acknowledged it. Run it by hand:
// SKEIN_MEASURE=1 go test -v -run Propagation ./test/session
func TestPropagation(t *testing.T) {
	if os.Getenv("SKEIN_MEASURE") == "" {
		t.Skip("a measurement: set SKEIN_MEASURE=1")
	}
	const nodes, services, changes = 50, 8, 200 // a /20 has room for 4,000 endpoints
	run(t, func(c *cluster) {
		var names []string
		for i := range nodes {
			names = append(names, fmt.Sprintf("w%d", i))
			c.worker(names[i])
		}
		var tasks []string
		for i := range services {
			tasks = append(tasks, c.service(fmt.Sprintf("web%d", i), slices.Repeat(names, 10)...)...)
		}
		for deadline := time.Now().Add(2 * time.Minute); !c.running(tasks...); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("tasks do not run")
			}
		}
		time.Sleep(3 * time.Second)
		t.Logf("%d endpoints on %d nodes", len(tasks), nodes)
		var mu sync.Mutex
		var victim string
		var seen chan struct{}
		for _, n := range names {
			var last string
			c.agents[n].net.OnChange(func(tab agent.Tables) {
				mu.Lock()
				defer mu.Unlock()
				if victim != "" && last != victim && tab.Mesh.Endpoints[victim] == nil && tab.Networks[id("net")].Endpoints[victim] == nil {
					last = victim
					seen <- struct{}{}
				}
			})
		}
		var took []time.Duration
		for i := range changes {
			mu.Lock()
			victim, seen = tasks[i], make(chan struct{}, nodes)
			mu.Unlock()
			began := time.Now()
			if err := c.agents[names[i%nodes]].exec.Kill(victim, task.Exit{Code: 1}); err != nil {
				t.Fatal(err)
			}
			for range nodes {
				<-seen
			}
			took = append(took, time.Since(began))
			if i%20 == 0 {
				time.Sleep(20 * time.Millisecond)
			}
		}
		slices.Sort(took)
		t.Logf("exit → out of the tables of %d nodes: p50 %v, p99 %v, max %v", nodes, took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
		if s := c.task(tasks[0]); s.State != api.TaskFailed {
			t.Errorf("task is %s", s.State)
		}
	})
}
