package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/nemesis"
)

const (
	steady     = "steady" // the service that has tasks
	watchStep  = 500 * time.Millisecond
	scaleStep  = 6 * time.Second
	maxScale   = 6
	finalScale = 4
	wholeTime  = 45 * time.Second // after everything was healed
)

// taskView is what was seen of tasks.
type taskView struct {
	mu   sync.Mutex
	seen map[string]swarm.Task
}

func newTaskView() *taskView { return &taskView{seen: map[string]swarm.Task{}} }

// rank orders the states that are in the log: what lies between assigned and running is soft.
func rank(s swarm.TaskState) int {
	switch s {
	case swarm.TaskStateRunning:
		return 1
	case swarm.TaskStateComplete, swarm.TaskStateShutdown, swarm.TaskStateFailed, swarm.TaskStateRejected, swarm.TaskStateRemove, swarm.TaskStateOrphaned:
		return 2
	}
	return 0
}

// look checks a list of tasks that was asked for after the last one had been answered: states only grow, nodes never change, a slot
// has one wanted task, an id and an address one owner.
func (v *taskView) look(list []swarm.Task) []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	var bad []string
	ids, slots, addrs := map[string]bool{}, map[string]string{}, map[string]string{}
	for _, t := range list {
		if ids[t.ID] {
			bad = append(bad, fmt.Sprintf("task id %s twice", t.ID))
		}
		ids[t.ID] = true
		if old, ok := v.seen[t.ID]; ok {
			if rank(t.Status.State) < rank(old.Status.State) {
				bad = append(bad, fmt.Sprintf("task %s was %s and is %s", t.ID, old.Status.State, t.Status.State))
			}
			if old.NodeID != "" && old.NodeID != t.NodeID {
				bad = append(bad, fmt.Sprintf("task %s moved from node %s to %s", t.ID, old.NodeID, t.NodeID))
			}
			if old.DesiredState != swarm.TaskStateRunning && old.DesiredState != swarm.TaskStateReady && t.DesiredState == swarm.TaskStateRunning {
				bad = append(bad, fmt.Sprintf("task %s was wanted %s and is wanted running again", t.ID, old.DesiredState))
			}
		}
		v.seen[t.ID] = t
		if t.DesiredState != swarm.TaskStateRunning {
			continue
		}
		slot := fmt.Sprintf("%s.%d", t.ServiceID, t.Slot)
		if other := slots[slot]; other != "" {
			bad = append(bad, fmt.Sprintf("slot %s has two wanted tasks, %s and %s", slot, other, t.ID))
		}
		slots[slot] = t.ID
		for _, a := range t.NetworksAttachments {
			for _, p := range a.Addresses {
				if other := addrs[p.String()]; other != "" {
					bad = append(bad, fmt.Sprintf("address %s is of task %s and of task %s", p, other, t.ID))
				}
				addrs[p.String()] = t.ID
			}
		}
	}
	return bad
}

// deploy makes the service with tasks.
func (w *world) deploy(ctx context.Context) error {
	list, err := w.rig.Client(w.rig.Nodes[0]).NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return err
	}
	for _, n := range list.Items {
		o := &object{kind: "node", name: n.ID}
		w.live, w.all = append(w.live, o), append(w.all, o)
	}
	if _, err := w.rig.Client(w.rig.Nodes[0]).NetworkCreate(ctx, "back", client.NetworkCreateOptions{Driver: "overlay"}); err != nil {
		return err
	}
	n, delay := uint64(finalScale), time.Duration(0)
	_, err = w.rig.Client(w.rig.Nodes[0]).ServiceCreate(ctx, client.ServiceCreateOptions{Spec: swarm.ServiceSpec{
		Annotations: swarm.Annotations{Name: steady},
		TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{Image: w.rig.Image}, RestartPolicy: &swarm.RestartPolicy{Delay: &delay},
			Networks: []swarm.NetworkAttachmentConfig{{Target: "back"}}},
		Mode: swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &n}},
	}})
	return err
}

