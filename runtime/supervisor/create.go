package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/initproc"
	"skein/runtime/rootfs"
	"skein/runtime/sandbox"
	"skein/runtime/zygote"
)

// setupLimit bounds set-up and execve of a process.
const setupLimit = 30 * time.Second

// stdio are the descriptors of a new process and our ends of them.
type stdio struct {
	nulls          *rootfs.Nulls
	child          []int
	stdin          *os.File
	stdout, stderr *os.File
}

func (s *stdio) closeChild() {
	for _, fd := range s.child {
		unix.Close(fd)
	}
	s.child = nil
}

func (s *stdio) close() {
	s.closeChild()
	for _, f := range []*os.File{s.stdin, s.stdout, s.stderr} {
		if f != nil {
			f.Close()
		}
	}
}

func (s *server) create(cfg *runtime.Config) (err error) {
	if cfg == nil || !validID(cfg.ID) {
		return fmt.Errorf("container id: want [a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}: %w", errdefs.ErrInvalidArgument)
	}
	c := &container{srv: s, id: cfg.ID, dir: filepath.Join(s.containersDir(), cfg.ID), cfg: *cfg, execs: map[string]*process{}}
	if err := errors.Join(sandbox.Check(cfg.Spec), logConfig(cfg).Check()); err != nil {
		return c.wrap("create", err)
	}
	c.op.Lock()
	defer c.op.Unlock()
	if err := s.add(c); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.remove())
			s.forget(c)
		}
	}()
	root := c.mountRoot()
	defer root.close()
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		return c.wrap("create", err)
	}
	b, err := json.Marshal(cfg)
	if err == nil {
		err = replaceFile(filepath.Join(c.dir, "config.json"), b)
	}
	if err != nil {
		return c.wrap("create", err)
	}
	if err := c.makeGroup(cfg.Spec.Linux.Resources); err != nil {
		return c.wrap("create", err)
	}
	if err := c.openLog(); err != nil {
		return c.wrap("create", err)
	}
	if err := c.spawn(root); err != nil {
		return c.wrap("create", err)
	}
	return nil
}

// rootMount is the container's root filesystem on its way: it is made while the groups are.
type rootMount struct {
	made chan struct{}
	fd   int
	err  error
}

// mountRoot begins to make the root filesystem.
func (c *container) mountRoot() *rootMount {
	r := &rootMount{made: make(chan struct{}), fd: -1}
	go func() { // ends when it is made; close waits for it
		defer close(r.made)
		if sandbox.InUser(c.cfg.Spec) {
			r.fd, r.err = c.mappedRoot()
			return
		}
		r.fd, r.err = rootfs.MountRoot(c.cfg.Spec, c.cfg.Rootfs, c.srv.host.LowerdirAppend)
	}()
	return r
}

// wait returns a descriptor that is valid until close, -1 when the container's own process makes its root filesystem.
func (r *rootMount) wait() (int, error) {
	<-r.made
	return r.fd, r.err
}

// close drops the mount unless a process has attached it.
func (r *rootMount) close() {
	if fd, _ := r.wait(); fd >= 0 {
		unix.Close(fd)
	}
}

