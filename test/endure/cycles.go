package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// Memory may move with the garbage collector's pace, but not grow with the number of cycles.
const (
	quarters       = 4
	memoryTrend    = 6 << 20 // of a process, from the first quarter's end to the last's
	daemonTrend    = 16 << 20
	cyclesPerCheck = 500
)

// cycling is how containers of one kind come and go.
type cycling struct {
	once  func(ctx context.Context, i int) error
	holds func(ctx context.Context) (holdings, error)
	pids  func() (map[string]int, error)
}

// cycles creates, starts, awaits and removes containers with a bridge network through the API.
func (w *world) cycles(ctx context.Context, n int) error {
	return w.cycle(ctx, n, cycling{
		once:  func(ctx context.Context, i int) error { return w.once(ctx, fmt.Sprintf("cycle-%d", i)) },
		holds: w.holds,
		pids:  w.pids,
	})
}

func (w *world) once(ctx context.Context, name string) error {
	res, err := w.api.ContainerCreate(ctx, client.ContainerCreateOptions{Name: name, Config: &container.Config{Image: w.image, Cmd: []string{"lines", name, "1", "0s", "7"}},
		HostConfig: &container.HostConfig{NetworkMode: "bridge"}})
	if err != nil {
		return err
	}
	wctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	wait := w.api.ContainerWait(wctx, res.ID, client.ContainerWaitOptions{Condition: container.WaitConditionNextExit})
	if _, err := w.api.ContainerStart(ctx, res.ID, client.ContainerStartOptions{}); err != nil {
		return err
	}
	select {
	case err := <-wait.Error:
		return fmt.Errorf("wait for %s: %w", name, err)
	case r := <-wait.Result:
		if r.StatusCode != 7 {
			return fmt.Errorf("%s ended with %d: %+v", name, r.StatusCode, r.Error)
		}
	}
	log, err := fetchLog(ctx, w.api, res.ID)
	if err == nil && log != name+" begin\n"+name+" 0\n" {
		err = fmt.Errorf("%s wrote %q", name, log)
	}
	if err != nil {
		return err
	}
	_, err = w.api.ContainerRemove(ctx, res.ID, client.ContainerRemoveOptions{})
	return err
}

// cycle does it n times and compares what is held before and after, and the memory of each quarter.
func (w *world) cycle(ctx context.Context, n int, c cycling) error {
	warm := max(n/20, 4) // what is made once is no cycle's
	if err := each(ctx, warm, c.once); err != nil {
		return err
	}
	pids, err := c.pids()
	if err != nil {
		return err
	}
	if base, err := c.holds(ctx); err == nil {
		err = w.quarters(ctx, n, c, pids, base)
		if err != nil {
			return err
		}
		return awaitHolds(ctx, base, c.holds)
	} else {
		return err
	}
}

func (w *world) quarters(ctx context.Context, n int, c cycling, pids map[string]int, base holdings) error {
	begun := time.Now()
	var samples []map[string]memory
	for q := range quarters {
		first := 1_000_000*(q+1) + 1 // names differ from the warm-up's
		if err := each(ctx, n/quarters, func(ctx context.Context, i int) error { return c.once(ctx, first+i) }); err != nil {
			return err
		}
		samples = append(samples, memories(pids))
		w.say("  %d cycles after %v", n*(q+1)/quarters, time.Since(begun).Round(time.Second))
	}
	w.figure("%.1f ms a cycle", time.Since(begun).Seconds()*1000/float64(n))
	now, err := c.pids()
	if err != nil || !maps.Equal(now, pids) {
		w.breaks("the processes were %v, are %v: %v", pids, now, err)
	}
	for _, name := range slices.Sorted(maps.Keys(pids)) {
		var list []string
		for _, s := range samples {
			list = append(list, fmt.Sprintf("%.1f", float64(s[name].private)/(1<<20)))
		}
		w.figure("%s private %s MiB", name, strings.Join(list, " "))
		limit := int64(memoryTrend)
		if name == "daemon" {
			limit = daemonTrend
		}
		if grown := samples[quarters-1][name].private - samples[0][name].private; grown > limit {
			w.breaks("the %s's private memory grew by %s in %d cycles", name, mib(grown), n*(quarters-1)/quarters)
		}
	}
	h, err := c.holds(ctx)
	if err != nil {
		return err
	}
	for _, k := range []string{"supervisor descriptors", "supervisor threads", "daemon descriptors", "daemon threads", "daemon goroutines", "namespaces", "mounts", "links", "nft elements"} {
		if _, ok := h[k]; ok {
			w.figure("%s %d → %d", k, base[k], h[k])
		}
	}
	return nil
}
