package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// pause freezes a running container.
func (c *container) pause(ctx context.Context) error {
	c.op.Lock()
	defer c.op.Unlock()
	if st := c.state().Status; st != runtime.Running {
		return c.errf(errdefs.ErrFailedPrecondition, "pause: it is %s, not running", st)
	}
	ctx, cancel := context.WithTimeout(ctx, setupLimit)
	defer cancel()
	if err := c.group.Freeze(ctx); err != nil {
		return c.wrap("pause", err)
	}
	return c.setStatus(runtime.Running, runtime.Paused)
}

func (c *container) resume() error {
	c.op.Lock()
	defer c.op.Unlock()
	if st := c.state().Status; st != runtime.Paused {
		return c.errf(errdefs.ErrFailedPrecondition, "resume: it is %s, not paused", st)
	}
	if err := c.group.Thaw(); err != nil {
		return c.wrap("resume", err)
	}
	return c.setStatus(runtime.Paused, runtime.Running)
}

// setStatus changes the status unless the container ended meanwhile.
func (c *container) setStatus(from, to runtime.Status) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rec.State.Status != from {
		return c.errf(errdefs.ErrFailedPrecondition, "it is %s", c.rec.State.Status)
	}
	c.rec.State.Status = to
	if err := c.save(); err != nil {
		return c.wrap("save state", err)
	}
	return nil
}

func (c *container) update(r *specs.LinuxResources) error {
	c.op.Lock()
	defer c.op.Unlock()
	if st := c.state().Status; st == runtime.Stopped {
		return c.errf(errdefs.ErrFailedPrecondition, "update: it is stopped")
	}
	if err := c.group.Update(r); err != nil {
		return c.wrap("update", err)
	}
	return nil
}

// delete removes a container that does not run.
func (c *container) delete() error {
	c.op.Lock()
	defer c.op.Unlock()
	c.mu.Lock()
	st, p := c.rec.State.Status, c.init
	if c.deleted {
		c.mu.Unlock()
		return c.errf(errdefs.ErrNotFound, "delete")
	}
	if st != runtime.Stopped && st != runtime.Created {
		c.mu.Unlock()
		return c.errf(errdefs.ErrFailedPrecondition, "delete: it is %s: stop it first", st)
	}
	c.mu.Unlock()
	if p != nil {
		if st == runtime.Created {
			if err := sendSignal(p.fd, int(unix.SIGKILL)); err != nil && !errors.Is(err, os.ErrProcessDone) {
				return c.wrap("delete", err)
			}
		}
		<-p.done
	}
	c.mu.Lock()
	c.deleted = true
	for _, p := range c.execs {
		p.out.release() // nobody will attach any more
	}
	c.mu.Unlock()
	if err := c.remove(); err != nil {
		c.mu.Lock()
		c.deleted = false
		c.mu.Unlock()
		return c.wrap("delete", err)
	}
	c.srv.forget(c)
	return nil
}

// shutdown ends the supervisor; with force running containers are killed and their exits recorded first.
func (s *server) shutdown(force bool) error {
	s.mu.Lock()
	var all, alive []*container
	for _, c := range s.containers {
		all = append(all, c)
		if st := c.state().Status; st != runtime.Stopped {
			alive = append(alive, c)
		}
	}
	if len(alive) > 0 && !force {
		s.mu.Unlock()
		return fmt.Errorf("%d containers are not stopped, %s among them: stop them or force: %w", len(alive), alive[0].id, errdefs.ErrFailedPrecondition)
	}
	s.stopping = true
	s.mu.Unlock()
	for _, c := range alive {
		c.op.Lock()
		c.mu.Lock()
		p := c.init
		c.mu.Unlock()
		if p != nil {
			if err := c.group.Kill(); err != nil {
				s.log.Error("cannot kill a container", "container", c.id, "error", err)
			}
			_ = sendSignal(p.fd, int(unix.SIGKILL))
		}
		c.op.Unlock()
	}
	for _, c := range alive {
		if p, err := c.find(""); err == nil {
			<-p.done
		}
	}
	for _, c := range all {
		c.mu.Lock()
		for _, p := range c.execs {
			p.out.release() // nobody will attach any more
		}
		c.mu.Unlock()
	}
	s.work.Wait() // nothing touches the state directory after the answer
	if err := s.groups.Close(); err != nil {
		s.log.Error("cannot remove ready groups", "error", err)
	}
	if err := os.Remove(s.cfg.SocketPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Error("cannot remove the socket", "error", err)
	}
	s.stop()
	return nil
}
