package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/client"

	"skein/cmd/dev"
)

const (
	killFirst  = 20 * time.Millisecond   // after everything was up again
	killLast   = 1200 * time.Millisecond // lives of containers are about as long
	auditEvery = 10                      // kills
)

// await returns the number of kills so far once nothing is dead.
func (w *world) await(ctx context.Context) int {
	for {
		w.mu.Lock()
		epoch, up := w.epoch, w.up
		w.mu.Unlock()
		select {
		case <-up:
			return epoch
		default:
		}
		select {
		case <-up:
		case <-ctx.Done():
			return epoch
		}
	}
}

func (w *world) epochNow() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.epoch
}

func (w *world) killedSince(epoch int) bool { return w.epochNow() > epoch }

// dying is called before a kill: answers may be lost from here on. The returned function says that all is up again.
func (w *world) dying() (back func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.epoch++
	up := make(chan struct{})
	w.up = up
	return func() { close(up) }
}

// victims says what is killed.
type victims struct{ daemon, supervisor bool }

func (w *world) killDaemon(ctx context.Context, n int) error {
	return w.kill(ctx, n, victims{daemon: true})
}

func (w *world) killSupervisor(ctx context.Context, n int) error {
	return w.kill(ctx, n, victims{supervisor: true})
}

func (w *world) killBoth(ctx context.Context, n int) error {
	return w.kill(ctx, n, victims{daemon: true, supervisor: true})
}

// kill lets clients work and kills n times; at the end every container is accounted for and removed, and the node must hold what it held.
func (w *world) kill(ctx context.Context, n int, v victims) error {
	base, err := w.holds(ctx)
	if err != nil {
		return err
	}
	c := &crew{world: w, count: map[string]int{}, lost: v}
	cctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopping := make(chan struct{})
	var clients sync.WaitGroup
	for range w.opts.clients {
		clients.Go(func() { c.work(cctx, stopping) })
	}
	var back []time.Duration
	for i := 1; i <= n && err == nil && ctx.Err() == nil; i++ {
		pause(ctx, w.between(killFirst, killLast))
		var took time.Duration
		if took, err = w.strike(ctx, v); err == nil {
			back = append(back, took)
		}
		if i%auditEvery == 0 && err == nil {
			err = c.takeStock(ctx, base, i)
		}
	}
	close(stopping)
	if err != nil {
		cancel()
	}
	clients.Wait()
	if err != nil || ctx.Err() != nil {
		return errors.Join(err, ctx.Err())
	}
	if err := c.finish(ctx, base); err != nil {
		return err
	}
	if lost := c.count["lines lost with a supervisor"]; lost > len(back) { // a chunk of a few lines, in a moment of microseconds
		c.breaks("%d lines were lost in %d kills", lost, len(back))
	}
	slices.Sort(back)
	w.figure("%d kills, back after %v (median), %v (most)", len(back), back[len(back)/2].Round(time.Millisecond), back[len(back)-1].Round(time.Millisecond))
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(c.count)) {
		parts = append(parts, fmt.Sprintf("%d %s", c.count[k], k))
	}
	w.figure("%s", strings.Join(parts, ", "))
	return nil
}

// takeStock audits while no operation is under way.
func (c *crew) takeStock(ctx context.Context, base holdings, kills int) error {
	c.quiet.Lock()
	defer c.quiet.Unlock()
	if err := c.audit(ctx, base); err != nil {
		c.breaks("after %d kills: %v", kills, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.say("  %d kills, %d containers, %d operations, %d of them unsure, %d kept", kills, c.count["containers"], c.count["operations"], c.count["unsure"], len(c.kept))
	return ctx.Err()
}

// finish checks what was kept once more, removes it, and looks for what is left.
func (c *crew) finish(ctx context.Context, base holdings) error {
	if err := c.audit(ctx, base); err != nil {
		c.breaks("at the end: %v", err)
	}
	for _, j := range c.kept {
		if err := errors.Join(c.verify(ctx, j), c.remove(ctx, j)); err != nil {
			c.breaks("container %s (%.12s), at the end: %v", j.name, j.id, err)
		}
	}
	k, err := c.known(ctx)
	if err != nil {
		return err
	}
	for id := range k.all {
		c.breaks("container %.12s is nobody's", id)
		if _, err := c.api.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true}); err != nil { // the next run begins afresh
			return err
		}
	}
	return c.asBefore(ctx, base)
}

// asBefore waits until the node holds no more than it held.
func (w *world) asBefore(ctx context.Context, base holdings) error {
	return eventually(ctx, settleTime, func() error {
		h, err := w.holds(ctx)
		if more := growth(base, h); err == nil && len(more) > 0 {
			err = fmt.Errorf("the node holds more than before: %s", strings.Join(more, ", "))
		}
		return err
	})
}

// strike kills and waits until everything is there again. Sometimes a daemon that is just starting is killed, too.
func (w *world) strike(ctx context.Context, v victims) (time.Duration, error) {
	back := w.dying()
	defer back()
	begun := time.Now()
	old := 0
	if v.supervisor {
		var err error
		if old, err = dev.Listener(w.supervisorSocket()); err != nil {
			return 0, err
		}
		if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
			return 0, err
		}
	}
	if v.daemon {
		if err := w.strikeDaemon(ctx); err != nil {
			return 0, err
		}
	}
	if v.supervisor {
		err := eventually(ctx, settleTime, func() error {
			now, err := dev.Listener(w.supervisorSocket())
			if err == nil && now == old {
				err = errors.New("the dead supervisor answers")
			}
			return err
		})
		if err != nil {
			return 0, fmt.Errorf("no new supervisor: %w", err)
		}
	}
	return time.Since(begun), nil
}

func (w *world) strikeDaemon(ctx context.Context) error {
	pid, err := w.daemonPID()
	if err != nil {
		return err
	}
	if err := killAndWait(ctx, pid); err != nil {
		return err
	}
	if w.pick(5) == 0 { // and once more while it starts
		ready := make(chan error, 1)
		go func() { ready <- w.clus.Start(ctx, w.node) }()
		pause(ctx, w.between(0, 500*time.Millisecond))
		if next, err := w.daemonPID(); err == nil && next != pid && alive(next) {
			if err := killAndWait(ctx, next); err != nil {
				return err
			}
		}
		<-ready
		if now, err := w.daemonPID(); err == nil && alive(now) {
			return nil
		}
	}
	return w.clus.Start(ctx, w.node)
}

func killAndWait(ctx context.Context, pid int) error {
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill %d: %w", pid, err)
	}
	return eventually(ctx, settleTime, func() error {
		if alive(pid) {
			return fmt.Errorf("process %d lives on after SIGKILL", pid)
		}
		return nil
	})
}
