package oci

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/sandbox"
	"skein/runtime/zygote"
)

// ExecOptions are what exec is told.
type ExecOptions struct {
	Process       *specs.Process
	PIDFile       string
	ConsoleSocket string
	Console       func(master *os.File) error
	// Preserve and KeepKeyring are as in CreateOptions.
	Preserve    int
	KeepKeyring bool
}

// ReadProcess reads an additional process from a file.
func ReadProcess(file string) (*specs.Process, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	var p specs.Process
	if err := json.NewDecoder(io.LimitReader(f, maxConfig)).Decode(&p); err != nil {
		return nil, fmt.Errorf("process %s: %w: %w", file, err, errdefs.ErrInvalidArgument)
	}
	return &p, nil
}

// Template is the container's own process, from which an additional one takes what it is not told.
func (c *Container) Template() (*specs.Process, error) {
	s, err := c.spec()
	if err != nil {
		return nil, err
	}
	p := *s.Process
	p.Terminal, p.ConsoleSize, p.OOMScoreAdj = false, nil, s.Process.OOMScoreAdj
	return &p, nil
}

// Exec starts an additional process, a child of this one, and returns its number once it has executed.
func (c *Container) Exec(o ExecOptions) (int, error) {
	if st := c.Status(); st != specs.StateRunning && st != specs.StateCreated {
		return 0, c.wrong("exec in", st, "running")
	}
	s, err := c.spec()
	if err != nil {
		return 0, err
	}
	if err := checkProcess(o.Process); err != nil {
		return 0, err
	}
	if err := checkPreserved(o.Preserve); err != nil {
		return 0, err
	}
	if namespacesOf(s)&unix.CLONE_NEWNS == 0 {
		return 0, refuse("linux.namespaces", "exec in a container that shares the host's mount namespace is not built yet")
	}
	if o.Process.Terminal && o.ConsoleSocket == "" && o.Console == nil {
		return 0, invalid("process.terminal", "a terminal needs --console-socket when detached")
	}
	pid, err := c.exec(s, o)
	if err != nil {
		return 0, fmt.Errorf("exec in container %q: %w", c.rec.ID, err)
	}
	return pid, nil
}

// execution is an additional process that comes into being.
type execution struct {
	prog  *zygote.Program
	child *zygote.Direct
	out   sandbox.ExecOutput
	gate  int
	// notify: the process stops once more, for its filter's listener.
	notify bool
}

func (c *Container) exec(s *specs.Spec, o ExecOptions) (int, error) {
	e := &execution{gate: -1}
	err := c.launchExec(e, s, o)
	if e.child != nil {
		defer e.child.Close()
	}
	if e.gate >= 0 {
		defer unix.Close(e.gate)
	}
	if err != nil {
		return 0, err
	}
	if reap(e.child.PID) != 0 {
		return 0, setupError(e.prog, zygote.ErrGone)
	}
	pid := int(e.prog.Result(e.out.PID))
	if err := ownChild(pid); err != nil {
		return 0, err
	}
	if err := c.driveExec(e, s, pid, o); err != nil {
		_ = unix.Kill(pid, unix.SIGKILL)
		reap(pid)
		return 0, err
	}
	return pid, writePIDFile(o.PIDFile, pid)
}

func (c *Container) launchExec(e *execution, s *specs.Spec, o ExecOptions) error {
	host, err := sandbox.ProbeProcess()
	if err != nil {
		return err
	}
	filter, err := sandbox.CompileSeccomp(s.Linux.Seccomp)
	if err != nil {
		return err
	}
	e.notify = filter.Notify
	pool, err := zygote.NewPool(1)
	if err != nil {
		return err
	}
	if e.prog, err = pool.Program(); err != nil {
		return err
	}
	g, err := c.group()
	if err != nil {
		return err
	}
	var gate [2]int
	if err := unix.Pipe2(gate[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	e.gate = gate[1]
	fds := []int{gate[0]}
	defer func() { closeFDs(fds) }()
	streams, own, err := standardStreams()
	defer closeFDs(own)
	if err != nil {
		return err
	}
	files := append(append(streams, gate[0]), preserved(o.Preserve)...)
	tasks, dir, err := g.OpenTasks()
	if err != nil {
		return err
	}
	fds = append(fds, tasks...)
	if dir >= 0 {
		fds = append(fds, dir)
	}
	pidfd, err := c.pidfd()
	if err != nil {
		return err
	}
	fds = append(fds, pidfd)
	if hasUser(s) {
		host = sandbox.InUserNamespace(host)
	}
	files = append(files, fds[1:]...)
	e.child = e.prog.EnterDirect(len(files))
	e.out, err = sandbox.CompileExec(e.prog, sandbox.ExecInput{Host: host, Process: o.Process, Filter: filter, Namespaces: namespacesOf(s),
		Tasks: len(tasks), HasCgroup: dir >= 0, Preserve: o.Preserve, NewKeyring: !o.KeepKeyring})
	if err != nil {
		return err
	}
	r, w, err := replyPipe()
	if err != nil {
		return err
	}
	err = e.child.Launch(files, r, w, 0, dir)
	unix.Close(w)
	return err
}

// ownChild makes sure that pid is a child of this process: others may have written into the process that says so.
func ownChild(pid int) error {
	if pid <= 0 || unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil) != nil {
		return fmt.Errorf("process %d is not the one that was started: the container tampered with it: %w", pid, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (c *Container) driveExec(e *execution, s *specs.Spec, pid int, o ExecOptions) error {
	deadline := time.Now().Add(setupLimit)
	if err := e.child.Await(deadline); err != nil {
		return err
	}
	if o.Process.Terminal {
		master, err := fetchConsole(pid, int(e.prog.Result(e.out.Console)))
		if err == nil {
			err = deliverConsole(master, o.ConsoleSocket, o.Console)
		}
		if err != nil {
			return err
		}
	}
	if err := setOOMScore(pid, o.Process.OOMScoreAdj); err != nil {
		return err
	}
	if _, err := unix.Write(e.gate, []byte{1}); err != nil {
		return err
	}
	if sec := s.Linux.Seccomp; e.notify {
		err := e.child.Await(deadline)
		if err == nil {
			l := listener{Path: sec.ListenerPath, Metadata: sec.ListenerMetadata}
			err = l.handOver(pid, int(e.prog.Result(e.out.Listener)), c.State())
		}
		if err == nil {
			_, err = unix.Write(e.gate, []byte{1})
		}
		if err != nil {
			return err
		}
	}
	if err := e.child.Executed(deadline); err != nil {
		return err
	}
	_, err := e.out.Execs.Failed(e.prog)
	return err
}
