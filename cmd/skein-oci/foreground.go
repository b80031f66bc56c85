package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/oci"
)

func runCommand() command {
	return command{"run", "ID", "create and start a container, wait for it and delete it", func(s *session, f *flag.FlagSet) func([]string) error {
		var o createFlags
		var detach, keep bool
		o.define(f)
		for _, n := range []string{"detach", "d"} {
			f.BoolVar(&detach, n, false, "return once it runs, and leave it")
		}
		f.BoolVar(&keep, "keep", false, "do not delete it when it has ended")
		return func(args []string) (err error) {
			if o.ID, err = one(args); err != nil {
				return err
			}
			if err = o.check(); err != nil {
				return err
			}
			t := &terminal{}
			if !detach && o.ConsoleSocket == "" {
				o.Console = t.take
			}
			return s.run(o, detach, keep, t)
		}
	}}
}

func (s *session) run(o createFlags, detach, keep bool, t *terminal) error {
	signals := make(chan os.Signal, 64)
	if !detach {
		o.Forked = func() { signal.Notify(signals, customary()...) }
	}
	c, err := s.rt.Create(o.CreateOptions)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.Start(); err != nil {
		return errors.Join(err, c.Delete(true))
	}
	if detach {
		return nil
	}
	if err := t.start(); err != nil {
		return errors.Join(err, c.Delete(true))
	}
	s.await(c.PID(), signals, t)
	if keep {
		return nil
	}
	return c.Delete(true)
}

// customary are the signals that a command is sent by people and service managers. Taking each costs some 15 µs, so that is done while the
// container sets itself up, and the many others are taken once it runs and is not over at once.
func customary() []os.Signal {
	return []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH}
}

// brief is how long a process must run before all signals are taken for it.
const brief = 20 * time.Millisecond

// await waits for the end of a child that runs in the foreground, and keeps its exit code.
func (s *session) await(pid int, signals chan os.Signal, t *terminal) {
	if oci.Ended(pid, brief) {
		s.code = oci.Wait(pid)
	} else {
		signal.Notify(signals)
		stop := forward(signals, pid, t)
		s.code = oci.Wait(pid)
		stop()
	}
	t.finish()
}

// forward passes signals on to a process until it is stopped.
func forward(signals chan os.Signal, pid int, t *terminal) (stop func()) {
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-end:
				return
			case sig := <-signals:
				n, ok := sig.(unix.Signal)
				switch {
				case !ok || n == unix.SIGCHLD || n == unix.SIGURG || n == unix.SIGPIPE:
				case n == unix.SIGWINCH:
					t.resize()
				default:
					_ = unix.Kill(pid, n)
				}
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(end)
		<-done
	}
}

// terminal connects a container's terminal with this process's own streams.
type terminal struct {
	master *os.File
	saved  *unix.Termios
	done   chan struct{}
}

func (t *terminal) take(master *os.File) error {
	t.master = master
	return nil
}

func (t *terminal) resize() {
	if t.master == nil {
		return
	}
	if ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ); err == nil {
		_ = unix.IoctlSetWinsize(int(t.master.Fd()), unix.TIOCSWINSZ, ws)
	}
}

func (t *terminal) start() error {
	if t.master == nil {
		return nil
	}
	t.resize()
	if old, err := unix.IoctlGetTermios(0, unix.TCGETS); err == nil {
		raw := *old
		raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
		raw.Oflag &^= unix.OPOST
		raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
		raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
		raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
		if err := unix.IoctlSetTermios(0, unix.TCSETS, &raw); err != nil {
			return fmt.Errorf("set the terminal to raw mode: %w", err)
		}
		t.saved = old
	}
	t.done = make(chan struct{})
	go func() { _, _ = io.Copy(t.master, os.Stdin) }() // ends with this process: a read of a terminal cannot be taken back
	go func() {
		defer close(t.done)
		_, _ = io.Copy(os.Stdout, t.master) // ends with EIO when nobody has the other side
	}()
	return nil
}