// spawn makes the first process and brings it to its gate.
func (c *container) spawn(root *rootMount) (err error) {
	io, err := openStdio(c.srv.nulls, c.cfg.Spec.Process.Terminal, c.cfg.OpenStdin, c.hostUID(c.cfg.Spec.Process.User.UID))
	if err != nil {
		return err
	}
	defer func() {
		io.closeChild()
		if err != nil {
			io.close()
		}
	}()
	prog, err := c.srv.pool.Program()
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	start := &pendingStart{prog: prog, gate: -1}
	req, out, files, err := c.compile(prog, io, root, start)
	defer closeFDs(files)
	if err != nil {
		prog.Release()
		if start.gate >= 0 {
			unix.Close(start.gate)
		}
		return err
	}
	deadline := time.Now().Add(setupLimit)
	if start.child, err = c.srv.zygote.Spawn(req, deadline); err != nil {
		prog.Release()
		unix.Close(start.gate)
		return c.setupError(err)
	}
	c.srv.orphans.add(start.child.PID)
	c.srv.orphans.expect(c.cfg.Spec)
	start.execs = out.Execs
	p := &process{pid: start.child.PID, ours: true, done: make(chan struct{}), stdin: io.stdin}
	if out.Forks {
		if p.pid, err = c.second(start, out.PID, deadline); err != nil {
			start.release()
			return c.setupError(err)
		}
	}
	if p.fd, err = openPID(p.pid); err == nil && out.Maps {
		err = c.giveMaps(p.pid, start)
	}
	if err == nil {
		io.closeChild()
		err = c.prepare(p, start, out, io, deadline)
	}
	if err != nil {
		_ = unix.Kill(p.pid, unix.SIGKILL)
		reap(p.pid)
		c.srv.orphans.remove(p.pid)
		start.release()
		if p.fd != nil {
			p.fd.Close()
		}
		if p.console != nil {
			p.console.Close()
		}
		return c.setupError(err)
	}
	p.out = c.srv.newOutput(false)
	p.out.add(io.stdout, frameStdout, c.log, nil)
	p.out.add(io.stderr, frameStderr, c.log, nil)
	p.out.pump()
	c.srv.keeper.hold(c.id, p)
	c.mu.Lock()
	c.init, c.pending = p, start
	c.trim(c.filter)
	c.mu.Unlock()
	c.srv.work.Add(1)
	go func() {
		defer c.srv.work.Done()
		c.watch(p)
	}()
	return nil
}

// prepare waits for the gate, fetches the terminal and records the container.
func (c *container) prepare(p *process, start *pendingStart, out sandbox.Output, io *stdio, deadline time.Time) error {
	if err := start.child.Ready(deadline); err != nil {
		return err
	}
	if c.cfg.Spec.Process.Terminal {
		console, err := fetchConsole(p.fd, int(start.prog.Result(out.Console)))
		if err != nil {
			return err
		}
		p.console, p.stdin = console, console
		if io.stdout, err = dupFile(console); err != nil {
			console.Close()
			return err
		}
	}
	if err := setOOMScore(p.pid, c.cfg.Spec.Process.OOMScoreAdj); err != nil {
		return err
	}
	ticks, err := startTicks(p.pid)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rec = record{State: runtime.State{ID: c.id, Status: runtime.Created, Pid: p.pid, CreatedAt: time.Now().UTC()}, Ticks: ticks, Boot: c.srv.boot, Pipes: io.pipes()}
	return c.save()
}

// openGate opens the gate that a process waits at and the groups that it joins, first of the descriptors it gets after the standard
// three: how many "tasks" files there are, and the number of the v2 group among a request's files, -1 without one.
func (c *container) openGate(start *pendingStart) (opened []int, tasks, cgroupAt int, err error) {
	gate := [2]int{-1, -1}
	if err := unix.Pipe2(gate[:], unix.O_CLOEXEC); err != nil {
		return nil, 0, -1, err
	}
	start.gate = gate[1]
	opened = append(opened, gate[0])
	files, dir, err := c.group.OpenTasks()
	if err != nil {
		return opened, 0, -1, err
	}
	opened = append(opened, files...)
	if dir < 0 {
		return opened, len(files), -1, nil
	}
	return append(opened, dir), len(files), 3 + len(opened), nil
}

