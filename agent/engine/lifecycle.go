package engine

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"skein/agent/dockerapi"
	"skein/runtime"
	"skein/runtime/image"
)

const (
	defaultStopTimeout = 10 * time.Second // docker's
	killWait           = 10 * time.Second // after SIGKILL: longer means an unkillable process
	restartDelayFirst  = 100 * time.Millisecond
	restartDelayMax    = time.Minute
	tryAgainFirst      = 100 * time.Millisecond // after a clean-up that failed
	tryAgainMax        = time.Minute
	restartReset       = 10 * time.Second // a run this long starts the back-off anew
)

// ContainerStart starts a created or ended container.
func (e *Engine) ContainerStart(ctx context.Context, ref string) error {
	c, err := e.acquire(ref)
	if err != nil {
		return err
	}
	defer c.op.Unlock()
	r := c.snapshot()
	if r.State.Status == container.StatePaused {
		return conflict("cannot start a paused container, try unpause instead")
	}
	if r.State.active() {
		return dockerapi.ErrNotModified
	}
	if err := e.update(c, func(r *record) { r.State.StoppedByUser, r.State.RestartCount, r.State.Backoff = false, 0, 0 }); err != nil {
		e.startFailed(ctx, c, err)
		return err
	}
	return e.start(ctx, c)
}

// start prepares root filesystem, sandbox and process, and executes it. The caller holds c.op.
func (e *Engine) start(ctx context.Context, c *entry) error {
	err := e.clean(ctx, c)
	r := c.snapshot()
	if err == nil && !r.State.active() {
		err = e.launch(ctx, c, r)
	}
	if err != nil {
		e.startFailed(ctx, c, err)
	}
	return err
}

// startFailed removes at once what was half made. The container stays, with the reason, unless it was to go at its end: then somebody may
// wait for that. The caller holds c.op.
func (e *Engine) startFailed(ctx context.Context, c *entry, reason error) {
	e.markFailed(c, reason)
	ctx = context.WithoutCancel(ctx)
	r := c.snapshot()
	var err error
	again := e.cleanUp
	if r.HostConfig.AutoRemove {
		again = e.followUp
		err = e.remove(ctx, c, removal{volumes: true}) // needs no space on a full disk, unlike a record
	} else {
		err = e.clean(ctx, c)
	}
	if err != nil {
		e.log.Warn("cleaning up after a failed start", "container", r.Name, "err", err)
		e.tryAgain(c, 0, again)
	}
}

// execError is a process that could not be executed: docker's exit codes 126 and 127.
type execError struct {
	code int
	text string
	err  error
}

func (x execError) Error() string {
	return "failed to create task for container: OCI runtime create failed: unable to start container process: error during container init: " + x.text
}
func (x execError) Unwrap() error { return x.err }

// surroundings makes root filesystem and network at the same time: the one writes to disk, the other waits for the kernel.
func (e *Engine) surroundings(ctx context.Context, c *entry, r record, img image.Image) (rootfs []runtime.Mount, netns string, err error) {
	var both errgroup.Group
	both.Go(func() (err error) {
		if rootfs, err = e.cfg.Images.Prepare(ctx, r.ID, img); err != nil {
			err = fmt.Errorf("root filesystem: %w", err)
		}
		return err
	})
	netns, err = e.connect(ctx, c)
	if err != nil {
		err = fmt.Errorf("network: %w", err)
	}
	return rootfs, netns, errors.Join(err, both.Wait())
}

