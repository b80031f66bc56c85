package session_test

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"skein/agent/task"
	"skein/manager/api"
)

func TestAssignmentToRunning(t *testing.T) {
	bubble(t, func(c *cluster) {
		w1, w2, w3 := c.worker("w1"), c.worker("w2"), c.worker("w3")
		c.eventually("nodes ready", 2*time.Second, func() bool { return c.nodeState("w1") == "ready" && c.nodeState("w3") == "ready" })
		tasks := c.service("web", "w1", "w2")
		took := c.eventually("tasks run", time.Second, func() bool { return c.running(tasks...) })
		if took > 200*time.Millisecond {
			t.Errorf("tasks ran after %v", took)
		}
		took = c.eventually("tables say ready", time.Second, func() bool {
			for _, id := range tasks {
				if w1.endpoint("mesh", id) != "ready" || w3.endpoint("mesh", id) != "ready" || w2.endpoint(c.network().Id, id) != "ready" {
					return false
				}
			}
			return true
		})
		if took > 100*time.Millisecond {
			t.Errorf("tables were applied after %v", took)
		}
		last, _ := w3.net.Last()
		if len(last.Networks) != 0 {
			t.Errorf("a node without tasks has tables of networks: %v", last.Networks)
		}
		if len(last.Mesh.Nodes) != 6 || last.NodeIndex == 0 || last.DataPort != 4789 || last.MeshPool != "10.192.0.0/10" {
			t.Errorf("mesh of w3: %d nodes, index %d, port %d, pool %s", len(last.Mesh.Nodes), last.NodeIndex, last.DataPort, last.MeshPool)
		}
		last, _ = w1.net.Last()
		n := last.Networks[c.network().Id]
		if e := n.Endpoints[tasks[1]]; e.Addr4 == "" || len(e.Names) != 2 || e.Names[0] != "web.2."+tasks[1] {
			t.Errorf("endpoint of the other node: %v", e)
		}
		if s := n.Services[c.task(tasks[0]).ServiceID]; s.GetVip4() == "" || s.Name != "web" || n.Network.GetVni() == 0 || len(n.Nodes) != 2 {
			t.Errorf("network table: service %v, network %v, nodes %v", s, n.Network, n.Nodes)
		}
		if s := last.Mesh.Services[c.task(tasks[0]).ServiceID]; len(s.GetPorts()) != 1 || s.Ports[0].Published == 0 {
			t.Errorf("mesh service: %v", s)
		}
		status, err := c.disp.NetStatus(c.t.Context())
		if err != nil || !slices.ContainsFunc(status.Rows, func(r *api.NetStatusRow) bool {
			return r.NodeId == w1.id && r.Table == "mesh" && r.Live && r.Applied == r.Desired && r.Applied > 0
		}) {
			t.Errorf("net status: %v %v", status, err)
		}
		if err := w1.exec.Kill(tasks[0], task.Exit{Code: 7}); err != nil {
			t.Fatal(err)
		}
		took = c.eventually("exit is known and out of all tables", time.Second, func() bool {
			return c.task(tasks[0]).State == api.TaskFailed && w3.endpoint("mesh", tasks[0]) == "" && w2.endpoint(c.network().Id, tasks[0]) == ""
		})
		if took > 200*time.Millisecond {
			t.Errorf("exit was known after %v", took)
		}
		if st := c.task(tasks[0]).Status; st.ExitCode != 7 || st.Err != "task: non-zero exit (7)" {
			t.Errorf("status: %v", st)
		}
	})
}