func (t *terminal) finish() {
	if t.master == nil {
		return
	}
	<-t.done
	if t.saved != nil {
		_ = unix.IoctlSetTermios(0, unix.TCSETS, t.saved)
	}
	t.master.Close()
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(v string) error { *l = append(*l, v); return nil }

// execFlags are those of exec.
type execFlags struct {
	oci.ExecOptions
	process, cwd, user           string
	env, caps, groups            list
	tty, detach, nnp, ignorePaus bool
	cgroup, label, apparmor      string
}

func (e *execFlags) define(f *flag.FlagSet) {
	str := func(to *string, help string, names ...string) {
		for _, n := range names {
			f.StringVar(to, n, "", help)
		}
	}
	str(&e.process, "`file` with the process as JSON", "process", "p")
	str(&e.cwd, "working `directory` inside", "cwd")
	str(&e.user, "`uid[:gid]` of the process", "user", "u")
	str(&e.PIDFile, "`file` to write the process's number to", "pid-file")
	str(&e.ConsoleSocket, "unix `socket` that receives the terminal's master", "console-socket")
	str(&e.cgroup, "refused: the process joins the container's own group", "cgroup")
	str(&e.label, "refused: SELinux is not built yet", "process-label")
	str(&e.apparmor, "refused: AppArmor is not built yet", "apparmor")
	for _, n := range []string{"env", "e"} {
		f.Var(&e.env, n, "`NAME=value` to add to the environment")
	}
	for _, n := range []string{"cap", "c"} {
		f.Var(&e.caps, n, "`capability` to add")
	}
	for _, n := range []string{"additional-gids", "g"} {
		f.Var(&e.groups, n, "supplementary `group` to add")
	}
	for _, n := range []string{"tty", "t"} {
		f.BoolVar(&e.tty, n, false, "with a terminal")
	}
	for _, n := range []string{"detach", "d"} {
		f.BoolVar(&e.detach, n, false, "return once it runs")
	}
	f.BoolVar(&e.nnp, "no-new-privs", false, "set no_new_privs")
	f.IntVar(&e.Preserve, "preserve-fds", 0, "pass this `number` of descriptors too, from 3 on")
}

func execCommand() command {
	return command{"exec", "ID COMMAND [ARG...] | exec --process FILE ID", "run an additional process in a container", func(s *session, f *flag.FlagSet) func([]string) error {
		var e execFlags
		e.define(f)
		return func(args []string) error {
			s.failed = execFailed
			switch {
			case len(args) == 0:
				return errors.New("container id is missing")
			case e.cgroup != "" || e.label != "" || e.apparmor != "":
				return errors.New("--cgroup, --process-label and --apparmor are not offered")
			}
			return s.with(args[0], false, func(c *oci.Container) error { return s.exec(c, &e, args[1:]) })
		}
	}}
}

func (s *session) exec(c *oci.Container, e *execFlags, args []string) error {
	p, err := e.build(c, args)
	if err != nil {
		return err
	}
	e.Process = p
	t := &terminal{}
	signals := make(chan os.Signal, 64)
	if !e.detach {
		signal.Notify(signals, customary()...)
		if e.ConsoleSocket == "" {
			e.Console = t.take
		}
	}
	pid, err := c.Exec(e.ExecOptions)
	if err != nil || e.detach {
		return err
	}
	c.Close()
	if err := t.start(); err != nil {
		return err
	}
	s.await(pid, signals, t)
	return nil
}

// build is the process of a file, or the container's own with what the flags change.
func (e *execFlags) build(c *oci.Container, args []string) (*specs.Process, error) {
	if e.process != "" {
		if len(args) > 0 {
			return nil, errors.New("give either --process or a command")
		}
		p, err := oci.ReadProcess(e.process)
		if err == nil && e.tty {
			p.Terminal = true
		}
		return p, err
	}
	p, err := c.Template()
	if err != nil {
		return nil, err
	}
	p.Args, p.Terminal = args, e.tty
	p.Env = append(p.Env[:len(p.Env):len(p.Env)], e.env...)
	if e.cwd != "" {
		p.Cwd = e.cwd
	}
	p.NoNewPrivileges = p.NoNewPrivileges || e.nnp
	if err := e.identity(p); err != nil {
		return nil, err
	}
	if len(e.caps) == 0 {
		return p, nil
	}
	caps := specs.LinuxCapabilities{}
	if p.Capabilities != nil {
		caps = *p.Capabilities
	}
	for _, set := range []*[]string{&caps.Bounding, &caps.Effective, &caps.Permitted} {
		*set = append((*set)[:len(*set):len(*set)], e.caps...)
	}
	p.Capabilities = &caps
	return p, nil
}

// identity parses IDs exactly: a number that does not fit is an error, never another user.
func (e *execFlags) identity(p *specs.Process) error {
	id := func(v string) (uint32, error) {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil || n == 1<<32-1 {
			return 0, fmt.Errorf("id %q: want a number below 4294967295", v)
		}
		return uint32(n), nil
	}
	var err error
	if e.user != "" {
		u, g, both := strings.Cut(e.user, ":")
		if p.User.UID, err = id(u); err != nil {
			return err
		}
		p.User.GID = 0
		if both {
			if p.User.GID, err = id(g); err != nil {
				return err
			}
		}
		p.User.AdditionalGids = nil
	}
	for _, g := range e.groups {
		n, err := id(g)
		if err != nil {
			return err
		}
		p.User.AdditionalGids = append(p.User.AdditionalGids[:len(p.User.AdditionalGids):len(p.User.AdditionalGids)], n)
	}
	return nil
}