func (e *Engine) launch(ctx context.Context, c *entry, r record) error {
	img, err := e.cfg.Images.Get(ctx, r.Image)
	if err != nil {
		return fmt.Errorf("start container %s: its image: %w", r.Name, err)
	}
	rootfs, netns, err := e.surroundings(ctx, c, r, img)
	if err != nil {
		return fmt.Errorf("start container %s: %w", r.Name, err)
	}
	r = c.snapshot()
	if err := e.writeNetworkFiles(r); err != nil {
		return fmt.Errorf("start container %s: %w", r.Name, err)
	}
	if err := e.populateVolumes(r, rootfs); err != nil {
		return fmt.Errorf("start container %s: %w", r.Name, err)
	}
	cfg, err := e.runtimeConfig(ctx, r, rootfs, netns)
	if err != nil {
		return err
	}
	if err := e.cfg.Supervisor.Create(ctx, cfg); err != nil {
		return fmt.Errorf("start container %s: %w", r.Name, err)
	}
	e.letAttach(ctx, c)
	begun := time.Now().UTC() // before the process can end: the order of the two tells an old run's end from this one's
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("start container %s: %w", r.Name, err)
	}
	// From here on the caller's change of mind comes too late: a start that is not waited for may succeed all the same.
	ctx = context.WithoutCancel(ctx)
	pid, err := e.cfg.Supervisor.Start(ctx, r.ID)
	if cerrdefs.IsUnavailable(err) {
		var done bool
		if pid, done = e.startedAnyway(ctx, r.ID); !done {
			return fmt.Errorf("start container %s: %w", r.Name, err)
		}
	} else if err != nil {
		code := 126
		if st, serr := e.cfg.Supervisor.State(ctx, r.ID); serr == nil && st.Status == runtime.Stopped && st.Exit.Code > 0 {
			code = st.Exit.Code
		}
		return execError{code, reason(err, r.ID, ""), err}
	}
	if err := e.markStarted(ctx, c, pid, begun); err != nil {
		// A run that no record knows would be nobody's: its end is journaled, and handleExit cleans up.
		if kerr := e.signal(context.WithoutCancel(ctx), c, unix.SIGKILL); kerr != nil {
			e.log.Error("kill a container whose start could not be recorded", "container", r.Name, "err", kerr)
		}
		return err
	}
	return nil
}

// startedAnyway asks the next supervisor whether a start took place whose answer was lost with the last one.
func (e *Engine) startedAnyway(ctx context.Context, id string) (pid int, done bool) {
	st, err := e.cfg.Supervisor.State(ctx, id)
	return st.Pid, err == nil && st.Status != runtime.Created && !st.StartedAt.IsZero() && st.Exit.Err == ""
}

// markStarted records the run, and its end if it is over already.
func (e *Engine) markStarted(ctx context.Context, c *entry, pid int, begun time.Time) error {
	err := e.update(c, func(r *record) {
		r.State.Status, r.State.Pid, r.State.StartedAt = container.StateRunning, pid, begun
		r.State.FinishedAt, r.State.ExitCode, r.State.OOMKilled, r.State.Error = time.Time{}, 0, false, ""
	})
	if err != nil {
		return err
	}
	e.emit(c.snapshot(), events.ActionStart, nil)
	e.startHealth(c)
	// Its end may have been journaled before the record said "running", when handleExit had nothing to end.
	if st, err := e.cfg.Supervisor.State(ctx, c.snapshot().ID); err == nil && st.Status == runtime.Stopped {
		e.ended(c, st.Exit)
	}
	return nil
}

// ContainerStop sends the stop signal, waits, and kills.
func (e *Engine) ContainerStop(ctx context.Context, ref string, o dockerapi.StopOptions) error {
	c, err := e.acquire(ref)
	if err != nil {
		return err
	}
	defer c.op.Unlock()
	ctx, done := e.untilShutdown(ctx)
	defer done()
	r := c.snapshot()
	if err := e.update(c, func(r *record) { r.State.StoppedByUser = true }); err != nil {
		return err
	}
	if !r.State.active() {
		if r.State.Status == container.StateRestarting {
			return e.update(c, func(r *record) { r.State.Status = container.StateExited })
		}
		return dockerapi.ErrNotModified
	}
	if err := e.stop(ctx, c, o); err != nil {
		return err
	}
	e.emit(r, events.ActionStop, nil)
	return nil
}

// untilShutdown is a context for what a client's going away must not leave half done; it ends with the daemon.
func (e *Engine) untilShutdown(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	if e.background == nil {
		return ctx, cancel
	}
	stop := context.AfterFunc(e.background, cancel)
	return ctx, func() { stop(); cancel() }
}

