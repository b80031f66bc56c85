package oci

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/cgroup"
	"skein/runtime/rootfs"
	"skein/runtime/sandbox"
	"skein/runtime/zygote"
)

// setupLimit bounds the set-up of a container, its hooks not counted.
const setupLimit = 30 * time.Second

// CreateOptions are what create is told.
type CreateOptions struct {
	ID, Bundle string
	PIDFile    string
	// ConsoleSocket receives the terminal's master; Console does so inside this process. One of them is needed with a terminal.
	ConsoleSocket string
	Console       func(master *os.File) error
	// Preserve counts descriptors of the caller, from 3 on, that the process keeps.
	Preserve int
	// KeepKeyring leaves the process in the caller's session keyring.
	KeepKeyring bool
	// Forked, when set, is called once the process exists and sets itself up.
	Forked func()
}

// creation is a container that comes into being.
type creation struct {
	*Container
	opts   CreateOptions
	spec   *specs.Spec
	flags  uint64
	join   []sandbox.NamespacePath
	trees  []int
	prog   *zygote.Program
	child  *zygote.Direct
	out    sandbox.CompleteOutput
	filter sandbox.Filter
	host   sandbox.Host
	gate   *os.File
	fds    []int // to close
	groups groups
	raw    []byte // the config as it was read
}

// groups is how the child gets into its groups.
type groups struct {
	dirs  []rootfs.CgroupDir
	tasks int  // files to write to, v1's tasks and v2's cgroup.procs
	born  bool // in the v2 group, by clone3
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// Create makes a container that waits for Start; its lock is held. A failure leaves nothing.
func (r *Runtime) Create(o CreateOptions) (_ *Container, err error) {
	dir, err := r.dir(o.ID)
	if err != nil {
		return nil, err
	}
	bundle, err := filepath.Abs(o.Bundle)
	if err != nil {
		return nil, err
	}
	spec, raw, err := readConfig(filepath.Join(bundle, configFile))
	if err != nil {
		return nil, err
	}
	hadProcess := spec.Process != nil
	complete(spec, bundle)
	if err := check(spec, hadProcess); err != nil {
		return nil, err
	}
	if spec.Process.Terminal && o.ConsoleSocket == "" && o.Console == nil {
		return nil, invalid("process.terminal", "a terminal needs --console-socket, or run in the foreground")
	}
	if !spec.Process.Terminal && o.ConsoleSocket != "" {
		return nil, invalid("process.terminal", "--console-socket is given, but no terminal is wanted")
	}
	if err := checkPreserved(o.Preserve); err != nil {
		return nil, err
	}
	c := &creation{Container: &Container{rt: r, dir: dir, conf: spec}, opts: o, spec: spec}
	c.raw = raw
	c.rec = record{ID: o.ID, Bundle: bundle, Boot: bootID(), Created: time.Now().UTC(), Rootfs: spec.Root.Path, Version: spec.Version,
		Empty: !hadProcess, Hooks: hasLaterHooks(spec.Hooks), Notes: spec.Annotations, Cgroup: spec.Linux.CgroupsPath}
	if c.rec.Cgroup == "" {
		c.rec.Cgroup = filepath.Join(cgroupParent, o.ID)
	}
	if _, err := c.group(); err != nil {
		return nil, fmt.Errorf("config: linux.%w", err)
	}
	if err := c.grp.Check(spec.Linux.Resources); err != nil {
		return nil, fmt.Errorf("config: linux.resources.%w", err)
	}
	if list := sandbox.Unavailable(spec.Process.Capabilities); len(list) > 0 {
		r.Log.Warn("this process has not all configured capabilities to give: the container goes without", "container", o.ID, "capabilities", list)
	}
	if err := c.claim(); err != nil {
		return nil, err
	}
	defer func() {
		closeFDs(c.fds)
		if c.gate != nil {
			c.gate.Close()
		}
		if c.child != nil {
			c.child.Close()
		}
		if err != nil {
			err = errors.Join(err, c.undo())
		}
	}()
	if err := c.make(); err != nil {
		return nil, fmt.Errorf("create container %q: %w", o.ID, err)
	}
	return c.Container, nil
}

// claim makes the state directory, which nobody else then can.
func (c *creation) claim() error {
	if err := os.MkdirAll(c.rt.Root, 0o700); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return fmt.Errorf("container with id exists: %q: choose another or delete it: %w", c.rec.ID, errdefs.ErrAlreadyExists)
		}
		return fmt.Errorf("make state directory: %w", err)
	}
	f, err := os.Open(c.dir)
	if err == nil {
		c.lock = f
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("make state directory: %w", err), os.RemoveAll(c.dir))
	}
	return nil
}

