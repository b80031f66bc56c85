package c1m

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// maxFaults bounds what is printed.
const maxFaults = 20

// retriable reports whether an answer says nothing about the request itself.
func retriable(err error) bool {
	return errdefs.IsUnavailable(err) || errdefs.IsDeadlineExceeded(err) || errors.Is(err, context.DeadlineExceeded)
}

// checker compares what the API shows with what the nodes have. It shares nothing with the scheduler.
type checker struct {
	faults []string
	count  int
	nodes  map[string]*agent
	load   map[string]int // tasks by node, as the API shows them
	tasks  int
	seen   map[string]bool
}

func (k *checker) fault(format string, args ...any) {
	if k.count++; len(k.faults) < maxFaults {
		k.faults = append(k.faults, fmt.Sprintf(format, args...))
	}
}

// check verifies the end of a run.
func check(ctx context.Context, c *cluster, f *fleet, o options) error {
	began := time.Now()
	k := &checker{nodes: map[string]*agent{}, load: map[string]int{}, seen: make(map[string]bool, o.services*o.replicas)}
	for _, a := range f.agents {
		k.nodes[a.id] = a
	}
	m, err := c.leader(ctx)
	if err != nil {
		return err
	}
	for i := range o.services {
		if err := k.service(ctx, m, serviceName(i), o.replicas); err != nil {
			return err
		}
	}
	k.capacity()
	containers := 0
	for _, a := range f.agents {
		containers += k.containers(a)
	}
	if containers != k.tasks || k.tasks != o.services*o.replicas {
		k.fault("%d tasks in the API, %d containers on the nodes, want %d", k.tasks, containers, o.services*o.replicas)
	}
	if n := f.removed.Load(); n > 0 {
		k.fault("%d running containers were taken away", n)
	}
	if err := k.stores(ctx, c); err != nil {
		return err
	}
	for _, s := range k.faults {
		fmt.Println("WRONG:", s)
	}
	if k.count > 0 {
		return fmt.Errorf("%d faults", k.count)
	}
	fmt.Printf("checked in %v: %d tasks, every slot once, every container started once, capacities kept, %d stores equal\n",
		time.Since(began).Round(time.Millisecond), k.tasks, len(c.members()))
	return nil
}

// service looks at the tasks of one service.
func (k *checker) service(ctx context.Context, m *member, name string, replicas int) error {
	o, err := m.mgr.Control().ListTasks(ctx, &api.ListRequest{Filters: map[string]*api.StringList{"service": {Values: []string{name}}}})
	if err != nil {
		return fmt.Errorf("list tasks of %s: %w", name, err)
	}
	slots := make([]int, replicas+1)
	for _, b := range o.Json {
		var t swarm.Task
		if err := json.Unmarshal(b, &t); err != nil {
			return err
		}
		if t.DesiredState != swarm.TaskStateRunning || t.Status.State != swarm.TaskStateRunning {
			k.fault("task %s of %s: desired %s, is %s (%s)", t.ID, name, t.DesiredState, t.Status.State, t.Status.Err)
			continue
		}
		if t.Slot < 1 || t.Slot > replicas {
			k.fault("task %s of %s has slot %d", t.ID, name, t.Slot)
			continue
		}
		if k.seen[t.ID] {
			k.fault("task id %s is there twice", t.ID)
		}
		k.seen[t.ID] = true
		slots[t.Slot]++
		k.tasks++
		k.load[t.NodeID]++
		a := k.nodes[t.NodeID]
		if a == nil {
			k.fault("task %s of %s is on %q, which is no node", t.ID, name, t.NodeID)
			continue
		}
		a.mu.Lock()
		x := a.tasks[t.ID]
		a.mu.Unlock()
		if x == nil || x.state != api.TaskRunning {
			k.fault("task %s of %s does not run on its node %s", t.ID, name, t.NodeID)
		}
	}
	for slot, n := range slots[1:] {
		if n != 1 {
			k.fault("slot %d of %s has %d running tasks", slot+1, name, n)
		}
	}
	return nil
}

func (k *checker) capacity() {
	for id, n := range k.load {
		if int64(n)*taskCPU > nodeCPUs*1e9 || int64(n)*taskMemory > nodeMemory {
			k.fault("node %s has %d tasks, more than it has room for", id, n)
		}
	}
}

// containers counts those that run on a node, and looks for what should never happen there.
func (k *checker) containers(a *agent) (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, c := range a.tasks {
		if c.state == api.TaskRunning {
			n++
		}
		if c.starts > 1 {
			k.fault("container of task %s was started %d times", id, c.starts)
		}
		if !k.seen[id] {
			k.fault("container of task %s on node %s is not in the API", id, a.id)
		}
	}
	for _, b := range a.broken {
		k.fault("node %s: %s", a.id, b)
	}
	return n
}

// stores compares the managers' stores once they are at the same entry.
func (k *checker) stores(ctx context.Context, c *cluster) error {
	err := until(ctx, func() bool {
		ms := c.members()
		if len(ms) < groupSize {
			return false
		}
		v := ms[0].mgr.Store().Version()
		for _, m := range ms[1:] {
			if m.mgr.Store().Version() != v {
				return false
			}
		}
		h := ms[0].mgr.Store().Hash()
		for _, m := range ms[1:] {
			if m.mgr.Store().Hash() != h {
				if ms[0].mgr.Store().Version() == v && m.mgr.Store().Version() == v {
					k.fault("the stores of %s and %s differ at entry %d", ms[0].addr, m.addr, v)
				} else {
					return false
				}
			}
		}
		return true
	})
	if err != nil {
		return fmt.Errorf("the managers do not reach the same entry: %w", err)
	}
	return nil
}
