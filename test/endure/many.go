package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
)

const (
	crowdClients    = 4
	crowdLeast      = 200       // containers of which memory tells more than the garbage collector's pace
	perContainer    = 100 << 10 // private memory of our processes for each idle container, at most
	supervisorLimit = 20 << 20  // private memory of the supervisor without containers, at most
	descriptorLimit = 12        // for each container, at most
	restTime        = 5 * time.Second
)

// crowd is how containers of one kind are started and ended.
type crowd struct {
	start func(ctx context.Context, i int) error
	end   func(ctx context.Context, i int) error
	count func(ctx context.Context) (int, error) // that run
	holds func(ctx context.Context) (holdings, error)
	pids  func() (map[string]int, error) // our processes
}

// many runs containers without a network through the API.
func (w *world) many(ctx context.Context, n int) error { return w.manyOf(ctx, n, "none") }

// manyBridge runs containers with a bridge network through the API.
func (w *world) manyBridge(ctx context.Context, n int) error { return w.manyOf(ctx, n, "bridge") }

func (w *world) manyOf(ctx context.Context, n int, network string) error {
	name := func(i int) string { return fmt.Sprintf("many-%s-%d", network, i) }
	return w.crowd(ctx, n, crowd{
		start: func(ctx context.Context, i int) error {
			res, err := w.api.ContainerCreate(ctx, client.ContainerCreateOptions{Name: name(i), Config: &container.Config{Image: w.image, Cmd: []string{"idle"}},
				HostConfig: &container.HostConfig{NetworkMode: container.NetworkMode(network)}})
			if err == nil {
				_, err = w.api.ContainerStart(ctx, res.ID, client.ContainerStartOptions{})
			}
			return err
		},
		end: func(ctx context.Context, i int) error {
			zero := 0
			_, err := w.api.ContainerStop(ctx, name(i), client.ContainerStopOptions{Timeout: &zero})
			if err == nil {
				_, err = w.api.ContainerRemove(ctx, name(i), client.ContainerRemoveOptions{})
			}
			return err
		},
		count: func(ctx context.Context) (int, error) {
			k, err := w.known(ctx)
			return len(k.running), err
		},
		holds: w.holds,
		pids:  w.pids,
	})
}

// pids are the node's own processes.
func (w *world) pids() (map[string]int, error) {
	daemon, err := w.daemonPID()
	if err != nil {
		return nil, err
	}
	sup, err := dev.Listener(w.supervisorSocket())
	if err != nil {
		return nil, err
	}
	z, err := zygotePID(sup)
	return map[string]int{"daemon": daemon, "supervisor": sup, "zygote": z}, err
}

// crowd starts n containers, looks what they cost, ends them, and looks what is left.
func (w *world) crowd(ctx context.Context, n int, c crowd) error {
	pids, err := c.pids()
	if err != nil {
		return err
	}
	if err := errors.Join(c.start(ctx, -1), c.end(ctx, -1)); err != nil { // what is made once is no container's
		return err
	}
	if n >= crowdLeast {
		pause(ctx, time.Second)
	}
	base, err := c.holds(ctx)
	if err != nil {
		return err
	}
	before := memories(pids)
	begun := time.Now()
	if err := each(ctx, n, c.start); err != nil {
		return fmt.Errorf("start %d containers: %w", n, err)
	}
	w.figure("%d run after %v", n, time.Since(begun).Round(10*time.Millisecond))
	if n >= crowdLeast {
		pause(ctx, restTime)
	}
	if have, err := c.count(ctx); err != nil || have != n {
		w.breaks("%d of %d run: %v", have, n, err)
	}
	w.costs(ctx, n, before, memories(pids), base, c)
	begun = time.Now()
	if err := each(ctx, n, c.end); err != nil {
		return fmt.Errorf("end %d containers: %w", n, err)
	}
	w.figure("gone after %v", time.Since(begun).Round(10*time.Millisecond))
	if now, err := c.pids(); err != nil || !maps.Equal(now, pids) {
		w.breaks("the node's processes were %v, are %v: %v", pids, now, err)
	}
	return awaitHolds(ctx, base, c.holds)
}

// costs compares memory and descriptors with what they may be.
func (w *world) costs(ctx context.Context, n int, before, after map[string]memory, base holdings, c crowd) {
	sum := int64(0)
	for _, name := range slices.Sorted(maps.Keys(after)) {
		sum += after[name].private - before[name].private
		w.figure("%s private %s → %s", name, mib(before[name].private), mib(after[name].private))
	}
	w.figure("%d KiB private for each container", sum>>10/int64(n))
	if n >= crowdLeast && sum/int64(n) > perContainer {
		w.breaks("%d KiB of our private memory for each container, more than %d", sum>>10/int64(n), perContainer>>10)
	}
	if m := before["supervisor"].private; m > supervisorLimit {
		w.breaks("the supervisor has %s of private memory before there is a container, more than %s", mib(m), mib(supervisorLimit))
	}
	h, err := c.holds(ctx)
	if err != nil {
		w.breaks("%v", err)
		return
	}
	for _, p := range []string{"supervisor", "daemon"} {
		if h[p+" threads"] == 0 {
			continue
		}
		each := float64(h[p+" descriptors"]-base[p+" descriptors"]) / float64(n)
		w.figure("%s: %.1f descriptors for each container, %d threads", p, each, h[p+" threads"])
		if each > descriptorLimit {
			w.breaks("%.1f descriptors of the %s for each container, more than %d", each, p, descriptorLimit)
		}
	}
}

func memories(pids map[string]int) map[string]memory {
	out := map[string]memory{}
	for name, pid := range pids {
		out[name] = memoryOf(pid)
	}
	return out
}

// each calls f for 0 to n-1 from several clients; it ends early at the first error.
func each(ctx context.Context, n int, f func(context.Context, int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(crowdClients, n) {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := f(ctx, i); err != nil {
					cancel(fmt.Errorf("%d: %w", i, err))
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}
