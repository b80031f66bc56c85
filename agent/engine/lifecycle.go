package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"golang.org/x/sys/unix"

	"skein/agent/dockerapi"
	"skein/runtime"
)

const (
	defaultStopTimeout = 10 * time.Second // docker's
	killWait           = 10 * time.Second // after SIGKILL: longer means an unkillable process
	restartDelayFirst  = 100 * time.Millisecond
	restartDelayMax    = time.Minute
	restartReset       = 10 * time.Second // a run this long starts the back-off anew
)

// ContainerStart starts a created or ended container.
func (e *Engine) ContainerStart(ctx context.Context, ref string) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	c.op.Lock()
	defer c.op.Unlock()
	r := c.snapshot()
	if r.State.Status == container.StatePaused {
		return conflict("cannot start a paused container, try unpause instead")
	}
	if r.State.active() {
		return dockerapi.ErrNotModified
	}
	if err := e.update(c, func(r *record) { r.State.StoppedByUser, r.State.RestartCount = false, 0 }); err != nil {
		return err
	}
	return e.start(ctx, c)
}

// start prepares root filesystem, sandbox and process, and executes it. The caller holds c.op.
func (e *Engine) start(ctx context.Context, c *entry) error {
	if err := e.clean(ctx, c); err != nil {
		return err
	}
	r := c.snapshot()
	if r.State.active() {
		return nil
	}
	err := e.launch(ctx, c, r)
	if err == nil {
		return nil
	}
	// What was half made is removed at once; the container stays, with the reason.
	exit := runtime.Exit{Code: 128, At: time.Now(), Err: err.Error()}
	var failed execError
	if errors.As(err, &failed) {
		exit.Code = failed.code
	}
	e.markEnded(c, exit)
	done := context.WithoutCancel(ctx)
	cerr := e.clean(done, c)
	if cerr == nil && r.HostConfig.AutoRemove {
		cerr = e.remove(done, c, false)
	}
	if cerr != nil {
		e.log.Warn("cleaning up after a failed start", "container", r.Name, "err", cerr)
	}
	return err
}

// execError is a process that could not be executed: docker's exit codes 126 and 127.
type execError struct {
	code int
	err  error
}

func (x execError) Error() string {
	return "failed to create task for container: " + x.err.Error()
}
func (x execError) Unwrap() error { return x.err }