// undo ends what exists of the container and removes its traces; poststop hooks run as the specification wants.
func (c *creation) undo() error {
	if c.rec.PID > 0 && c.alive() {
		_ = unix.Kill(c.rec.PID, unix.SIGKILL)
	}
	if c.child != nil && c.child.PID > 0 {
		if c.rec.PID == 0 {
			_ = unix.Kill(c.child.PID, unix.SIGKILL)
			reap(c.child.PID)
		}
	}
	if c.rec.PID > 0 {
		reap(c.rec.PID)
	}
	return c.Container.remove()
}

// make builds the program first, since that can be refused, then the groups, then the process.
func (c *creation) make() error {
	c.groups = groupsOf(c.grp)
	// Neither waits for the other; what can be refused was refused before.
	compiled := make(chan error, 1)
	go func() { compiled <- c.compile() }()
	err := c.makeGroups()
	if err = errors.Join(<-compiled, err); err != nil {
		return err
	}
	if err := c.launch(); err != nil {
		return err
	}
	if c.opts.Forked != nil {
		c.opts.Forked()
	}
	return c.drive()
}

// maxTries bounds how often the groups' common parent may vanish, with the last other container, while they are made.
const maxTries = 5

func (c *creation) makeGroups() error {
	for try := 1; ; try++ {
		made, err := c.grp.Make(withDefaults(c.spec.Linux.Resources))
		if !errors.Is(err, os.ErrNotExist) || try == maxTries {
			c.rec.Made = made
			return err
		}
		if err := cgroup.Unmake(made); err != nil {
			return err
		}
	}
}

func groupsOf(g *cgroup.Group) groups {
	var out groups
	for _, d := range g.Dirs() {
		out.dirs = append(out.dirs, rootfs.CgroupDir(d))
		// A group that was killed once with cgroup.kill takes nobody by clone3 any more (seen with Linux 6.18): one that exists already is
		// joined by writing.
		if d.Controller == "" && !exists(d.Path) {
			out.born = true
		} else {
			out.tasks++
		}
	}
	return out
}

// withDefaults are limits with the devices that every container may use allowed after their own rules.
func withDefaults(r *specs.LinuxResources) *specs.LinuxResources {
	if r == nil || len(r.Devices) == 0 {
		return r
	}
	out := *r
	for _, d := range sandbox.DefaultDeviceRules() {
		if d.Allow {
			out.Devices = append(out.Devices[:len(out.Devices):len(out.Devices)], d)
		}
	}
	return &out
}

func (c *creation) compile() error {
	var err error
	if c.filter, err = sandbox.CompileSeccomp(c.spec.Linux.Seccomp); err != nil {
		return fmt.Errorf("config: linux.seccomp: %w", err)
	}
	if c.host, err = sandbox.ProbeProcess(); err != nil {
		return err
	}
	if c.flags, c.join, err = sandbox.Split(c.spec); err != nil {
		return err
	}
	for i, m := range c.spec.Mounts {
		if mapped(c.spec, m) {
			c.trees = append(c.trees, i)
		}
	}
	pool, err := zygote.NewFilePool(filepath.Join(c.dir, programFile))
	if err != nil {
		return err
	}
	if c.prog, err = pool.Program(); err != nil {
		return err
	}
	n := 4 + c.opts.Preserve + c.groups.tasks + len(c.join) + len(c.trees)
	if c.groups.born {
		n++
	}
	c.child = c.prog.EnterDirect(n)
	h := c.spec.Hooks
	c.out, err = sandbox.CompileComplete(c.prog, sandbox.CompleteInput{Host: c.host, Spec: c.spec, Cgroups: c.groups.dirs, Filter: c.filter,
		Preserve: c.opts.Preserve, NewKeyring: !c.opts.KeepKeyring, Tasks: c.groups.tasks, HasCgroup: c.groups.born, Join: c.join, Trees: c.trees, Steps: h != nil && len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer) > 0})
	if err != nil {
		return err
	}
	c.rec.Execs, c.rec.Program = c.out.Execs, c.prog.Record(c.out.Late)
	if s := c.spec.Linux.Seccomp; c.filter.Notify {
		c.rec.Listener = &listener{Slot: c.out.Listener, Path: s.ListenerPath, Metadata: s.ListenerMetadata}
	}
	return c.prog.Err()
}

