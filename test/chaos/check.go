package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
)

const raftDir = "cluster/raft" // below the state directory

const healTime = 20 * time.Second // after a fault ended everything must be right again

// check waits until the cluster is whole, notes how long that took, and complains when it takes too long. Without restarts the containers
// must be those of the last check.
func (w *world) check(ctx context.Context, fault string, restarts bool) {
	begun := time.Now()
	var pids map[string]int
	var err error
	for {
		if pids, err = w.whole(ctx); err == nil || time.Since(begun) > healTime || ctx.Err() != nil {
			break
		}
		time.Sleep(pollStep)
	}
	took := time.Since(begun)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		w.violate("%s: not whole %v after the fault ended: %v", fault, healTime, err)
		w.dump(ctx)
		// The next round must not be blamed for this one.
		for more := time.Now(); err != nil && time.Since(more) < 15*time.Second && ctx.Err() == nil; time.Sleep(time.Second) {
			pids, err = w.whole(ctx)
		}
		if err == nil {
			w.say("  whole %v after the fault", time.Since(begun).Round(time.Second))
		} else {
			w.say("  still not whole: %v", err)
		}
	} else {
		w.say("  whole after %v", took.Round(10*time.Millisecond))
		w.heals[fault] = append(w.heals[fault], took)
	}
	if !restarts && w.before != nil && pids != nil {
		for id, pid := range w.before {
			if pids[id] != pid {
				w.violate("%s: container %s had pid %d, now %d (0: is gone)", fault, id, pid, pids[id])
			}
		}
	}
	w.before = pids
}

// whole compares what the cluster says, what the nodes run and what clients see. It returns the pid of every service container, keyed by
// node and container.
func (w *world) whole(ctx context.Context) (map[string]int, error) {
	hosts, err := w.allReady(ctx)
	if err != nil {
		return nil, err
	}
	tasks, err := w.runningTasks(ctx)
	if err != nil {
		return nil, err
	}
	pids, err := w.containersOf(ctx, tasks, hosts)
	if err != nil {
		return nil, err
	}
	if err := w.acknowledged(ctx); err != nil {
		return nil, err
	}
	return pids, w.reachable(tasks)
}