// stop ends the container's process. The caller holds c.op.
func (e *Engine) stop(ctx context.Context, c *entry, o dockerapi.StopOptions) error {
	r := c.snapshot()
	sig := o.Signal
	if sig == "" {
		sig = r.Config.StopSignal
	}
	n, err := parseSignal(sig)
	if err != nil {
		return err
	}
	if n == 0 {
		n = unix.SIGTERM
	}
	timeout := defaultStopTimeout
	if r.Config.StopTimeout != nil {
		timeout = time.Duration(*r.Config.StopTimeout) * time.Second
	}
	if o.Timeout != nil {
		timeout = time.Duration(*o.Timeout) * time.Second
	}
	if r.State.Status == container.StatePaused {
		if err := e.thaw(ctx, c); err != nil {
			return err
		}
	}
	if timeout != 0 {
		if err := e.signal(ctx, c, n); err != nil {
			return err
		}
		e.emit(r, events.ActionKill, map[string]string{"signal": strconv.Itoa(int(n))})
		if e.awaitEnd(ctx, c, timeout) {
			return e.clean(ctx, c)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := e.signal(ctx, c, unix.SIGKILL); err != nil {
		return err
	}
	if !e.awaitEnd(ctx, c, killWait) {
		return fmt.Errorf("cannot stop container %s: its process %d did not end within %v of SIGKILL: it is stuck in the kernel", r.Name, r.State.Pid, killWait)
	}
	return e.clean(ctx, c)
}

// thaw lets a paused container's processes run, so that signals reach them.
func (e *Engine) thaw(ctx context.Context, c *entry) error {
	r := c.snapshot()
	if err := e.cfg.Supervisor.Resume(ctx, r.ID); err != nil && !cerrdefs.IsNotFound(err) && !cerrdefs.IsFailedPrecondition(err) {
		return fmt.Errorf("unpause container %s: %w", r.Name, err)
	}
	return e.update(c, func(r *record) {
		if r.State.Status == container.StatePaused {
			r.State.Status = container.StateRunning
		}
	})
}

// signal sends n; a process that is already gone is no error.
func (e *Engine) signal(ctx context.Context, c *entry, n syscall.Signal) error {
	r := c.snapshot()
	err := e.cfg.Supervisor.Signal(ctx, r.ID, int(n))
	if err != nil && !cerrdefs.IsNotFound(err) && !cerrdefs.IsFailedPrecondition(err) {
		return fmt.Errorf("signal container %s: %w", r.Name, err)
	}
	return nil
}

// awaitEnd waits until the container runs no more; timeout below 0 waits for ever.
func (e *Engine) awaitEnd(ctx context.Context, c *entry, timeout time.Duration) bool {
	var limit <-chan time.Time
	if timeout >= 0 {
		t := time.NewTimer(timeout)
		defer t.Stop()
		limit = t.C
	}
	for {
		r, _, removed, changed := c.watch()
		if removed || !r.State.active() {
			return true
		}
		select {
		case <-changed:
		case <-limit:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// ContainerRestart stops a running container and starts it.
func (e *Engine) ContainerRestart(ctx context.Context, ref string, o dockerapi.StopOptions) error {
	c, err := e.acquire(ref)
	if err != nil {
		return err
	}
	defer c.op.Unlock()
	ctx, done := e.untilShutdown(ctx)
	defer done()
	if c.snapshot().State.active() {
		if err := e.update(c, func(r *record) { r.State.StoppedByUser = true }); err != nil {
			return err
		}
		if err := e.stop(ctx, c, o); err != nil {
			return err
		}
	}
	if err := e.update(c, func(r *record) { r.State.StoppedByUser = false }); err != nil {
		return err
	}
	if err := e.start(ctx, c); err != nil {
		return err
	}
	e.emit(c.snapshot(), events.ActionRestart, nil)
	return nil
}

// ContainerKill sends a signal, SIGKILL by default.
func (e *Engine) ContainerKill(ctx context.Context, ref, signal string) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if signal == "" {
		signal = "KILL"
	}
	n, err := parseSignal(signal)
	if err != nil {
		return err
	}
	r := c.snapshot()
	if r.State.Status == container.StateRestarting {
		return e.cancelRestart(c)
	}
	if !r.State.active() {
		return conflict("cannot kill container: %s: container %s is not running", ref, r.ID)
	}
	if stop, _ := parseSignal(r.Config.StopSignal); n == unix.SIGKILL || n == stop || stop == 0 && n == unix.SIGTERM {
		if err := e.update(c, func(r *record) { r.State.StoppedByUser = true }); err != nil {
			return err
		}
	}
	if err := e.signal(ctx, c, n); err != nil {
		return err
	}
	if n == unix.SIGKILL && r.State.Status == container.StatePaused { // a frozen process does not die
		if err := e.thaw(ctx, c); err != nil {
			return err
		}
	}
	e.emit(r, events.ActionKill, map[string]string{"signal": strconv.Itoa(int(n))})
	if n == unix.SIGKILL && !e.awaitEnd(ctx, c, killWait) {
		return fmt.Errorf("container %s did not end within %v of SIGKILL", r.Name, killWait)
	}
	return nil
}

// cancelRestart is what a signal means to a container that waits for its restart.
func (e *Engine) cancelRestart(c *entry) error {
	return e.update(c, func(r *record) {
		r.State.StoppedByUser = true
		if r.State.Status == container.StateRestarting {
			r.State.Status = container.StateExited
		}
	})
}

// ContainerPause freezes the container's processes.
func (e *Engine) ContainerPause(ctx context.Context, ref string) error {
	return e.freeze(ctx, ref, container.StateRunning, container.StatePaused, e.cfg.Supervisor.Pause, events.ActionPause)
}

// ContainerUnpause thaws them.
func (e *Engine) ContainerUnpause(ctx context.Context, ref string) error {
	return e.freeze(ctx, ref, container.StatePaused, container.StateRunning, e.cfg.Supervisor.Resume, events.ActionUnPause)
}

func (e *Engine) freeze(ctx context.Context, ref string, from, to container.ContainerState, do func(context.Context, string) error, action events.Action) error {
	c, err := e.acquire(ref)
	if err != nil {
		return err
	}
	defer c.op.Unlock()
	r := c.snapshot()
	if r.State.Status != from {
		if from == container.StateRunning && r.State.Status == container.StatePaused {
			return conflict("Container %s is already paused", r.ID)
		}
		return conflict("Container %s is not %s", r.ID, from)
	}
	if err := do(ctx, r.ID); err != nil {
		return err
	}
	if err := e.update(c, func(r *record) {
		if r.State.active() {
			r.State.Status = to
		}
	}); err != nil {
		return err
	}
	e.emit(r, action, nil)
	return nil
}

// ContainerRename changes the name.
func (e *Engine) ContainerRename(ctx context.Context, ref, name string) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	name = strings.TrimPrefix(name, "/")
	if !validName.MatchString(name) {
		return invalid("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
	}
	if err := c.lock(); err != nil {
		return err
	}
	defer c.op.Unlock()
	old := c.snapshot().Name
	if name == old {
		return invalid("Renaming a container with the same name as its current name")
	}
	e.mu.Lock()
	if id, taken := e.names[name]; taken {
		e.mu.Unlock()
		return conflict("Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+name, id)
	}
	e.names[name] = c.rec.ID
	delete(e.names, old)
	e.mu.Unlock()
	if err := e.update(c, func(r *record) { r.Name = name }); err != nil {
		e.mu.Lock()
		delete(e.names, name)
		e.names[old] = c.rec.ID
		e.mu.Unlock()
		return err
	}
	e.emit(c.snapshot(), events.ActionRename, map[string]string{"oldName": "/" + old})
	if err := e.renameInDNS(ctx, c, old); err != nil {
		return fmt.Errorf("container %s has its new name %s, but not in DNS until it is started again: %w", old, name, err)
	}
	return nil
}
