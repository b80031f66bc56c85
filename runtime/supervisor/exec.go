package supervisor

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/sandbox"
	"skein/runtime/zygote"
)

const (
	// maxExecs bounds the additional processes of one container.
	maxExecs = 256
	// attachLimit is how long an additional process's output waits for its first client before it is discarded.
	attachLimit = 5 * time.Second
)

// exec starts an additional process.
func (c *container) exec(p *runtime.Process) (int, error) {
	if p == nil || !validID(p.ID) {
		return 0, c.errf(errdefs.ErrInvalidArgument, "exec: bad process id")
	}
	if len(p.Args) == 0 || p.Args[0] == "" {
		return 0, c.errf(errdefs.ErrInvalidArgument, "exec %s: no command given", p.ID)
	}
	c.mu.Lock()
	st, init := c.rec.State.Status, c.init
	_, taken := c.execs[p.ID]
	n := len(c.execs)
	c.mu.Unlock()
	switch {
	case st != runtime.Running:
		return 0, c.errf(errdefs.ErrFailedPrecondition, "exec %s: it is %s, not running", p.ID, st)
	case taken:
		return 0, c.errf(errdefs.ErrAlreadyExists, "exec %s", p.ID)
	case n >= maxExecs:
		return 0, c.errf(errdefs.ErrResourceExhausted, "exec %s: %d processes were added already", p.ID, n)
	}
	pid, err := c.spawnExec(p, init)
	if err != nil {
		return 0, c.wrap("exec "+p.ID, err)
	}
	return pid, nil
}

// execProcess is the OCI process of an additional one: the container's own confinement unless it is privileged.
func (c *container) execProcess(p *runtime.Process) (*specs.Process, sandbox.Filter) {
	own := c.cfg.Spec.Process
	out := &specs.Process{Args: p.Args, Env: p.Env, Cwd: p.Cwd, User: p.User, Terminal: p.Terminal, ConsoleSize: p.ConsoleSize, Capabilities: own.Capabilities,
		Rlimits: own.Rlimits, NoNewPrivileges: own.NoNewPrivileges}
	if out.Cwd == "" {
		out.Cwd = "/"
	}
	if !p.Privileged {
		if caps := own.Capabilities; caps != nil && own.User.UID != p.User.UID {
			// A root process in a container of another user has what the bounding set allows, and the other way round nothing.
			out.Capabilities = &specs.LinuxCapabilities{Bounding: caps.Bounding}
			if p.User.UID == 0 {
				out.Capabilities.Effective, out.Capabilities.Permitted = caps.Bounding, caps.Bounding
			}
		}
		return out, c.filter
	}
	all := sandbox.AllCaps()
	out.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
	out.NoNewPrivileges = false
	return out, sandbox.Filter{}
}