// watchTasks checks the tasks at random managers until ctx ends.
func (w *world) watchTasks(ctx context.Context) {
	r := rand.New(rand.NewPCG(w.opts.seed, 0x7461))
	for ctx.Err() == nil {
		list := w.rig.Managers()
		m := list[r.IntN(len(list))]
		cctx, cancel := context.WithTimeout(ctx, opTime)
		res, err := w.rig.Client(m).TaskList(cctx, client.TaskListOptions{})
		cancel()
		if err == nil {
			w.count("tasks", resOK)
			for _, b := range w.tasks.look(res.Items) {
				w.violate("tasks at %s: %s", m.Name, b)
			}
		}
		nemesis.Sleep(ctx, watchStep)
	}
}

// scaleLoop scales the service until ctx ends.
func (w *world) scaleLoop(ctx context.Context) {
	r := rand.New(rand.NewPCG(w.opts.seed, 0x7363))
	for ctx.Err() == nil {
		list := w.rig.Managers()
		if err := w.scale(ctx, list[r.IntN(len(list))], uint64(1+r.IntN(maxScale))); err == nil {
			w.count("scale", resOK)
		}
		nemesis.Sleep(ctx, scaleStep)
	}
}

func (w *world) scale(ctx context.Context, m *dev.Node, n uint64) error {
	ctx, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	api := w.rig.Client(m)
	in, err := api.ServiceInspect(ctx, steady, client.ServiceInspectOptions{})
	if err != nil {
		return err
	}
	in.Service.Spec.Mode.Replicated.Replicas = &n
	_, err = api.ServiceUpdate(ctx, in.Service.ID, client.ServiceUpdateOptions{Version: in.Service.Version, Spec: in.Service.Spec})
	return err
}

// alive compares what is called running with the nodes' containers, once.
func (w *world) alive(ctx context.Context) error {
	res, err := w.rig.Client(w.rig.Nodes[0]).TaskList(ctx, client.TaskListOptions{})
	if err != nil {
		return err
	}
	if bad := w.tasks.look(res.Items); len(bad) > 0 {
		w.violate("tasks at the end: %v", bad)
	}
	nodes, err := w.rig.Client(w.rig.Nodes[0]).NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return err
	}
	names := map[string]string{}
	for _, n := range nodes.Items {
		if n.Status.State != swarm.NodeStateReady {
			return fmt.Errorf("node %s is %s", n.Description.Hostname, n.Status.State)
		}
		if d := w.rig.NodeOf(n.Description.Hostname); d != nil {
			names[n.ID] = d.Name
		}
	}
	want := map[string]string{}
	for _, t := range res.Items {
		if t.DesiredState == swarm.TaskStateRunning && t.Status.State != swarm.TaskStateRunning {
			return fmt.Errorf("task %s is %s: %s %s", t.ID, t.Status.State, t.Status.Message, t.Status.Err)
		}
		if t.Status.State == swarm.TaskStateRunning {
			want[t.ID] = names[t.NodeID]
		}
	}
	if len(want) != finalScale {
		return fmt.Errorf("%d tasks run, want %d", len(want), finalScale)
	}
	for _, n := range w.rig.Nodes {
		list, err := w.rig.Client(n).ContainerList(ctx, client.ContainerListOptions{})
		if err != nil {
			return err
		}
		for _, c := range list.Items {
			task := c.Labels["com.docker.swarm.task.id"]
			if want[task] != n.Name {
				return fmt.Errorf("container %.12s runs on %s for task %s, which should run on %q", c.ID, n.Name, task, want[task])
			}
			in, err := w.rig.Client(n).ContainerInspect(ctx, c.ID, client.ContainerInspectOptions{})
			if err != nil || !living(in.Container.State.Pid) {
				return fmt.Errorf("container %.12s of task %s has no living process (%v)", c.ID, task, err)
			}
			delete(want, task)
		}
	}
	for t, n := range want {
		return fmt.Errorf("task %s is called running on %s, which has no such container", t, n)
	}
	return nil
}
