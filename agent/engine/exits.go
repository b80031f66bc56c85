package engine

import (
	"context"
	"errors"
	"path/filepath"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"skein/runtime"
)

// handleExit takes one record of the supervisor's journal. It is called in order by Run.
func (e *Engine) handleExit(ev runtime.Event) {
	if ev.ExecID != "" {
		e.execEnded(ev)
	} else if c := e.byID(ev.ContainerID); c != nil {
		if e.current(c, ev.Exit) {
			e.ended(c, ev.Exit)
		}
	}
	e.lastEvent = ev.Seq
	// Losing this write is harmless: records older than a container's run are ignored when they are replayed.
	if err := writeFile(filepath.Join(e.cfg.StateDir, "last-event"), []byte(strconv.FormatUint(ev.Seq, 10)), volatile); err != nil {
		e.log.Warn("remember the journal position", "err", err)
	}
}

func (e *Engine) byID(id string) *entry {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.containers[id]
}

// current tells whether a journaled end can be of the run that the record knows. The journal is replayed after a crash, so that an end
// that looks older than the run is checked against the supervisor's word, not against clocks alone.
func (e *Engine) current(c *entry, exit runtime.Exit) bool {
	r := c.snapshot()
	if !r.State.active() || !exit.At.Before(r.State.StartedAt) {
		return true
	}
	st, err := e.cfg.Supervisor.State(e.background, r.ID)
	return err != nil || st.Status == runtime.Stopped
}

// ended records the end of the current run and follows it up: clean-up, removal, restart. Of a container that does not run only what is
// left over is cleaned up.
func (e *Engine) ended(c *entry, exit runtime.Exit) {
	if !e.markEnded(c, exit) {
		if r, _, removed, _ := c.watch(); removed || r.State.Clean {
			return // replayed, or told twice
		}
		e.work.Go(func() error {
			e.cleanUp(c, 0)
			return nil
		})
		return
	}
	e.work.Go(func() error {
		e.followUp(c, 0)
		return nil
	})
}

// cleanUp is clean for what nobody waits for.
func (e *Engine) cleanUp(c *entry, attempt int) {
	c.op.Lock()
	defer c.op.Unlock()
	if err := e.clean(context.WithoutCancel(e.background), c); err != nil {
		e.log.Error("clean up after a container", "container", c.snapshot().Name, "err", err)
		e.tryAgain(c, attempt, e.cleanUp)
	}
}

// tryAgain repeats what could not be done after a run, later each time: a supervisor that died is started again, a full disk is emptied.
func (e *Engine) tryAgain(c *entry, attempt int, do func(*entry, int)) {
	e.work.Go(func() error {
		t := time.NewTimer(min(tryAgainFirst<<min(attempt, 10), tryAgainMax))
		defer t.Stop()
		select {
		case <-t.C:
		case <-e.background.Done():
			return nil
		}
		if r, _, removed, _ := c.watch(); !removed && (!r.State.Clean || r.HostConfig.AutoRemove) {
			do(c, attempt+1)
		}
		return nil
	})
}

// markEnded writes the end of a run into the record and tells everybody who waits. It reports whether there was a run to end.
func (e *Engine) markEnded(c *entry, exit runtime.Exit) bool {
	code, text := exit.Code, exit.Err
	if code == runtime.UnknownExit {
		code, text = 255, "exit code unknown: nobody saw the process end"
	}
	at := exit.At.UTC()
	if exit.At.IsZero() {
		at = time.Now().UTC()
	}
	marked := false
	err := e.update(c, func(r *record) {
		if !r.State.active() {
			return
		}
		marked = true
		c.exits++
		r.State.Status, r.State.Pid, r.State.ExitCode = container.StateExited, 0, code
		r.State.OOMKilled, r.State.Error, r.State.FinishedAt = exit.OOMKilled, text, at
		if e.wantsRestart(*r) && !r.HostConfig.AutoRemove {
			r.State.Status = container.StateRestarting // at once: who waits for the end does not take this for it
		}
	})
	if err != nil {
		e.log.Error("record the end of a container", "container", c.snapshot().Name, "err", err)
	}
	if !marked {
		return false
	}
	e.stopHealth(c)
	r := c.snapshot()
	if exit.OOMKilled {
		e.emit(r, events.ActionOOM, nil)
	}
	e.emit(r, events.ActionDie, map[string]string{"exitCode": strconv.Itoa(code), "execDuration": strconv.Itoa(int(at.Sub(r.State.StartedAt).Seconds()))})
	return true
}

