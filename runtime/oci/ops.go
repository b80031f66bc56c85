package oci

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/cgroup"
	"skein/runtime/zygote"
)

// killLimit bounds the wait for a killed process to be gone.
const killLimit = 10 * time.Second

func (c *Container) wrong(doing string, have specs.ContainerState, want string) error {
	return fmt.Errorf("cannot %s container %q: it is %s, not %s: %w", doing, c.rec.ID, have, want, errdefs.ErrFailedPrecondition)
}

// Start lets the container's process execute and returns when it has.
func (c *Container) Start() error {
	if st := c.Status(); st != specs.StateCreated {
		return c.wrong("start", st, "created")
	}
	h, s, err := c.laterHooks()
	if err != nil {
		return err
	}
	if c.rec.Empty {
		// The specification's text wants an error here, its validation suite none; both get the container ended and the reason told.
		c.rt.Log.Warn("the config has no process: the container ends at once", "container", c.rec.ID)
	}
	if err := c.runInside("startContainer", s, h.StartContainer, c.hookState(specs.StateCreated)); err != nil {
		return errors.Join(err, c.stop())
	}
	if err := c.openGate(); err != nil {
		return errors.Join(fmt.Errorf("start container %q: %w", c.rec.ID, err), c.stop())
	}
	for i := range h.Poststart {
		if err := c.runHooks("poststart", h.Poststart[i:i+1], c.hookState(specs.StateRunning)); err != nil {
			c.rt.Log.Warn("a hook failed, the container goes on", "error", err)
		}
	}
	return nil
}

// openGate writes the byte the process waits for, and waits until its reply pipe closes: by execve or by its end.
func (c *Container) openGate() error {
	gate := filepath.Join(c.dir, gateFile)
	reply, err := unix.Open(filepath.Join(c.dir, replyFile), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(reply)
	fd, err := unix.Open(gate, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("its process is gone: %w", err)
	}
	defer unix.Close(fd)
	if _, err = unix.Write(fd, []byte{1}); err != nil {
		return err
	}
	if err := os.Remove(gate); err != nil {
		return err
	}
	if c.rec.Listener != nil {
		if err := c.giveListener(reply, fd); err != nil {
			return err
		}
	}
	if !awaitEnd(reply, time.Now().Add(setupLimit)) {
		return fmt.Errorf("it did not execute within %v: %w", setupLimit, context.DeadlineExceeded)
	}
	file := filepath.Join(c.dir, programFile)
	res, err := zygote.ReadResult(file, c.rec.Program)
	if err != nil {
		return err
	}
	// Arguments and environment may be secrets: they are not needed any more.
	err = errors.Join(os.Remove(file), os.Remove(filepath.Join(c.dir, replyFile)))
	if f := res.Failure(); f != nil {
		return f
	}
	if _, ferr := c.rec.Execs.FailedIn(res); ferr != nil {
		return ferr
	}
	return err
}

// giveListener hands the seccomp listener over when the process has installed its filter, and lets it go on. A process that failed before
// has closed its pipe; what failed is then found where all failures are.
func (c *Container) giveListener(reply, gate int) error {
	if !awaitReport(reply, time.Now().Add(setupLimit)) {
		return nil
	}
	res, err := zygote.ReadResult(filepath.Join(c.dir, programFile), c.rec.Program)
	if err != nil {
		return err
	}
	l := c.rec.Listener
	st := specs.State{Version: specs.Version, ID: c.rec.ID, Status: specs.StateRunning, Pid: c.rec.PID, Bundle: c.rec.Bundle, Annotations: c.rec.Notes}
	if err := l.handOver(c.rec.PID, int(res.Slot(l.Slot)), st); err != nil {
		return err
	}
	_, err = unix.Write(gate, []byte{1})
	return err
}

// awaitReport waits for a report of the process, false at the pipe's end.
func awaitReport(fd int, deadline time.Time) bool {
	var b [8]byte
	for {
		n, err := unix.Read(fd, b[:])
		left := int(time.Until(deadline).Milliseconds())
		switch {
		case n == len(b):
			return true
		case err == nil || left <= 0 || !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR):
			return false
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, left)
	}
}

// awaitEnd reads a pipe to its end.
func awaitEnd(fd int, deadline time.Time) bool {
	var b [64]byte
	for {
		n, err := unix.Read(fd, b[:])
		if n == 0 && err == nil {
			return true
		}
		left := int(time.Until(deadline).Milliseconds())
		if left <= 0 {
			return false
		}
		if errors.Is(err, unix.EAGAIN) {
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, left)
		}
	}
}

// stop kills the first process and waits for it.
func (c *Container) stop() error {
	fd, err := c.pidfd()
	if err != nil {
		return nil // gone already
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill container %q: %w", c.rec.ID, err)
	}
	if g, err := c.group(); err == nil && g.Frozen() {
		_ = g.Thaw()
	}
	if !awaitExit(fd, int(killLimit.Milliseconds())) {
		return fmt.Errorf("container %q did not end within %v of SIGKILL: %w", c.rec.ID, killLimit, context.DeadlineExceeded)
	}
	return nil
}