// compile builds the program and the list of descriptors it refers to; the returned ones are to be closed after the spawn.
func (c *container) compile(prog *zygote.Program, io *stdio, root *rootMount, start *pendingStart) (req zygote.Request, out sandbox.Output, opened []int, err error) {
	spec := c.cfg.Spec
	opened, tasks, cgroupAt, err := c.openGate(start)
	if err != nil {
		return req, out, opened, err
	}
	_, join, err := sandbox.Namespaces(spec)
	if err != nil {
		return req, out, opened, err
	}
	for _, n := range join {
		fd, err := c.openNamespace(n)
		if err != nil {
			return req, out, opened, err
		}
		opened = append(opened, fd)
	}
	if c.cfg.Init {
		fd, err := initproc.Open()
		if err != nil {
			return req, out, opened, err
		}
		opened = append(opened, fd)
	}
	if c.filter, err = c.srv.filter(spec.Linux.Seccomp); err != nil {
		return req, out, opened, err
	}
	var dirs []rootfs.CgroupDir
	for _, d := range c.group.Dirs() {
		dirs = append(dirs, rootfs.CgroupDir(d))
	}
	mounted, err := root.wait()
	if err != nil {
		return req, out, opened, c.setupError(err)
	}
	trees, treeFDs, err := c.openTrees()
	if err != nil {
		return req, out, append(opened, treeFDs...), err
	}
	out, err = sandbox.Compile(prog, sandbox.Input{Host: c.srv.host, Spec: spec, Rootfs: c.cfg.Rootfs, Cgroups: dirs, Filter: c.filter,
		Tasks: tasks, HasCgroup: cgroupAt >= 0, Init: c.cfg.Init, HasRoot: mounted >= 0, Trees: trees})
	files := append(append([]int{}, io.child...), opened...)
	if mounted >= 0 {
		files = append(files, mounted)
	}
	files = append(files, treeFDs...)
	opened = append(opened, treeFDs...)
	req = zygote.Request{Program: prog, Flags: out.Flags, Files: files, Cgroup: cgroupAt}
	return req, out, opened, errors.Join(err, prog.Err())
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// setupError gives a failed call a kind: what the caller named and does not exist is his to mend.
func (c *container) setupError(err error) error {
	if errors.Is(err, zygote.ErrGone) && c.group.OOMKills() > 0 {
		return fmt.Errorf("set-up: the memory limit of the container leaves too little for a process to start: raise it: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var f *zygote.Failure
	if errors.As(err, &f) {
		switch f.Errno {
		case unix.ENOENT, unix.ENOTDIR, unix.EINVAL, unix.ELOOP, unix.EEXIST:
			return fmt.Errorf("set-up: %w: %w", err, errdefs.ErrInvalidArgument)
		case unix.ESRCH: // the container whose namespaces were to be joined ended
			return fmt.Errorf("set-up: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
	}
	return fmt.Errorf("set-up: %w", err)
}

// setOOMScore is written from outside, so that the value cannot stick to the zygote.
func setOOMScore(pid int, adj *int) error {
	v := 0
	if adj != nil {
		v = *adj
	} else if own, err := os.ReadFile("/proc/self/oom_score_adj"); err == nil && string(own) == "0\n" {
		return nil
	}
	if err := os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(strconv.Itoa(v)), 0); err != nil {
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("set oom_score_adj to %d: lowering it needs CAP_SYS_RESOURCE, which the daemon has not: start it with that capability or ask for a higher value: %w", v, errdefs.ErrPermissionDenied)
		}
		return fmt.Errorf("set oom_score_adj to %d: %w", v, err)
	}
	return nil
}

// openStdio makes the descriptors of a process.
func openStdio(nulls *rootfs.Nulls, terminal, openStdin bool, uid uint32) (*stdio, error) {
	io := &stdio{nulls: nulls}
	if terminal {
		return io, io.null(3)
	}
	var err error
	if openStdin {
		io.stdin, err = io.pipeIn()
	} else {
		err = io.null(1)
	}
	if err == nil {
		io.stdout, err = io.pipeOut("stdout")
	}
	if err == nil {
		io.stderr, err = io.pipeOut("stderr")
	}
	if err == nil {
		err = io.own(uid)
	}
	if err != nil {
		io.close()
		return nil, err
	}
	return io, nil
}

// own lets a process that is not root open its own output again, through /dev/stdout.
func (s *stdio) own(uid uint32) error {
	if uid == 0 {
		return nil
	}
	for _, fd := range s.child {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
			continue // a null device: everybody may open it
		}
		if err := unix.Fchown(fd, int(uid), -1); err != nil {
			return fmt.Errorf("give the output pipes to user %d: %w", uid, err)
		}
	}
	return nil
}

// null adds n descriptors of the null device.
func (s *stdio) null(n int) error {
	for range n {
		fd, err := s.nulls.Open()
		if err != nil {
			return err
		}
		s.child = append(s.child, fd)
	}
	return nil
}

// pipeIn adds the reading end of a new pipe and returns the writing end.
func (s *stdio) pipeIn() (*os.File, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	s.child = append(s.child, p[0])
	if err := unix.SetNonblock(p[1], true); err != nil {
		unix.Close(p[1])
		return nil, err
	}
	return os.NewFile(uintptr(p[1]), "stdin"), nil
}

// pipeOut adds the writing end of a new pipe and returns the reading end. The writing end is open for reading, too: whoever holds the other
// may die, and then writing waits for the next instead of failing.
func (s *stdio) pipeOut(name string) (*os.File, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("make %s: %w", name, err)
	}
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(p[1]), unix.O_RDWR|unix.O_CLOEXEC, 0)
	unix.Close(p[1])
	if err == nil {
		s.child = append(s.child, fd)
		err = unix.SetNonblock(p[0], true)
	}
	if err != nil {
		unix.Close(p[0])
		return nil, fmt.Errorf("make %s: %w", name, err)
	}
	return os.NewFile(uintptr(p[0]), name), nil
}