// markFailed writes why a start did not become a run. A container that never ran stays "created", as docker shows it.
func (e *Engine) markFailed(c *entry, cause error) {
	code := 128
	var failed execError
	if errors.As(cause, &failed) {
		code = failed.code
	}
	err := e.update(c, func(r *record) {
		c.failures++
		r.State.Pid, r.State.ExitCode, r.State.OOMKilled, r.State.Error = 0, code, false, cause.Error()
		r.State.Status = container.StateCreated
		if !r.State.StartedAt.IsZero() || r.Task != "" {
			r.State.Status, r.State.FinishedAt = container.StateExited, time.Now().UTC()
		}
	})
	if err != nil {
		e.log.Error("record a failed start", "container", c.snapshot().Name, "err", err)
	}
}

// followUp cleans up after a run and applies --rm and the restart policy.
func (e *Engine) followUp(c *entry, attempt int) {
	ctx := e.background
	c.op.Lock()
	defer c.op.Unlock()
	r, _, removed, _ := c.watch()
	if removed || r.State.active() {
		return
	}
	if r.HostConfig.AutoRemove {
		if err := e.remove(context.WithoutCancel(ctx), c, removal{volumes: true}); err != nil {
			e.log.Error("remove an ended container", "container", r.Name, "err", err)
			if err := e.clean(context.WithoutCancel(ctx), c); err != nil { // what it holds others may need
				e.log.Error("clean up after a container", "container", r.Name, "err", err)
			}
			e.tryAgain(c, attempt, e.followUp)
		}
		return
	}
	if err := e.clean(context.WithoutCancel(ctx), c); err != nil {
		e.log.Error("clean up after a container", "container", r.Name, "err", err)
		e.tryAgain(c, attempt, e.cleanUp)
	}
	if r, _, _, _ = c.watch(); e.wantsRestart(r) {
		e.scheduleRestart(ctx, c, r)
	} else if r.State.Status == container.StateRestarting { // its policy was changed meanwhile
		if err := e.update(c, func(r *record) { r.State.Status = container.StateExited }); err != nil {
			e.log.Error("record the end of a container", "container", r.Name, "err", err)
		}
	}
}

func (e *Engine) wantsRestart(r record) bool {
	if r.State.StoppedByUser || r.Task != "" {
		return false
	}
	p := r.HostConfig.RestartPolicy
	switch {
	case p.IsAlways(), p.IsUnlessStopped():
		return true
	case p.IsOnFailure():
		return r.State.ExitCode != 0 && (p.MaximumRetryCount == 0 || r.State.RestartCount < p.MaximumRetryCount)
	}
	return false
}

// scheduleRestart starts the container again after a delay that doubles with each short run.
func (e *Engine) scheduleRestart(ctx context.Context, c *entry, r record) {
	backoff := r.State.Backoff
	if r.State.FinishedAt.Sub(r.State.StartedAt) >= restartReset {
		backoff = 0
	}
	delay := min(restartDelayFirst<<min(backoff, 10), restartDelayMax)
	count := r.State.RestartCount + 1
	if err := e.update(c, func(r *record) {
		r.State.Status, r.State.RestartCount, r.State.Backoff = container.StateRestarting, count, backoff+1
	}); err != nil {
		e.log.Error("record a restart", "container", r.Name, "err", err)
		return
	}
	e.work.Go(func() error {
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
		c.op.Lock()
		defer c.op.Unlock()
		now, _, removed, _ := c.watch()
		if removed || now.State.Status != container.StateRestarting || now.State.RestartCount != count {
			return nil // stopped, started or removed meanwhile
		}
		if err := e.start(ctx, c); err != nil && ctx.Err() == nil {
			e.log.Warn("restart a container", "container", r.Name, "err", err)
			if now, _, removed, _ := c.watch(); !removed && e.wantsRestart(now) {
				e.scheduleRestart(ctx, c, now)
			}
		}
		return nil
	})
}

// ContainerWait yields once when the condition holds. The wait is registered when it returns.
func (e *Engine) ContainerWait(ctx context.Context, ref string, condition container.WaitCondition) (<-chan container.WaitResponse, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	_, exitsBefore, _, _ := c.watch()
	out := make(chan container.WaitResponse, 1)
	go func() { // ends with ctx or the condition
		for {
			r, exits, removed, changed := c.watch()
			done := removed
			switch condition {
			case container.WaitConditionNextExit:
				done = done || exits > exitsBefore
			case container.WaitConditionRemoved:
			default:
				done = done || !r.State.active() && r.State.Status != container.StateRestarting
			}
			if done {
				resp := container.WaitResponse{StatusCode: int64(r.State.ExitCode)}
				if r.State.Error != "" && condition != container.WaitConditionRemoved {
					resp.Error = &container.WaitExitError{Message: r.State.Error}
				}
				out <- resp
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}
