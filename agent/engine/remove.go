package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"skein/agent/dockerapi"
)

// ContainerRemove deletes a container; force kills it first.
func (e *Engine) ContainerRemove(ctx context.Context, ref string, force, volumes bool) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if force { // not behind a stop that waits, perhaps for ever
		if err := e.killNow(ctx, c); err != nil {
			return err
		}
	}
	if err := c.lock(); err != nil {
		return err
	}
	defer c.op.Unlock()
	return e.remove(ctx, c, removal{force: force, volumes: volumes})
}

// killNow ends a running container without waiting for its other operations.
func (e *Engine) killNow(ctx context.Context, c *entry) error {
	r, _, removed, _ := c.watch()
	if removed || !r.State.active() {
		return nil
	}
	if err := e.update(c, func(r *record) { r.State.StoppedByUser = true }); err != nil {
		return err
	}
	if err := e.signal(ctx, c, unix.SIGKILL); err != nil {
		return err
	}
	if r.State.Status == container.StatePaused {
		return e.thaw(ctx, c)
	}
	return nil
}

// removal says how a container is removed.
type removal struct {
	force   bool // kill it first
	volumes bool // and its anonymous volumes
}

// remove deletes everything of the container; its record goes last, so that a crash leaves something to mend. The caller holds c.op.
func (e *Engine) remove(ctx context.Context, c *entry, o removal) error {
	r, _, removed, _ := c.watch()
	if removed {
		return nil
	}
	if r.State.Status == container.StateRestarting && !o.force {
		return conflict("cannot remove container %q: container is restarting: stop the container before removing or force remove", "/"+r.Name)
	}
	if r.State.active() {
		if !o.force {
			return conflict("cannot remove container %q: container is %s: stop the container before removing or force remove", "/"+r.Name, r.State.Status)
		}
		if err := e.update(c, func(r *record) { r.State.StoppedByUser = true }); err != nil {
			return err
		}
		zero := 0
		if err := e.stop(ctx, c, dockerapi.StopOptions{Timeout: &zero}); err != nil {
			return err
		}
	}
	ctx = context.WithoutCancel(ctx) // once begun, a removal is finished
	if err := e.release(ctx, c); err != nil {
		return err
	}
	if err := e.cfg.Images.RemoveSnapshot(ctx, r.ID); err != nil {
		return fmt.Errorf("remove container %s: root filesystem: %w", r.Name, err)
	}
	if err := e.removeFiles(r.Task); err != nil {
		return fmt.Errorf("remove container %s: secrets: %w", r.Name, err)
	}
	c.mu.Lock()
	err := os.Remove(filepath.Join(e.containerDir(r.ID), recordFile))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	c.gone = err == nil
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("remove container %s: %w", r.Name, err)
	}
	e.work.Go(func() error { // without its record the directory is nobody's; what a crash leaves of it goes at the next start
		if err := os.RemoveAll(e.containerDir(r.ID)); err != nil {
			e.log.Error("remove the files of a container", "container", r.Name, "err", err)
		}
		return nil
	})
	e.unregister(c)
	if r.Attached {
		e.attachmentsChanged()
	}
	e.execs.forget(r.ID)
	if o.volumes {
		e.dropAnonymous(r)
	}
	c.mu.Lock()
	c.removed = true
	close(c.changed)
	c.changed = make(chan struct{})
	c.mu.Unlock()
	e.emit(r, events.ActionDestroy, nil)
	return nil
}

// clean removes what the last run left in the runtime and the network, and records that. Idempotent; nothing happens while the container
// runs. The caller holds c.op.
func (e *Engine) clean(ctx context.Context, c *entry) error {
	r := c.snapshot()
	if r.State.active() || r.State.Clean {
		return nil
	}
	if err := e.release(ctx, c); err != nil {
		return err
	}
	if r.Attached {
		defer e.attachmentsChanged()
	}
	return e.update(c, func(r *record) {
		r.State.Clean = true
		disconnected(r)
	})
}

// release is clean without its record, for a container whose record goes next.
func (e *Engine) release(ctx context.Context, c *entry) error {
	r := c.snapshot()
	if r.State.active() || r.State.Clean {
		return nil
	}
	err := e.cfg.Supervisor.Delete(ctx, r.ID)
	if cerrdefs.IsFailedPrecondition(err) {
		// It runs although its record says no: the answer to its start was lost. Nobody asked for this run, so it is ended; who removes
		// tries again.
		err = errors.Join(err, e.cfg.Supervisor.Signal(ctx, r.ID, int(unix.SIGKILL)))
	}
	if err != nil && !cerrdefs.IsNotFound(err) {
		return fmt.Errorf("clean up container %s: %w", r.Name, err)
	}
	if err := e.disconnect(ctx, c); err != nil {
		return fmt.Errorf("clean up container %s: network: %w", r.Name, err)
	}
	return nil
}