// pipes are the numbers of the output pipes, by which they are found again.
func (s *stdio) pipes() (inodes [2]uint64) {
	for i, f := range []*os.File{s.stdout, s.stderr} {
		if f == nil {
			continue
		}
		_ = control(f, func(fd int) error {
			var st unix.Stat_t
			if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO {
				inodes[i] = st.Ino
			}
			return nil
		})
	}
	return inodes
}

// fetchConsole takes the terminal's master from the waiting process and makes sure that it is one.
func fetchConsole(pidfd *os.File, n int) (*os.File, error) {
	fd, err := getFD(pidfd, n)
	if err != nil {
		return nil, fmt.Errorf("take the terminal: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || unix.Major(uint64(st.Rdev)) != 5 || unix.Minor(uint64(st.Rdev)) != 2 {
		unix.Close(fd)
		return nil, fmt.Errorf("take the terminal: /dev/ptmx of the container is something else: %w", errdefs.ErrFailedPrecondition)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "console"), nil
}

func dupFile(f *os.File) (*os.File, error) {
	got := -1
	err := control(f, func(fd int) error {
		var err error
		got, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(got), f.Name()), nil
}

// start opens the gate of a created container.
func (c *container) start(_ context.Context) (int, error) {
	c.op.Lock()
	defer c.op.Unlock()
	c.mu.Lock()
	start, p := c.pending, c.init
	if c.rec.State.Status != runtime.Created || start == nil {
		st := c.rec.State.Status
		c.mu.Unlock()
		return 0, c.errf(errdefs.ErrFailedPrecondition, "start: it is %s, not created", st)
	}
	settled := make(chan struct{})
	c.settled, c.pending = settled, nil
	c.rec.State.Status, c.rec.State.StartedAt, c.rec.Starting = runtime.Running, time.Now().UTC(), true
	err := c.save()
	c.mu.Unlock()
	if err == nil {
		err = openGate(start)
	}
	if err == nil {
		err = start.child.Executed(time.Now().Add(setupLimit))
	}
	code := 126
	if err == nil {
		code, err = start.execs.Failed(start.prog)
	}
	if err != nil {
		_ = sendSignal(p.fd, int(unix.SIGKILL))
		_ = start.child.Executed(time.Now().Add(drainLimit))
		c.mu.Lock()
		c.failure = runtime.Exit{Code: code, Err: err.Error()}
		c.mu.Unlock()
	}
	c.mu.Lock()
	c.rec.State.SetUp, c.rec.Starting = start.child.SetUp(), false
	if serr := c.save(); serr != nil {
		c.srv.log.Error("cannot save a container's state", "container", c.id, "error", serr)
	}
	c.mu.Unlock()
	c.srv.later(start.release)
	close(settled)
	if err != nil {
		<-p.done
		return 0, c.errf(errdefs.ErrInvalidArgument, "start: %v", err)
	}
	return p.pid, nil
}

// openGate lets the process run.
func openGate(p *pendingStart) error {
	for {
		_, err := unix.Write(p.gate, []byte{1})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