// launch opens what the child needs and forks it.
func (c *creation) launch() error {
	reply, replyW, err := c.pipes()
	if err != nil {
		return err
	}
	defer func() {
		if reply >= 0 {
			unix.Close(reply)
		}
	}()
	files, own, err := standardStreams()
	c.fds = append(c.fds, own...)
	if err != nil {
		return err
	}
	files = append(append(files, int(c.gate.Fd())), preserved(c.opts.Preserve)...)
	tasks, dir, err := c.grp.OpenTasks()
	if err != nil {
		return err
	}
	c.fds = append(c.fds, tasks...)
	files = append(files, tasks...)
	if dir >= 0 && !c.groups.born {
		procs, err := unix.Openat(dir, "cgroup.procs", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		unix.Close(dir)
		if err != nil {
			return fmt.Errorf("open cgroup %s: %w", c.rec.Cgroup, err)
		}
		dir = -1
		c.fds = append(c.fds, procs)
		files = append(files, procs)
	}
	if dir >= 0 {
		c.fds = append(c.fds, dir)
		files = append(files, dir)
	}
	for _, n := range c.join {
		fd, err := openNamespace(n)
		if err != nil {
			return err
		}
		c.fds = append(c.fds, fd)
		files = append(files, fd)
	}
	for _, i := range c.trees {
		fd, err := mappedTree(c.spec, c.spec.Mounts[i])
		if err != nil {
			return fmt.Errorf("mounts[%d]: %w", i, err)
		}
		c.fds = append(c.fds, fd)
		files = append(files, fd)
	}
	owned := reply
	reply = -1
	return c.child.Launch(files, owned, replyW, c.out.Flags, dir)
}

// pipes makes the named pipes by which another process will start the container and see it execute.
func (c *creation) pipes() (reply, replyW int, err error) {
	for _, n := range []string{gateFile, replyFile} {
		if err := unix.Mkfifo(filepath.Join(c.dir, n), 0o600); err != nil {
			return -1, -1, fmt.Errorf("make %s: %w", n, err)
		}
	}
	gate, err := unix.Open(filepath.Join(c.dir, gateFile), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("open %s: %w", gateFile, err)
	}
	c.gate = os.NewFile(uintptr(gate), gateFile)
	r, err := unix.Open(filepath.Join(c.dir, replyFile), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("open %s: %w", replyFile, err)
	}
	w, err := unix.Open(filepath.Join(c.dir, replyFile), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(r)
		return -1, -1, fmt.Errorf("open %s: %w", replyFile, err)
	}
	c.fds = append(c.fds, w)
	return r, w, nil
}

// openNamespace opens a namespace by path and makes sure that it is one of the type.
func openNamespace(n sandbox.NamespacePath) (int, error) {
	fd, err := unix.Open(n.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("%s namespace %s: %w: %w", n.Type, n.Path, err, errdefs.ErrInvalidArgument)
	}
	typ, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil || uint64(typ) != sandbox.NamespaceFlag(n.Type) {
		unix.Close(fd)
		return -1, fmt.Errorf("%s is not a %s namespace: %w", n.Path, n.Type, errdefs.ErrInvalidArgument)
	}
	return fd, nil
}

// drive brings the child through its gates to the one that Start opens.
func (c *creation) drive() error {
	// The child holds the only writing end from here on, so that its death is seen.
	closeFDs(c.fds)
	c.fds = nil
	deadline := time.Now().Add(setupLimit)
	pid := c.child.PID
	if c.out.Forks {
		if code := reap(pid); code != 0 {
			return setupError(c.prog, zygote.ErrGone)
		}
		pid = int(c.prog.Result(c.out.PID))
	}
	_, ticks, err := procStat(pid)
	if err != nil {
		return setupError(c.prog, err)
	}
	c.rec.PID, c.rec.Ticks = pid, ticks
	// While the child works.
	if err := os.WriteFile(filepath.Join(c.dir, configFile), c.raw, 0o600); err != nil {
		return fmt.Errorf("keep the config: %w", err)
	}
	if err := c.write(); err != nil {
		return err
	}
	if c.out.Gates.Maps {
		if err := c.child.Await(deadline); err != nil {
			return err
		}
		if err := writeMaps(pid, c.spec.Linux.UIDMappings, c.spec.Linux.GIDMappings); err != nil {
			return err
		}
		if err := c.open(); err != nil {
			return err
		}
	}
	if c.out.Gates.Pivot {
		if err := c.atPivot(deadline); err != nil {
			return err
		}
		deadline = time.Now().Add(setupLimit)
	}
	if c.out.Gates.Console {
		if err := c.child.Await(deadline); err != nil {
			return err
		}
		if err := c.sendConsole(pid); err != nil {
			return err
		}
		if err := c.open(); err != nil {
			return err
		}
	}
	if err := c.child.Await(deadline); err != nil {
		return err
	}
	if err := setOOMScore(pid, c.spec.Process.OOMScoreAdj); err != nil {
		return err
	}
	if err := c.publish(); err != nil {
		return err
	}
	return writePIDFile(c.opts.PIDFile, pid)
}

// atPivot does what belongs between the mounts and the root.
func (c *creation) atPivot(deadline time.Time) error {
	if err := c.child.Await(deadline); err != nil {
		return err
	}
	if err := copyUps(c.rec.PID, c.prog, c.out.CopyUps); err != nil {
		return err
	}
	if h := c.spec.Hooks; h != nil {
		if err := c.publish(); err != nil {
			return err
		}
		if err := c.write(); err != nil {
			return err
		}
		st := c.hookState(specs.StateCreated)
		for _, list := range [][]specs.Hook{h.Prestart, h.CreateRuntime} {
			if err := c.runHooks("createRuntime", list, st); err != nil {
				return err
			}
		}
		if err := c.runInside("createContainer", c.spec, h.CreateContainer, st); err != nil {
			return err
		}
	}
	return c.open()
}

// open lets the child go on from its gate.
func (c *creation) open() error {
	_, err := c.gate.Write([]byte{1})
	return err
}

func (c *creation) sendConsole(pid int) error {
	master, err := fetchConsole(pid, int(c.prog.Result(c.out.Console)))
	if err != nil {
		return err
	}
	return deliverConsole(master, c.opts.ConsoleSocket, c.opts.Console)
}

// deliverConsole hands the terminal's master over, in this process or through a socket, and closes it then.
func deliverConsole(master *os.File, socket string, own func(*os.File) error) error {
	if own != nil {
		return own(master)
	}
	defer master.Close()
	if err := sendFD(socket, []byte("/dev/ptmx"), int(master.Fd())); err != nil {
		return fmt.Errorf("console socket %s: %w: %w", socket, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// sendFD sends a descriptor with a message to whoever listens on a socket; package net would double this program.
func sendFD(socket string, msg []byte, fd int) error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	if err := unix.Connect(s, &unix.SockaddrUnix{Name: socket}); err != nil {
		return err
	}
	for {
		n, err := unix.SendmsgN(s, msg, unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL)
		switch {
		case errors.Is(err, unix.EINTR):
		case err == nil && n < len(msg):
			return io.ErrShortWrite
		default:
			return err
		}
	}
}

// fetchConsole takes the terminal's master from the waiting process and makes sure that it is one.
func fetchConsole(pid, n int) (*os.File, error) {
	fd, err := fetchFD(pid, n)
	if err != nil {
		return nil, fmt.Errorf("take the terminal: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || unix.Major(uint64(st.Rdev)) != 5 || unix.Minor(uint64(st.Rdev)) != 2 {
		unix.Close(fd)
		return nil, fmt.Errorf("take the terminal: ptmx of the container is something else: %w", errdefs.ErrFailedPrecondition)
	}
	return os.NewFile(uintptr(fd), "console"), nil
}

func fetchFD(pid, n int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(pidfd)
	return unix.PidfdGetfd(pidfd, n, 0)
}

// setupError prefers the call that failed to the way its failure was seen.
func setupError(p *zygote.Program, err error) error {
	if f := p.Failure(); f != nil {
		return f
	}
	return err
}

func setOOMScore(pid int, adj *int) error {
	if adj == nil {
		return nil
	}
	if err := os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(strconv.Itoa(*adj)), 0); err != nil {
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("process.oomScoreAdj %d: lowering it needs CAP_SYS_RESOURCE: %w", *adj, errdefs.ErrPermissionDenied)
		}
		return fmt.Errorf("process.oomScoreAdj %d: %w", *adj, err)
	}
	return nil
}

// writePIDFile replaces the file in one step, so that no reader sees a part of a number.
func writePIDFile(file string, pid int) error {
	if file == "" {
		return nil
	}
	tmp := filepath.Join(filepath.Dir(file), "."+strings.TrimPrefix(filepath.Base(file), ".")+".new")
	if err := os.WriteFile(tmp, []byte(strconv.Itoa(pid)), 0o644); err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	if err := os.Rename(tmp, file); err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	return nil
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// reap waits for a child and returns its exit code.
func reap(pid int) int {
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0
		case ws.Signaled():
			return 128 + int(ws.Signal())
		default:
			return ws.ExitStatus()
		}
	}
}