func TestDrainBarrier(t *testing.T) {
	bubble(t, func(c *cluster) {
		w1, w2 := c.worker("w1"), c.worker("w2")
		c.worker("w3")
		tasks := c.service("web", "w1", "w2")
		c.eventually("tasks run", 5*time.Second, func() bool { return c.running(tasks...) && c.connected("w1", "w2", "w3") })
		time.Sleep(time.Second)
		w2.net.SetDelay(3 * time.Second) // a slow node holds everybody up, within bounds
		began := time.Now()
		c.desire(api.TaskShutdown, tasks[0])
		c.eventually("slow node has it out of rotation", 10*time.Second, func() bool { return w2.endpoint("mesh", tasks[0]) == "draining" })
		if !slices.Contains(w1.exec.Running(), tasks[0]) {
			t.Fatal("the container was stopped before every node acknowledged")
		}
		c.eventually("stopped", 4*time.Second, func() bool { return c.task(tasks[0]).State == api.TaskShutdown })
		if took := time.Since(began); took < 3150*time.Millisecond || took > 6500*time.Millisecond { // two tables: once, or one after the other
			t.Errorf("stopped after %v, want the slow node's 3s and the margin", took)
		}
		// A node that is cut off has no say once its lease is over.
		w2.net.SetDelay(0)
		c.eventually("w2 recovers", 10*time.Second, func() bool { return w2.endpoint("mesh", tasks[0]) == "" })
		tasks = append(tasks, c.service("db", "w1")...)
		c.eventually("db runs", 5*time.Second, func() bool { return c.running(tasks[2]) })
		c.freeze("w3")
		began = time.Now()
		c.desire(api.TaskRemove, tasks[2])
		c.eventually("stopped although w3 is gone", 10*time.Second, func() bool { return c.task(tasks[2]).State == api.TaskShutdown })
		if took := time.Since(began); took < 2*time.Second || took > 5*time.Second {
			t.Errorf("stopped after %v, want the rest of the lease", took)
		}
		if ids, _ := w1.exec.Tasks(c.t.Context()); slices.Contains(ids, tasks[2]) {
			t.Error("container of a task to be removed is still there")
		}
		c.apply(&api.Change{Kind: &api.Change_DeleteTasks{DeleteTasks: &api.TaskDelete{TaskIds: tasks[2:]}}})
		synctest.Wait()
	})
}

// freeze makes a node silent: nothing gets through, connections stay open.
func (c *cluster) freeze(name string) {
	a := c.agents[name]
	a.setCut(true)
	c.mu.Lock()
	conns := a.conns
	c.mu.Unlock()
	for _, conn := range conns {
		conn.Close()
	}
}

func TestUnreachableTableIsReported(t *testing.T) {
	bubble(t, func(c *cluster) {
		w1 := c.worker("w1")
		w1.net.Refuse("mesh", errors.New("netlink: no buffer space"))
		c.eventually("failure is known", 5*time.Second, func() bool {
			status, _ := c.disp.NetStatus(c.t.Context())
			return slices.ContainsFunc(status.Rows, func(r *api.NetStatusRow) bool { return r.NodeId == w1.id && r.Err == "netlink: no buffer space" })
		})
		w1.net.Refuse("mesh", nil)
		c.eventually("retry succeeds", 5*time.Second, func() bool {
			status, _ := c.disp.NetStatus(c.t.Context())
			return slices.ContainsFunc(status.Rows, func(r *api.NetStatusRow) bool {
				return r.NodeId == w1.id && r.Err == "" && r.Applied == r.Desired
			})
		})
	})
}

func TestLeaseAndReturn(t *testing.T) {
	bubble(t, func(c *cluster) {
		c.worker("w1")
		w2 := c.worker("w2")
		tasks := c.service("web", "w1", "w2")
		c.eventually("tasks run", 5*time.Second, func() bool { return c.running(tasks...) })
		c.freeze("w1")
		took := c.eventually("w1 is down", 10*time.Second, func() bool { return c.nodeState("w1") == "down" })
		if took < 2*time.Second || took > 5*time.Second {
			t.Errorf("down after %v", took)
		}
		c.eventually("its endpoint leaves rotation", time.Second, func() bool { return w2.endpoint("mesh", tasks[0]) == "lost" })
		if c.nodeState("w2") != "ready" {
			t.Error("w2 is down too")
		}
		time.Sleep(time.Minute)
		c.agents["w1"].setCut(false)
		took = c.eventually("w1 returns", 20*time.Second, func() bool { return c.nodeState("w1") == "ready" })
		t.Logf("returned after %v", took)
		c.eventually("its endpoint is back", time.Second, func() bool { return w2.endpoint("mesh", tasks[0]) == "ready" })
		if n := c.agents["w1"].exec.Starts(tasks[0]); n != 1 {
			t.Errorf("container was started %d times", n)
		}
	})
}

