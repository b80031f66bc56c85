package main

import (
	"context"
	"fmt"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
)

const (
	pollStep = 40 * time.Millisecond // asking costs CPU that is measured
	waitTime = time.Minute
)

func (b *bench) create(ctx context.Context, name string, n uint64, order swarm.UpdateOrder) error {
	zero := time.Duration(0)
	_, err := b.apis[0].ServiceCreate(ctx, client.ServiceCreateOptions{Spec: swarm.ServiceSpec{
		Annotations: swarm.Annotations{Name: name},
		TaskTemplate: swarm.TaskSpec{
			ContainerSpec: &swarm.ContainerSpec{Image: b.image("v1")}, RestartPolicy: &swarm.RestartPolicy{Delay: &zero},
			Networks: []swarm.NetworkAttachmentConfig{{Target: "bench"}},
		},
		Mode:         swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &n}},
		UpdateConfig: &swarm.UpdateConfig{Parallelism: 2, Order: order, Monitor: time.Millisecond},
	}})
	return err
}

func (b *bench) change(ctx context.Context, name string, f func(*swarm.ServiceSpec)) error {
	in, err := b.apis[0].ServiceInspect(ctx, name, client.ServiceInspectOptions{})
	if err != nil {
		return err
	}
	spec := in.Service.Spec
	f(&spec)
	_, err = b.apis[0].ServiceUpdate(ctx, in.Service.ID, client.ServiceUpdateOptions{Version: in.Service.Version, Spec: spec})
	return err
}

// running counts the service's running tasks with an image, and those of others that still run.
func (b *bench) running(ctx context.Context, name, image string) (n, others int, err error) {
	res, err := b.apis[0].TaskList(ctx, client.TaskListOptions{Filters: client.Filters{}.Add("service", name)})
	for _, t := range res.Items {
		switch {
		case t.Status.State != swarm.TaskStateRunning || t.DesiredState != swarm.TaskStateRunning:
			if t.Status.State == swarm.TaskStateRunning {
				others++
			}
		case t.Spec.ContainerSpec.Image == image:
			n++
		default:
			others++
		}
	}
	return n, others, err
}

// await polls until exactly n tasks of the image run and no others.
func (b *bench) await(ctx context.Context, name, image string, n int) error {
	ctx, cancel := context.WithTimeout(ctx, waitTime)
	defer cancel()
	tick := time.NewTicker(pollStep)
	defer tick.Stop()
	for {
		have, others, err := b.running(ctx, name, image)
		if err != nil {
			return err
		}
		if have == n && others == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("service %s: %d of %d tasks run, and %d others", name, have, n, others)
		}
	}
}

func (b *bench) network(ctx context.Context) error {
	if _, err := b.apis[0].NetworkInspect(ctx, "bench", client.NetworkInspectOptions{}); err == nil {
		return nil
	}
	_, err := b.apis[0].NetworkCreate(ctx, "bench", client.NetworkCreateOptions{Driver: "overlay"})
	return err
}

// remove deletes a service and waits until nothing of it runs.
func (b *bench) remove(ctx context.Context, name string) error {
	if _, err := b.apis[0].ServiceRemove(ctx, name, client.ServiceRemoveOptions{}); err != nil {
		return err
	}
	limit := time.Now().Add(waitTime)
	for {
		ps, err := b.processes()
		if err != nil {
			return err
		}
		left := 0
		for _, p := range ps {
			if p.role == "container" {
				left++
			}
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("%d processes of service %s are left", left, name)
		}
		time.Sleep(5 * pollStep)
	}
}

const scaleRounds = 3

