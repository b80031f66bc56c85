package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

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

// adopt takes over what an earlier supervisor left: records of stopped containers, running ones by their handle, and the end of those
// that went while nobody looked. What an earlier program of this process handed over goes on.
func (s *server) adopt(events []runtime.Event, given *state) {
	last := map[string]runtime.Event{}
	for _, ev := range events {
		last[ev.ContainerID+"/"+ev.ExecID] = ev
	}
	handed := map[string]*containerState{}
	if given != nil {
		s.store.m = given.Stored
		for i := range given.Containers {
			handed[given.Containers[i].ID] = &given.Containers[i]
		}
	}
	entries, err := os.ReadDir(s.containersDir())
	if err != nil {
		s.log.Error("cannot read records of containers", "error", err)
		return
	}
	for _, e := range entries {
		c := &container{srv: s, id: e.Name(), dir: filepath.Join(s.containersDir(), e.Name()), execs: map[string]*process{}}
		if err := c.load(); err != nil {
			s.log.Error("a container's record is unusable, its groups and record are removed", "container", c.id, "error", err)
			c.discard()
			continue
		}
		s.containers[c.id] = c
		if cs := handed[c.id]; cs != nil {
			if err := c.takeOver(cs); err == nil {
				continue
			} else {
				s.log.Error("a container could not be taken over as it was, it is adopted", "container", c.id, "error", err)
			}
		}
		ev, ended := last[c.id+"/"]
		c.readopt(last, ended && !ev.Exit.At.Before(c.rec.State.CreatedAt))
	}
}

func (c *container) load() error {
	if !validID(c.id) {
		return fmt.Errorf("name: %w", errdefs.ErrInvalidArgument)
	}
	read := func(name string, to any) error {
		b, err := os.ReadFile(filepath.Join(c.dir, name))
		if err != nil {
			return err
		}
		return json.Unmarshal(b, to)
	}
	err := read("config.json", &c.cfg)
	if gerr := c.openGroup(); gerr != nil { // also without a configuration: there may be one to remove
		return gerr
	}
	if err == nil {
		err = read("state.json", &c.rec)
	}
	if err != nil {
		return err
	}
	if c.rec.State.ID != c.id || c.cfg.ID != c.id || c.cfg.Spec == nil || c.cfg.Spec.Process == nil || c.cfg.Spec.Linux == nil {
		return errors.New("incomplete")
	}
	f, err := c.srv.filter(c.cfg.Spec.Linux.Seccomp)
	if err != nil {
		return err
	}
	c.srv.orphans.expect(c.cfg.Spec)
	c.trim(f)
	return nil
}

// discard removes a container that was never completely created.
func (c *container) discard() {
	var errs []error
	if c.group != nil {
		errs = append(errs, c.group.Kill(), c.group.Remove())
	}
	errs = append(errs, os.RemoveAll(c.dir))
	if err := errors.Join(errs...); err != nil {
		c.srv.log.Error("cannot remove a container's remains", "container", c.id, "error", err)
	}
}

// readopt continues a loaded container.
func (c *container) readopt(last map[string]runtime.Event, ended bool) {
	st := &c.rec.State
	if ended {
		ev := last[c.id+"/"]
		st.Status, st.Pid, st.Exit, st.FinishedAt = runtime.Stopped, 0, ev.Exit, ev.Exit.At
	}
	if st.Status == runtime.Stopped {
		return
	}
	p := &process{pid: st.Pid, done: make(chan struct{}), out: c.srv.newOutput(false)}
	if st.Status == runtime.Created {
		// It waited at a gate whose other end died: it is ending or gone.
		if c.srv.same(p.pid, c.rec.Ticks, c.rec.Boot) {
			_ = unix.Kill(p.pid, unix.SIGKILL)
		}
	}
	if err := c.openLog(); err != nil {
		c.srv.log.Error("cannot continue a container's log", "container", c.id, "error", err)
	}
	c.reopenOutput(p)
	c.init = p
	for _, e := range c.rec.Execs {
		ev, ok := last[c.id+"/"+e.ID]
		if ok && !ev.Exit.At.Before(st.StartedAt) {
			continue
		}
		x := &process{id: e.ID, pid: e.PID, done: make(chan struct{}), out: c.srv.newOutput(false)}
		x.out.pump()
		c.execs[e.ID] = x
		c.follow(x, e.Ticks)
	}
	c.follow(p, c.rec.Ticks)
}

// reopenOutput opens the named pipes again; a terminal's master is lost with the supervisor that held it.
func (c *container) reopenOutput(p *process) {
	if c.cfg.Spec.Process.Terminal {
		p.out.pump()
		return
	}
	for name, kind := range map[string]byte{"stdout": frameStdout, "stderr": frameStderr} {
		f, err := openFIFO(filepath.Join(c.dir, name))
		if err != nil {
			c.srv.log.Error("cannot continue a container's output", "container", c.id, "stream", name, "error", err)
			continue
		}
		p.out.add(f, kind, c.log, nil)
	}
	p.out.pump()
}

// follow waits for a process that is not our child, or records at once that it is gone.
func (c *container) follow(p *process, ticks uint64) {
	fd, err := openPID(p.pid)
	if err == nil && !c.srv.same(p.pid, ticks, c.rec.Boot) {
		fd.Close()
		err = os.ErrProcessDone
	}
	if err == nil {
		p.fd = fd
	}
	c.srv.work.Add(1)
	go func() {
		defer c.srv.work.Done()
		if err == nil {
			c.watch(p)
			return
		}
		c.srv.gate.enter()
		defer c.srv.gate.leave()
		c.record(p, runtime.Exit{Code: runtime.UnknownExit, At: time.Now().UTC()})
	}()
}

// same says whether a number still names the process it named when it was recorded.
func (s *server) same(pid int, ticks uint64, boot string) bool {
	now, err := startTicks(pid)
	return err == nil && now == ticks && boot == s.boot
}