// spawnExec runs the program of an additional process: a first child joins the container and makes the process, both ours.
func (c *container) spawnExec(p *runtime.Process, init *process) (pid int, err error) {
	io, err := openStdio(c.srv.nulls, p.Terminal, p.OpenStdin, c.hostUID(p.User.UID))
	if err != nil {
		return 0, err
	}
	defer func() {
		io.closeChild()
		if err != nil {
			io.close()
		}
	}()
	prog, err := c.srv.pool.Program()
	if err != nil {
		return 0, fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	start := &pendingStart{prog: prog, gate: -1}
	req, out, files, err := c.compileExec(prog, p, io, init, start)
	defer closeFDs(files)
	if err != nil {
		prog.Release()
		if start.gate >= 0 {
			unix.Close(start.gate)
		}
		return 0, err
	}
	start.execs = out.Execs
	deadline := time.Now().Add(setupLimit)
	if start.child, err = c.srv.zygote.Spawn(req, deadline); err != nil {
		prog.Release()
		unix.Close(start.gate)
		return 0, c.setupError(err)
	}
	first := start.child.PID
	c.srv.orphans.add(first)
	defer c.srv.later(func() {
		reap(first) // it ends when it has made the process, or could not
		c.srv.orphans.remove(first)
	})
	pid, err = start.child.Parted(deadline)
	if err != nil {
		_ = unix.Kill(start.child.PID, unix.SIGKILL)
	}
	if err == nil {
		err = c.joined(pid, init)
	}
	if err != nil {
		start.release() // whatever waits at the gate ends
		var f *zygote.Failure
		if !errors.As(err, &f) { // there may be a child that nobody knows
			c.srv.orphans.always()
		}
		return 0, c.setupError(err)
	}
	np := &process{id: p.ID, pid: pid, ours: true, stdin: io.stdin, done: make(chan struct{})}
	io.closeChild()
	if err = c.beginExec(np, p, start, out, io, deadline); err != nil {
		_ = unix.Kill(pid, unix.SIGKILL)
		_ = start.child.Executed(time.Now().Add(drainLimit))
		c.srv.bury(np)
		start.release()
		return 0, c.setupError(err)
	}
	c.srv.later(start.release)
	return pid, nil
}

// later does what a request leaves to do after its answer. No upgrade comes in between, and the end waits for it.
func (s *server) later(f func()) {
	s.gate.enter() // the request is under way, so the gate is open
	s.work.Go(func() {
		defer s.gate.leave()
		f()
	})
}

func errIfNil(err error) error {
	if err == nil {
		return zygote.ErrGone
	}
	return nil
}

// joined makes sure that pid is a child of ours in the container's pid namespace: others may have written into the process that says so.
func (c *container) joined(pid int, init *process) error {
	claimed := false
	tampered := func(err error) error {
		if claimed {
			c.srv.orphans.remove(pid)
		}
		return errors.Join(fmt.Errorf("process %d is not the one that was started: the container tampered with it: %w", pid, errdefs.ErrFailedPrecondition), err)
	}
	if !c.srv.orphans.claim(pid) {
		return tampered(nil)
	}
	claimed = true
	if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err != nil {
		return tampered(err)
	}
	own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
	if err != nil {
		return tampered(err)
	}
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", init.pid))
	if err != nil || own != theirs {
		return tampered(err)
	}
	return nil
}

// bury waits for a killed process, and leaves it to a watcher when it does not go: one that a process inside traces stays a zombie until
// its tracer lets go of it or ends.
func (s *server) bury(p *process) {
	gone := make(chan struct{})
	s.work.Go(func() {
		defer close(gone)
		if p.fd == nil {
			reap(p.pid)
		} else if _, err := awaitEnd(p.fd); err != nil {
			s.log.Error("cannot wait for a process that was not started", "pid", p.pid, "error", err)
		} else {
			reap(p.pid)
		}
		s.orphans.remove(p.pid)
		p.closeAll()
	})
	t := time.NewTimer(drainLimit)
	defer t.Stop()
	select {
	case <-gone:
	case <-t.C:
	}
}

// closeAll is close for a process that never ran.
func (p *process) closeAll() {
	if p.console != nil {
		p.console.Close()
	}
	if p.fd != nil {
		p.fd.Close()
	}
}

// beginExec takes over a process on its way to its gate and lets it execute. The gate may be open before the process comes there.
func (c *container) beginExec(np *process, p *runtime.Process, start *pendingStart, out sandbox.ExecOutput, io *stdio, deadline time.Time) error {
	var err error
	if np.fd, err = openPID(np.pid); err != nil {
		return err
	}
	if p.Terminal {
		if err := start.child.Ready(deadline); err != nil {
			return err
		}
		if np.console, err = fetchConsole(np.fd, int(start.prog.Result(out.Console))); err != nil {
			return err
		}
		np.stdin = np.console
		if io.stdout, err = dupFile(np.console); err != nil {
			return err
		}
	}
	if err := setOOMScore(np.pid, c.cfg.Spec.Process.OOMScoreAdj); err != nil {
		return err
	}
	ticks, err := startTicks(np.pid)
	if err != nil {
		return err
	}
	if err := openGate(start); err != nil {
		return err
	}
	if err := start.child.Executed(time.Now().Add(setupLimit)); err != nil {
		return err
	}
	if _, err := start.execs.Failed(start.prog); err != nil {
		return err
	}
	np.out = c.srv.newOutput(!p.Detach)
	np.out.add(io.stdout, frameStdout, nil, nil)
	np.out.add(io.stderr, frameStderr, nil, nil)
	np.out.pump()
	if !p.Detach {
		np.hold = time.AfterFunc(attachLimit, np.out.release)
	}
	c.srv.keeper.hold(c.id, np)
	c.mu.Lock()
	c.execs[np.id] = np
	c.rec.Execs = append(c.rec.Execs, execRecord{ID: np.id, PID: np.pid, Ticks: ticks, Pipes: io.pipes()})
	err = c.save()
	c.mu.Unlock()
	if err != nil {
		c.srv.log.Error("cannot save a container's state", "container", c.id, "error", err)
	}
	c.srv.work.Add(1)
	go func() {
		defer c.srv.work.Done()
		c.watch(np)
	}()
	return nil
}

func (c *container) compileExec(prog *zygote.Program, p *runtime.Process, io *stdio, init *process, start *pendingStart) (req zygote.Request, out sandbox.ExecOutput, opened []int, err error) {
	opened, tasks, cgroupAt, err := c.openGate(start)
	if err != nil {
		return req, out, opened, err
	}
	own := -1
	if err := control(init.fd, func(fd int) error {
		var err error
		own, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		return err
	}); err != nil {
		return req, out, opened, err
	}
	opened = append(opened, own)
	proc, filter := c.execProcess(p)
	made, join, err := sandbox.Namespaces(c.cfg.Spec)
	if err != nil {
		return req, out, opened, err
	}
	out, err = sandbox.CompileExec(prog, sandbox.ExecInput{Host: c.srv.host, Process: proc, Filter: filter,
		Namespaces: made | sandbox.Flags(join), Tasks: tasks, HasCgroup: cgroupAt >= 0, User: sandbox.InUser(c.cfg.Spec)})
	files := append(append([]int{}, io.child...), opened...)
	req = zygote.Request{Program: prog, Files: files, Cgroup: cgroupAt}
	return req, out, opened, errors.Join(err, prog.Err())
}

// execEnded records the end of an additional process.
func (c *container) execEnded(p *process, exit runtime.Exit) {
	exit.OOMKilled = exit.Code == 128+int(unix.SIGKILL) && c.group.OOMKills() > 0
	attached := p.hold == nil || !p.hold.Stop() || p.out.begunReading()
	if attached {
		p.drain()
	}
	if err := c.srv.journal.append(runtime.Event{ContainerID: c.id, ExecID: p.id, Exit: exit}); err != nil {
		c.srv.log.Error("cannot record an exit", "container", c.id, "exec", p.id, "error", err)
	}
	c.reap(p)
	close(p.done)
	if !attached {
		c.linger(p)
	}
	c.forgetExec(p)
}

// linger waits for the first client of a process that has ended: a short command may have ended before its caller could attach, and its
// output waits in the pipe. It is called, and returns, with work counted, but is none itself.
func (c *container) linger(p *process) {
	c.mu.Lock()
	p.lingers = true
	c.mu.Unlock()
	c.srv.gate.leave()
	t := time.NewTimer(attachLimit)
	select {
	case <-p.out.start:
	case <-t.C:
	}
	t.Stop()
	c.srv.gate.enter()
	p.drain()
}

// forgetExec lets go of an additional process that has ended.
func (c *container) forgetExec(p *process) {
	c.mu.Lock()
	delete(c.execs, p.id)
	for i, e := range c.rec.Execs {
		if e.ID == p.id {
			c.rec.Execs = append(c.rec.Execs[:i:i], c.rec.Execs[i+1:]...)
			break
		}
	}
	var err error
	if !c.deleted {
		err = c.save()
	}
	c.mu.Unlock()
	if err != nil {
		c.srv.log.Error("cannot save a container's state", "container", c.id, "error", err)
	}
	c.srv.keeper.drop(c.id, p)
	p.close()
}