func (e *Engine) launch(ctx context.Context, c *entry, r record) error {
	if err := e.update(c, func(r *record) { r.State.Clean = false }); err != nil {
		return err
	}
	img, err := e.cfg.Images.Get(ctx, r.Image)
	if err != nil {
		return fmt.Errorf("start container %s: its image: %w", r.Name, err)
	}
	rootfs, err := e.cfg.Images.Prepare(ctx, r.ID, img)
	if err != nil {
		return fmt.Errorf("start container %s: root filesystem: %w", r.Name, err)
	}
	netns, err := e.connect(ctx, c)
	if err != nil {
		return fmt.Errorf("start container %s: network: %w", r.Name, err)
	}
	r = c.snapshot()
	if err := e.writeNetworkFiles(r); err != nil {
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
	pid, err := e.cfg.Supervisor.Start(ctx, r.ID)
	if err != nil {
		code := 126
		if st, serr := e.cfg.Supervisor.State(ctx, r.ID); serr == nil && st.Status == runtime.Stopped && st.Exit.Code > 0 {
			code = st.Exit.Code
		}
		return execError{code, err}
	}
	if err := e.markStarted(ctx, c, pid); err != nil {
		return err
	}
	e.emit(r, events.ActionStart, nil)
	return nil
}

// markStarted records the run unless it already ended.
func (e *Engine) markStarted(ctx context.Context, c *entry, pid int) error {
	now := time.Now().UTC()
	err := e.update(c, func(r *record) {
		r.State.Status, r.State.Pid, r.State.StartedAt = container.StateRunning, pid, now
		r.State.FinishedAt, r.State.ExitCode, r.State.OOMKilled, r.State.Error = time.Time{}, 0, false, ""
	})
	if err != nil {
		return err
	}
	// Its end may have been journaled before the record said "running", when handleExit had nothing to end.
	if st, err := e.cfg.Supervisor.State(ctx, c.snapshot().ID); err == nil && st.Status == runtime.Stopped {
		e.ended(c, st.Exit)
		return nil
	}
	e.startHealth(c)
	return nil
}

// ContainerStop sends the stop signal, waits, and kills.
func (e *Engine) ContainerStop(ctx context.Context, ref string, o dockerapi.StopOptions) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	c.op.Lock()
	defer c.op.Unlock()
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
		if err := e.cfg.Supervisor.Resume(ctx, r.ID); err != nil {
			return err
		}
	}
	if timeout != 0 {
		if err := e.signal(ctx, c, n); err != nil {
			return err
		}
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
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	c.op.Lock()
	defer c.op.Unlock()
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
	if !r.State.active() {
		return conflict("cannot kill container: %s: container %s is not running", ref, r.ID)
	}
	if n == unix.SIGKILL {
		if err := e.update(c, func(r *record) { r.State.StoppedByUser = true }); err != nil {
			return err
		}
	}
	if err := e.signal(ctx, c, n); err != nil {
		return err
	}
	e.emit(r, events.ActionKill, map[string]string{"signal": strconv.Itoa(int(n))})
	if n == unix.SIGKILL && !e.awaitEnd(ctx, c, killWait) {
		return fmt.Errorf("container %s did not end within %v of SIGKILL", r.Name, killWait)
	}
	return nil
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
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	c.op.Lock()
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
	c.op.Lock()
	defer c.op.Unlock()
	old := c.snapshot().Name
	e.mu.Lock()
	if id, taken := e.names[name]; taken {
		e.mu.Unlock()
		return conflict("Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+name, id)
	}
	e.names[name] = c.rec.ID
	delete(e.names, old)
	e.mu.Unlock()
	if err := e.update(c, func(r *record) { r.Name = name }); err != nil {
		return err
	}
	e.emit(c.snapshot(), events.ActionRename, map[string]string{"oldName": "/" + old})
	return nil
}

// ContainerRemove deletes a container; force kills it first.
func (e *Engine) ContainerRemove(ctx context.Context, ref string, force, volumes bool) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	c.op.Lock()
	defer c.op.Unlock()
	return e.remove(ctx, c, force)
}

// remove deletes everything of the container; its record goes last, so that a crash leaves something to mend. The caller holds c.op.
func (e *Engine) remove(ctx context.Context, c *entry, force bool) error {
	r, _, removed, _ := c.watch()
	if removed {
		return nil
	}
	if r.State.active() {
		if !force {
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
	if err := e.clean(ctx, c); err != nil {
		return err
	}
	if err := e.cfg.Images.RemoveSnapshot(ctx, r.ID); err != nil {
		return fmt.Errorf("remove container %s: root filesystem: %w", r.Name, err)
	}
	c.mu.Lock()
	err := os.RemoveAll(e.containerDir(r.ID))
	if err == nil {
		c.removed = true
		close(c.changed)
		c.changed = make(chan struct{})
	}
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("remove container %s: %w", r.Name, err)
	}
	e.unregister(c)
	e.execs.forget(r.ID)
	e.emit(r, events.ActionDestroy, nil)
	return nil
}

// clean removes what the last run left in the runtime and the network. Idempotent; nothing happens while the container runs. The
// caller holds c.op.
func (e *Engine) clean(ctx context.Context, c *entry) error {
	r := c.snapshot()
	if r.State.active() || r.State.Clean {
		return nil
	}
	if err := e.cfg.Supervisor.Delete(ctx, r.ID); err != nil && !cerrdefs.IsNotFound(err) {
		return fmt.Errorf("clean up container %s: %w", r.Name, err)
	}
	if err := e.disconnect(ctx, c); err != nil {
		return fmt.Errorf("clean up container %s: network: %w", r.Name, err)
	}
	return e.update(c, func(r *record) { r.State.Clean = true })
}
