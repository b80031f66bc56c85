package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/test/nemesis"
)

const (
	// small is a network that is full when its tasks hold all addresses: a leaked one would be missed at the end.
	small     = "192.168.77.0/25"
	wave      = 100 // tasks at a time
	roomFor   = 110 // of 128 addresses, without the network's own, the router's and VIPs
	released  = 75 * time.Second
	waveBound = 3 * time.Minute
)

// runAddresses makes and kills tasks in waves while leaders die, and counts who holds which address.
func runAddresses(ctx context.Context, o options) (int, error) {
	w, err := newWorld(ctx, o)
	if err != nil {
		return 0, err
	}
	pool := client.NetworkCreateOptions{IPAM: &network.IPAM{Config: []network.IPAMConfig{{Subnet: netip.MustParsePrefix(small)}}}}
	if err = w.createNetwork(ctx, "small", pool); err == nil {
		err = w.createService(ctx, spec("many", w.Image, 0, "small"))
	}
	if err == nil {
		err = w.waves(ctx, o)
	}
	if err == nil {
		w.Say("waiting %v for released addresses", released)
		nemesis.Sleep(ctx, released)
		if err = w.settled(ctx, roomFor, nil); err != nil { // with a leak there is no room for all of them
			w.violate("%d tasks find no place in %s: %v", roomFor, small, err)
			err = nil
		}
	}
	return w.broken, errors.Join(err, w.close())
}

// waves scales up and down until enough tasks were made.
func (w *world) waves(ctx context.Context, o options) error {
	var kills atomic.Int64
	kctx, cancel := context.WithCancel(ctx)
	killed := make(chan error, 1)
	go func() { killed <- w.killLeaders(kctx, o.kills, &kills) }()
	seen := map[string]bool{}
	var err error
	for n := 0; err == nil && (len(seen) < o.tasks || int(kills.Load()) < o.kills) && ctx.Err() == nil; n++ {
		if err = w.settled(ctx, wave, seen); err == nil {
			err = w.settled(ctx, wave/4, seen)
		}
		w.Say("wave %d: %d tasks made, %d leaders killed", n+1, len(seen), kills.Load())
	}
	cancel()
	return errors.Join(err, <-killed)
}

func (w *world) killLeaders(ctx context.Context, n int, kills *atomic.Int64) error {
	for range n {
		nemesis.Sleep(ctx, 3*time.Second)
		lead, err := w.Leader(ctx, 30*time.Second)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := w.KillDaemon(lead); err != nil {
			return err
		}
		kills.Add(1)
		if err := w.StartDaemon(context.WithoutCancel(ctx), lead); err != nil {
			return err
		}
	}
	return nil
}

// settled scales and waits until so many tasks run and no others hold an address; at each look no address may have two holders.
func (w *world) settled(ctx context.Context, replicas uint64, seen map[string]bool) error {
	if err := w.scale(ctx, "many", replicas); err != nil {
		return err
	}
	for begun := time.Now(); ; nemesis.Sleep(ctx, 200*time.Millisecond) {
		list, err := w.tasks(ctx)
		if err != nil {
			return err
		}
		running, errs := w.holders(list, seen)
		if uint64(running) == replicas && uint64(errs) == replicas {
			return nil
		}
		if time.Since(begun) > waveBound || ctx.Err() != nil {
			return errors.Join(ctx.Err(), w.explain(list, replicas, running))
		}
	}
}

// holders counts tasks that run, and those that are to run, and looks for addresses with two holders.
func (w *world) holders(list []swarm.Task, seen map[string]bool) (running, wanted int) {
	holder := map[string]string{}
	for _, t := range list {
		if seen != nil {
			seen[t.ID] = true
		}
		if t.DesiredState == swarm.TaskStateRunning {
			wanted++
		}
		if t.Status.State == swarm.TaskStateRunning && t.DesiredState == swarm.TaskStateRunning {
			running++
		}
		ended := []swarm.TaskState{swarm.TaskStateComplete, swarm.TaskStateFailed, swarm.TaskStateShutdown, swarm.TaskStateRejected, swarm.TaskStateOrphaned, swarm.TaskStateRemove}
		if slices.Contains(ended, t.Status.State) {
			continue
		}
		for _, a := range t.NetworksAttachments {
			for _, addr := range a.Addresses {
				if other := holder[addr.String()]; other != "" {
					w.violate("%s is held by %s and %s", addr, other, t.ID)
				}
				holder[addr.String()] = t.ID
			}
		}
	}
	return running, wanted
}

// explain says what keeps tasks from running.
func (w *world) explain(list []swarm.Task, replicas uint64, running int) error {
	why := map[string]int{}
	for _, t := range list {
		if t.DesiredState == swarm.TaskStateRunning && t.Status.State != swarm.TaskStateRunning {
			why[string(t.Status.State)+" "+t.Status.Err]++
		}
	}
	return fmt.Errorf("%d of %d tasks run after %v: %v", running, replicas, waveBound, why)
}
