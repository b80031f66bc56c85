package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"skein/runtime"
)

// reconcile compares the records with processes, sandboxes and snapshots, mends records, and removes what has none. Running
// containers are adopted as they are.
func (e *Engine) reconcile(ctx context.Context) error {
	if err := e.cfg.Network.SetBridges(ctx, e.nets.bridges()); err != nil {
		return fmt.Errorf("bridges: %w", err)
	}
	states, err := e.cfg.Supervisor.List(ctx)
	if err != nil {
		return err
	}
	alive := map[string]runtime.State{}
	for _, s := range states {
		alive[s.ID] = s
		if e.byID(s.ID) == nil {
			e.removeOrphan(ctx, s)
		}
	}
	for _, c := range e.all() {
		e.adopt(ctx, c, alive)
	}
	return e.removeLeftovers(ctx)
}

// adopt makes one record agree with the supervisor's word.
func (e *Engine) adopt(ctx context.Context, c *entry, alive map[string]runtime.State) {
	r := c.snapshot()
	for _, b := range r.Sandbox.Bridges {
		for _, p := range b.Ports {
			if !r.State.Clean && p.Published != 0 {
				e.ports.reserve(portKey{p.Protocol, p.Published}, hostIP(p.HostIP), r.ID)
			}
		}
		if l, err := e.nets.find(b.BridgeID); err == nil && !r.State.Clean {
			if err := e.nets.retake(l, r.ID, b.Addr4.Addr(), b.Addr6.Addr()); err != nil {
				e.log.Error("reserve a container's address", "container", r.Name, "err", err)
			}
		}
	}
	st, known := alive[r.ID]
	running := known && (st.Status == runtime.Running || st.Status == runtime.Paused)
	switch {
	case running:
		e.adoptRunning(ctx, c, r, st)
	case r.State.active() && known && st.Status == runtime.Stopped:
		e.markEnded(c, st.Exit)
	case r.State.active():
		e.markEnded(c, runtime.Exit{Code: runtime.UnknownExit})
	case known && st.Status == runtime.Stopped && !st.StartedAt.IsZero() && r.State.StartedAt.Before(st.CreatedAt):
		e.markMissed(c, st)
	case known && st.Status == runtime.Created: // crashed between create and start
		if err := e.update(c, func(r *record) { r.State.Clean = false }); err != nil {
			e.log.Error("adopt container", "container", r.Name, "err", err)
		}
	}
}

func (e *Engine) adoptRunning(ctx context.Context, c *entry, r record, st runtime.State) {
	if r.HostConfig.NetworkMode != "host" && r.Sandbox.ID != "" {
		if _, err := e.cfg.Network.AddSandbox(ctx, r.Sandbox); err != nil {
			e.log.Error("mend the network of a running container", "container", r.Name, "err", err)
		}
	}
	err := e.update(c, func(r *record) {
		r.State.Pid, r.State.Clean = st.Pid, false
		if !r.State.active() {
			r.State.StartedAt, r.State.FinishedAt, r.State.ExitCode = st.StartedAt, st.FinishedAt, 0
		}
		r.State.Status = container.StateRunning
		if st.Status == runtime.Paused {
			r.State.Status = container.StatePaused
		}
	})
	if err != nil {
		e.log.Error("adopt container", "container", r.Name, "err", err)
	}
	e.startHealth(c)
}

// markMissed records a run, from start to end, whose start the last daemon did not live to record.
func (e *Engine) markMissed(c *entry, st runtime.State) {
	if st.Exit.Err != "" {
		e.markFailed(c, execError{st.Exit.Code, st.Exit.Err, errors.New(st.Exit.Err)})
		return
	}
	err := e.update(c, func(r *record) {
		r.State.Status, r.State.StartedAt, r.State.Clean = container.StateRunning, st.StartedAt, false
		r.State.FinishedAt, r.State.ExitCode, r.State.OOMKilled, r.State.Error = time.Time{}, 0, false, ""
	})
	if err != nil {
		e.log.Error("record a run", "container", c.snapshot().Name, "err", err)
	}
	e.markEnded(c, st.Exit)
}

func (e *Engine) removeOrphan(ctx context.Context, s runtime.State) {
	e.log.Warn("removing a container without a record", "id", s.ID, "status", s.Status)
	if s.Status == runtime.Running || s.Status == runtime.Paused {
		if err := e.cfg.Supervisor.Signal(ctx, s.ID, 9); err != nil && !cerrdefs.IsNotFound(err) && !cerrdefs.IsFailedPrecondition(err) {
			e.log.Error("kill orphan", "id", s.ID, "err", err)
		}
		e.work.Go(func() error { // its end comes with the journal; nobody else knows it
			ch, err := e.cfg.Supervisor.Events(e.background, e.lastEvent)
			if err != nil {
				return nil
			}
			for ev := range ch {
				if ev.ContainerID == s.ID && ev.ExecID == "" {
					break
				}
			}
			if err := e.cfg.Supervisor.Delete(context.WithoutCancel(ctx), s.ID); err != nil && !cerrdefs.IsNotFound(err) {
				e.log.Error("delete orphan", "id", s.ID, "err", err)
			}
			return nil
		})
		return
	}
	if err := e.cfg.Supervisor.Delete(ctx, s.ID); err != nil && !cerrdefs.IsNotFound(err) {
		e.log.Error("delete orphan", "id", s.ID, "err", err)
	}
}

// removeLeftovers deletes sandboxes and snapshots without a record, and sandboxes whose container's record says that its last run is
// cleaned up: devices and namespaces go after their removal was acknowledged.
func (e *Engine) removeLeftovers(ctx context.Context) error {
	boxes, err := e.cfg.Network.Sandboxes()
	if err != nil {
		return err
	}
	for _, id := range boxes {
		if c := e.byID(id); c == nil || c.snapshot().State.Clean {
			if err := e.cfg.Network.RemoveSandbox(ctx, id); err != nil {
				e.log.Error("remove orphan sandbox", "id", id, "err", err)
			}
		}
	}
	if err := e.removeOrphanFiles(); err != nil {
		e.log.Error("remove orphan secrets and configs", "err", err)
	}
	keys, err := e.cfg.Images.Snapshots(ctx)
	if err != nil {
		return err
	}
	for _, key := range keys {
		if e.byID(key) == nil {
			if err := e.cfg.Images.RemoveSnapshot(ctx, key); err != nil {
				e.log.Error("remove orphan root filesystem", "id", key, "err", err)
			}
		}
	}
	return nil
}

// resume follows up what the last daemon could not: ended containers are cleaned, removed, restarted.
func (e *Engine) resume() {
	for _, c := range e.all() {
		r := c.snapshot()
		if r.State.active() {
			continue
		}
		if r.HostConfig.RestartPolicy.IsAlways() && r.State.StoppedByUser && !r.State.StartedAt.IsZero() {
			// "always" means after a stop too, once the daemon starts anew; "unless-stopped" is for the others.
			if err := e.update(c, func(r *record) { r.State.StoppedByUser = false }); err != nil {
				e.log.Error("restart a container", "container", r.Name, "err", err)
			}
		}
		restart := r.State.Status == container.StateRestarting || r.HostConfig.RestartPolicy.IsAlways() && !r.State.StartedAt.IsZero()
		if r.State.Clean && !restart && !(r.HostConfig.AutoRemove && !r.State.StartedAt.IsZero()) {
			continue
		}
		e.work.Go(func() error {
			e.followUp(c, 0)
			return nil
		})
	}
}
