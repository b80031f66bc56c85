package session_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// TestPartitionMovesNothing: a leader that is cut off from most agents declares none of them down and leaves their tasks where they are;
// then one that really dies is noticed as fast as ever.
func TestPartitionMovesNothing(t *testing.T) {
	bubble(t, func(c *cluster) {
		var names []string
		for i := range 12 {
			names = append(names, fmt.Sprintf("w%d", i))
			c.worker(names[i])
		}
		c.eventually("connected", 10*time.Second, func() bool { return c.connected(names...) })
		tasks := c.service("web", names...)
		c.eventually("tasks run", 10*time.Second, func() bool { return c.running(tasks...) })
		cut := names[:8]
		for _, n := range cut {
			c.freeze(n)
		}
		began := time.Now()
		for time.Since(began) < 2*time.Minute {
			time.Sleep(500 * time.Millisecond)
			for _, n := range names {
				if s := c.nodeState(n); s == "down" {
					t.Fatalf("%s was declared down %v after the cut", n, time.Since(began))
				}
			}
		}
		if s, m := c.nodeState(cut[0]), c.record(cut[0]).Status.GetMessage(); s != "unknown" || !strings.Contains(m, "silent at once") || !strings.Contains(m, "skein.node.down-share") {
			t.Errorf("a node that is held back is %s: %q", s, m)
		}
		// Somebody knows that one of them is dead: drained, it is given up.
		drained := proto.CloneOf(c.record(cut[7]))
		drained.Availability = "drain"
		c.apply(&api.Change{Kind: &api.Change_PutNode{PutNode: drained}})
		c.eventually("the drained one is down", 3*time.Second, func() bool { return c.nodeState(cut[7]) == "down" })
		for _, n := range cut[:7] {
			c.agents[n].setCut(false)
		}
		c.eventually("all others are back", 20*time.Second, func() bool {
			return !slices.ContainsFunc(cut[:7], func(n string) bool { return c.nodeState(n) != "ready" })
		})
		for i, id := range tasks[:7] {
			if got := c.task(id); got.State != api.TaskRunning || c.agents[names[i]].exec.Starts(id) != 1 {
				t.Errorf("task of %s: %s", names[i], got.State)
			}
		}
		time.Sleep(time.Minute)
		c.freeze("w9")
		if took := c.eventually("one is down", 10*time.Second, func() bool { return c.nodeState("w9") == "down" }); took > 5*time.Second {
			t.Errorf("a single node was declared down after %v", took)
		}
	})
}

// TestStaleLeaderIsRefused: an agent that had a leader of a newer term does not follow an older one, until that can only be a cluster that
// was restored.
func TestStaleLeaderIsRefused(t *testing.T) {
	bubble(t, func(c *cluster) {
		w := c.worker("w1")
		c.leadIn("m2", 7)
		c.eventually("in term 7", 10*time.Second, func() bool { return c.connected("w1") && w.a.Status().Leader == "m2" })
		c.leadIn("m3", 5)
		began := time.Now()
		for time.Since(began) < 30*time.Second {
			time.Sleep(time.Second)
			if c.connected("w1") {
				t.Fatalf("the agent followed a leader of term 5 after one of term 7, %v later", time.Since(began))
			}
		}
		c.eventually("followed in the end", 2*time.Minute, func() bool { return c.connected("w1") })
	})
}

func (c *cluster) record(name string) (n *store.Node) {
	c.store.View(func(tx store.ReadTx) { n = tx.Node(id(name)) })
	return n
}
