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

	"skein/cmd/dev"
	"skein/test/nemesis"
)

const (
	// small is a network that is full when its tasks hold all addresses: a leaked one would be missed at the end.
	small     = "192.168.77.0/26"
	wave      = 50 // tasks at a time
	roomFor   = 56 // of 64 addresses, without the network's own, the router's and VIPs
	released  = 75 * time.Second
	waveBound = 8 * time.Minute
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
		err = w.settled(ctx, 0, nil) // some are in a range that was added while released addresses rested
	}
	if err == nil {
		w.Say("waiting %v for released addresses", released)
		nemesis.Sleep(ctx, released)
		err = w.fits(ctx)
	}
	return w.broken, errors.Join(err, w.close())
}

// fits fills the network's range; with a leaked address there is no room for all, or the network grew.
func (w *world) fits(ctx context.Context) error {
	if err := w.settled(ctx, roomFor, nil); err != nil {
		w.violate("%d tasks find no place in %s: %v", roomFor, small, err)
		return ctx.Err()
	}
	list, err := w.tasks(ctx)
	inside, other := 0, 0
	for _, t := range list {
		for _, a := range t.NetworksAttachments {
			if t.DesiredState != swarm.TaskStateRunning || len(a.Addresses) == 0 {
				continue
			}
			if netip.MustParsePrefix(small).Contains(a.Addresses[0].Addr()) {
				inside++
			} else {
				other++
			}
		}
	}
	if inside != roomFor || other != 0 {
		w.violate("%d tasks are inside %s and %d are not, want %d and none: addresses leaked", inside, small, other, roomFor)
	}
	w.Say("%d tasks fit into %s", inside, small)
	return err
}

// waves scales up and down until enough tasks were made.
func (w *world) waves(ctx context.Context, o options) error {
	var kills atomic.Int64
	kctx, cancel := context.WithCancel(ctx)
	killed := make(chan error, 1)
	go func() {
		err := w.killLeaders(kctx, o.kills, &kills)
		if err != nil {
			cancel() // no wave need come any more
		}
		killed <- err
	}()
	seen := map[string]bool{}
	var err error
	for n := 0; err == nil && (len(seen) < o.tasks || int(kills.Load()) < o.kills) && ctx.Err() == nil && kctx.Err() == nil; n++ {
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
		if err := w.restart(context.WithoutCancel(ctx), lead); err != nil {
			return err
		}
	}
	return nil
}

// restart starts a daemon, with patience for a machine that stands still now and then.
func (w *world) restart(ctx context.Context, n *dev.Node) (err error) {
	for range 10 {
		if err = w.StartDaemon(ctx, n); err == nil {
			return nil
		}
		w.Say("%s does not start: %v", n.Name, err)
		nemesis.Sleep(ctx, 5*time.Second)
	}
	return err
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