// Kill sends a signal to the first process, or with all to every process of the container.
func (c *Container) Kill(sig unix.Signal, all bool) error {
	st := c.Status()
	if st == specs.StateStopped && !all {
		return fmt.Errorf("container %q is not running: %w", c.rec.ID, errdefs.ErrFailedPrecondition)
	}
	if all {
		return c.killAll(sig)
	}
	fd, err := c.pidfd()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("container %q is not running: %w", c.rec.ID, errdefs.ErrFailedPrecondition)
		}
		return fmt.Errorf("signal container %q: %w", c.rec.ID, err)
	}
	return nil
}

func (c *Container) killAll(sig unix.Signal) error {
	g, err := c.group()
	if err != nil {
		return err
	}
	if sig == unix.SIGKILL {
		return g.Kill()
	}
	pids, err := g.Processes()
	if err != nil {
		return err
	}
	for _, p := range pids {
		if err := unix.Kill(p, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal process %d: %w", p, err)
		}
	}
	return nil
}

// Delete removes a container that has stopped, or was never started; with force any.
func (c *Container) Delete(force bool) error {
	switch st := c.Status(); {
	case st == specs.StateStopped:
	case st == specs.StateCreated || force:
		if err := c.stop(); err != nil {
			return err
		}
	default:
		return c.wrong("delete", st, "stopped")
	}
	return c.remove()
}

// remove ends what the first process left behind, removes groups and state, and runs the last hooks.
func (c *Container) remove() error {
	var errs []error
	if g, err := c.group(); err == nil && own(g, c.rec.Made) {
		errs = append(errs, g.Kill())
	}
	errs = append(errs, cgroup.Unmake(c.rec.Made), c.removeParent())
	h, _, err := c.laterHooks()
	switch {
	case err != nil:
		c.rt.Log.Warn("the container's config cannot be read, its hooks are left out", "error", err)
	case c.rec.PID > 0:
		for i := range h.Poststop {
			if err := c.runHooks("poststop", h.Poststop[i:i+1], c.hookState(specs.StateStopped)); err != nil {
				c.rt.Log.Warn("a hook failed, the removal goes on", "error", err)
			}
		}
	}
	errs = append(errs, os.RemoveAll(c.dir))
	if c.lock != nil {
		c.lock.Close()
	}
	return errors.Join(errs...)
}

// removeParent removes the parent of all groups without a path of their own when this was the last: the container that made it may be
// gone for long.
func (c *Container) removeParent() error {
	if !strings.HasPrefix(c.rec.Cgroup, cgroupParent+"/") {
		return nil
	}
	g, err := c.group()
	if err != nil {
		return err
	}
	return g.RemoveEmptyParent()
}

// own says whether the groups were made for the container: processes of a group it only joined are not its own.
func own(g *cgroup.Group, made []string) bool {
	for _, d := range g.Dirs() {
		if !slices.Contains(made, d.Path) {
			return false
		}
	}
	return true
}

// Pause stops all processes of a running container, Resume lets them go on.
func (c *Container) Pause() error {
	if st := c.Status(); st != specs.StateRunning && st != specs.StateCreated {
		return c.wrong("pause", st, "running")
	}
	g, err := c.group()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	return g.Freeze(ctx)
}

// Resume undoes Pause.
func (c *Container) Resume() error {
	if st := c.Status(); st != Paused {
		return c.wrong("resume", st, "paused")
	}
	g, err := c.group()
	if err != nil {
		return err
	}
	return g.Thaw()
}

// Update changes limits of a container that has not stopped.
func (c *Container) Update(r *specs.LinuxResources) error {
	if st := c.Status(); st == specs.StateStopped {
		return c.wrong("update", st, "running")
	}
	unlimited(r)
	if err := checkResources(&specs.Spec{Linux: &specs.Linux{Resources: r}}); err != nil {
		return err
	}
	g, err := c.group()
	if err != nil {
		return err
	}
	if err := g.Check(r); err != nil {
		return fmt.Errorf("linux.resources.%w", err)
	}
	if err := g.Update(r); err != nil {
		return fmt.Errorf("update container %q: %w", c.rec.ID, err)
	}
	if len(r.Devices) == 0 {
		return nil
	}
	return g.SetDevices(withDefaults(r).Devices)
}

// Processes are the host's numbers of the container's processes.
func (c *Container) Processes() ([]int, error) {
	if st := c.Status(); st == specs.StateStopped {
		return nil, c.wrong("list the processes of", st, "running")
	}
	g, err := c.group()
	if err != nil {
		return nil, err
	}
	return g.Processes()
}

// PID of the first process.
func (c *Container) PID() int { return c.rec.PID }

// Wait reaps the first process, which must be a child of this one, and returns its exit code.
func (c *Container) Wait() int { return reap(c.rec.PID) }

// Ended says whether a child has ended, or does within the time.
func Ended(pid int, within time.Duration) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	return awaitExit(fd, int(within.Milliseconds()))
}

// Wait reaps a process of Exec and returns its exit code.
func Wait(pid int) int { return reap(pid) }