// scale grows a service from one task to many, with the image on all nodes.
func (b *bench) scale(ctx context.Context) error {
	if err := b.network(ctx); err != nil {
		return err
	}
	var walls []time.Duration
	var cpu time.Duration
	roles := map[string]time.Duration{}
	for range scaleRounds {
		if err := b.create(ctx, "many", uint64(len(b.Nodes)), swarm.UpdateOrderStopFirst); err != nil {
			return err
		}
		if err := b.await(ctx, "many", b.image("v1"), len(b.Nodes)); err != nil { // every node has the image now
			return err
		}
		if err := b.resize(ctx, "many", 1); err != nil {
			return err
		}
		time.Sleep(time.Second) // leave the shrinking behind
		was, err := b.roleCPU()
		if err != nil {
			return err
		}
		c0, begun := b.cpu(), time.Now()
		if err := b.resize(ctx, "many", uint64(b.opts.tasks)); err != nil {
			return err
		}
		walls = append(walls, time.Since(begun))
		cpu += b.cpu() - c0
		is, err := b.roleCPU()
		if err != nil {
			return err
		}
		for r := range is {
			roles[r] += is[r] - was[r]
		}
		if err := b.remove(ctx, "many"); err != nil {
			return err
		}
	}
	row(fmt.Sprintf("scale 1→%d", b.opts.tasks), walls, cpu)
	n := time.Duration(scaleRounds * (b.opts.tasks - 1))
	fmt.Printf("  CPU per task: %s in all; daemons %s, supervisors %s\n", ms(cpu/n), ms(roles["daemon"]/n), ms(roles["supervisor"]/n))
	return nil
}

func (b *bench) resize(ctx context.Context, name string, n uint64) error {
	if err := b.change(ctx, name, func(s *swarm.ServiceSpec) { s.Mode.Replicated.Replicas = &n }); err != nil {
		return err
	}
	return b.await(ctx, name, b.image("v1"), int(n))
}

// update replaces ten tasks, two at a time, in either order.
func (b *bench) update(ctx context.Context) error {
	if err := b.network(ctx); err != nil {
		return err
	}
	for _, order := range []swarm.UpdateOrder{swarm.UpdateOrderStopFirst, swarm.UpdateOrderStartFirst} {
		if err := b.create(ctx, "roll", 10, order); err != nil {
			return err
		}
		if err := b.await(ctx, "roll", b.image("v1"), 10); err != nil {
			return err
		}
		var walls []time.Duration
		cpu := b.cpu()
		for i := range 4 {
			to := b.image([]string{"v2", "v1"}[i%2])
			begun := time.Now()
			if err := b.change(ctx, "roll", func(s *swarm.ServiceSpec) { s.TaskTemplate.ContainerSpec.Image = to }); err != nil {
				return err
			}
			if err := b.await(ctx, "roll", to, 10); err != nil {
				return err
			}
			walls = append(walls, time.Since(begun))
		}
		row("update of 10, 2 at a time, "+string(order), walls, b.cpu()-cpu)
		if err := b.remove(ctx, "roll"); err != nil {
			return err
		}
	}
	return nil
}

// failover kills the last node and waits until its tasks run on the others. It comes last: the node stays dead.
func (b *bench) failover(ctx context.Context) error {
	if err := b.network(ctx); err != nil {
		return err
	}
	if err := b.create(ctx, "safe", 6, swarm.UpdateOrderStopFirst); err != nil {
		return err
	}
	if err := b.await(ctx, "safe", b.image("v1"), 6); err != nil {
		return err
	}
	nodes, err := b.apis[0].NodeList(ctx, client.NodeListOptions{})
	if err != nil {
		return err
	}
	victim := b.Nodes[len(b.Nodes)-1]
	id := ""
	for _, n := range nodes.Items {
		if n.Description.Hostname == b.Name+"-"+victim.Name {
			id = n.ID
		}
	}
	cpu, begun := b.cpu(), time.Now()
	if err := b.Kill(victim); err != nil {
		return err
	}
	killed := time.Now()
	for {
		res, err := b.apis[0].TaskList(ctx, client.TaskListOptions{Filters: client.Filters{}.Add("service", "safe")})
		n := 0
		for _, t := range res.Items {
			if t.NodeID != id && t.Status.State == swarm.TaskStateRunning && t.DesiredState == swarm.TaskStateRunning {
				n++
			}
		}
		if err == nil && n == 6 {
			break
		}
		if time.Since(begun) > waitTime {
			return fmt.Errorf("%d of 6 tasks run elsewhere after %v: %w", n, waitTime, err)
		}
		time.Sleep(pollStep)
	}
	row("failover of 2 of 6 tasks", []time.Duration{time.Since(killed)}, b.cpu()-cpu)
	return nil
}