// allReady returns node id → node, once every manager that is not away calls every such node ready.
func (w *world) allReady(ctx context.Context) (map[string]*dev.Node, error) {
	hosts := map[string]*dev.Node{}
	for _, m := range w.managers() {
		err := w.call(ctx, m, func(ctx context.Context, api *client.Client) error {
			res, err := api.NodeList(ctx, client.NodeListOptions{})
			if err != nil {
				return err
			}
			for _, x := range res.Items {
				n := w.byHost(x.Description.Hostname)
				if n == nil {
					return fmt.Errorf("unknown node %s %q", x.ID, x.Description.Hostname)
				}
				hosts[x.ID] = n
				if w.isAway(n) {
					continue
				}
				if x.Status.State != swarm.NodeStateReady {
					return fmt.Errorf("%s is %s: %s", n.Name, x.Status.State, x.Status.Message)
				}
				if x.ManagerStatus != nil && x.ManagerStatus.Reachability != swarm.ReachabilityReachable {
					return fmt.Errorf("manager %s is %s", n.Name, x.ManagerStatus.Reachability)
				}
			}
			if len(res.Items) != len(w.Nodes) {
				return fmt.Errorf("%d nodes instead of %d", len(res.Items), len(w.Nodes))
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("node ls at %s: %w", m.Name, err)
		}
	}
	return hosts, nil
}

func (w *world) isAway(n *dev.Node) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.down_[n.Name]
}

// runningTasks returns the tasks by service when each has exactly as many as wanted, all running, with addresses of their own.
func (w *world) runningTasks(ctx context.Context) (map[string][]swarm.Task, error) {
	out := map[string][]swarm.Task{}
	ids, addrs := map[string]bool{}, map[string]string{}
	names := map[string]string{}
	m := w.managers()[0]
	err := w.call(ctx, m, func(ctx context.Context, api *client.Client) error {
		services, err := api.ServiceList(ctx, client.ServiceListOptions{})
		if err != nil {
			return err
		}
		for _, s := range services.Items {
			names[s.ID] = s.Spec.Name
		}
		list, err := api.TaskList(ctx, client.TaskListOptions{})
		if err != nil {
			return err
		}
		for _, t := range list.Items {
			if ids[t.ID] {
				return fmt.Errorf("task id %s twice", t.ID)
			}
			ids[t.ID] = true
			if t.DesiredState != swarm.TaskStateRunning {
				continue
			}
			name := names[t.ServiceID]
			if t.Status.State != swarm.TaskStateRunning {
				return fmt.Errorf("task %s of %s is %s (%s %s)", t.ID, name, t.Status.State, t.Status.Message, t.Status.Err)
			}
			out[name] = append(out[name], t)
			for _, a := range t.NetworksAttachments {
				for _, p := range a.Addresses {
					if other, twice := addrs[p.String()]; twice {
						return fmt.Errorf("address %s is of task %s and of task %s", p, other, t.ID)
					}
					addrs[p.String()] = t.ID
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("tasks at %s: %w", m.Name, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, s := range w.services {
		if len(out[name]) != s.replicas {
			return nil, fmt.Errorf("%d tasks of %s, want %d", len(out[name]), name, s.replicas)
		}
	}
	return out, nil
}

// containersOf compares the nodes' containers with the tasks: exactly those, each on its node, none besides.
func (w *world) containersOf(ctx context.Context, tasks map[string][]swarm.Task, hosts map[string]*dev.Node) (map[string]int, error) {
	want := map[string]string{} // task → node
	for _, list := range tasks {
		for _, t := range list {
			if n := hosts[t.NodeID]; n != nil {
				want[t.ID] = n.Name
			}
		}
	}
	pids := map[string]int{}
	for _, n := range w.living() {
		err := w.call(ctx, n, func(ctx context.Context, api *client.Client) error {
			res, err := api.ContainerList(ctx, client.ContainerListOptions{})
			if err != nil {
				return err
			}
			for _, c := range res.Items {
				task := c.Labels["com.docker.swarm.task.id"]
				if want[task] != n.Name {
					return fmt.Errorf("container %.12s runs for task %s of %s, which is not wanted here", c.ID, task, c.Labels["com.docker.swarm.service.name"])
				}
				delete(want, task)
				in, err := api.ContainerInspect(ctx, c.ID, client.ContainerInspectOptions{})
				if err != nil {
					return err
				}
				pids[n.Name+"/"+c.ID[:12]] = in.Container.State.Pid
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("containers of %s: %w", n.Name, err)
		}
	}
	for t, n := range want {
		return nil, fmt.Errorf("task %s is called running on %s, which has no such container", t, n)
	}
	return pids, nil
}

// acknowledged looks at every living manager for what was acknowledged.
func (w *world) acknowledged(ctx context.Context) error {
	for _, m := range w.managers() {
		var list []swarm.Service
		err := w.call(ctx, m, func(ctx context.Context, api *client.Client) error {
			res, err := api.ServiceList(ctx, client.ServiceListOptions{})
			list = res.Items
			return err
		})
		if err != nil {
			return fmt.Errorf("services at %s: %w", m.Name, err)
		}
		have := map[string]swarm.Service{}
		for _, s := range list {
			if _, twice := have[s.Spec.Name]; twice {
				return fmt.Errorf("service %s twice at %s", s.Spec.Name, m.Name)
			}
			have[s.Spec.Name] = s
		}
		w.mu.Lock()
		for name, s := range w.services {
			got, ok := have[name]
			mark, _ := strconv.Atoi(got.Spec.Labels[ackLabel])
			if !ok || mark < s.ack || mark > s.tried {
				w.mu.Unlock()
				return fmt.Errorf("service %s at %s: there: %v, last write %d, acknowledged %d, tried %d", name, m.Name, ok, mark, s.ack, s.tried)
			}
		}
		w.mu.Unlock()
	}
	return nil
}

// reachable asks every living node for every task: through the published ports, and from inside the node's probe through VIP and DNS.
func (w *world) reachable(tasks map[string][]swarm.Task) error {
	errs := make(chan error, len(w.Nodes))
	nodes := w.living()
	for _, n := range nodes {
		go func() { errs <- w.reachableAt(n, tasks) }()
	}
	var first error
	for range nodes {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

func (w *world) reachableAt(n *dev.Node, tasks map[string][]swarm.Task) error {
	for name, port := range map[string]int{"web": 8080, "sf": 8081} {
		if err := w.everyTask(fmt.Sprintf("http://%s:%d/", n.Address, port), len(tasks[name])); err != nil {
			return fmt.Errorf("port %d at %s: %w", port, n.Name, err)
		}
	}
	// The probe that answers may be any node's; all are asked as the port is asked often enough.
	probe := fmt.Sprintf("http://%s:9090", n.Address)
	for name, list := range map[string][]swarm.Task{"web": tasks["web"], "sf": tasks["sf"]} {
		if err := w.everyTask(probe+"/fetch?url="+url.QueryEscape("http://"+name+":8080/"), len(list)); err != nil {
			return fmt.Errorf("name %s inside, asked through %s: %w", name, n.Name, err)
		}
		var want []string
		for _, t := range list {
			for _, a := range t.NetworksAttachments {
				if a.Network.Spec.Name == networkID {
					for _, p := range a.Addresses {
						if p.Addr().Is4() {
							want = append(want, p.Addr().String())
						}
					}
				}
			}
		}
		for range len(w.Nodes) {
			body, err := fresh(probe+"/resolve?name=tasks."+name, 3*time.Second)
			if err != nil {
				return fmt.Errorf("resolve tasks.%s through %s: %w", name, n.Name, err)
			}
			got := ipv4(body)
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				return fmt.Errorf("tasks.%s asked through %s: %v, want %v", name, n.Name, got, want)
			}
		}
	}
	return nil
}

// everyTask asks until n different hosts have answered, with no failure.
func (w *world) everyTask(url string, n int) error {
	seen := map[string]bool{}
	for range 30 * n {
		body, err := fresh(url, 3*time.Second)
		if err != nil {
			return err
		}
		f := strings.Fields(body)
		if len(f) < 2 {
			return fmt.Errorf("answer %q", body)
		}
		if seen[f[0]] = true; len(seen) > n {
			return fmt.Errorf("%d hosts answered, want %d", len(seen), n)
		}
		if len(seen) == n {
			return nil
		}
	}
	return fmt.Errorf("only %d of %d hosts answered: %v", len(seen), n, slices.Sorted(maps.Keys(seen)))
}

func ipv4(lines string) []string {
	var out []string
	for _, l := range strings.Fields(lines) {
		if !strings.Contains(l, ":") {
			out = append(out, l)
		}
	}
	return out
}

// dump prints what the API says, for the reader of a failure.
func (w *world) dump(ctx context.Context) {
	for _, m := range w.managers()[:1] {
		_ = w.call(ctx, m, func(ctx context.Context, api *client.Client) error {
			nodes, err := api.NodeList(ctx, client.NodeListOptions{})
			if err != nil {
				return err
			}
			for _, n := range nodes.Items {
				b, _ := json.Marshal(n.ManagerStatus)
				w.say("    node %s %s %s %s", n.ID, n.Description.Hostname, n.Status.State, b)
			}
			tasks, err := api.TaskList(ctx, client.TaskListOptions{Filters: make(client.Filters).Add("desired-state", "running")})
			for _, t := range tasks.Items {
				if t.Status.State != swarm.TaskStateRunning {
					w.say("    task %s node %s slot %d %s %s %s", t.ID, t.NodeID, t.Slot, t.Status.State, t.Status.Message, t.Status.Err)
				}
			}
			return err
		})
	}
}