func TestHintIsProbed(t *testing.T) {
	bubble(t, func(c *cluster) {
		c.worker("w1")
		c.worker("w2")
		c.eventually("ready", 5*time.Second, func() bool { return c.nodeState("w1") == "ready" && c.nodeState("w2") == "ready" })
		time.Sleep(100 * time.Millisecond)
		c.disp.Hint(id("w1")) // wrong: it answers
		c.freeze("w2")
		time.Sleep(1100 * time.Millisecond) // its last beat is older than the probe
		began := time.Now()
		c.disp.Hint(id("w2"))
		c.eventually("w2 is down", 5*time.Second, func() bool { return c.nodeState("w2") == "down" })
		if took := time.Since(began); took > 1600*time.Millisecond {
			t.Errorf("down %v after the hint", took)
		}
		if c.nodeState("w1") != "ready" {
			t.Error("a node that answers was declared down")
		}
	})
}

func TestLeaderChangeReplacesNothing(t *testing.T) {
	bubble(t, func(c *cluster) {
		names := []string{"w1", "w2", "w3", "w4", "w5"}
		for _, n := range names {
			c.worker(n)
		}
		tasks := c.service("web", slices.Repeat(names, 4)...)
		c.eventually("tasks run", 5*time.Second, func() bool { return c.running(tasks...) })
		before := map[string]uint64{}
		for _, id := range tasks {
			before[id] = c.task(id).Version
		}
		c.unlead() // the old leader is gone; an election takes its time
		w := c.agents["w1"]
		if err := w.exec.Kill(tasks[0], task.Exit{Code: 1}); err != nil { // nobody hears it now
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		began := time.Now()
		c.lead("m2")
		c.eventually("agents are back", 5*time.Second, func() bool { return c.connected(names...) })
		if took := time.Since(began); took > time.Second {
			t.Errorf("agents were back after %v", took)
		}
		c.eventually("the exit is told to the new leader", time.Second, func() bool { return c.task(tasks[0]).State == api.TaskFailed })
		time.Sleep(20 * time.Second)
		for _, n := range names {
			if c.nodeState(n) != "ready" {
				t.Errorf("%s is %s", n, c.nodeState(n))
			}
		}
		for _, id := range tasks[1:] {
			if got := c.task(id); got.State != api.TaskRunning || got.Version != before[id] {
				t.Errorf("task %s was written again: %s, version %d, before %d", id, got.State, got.Version, before[id])
			}
			for _, a := range c.agents {
				if n := a.exec.Starts(id); n > 1 {
					t.Errorf("task %s started %d times", id, n)
				}
			}
		}
		// A drain that began under the old leader settles under the new one.
		c.lead("m3")
		c.desire(api.TaskShutdown, tasks[1])
		c.eventually("drain under a new leader", 7*time.Second, func() bool { return c.task(tasks[1]).State == api.TaskShutdown })
	})
}

func TestSecondSessionEndsTheFirst(t *testing.T) {
	bubble(t, func(c *cluster) {
		w1 := c.worker("w1")
		c.eventually("connected", 5*time.Second, func() bool { return c.connected("w1") })
		first := w1.a.Status().SessionID
		twin := *w1 // the same identity on another machine (a cloned disk)
		twin.dir = t.TempDir()
		twin.boot()
		c.eventually("the twin has the session", 5*time.Second, func() bool { return twin.a.Status().Connected && w1.a.Status().SessionID != first })
		twin.halt()
		c.eventually("the first is back", 20*time.Second, func() bool { return c.connected("w1") })
	})
}

func TestRemovedNodeIsRefused(t *testing.T) {
	bubble(t, func(c *cluster) {
		w1 := c.worker("w1")
		c.eventually("connected", 5*time.Second, func() bool { return c.connected("w1") })
		c.apply(&api.Change{Kind: &api.Change_DeleteNode{DeleteNode: w1.id}})
		c.eventually("refused", 5*time.Second, func() bool {
			s := w1.a.Status()
			return !s.Connected && s.Err != ""
		})
		time.Sleep(30 * time.Second)
		if s := w1.a.Status(); s.Connected {
			t.Errorf("status of a removed node: %+v", s)
		} else {
			t.Log(s.Err)
		}
	})
}

func TestRestartWithoutManagers(t *testing.T) {
	bubble(t, func(c *cluster) {
		w1, w2 := c.worker("w1"), c.worker("w2")
		tasks := c.service("web", "w1", "w2", "w1")
		c.eventually("tasks run", 5*time.Second, func() bool { return c.running(tasks...) })
		time.Sleep(time.Second)
		c.unlead()
		want, _ := w1.net.Last()
		w1.halt()
		if err := w1.exec.Kill(tasks[2], task.Exit{Code: 3}); err != nil {
			t.Fatal(err)
		}
		w1.exec.Add("stranger")
		_, calls := w1.net.Last()
		w1.boot() // no manager anywhere
		time.Sleep(time.Second)
		got, now := w1.net.Last()
		if now == calls {
			t.Fatal("tables were not applied after the restart")
		}
		if got.Mesh.Version != want.Mesh.Version || len(got.Mesh.Endpoints) != 3 || got.NodeIndex != want.NodeIndex || len(got.Networks) != 1 {
			t.Errorf("tables after the restart: %+v, before: %+v", got, want)
		}
		if r := w1.exec.Running(); !slices.Contains(r, tasks[0]) || !slices.Contains(r, "stranger") {
			t.Errorf("running: %v", r)
		}
		if n := w1.exec.Starts(tasks[0]); n != 1 {
			t.Errorf("started %d times", n)
		}
		time.Sleep(time.Minute)
		c.lead("m2")
		c.eventually("the exit during the outage is told", 20*time.Second, func() bool { return c.task(tasks[2]).State == api.TaskFailed })
		c.eventually("the stranger is removed", time.Second, func() bool { return !slices.Contains(w1.exec.Running(), "stranger") })
		if !c.running(tasks[0], tasks[1]) {
			t.Error("tasks do not run any more")
		}
		_ = w2
	})
}

func TestSoftStatesStayOutOfTheLog(t *testing.T) {
	bubble(t, func(c *cluster) {
		w1 := c.worker("w1")
		c.eventually("connected", 5*time.Second, func() bool { return c.nodeState("w1") == "ready" })
		w1.exec.Script = preparing(10 * time.Second)
		tasks := c.service("web", "w1")
		time.Sleep(time.Second)
		if st := c.task(tasks[0]); st.State != api.TaskAssigned {
			t.Errorf("the log says %s", st.State)
		}
		if r := c.disp.SoftState(tasks[0]); r == nil || api.TaskState(r.State) != api.TaskPreparing {
			t.Errorf("soft state: %v", r)
		}
		entries := len(c.loop.Log())
		c.eventually("runs", 20*time.Second, func() bool { return c.running(tasks...) })
		if n := len(c.loop.Log()) - entries; n > 2 {
			t.Errorf("%d entries from preparing to running, want ready and running at most", n)
		}
		synctest.Wait()
		if r := c.disp.SoftState(tasks[0]); r != nil {
			t.Errorf("soft state of a running task: %v", r)
		}
	})
}

func TestWritesWaitForALeader(t *testing.T) {
	bubble(t, func(c *cluster) {
		w1 := c.worker("w1")
		tasks := c.service("web", "w1")
		c.eventually("runs", 5*time.Second, func() bool { return c.running(tasks...) })
		c.loop.SetError(errors.New("no quorum"))
		if err := w1.exec.Kill(tasks[0], task.Exit{Code: 1}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		c.loop.SetError(nil)
		c.eventually("the exit is written", time.Second, func() bool { return c.task(tasks[0]).State == api.TaskFailed })
	})
}

func TestNetworkBeforeStart(t *testing.T) {
	bubble(t, func(c *cluster) {
		w1, w2 := c.worker("w1"), c.worker("w2")
		c.eventually("ready", 5*time.Second, func() bool { return c.nodeState("w1") == "ready" && c.nodeState("w2") == "ready" })
		w1.net.SetDelay(3 * time.Second)
		w2.net.Refuse(id("net"), errors.New("vxlan: no such device"))
		tasks := c.service("web", "w1", "w2")
		took := c.eventually("runs on w1", 10*time.Second, func() bool { return c.running(tasks[0]) })
		if took < 3*time.Second {
			t.Errorf("started after %v, before its network", took)
		}
		c.eventually("fails on w2", 20*time.Second, func() bool { return c.task(tasks[1]).State == api.TaskFailed })
		want := "start task: its network is not ready on this node after 15s: network net: vxlan: no such device"
		if got := c.task(tasks[1]).Status.Err; got != want {
			t.Errorf("error %q, want %q", got, want)
		}
	})
}
