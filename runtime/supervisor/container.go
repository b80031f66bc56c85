package supervisor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/cgroup"
	"skein/runtime/logs"
	"skein/runtime/sandbox"
	"skein/runtime/zygote"
)

// record is what is kept on disk of a container, so that a new supervisor can adopt it.
type record struct {
	State runtime.State
	Ticks uint64
	Boot  string
	// Starting is true from before a start's gate is opened until the process is known to have executed.
	Starting bool      `json:",omitempty"`
	Pipes    [2]uint64 // which pipes standard output and error are
	Execs    []execRecord
}

type execRecord struct {
	ID    string
	PID   int
	Ticks uint64
	Pipes [2]uint64
}

// container is one container and its processes.
type container struct {
	srv *server
	id  string
	dir string
	op  sync.Mutex // serializes what changes the container; held over its set-up

	mu      sync.Mutex     // guards what follows; never held over I/O but the record's
	cfg     runtime.Config // without what only the set-up needs, see trim
	filter  sandbox.Filter
	rec     record
	inPlace bool // the record's file has the size that overwrite wants
	init    *process
	execs   map[string]*process
	pending *pendingStart
	settled chan struct{} // while a start is under way: closed when it is known how it went
	failure runtime.Exit  // of a start that failed
	deleted bool

	group *cgroup.Group
	log   *logs.Writer
}

// process is a process of the container and what connects to it.
type process struct {
	id      string // empty for the first
	pid     int
	fd      *os.File
	out     *output
	stdin   *os.File
	console *os.File
	ours    bool          // a child of this supervisor
	lingers bool          // it has ended, which was told, and its output waits for a client
	hold    *time.Timer   // lets the output of an additional process go when nobody attaches
	done    chan struct{} // closed after its exit was journaled
	gone    bool          // nobody shall keep it any more; guarded by keeper
}

// pendingStart is a process that waits at its gate.
type pendingStart struct {
	prog  *zygote.Program
	child *zygote.Child
	execs sandbox.Execs
	gate  int
}

// release gives back what the start needed; the child has executed or is dead.
func (p *pendingStart) release() {
	p.child.Close()
	p.prog.Release()
	if p.gate >= 0 {
		unix.Close(p.gate)
	}
}

func (c *container) errf(kind error, format string, args ...any) error {
	return &kindError{fmt.Sprintf("container %s: %s", c.id, fmt.Sprintf(format, args...)), kind}
}

func (c *container) wrap(op string, err error) error {
	return fmt.Errorf("container %s: %s: %w", c.id, op, err)
}

// trim forgets what only the set-up of the first process needs; the whole configuration is on disk.
func (c *container) trim(f sandbox.Filter) {
	old := c.cfg.Spec
	c.filter = f
	c.cfg.Rootfs = nil
	c.cfg.Spec = &specs.Spec{Process: &specs.Process{Terminal: old.Process.Terminal, User: old.Process.User, Capabilities: old.Process.Capabilities,
		Rlimits: old.Process.Rlimits, NoNewPrivileges: old.Process.NoNewPrivileges, OOMScoreAdj: old.Process.OOMScoreAdj},
		Linux: &specs.Linux{Namespaces: old.Linux.Namespaces, UIDMappings: old.Linux.UIDMappings, GIDMappings: old.Linux.GIDMappings}}
}

// state is the public view; paused is asked of the kernel so that it survives restarts.
func (c *container) state() runtime.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := c.rec.State
	if c.log != nil {
		st.LogDropped, _ = c.log.Dropped()
	}
	return st
}

// save writes the record. It is called with mu held.
func (c *container) save() error {
	b, err := json.Marshal(c.rec)
	if err != nil {
		return err
	}
	if len(b) >= recordPage {
		c.inPlace = false
		return replaceFile(filepath.Join(c.dir, "state.json"), b)
	}
	return c.overwrite(filepath.Join(c.dir, "state.json"), b)
}

// recordPage is what one write changes as a whole or not at all, whatever happens to this process: less than the page that it is in.
const recordPage = 4096

// overwrite writes a small record over the last one, filled up with blanks: making a file for each change of state, and removing the old
// one, costs more than all else in it.
func (c *container) overwrite(path string, b []byte) error {
	full := append(bytes.Repeat([]byte{' '}, recordPage-1), '\n')
	copy(full, b)
	if !c.inPlace {
		if err := replaceFile(path, full); err != nil {
			return err
		}
		c.inPlace = true
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(full, 0)
	return errors.Join(err, f.Close())
}

// replaceFile survives the end of this process, not of the machine, after which containers are gone anyway.
func replaceFile(path string, b []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// watch waits for the process's end and records it.
func (c *container) watch(p *process) {
	var code int
	var err error
	if p.ours {
		code, err = awaitEnd(p.fd)
	} else {
		code, err = awaitOther(p.fd)
	}
	c.srv.gate.enter()
	defer c.srv.gate.leave()
	if err != nil {
		c.srv.log.Error("cannot learn how a process ended", "container", c.id, "exec", p.id, "pid", p.pid, "error", err)
		code = runtime.UnknownExit
	}
	c.record(p, runtime.Exit{Code: code, At: time.Now().UTC()})
}

// reap lets go of a process whose end is recorded. Until then the kernel keeps its exit code, for the next supervisor if this one dies.
func (c *container) reap(p *process) {
	if !p.ours {
		return
	}
	if err := reapEnded(p.fd); err != nil {
		c.srv.log.Error("cannot reap a process", "container", c.id, "exec", p.id, "pid", p.pid, "error", err)
	}
	c.srv.orphans.remove(p.pid)
}

// record keeps the end of a process and tells it.
func (c *container) record(p *process, exit runtime.Exit) {
	if p.id == "" {
		c.ended(p, exit)
	} else {
		c.execEnded(p, exit)
	}
}

// drainLimit bounds the wait for output after the end: other holders of the pipe may live on.
const drainLimit = 3 * time.Second

// clientLimit is how long clients that do not read may hold up the end of what they are attached to.
const clientLimit = time.Second

// drain waits for the rest of the output: first with its clients, then without those that do not read.
func (p *process) drain() {
	p.out.release()
	if p.out.ends(clientLimit) {
		return
	}
	close(p.out.hurry)
	if !p.out.ends(drainLimit) {
		p.out.stop()
		<-p.out.done
	}
}

// ends says whether all output has been read within a time.
func (o *output) ends(limit time.Duration) bool {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-o.done:
		return true
	case <-t.C:
		return false
	}
}

// close frees the process's descriptors.
func (p *process) close() {
	if p.stdin != nil {
		p.stdin.Close()
	}
	if p.console != nil && p.console != p.stdin {
		p.console.Close()
	}
	if p.fd != nil {
		p.fd.Close()
	}
}

// ended records the end of the container's first process: everything else in it dies first, the log is complete, the journal durable,
// and only then anybody is told.
func (c *container) ended(p *process, exit runtime.Exit) {
	if c.group.Populated() {
		if err := c.group.Kill(); err != nil {
			c.srv.log.Error("cannot kill what a container left", "container", c.id, "error", err)
		}
	}
	c.mu.Lock()
	settled := c.settled
	c.mu.Unlock()
	if settled != nil {
		<-settled
	}
	c.mu.Lock()
	if c.failure.Err != "" {
		exit.Code, exit.Err = c.failure.Code, c.failure.Err
	} else if c.rec.Starting && exit.Code == zygote.NeverStarted {
		exit.Err = "it was never executed: the supervisor died while it started it"
		c.rec.State.StartedAt = time.Time{}
	}
	pending := c.pending
	c.pending = nil
	c.mu.Unlock()
	if pending != nil {
		_ = pending.child.Executed(time.Now().Add(drainLimit))
		pending.release()
	}
	exit.OOMKilled = exit.Err == "" && c.group.OOMKills() > 0
	p.drain()
	if c.log != nil && !c.log.Flush(time.Now().Add(drainLimit)) {
		c.srv.log.Error("a container's log is not complete when its end is told: the disk is slow", "container", c.id)
	}
	c.endExecs()
	stopped := func() { // who is told must find it so
		c.mu.Lock()
		defer c.mu.Unlock()
		s := &c.rec.State
		s.Status, s.Pid, s.Exit, s.FinishedAt = runtime.Stopped, 0, exit, exit.At
		c.rec.Execs = nil
	}
	if err := c.srv.journal.appendThen(runtime.Event{ContainerID: c.id, Exit: exit}, stopped); err != nil {
		c.srv.log.Error("cannot record an exit", "container", c.id, "error", err)
	}
	c.reap(p)
	c.mu.Lock()
	err := c.save()
	c.mu.Unlock()
	if err != nil {
		c.srv.log.Error("cannot save a container's state", "container", c.id, "error", err)
	}
	if c.log != nil {
		if n, err := c.log.Dropped(); n > 0 {
			c.srv.log.Error("log lines were lost", "container", c.id, "lines", n, "error", err)
		}
		_ = c.log.Close()
	}
	c.srv.keeper.drop(c.id, p)
	p.close()
	close(p.done)
}

// endExecs waits for the additional processes, which die with the first.
func (c *container) endExecs() {
	c.mu.Lock()
	list := make([]*process, 0, len(c.execs))
	for _, p := range c.execs {
		list = append(list, p)
	}
	c.mu.Unlock()
	for _, p := range list {
		_ = sendSignal(p.fd, int(unix.SIGKILL))
		<-p.done
	}
}

// find returns the first process or the additional one.
func (c *container) find(execID string) (*process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.init
	if execID != "" {
		p = c.execs[execID]
	}
	if p == nil {
		return nil, c.errf(errdefs.ErrNotFound, "no process %q", execID)
	}
	return p, nil
}

func (c *container) signal(execID string, sig int) error {
	if sig < 1 || sig > 64 {
		return c.errf(errdefs.ErrInvalidArgument, "signal %d", sig)
	}
	p, err := c.find(execID)
	if err != nil {
		return err
	}
	if err := sendSignal(p.fd, sig); errors.Is(err, os.ErrProcessDone) {
		return c.errf(errdefs.ErrFailedPrecondition, "not running")
	} else if err != nil {
		return c.wrap(fmt.Sprintf("signal %d", sig), err)
	}
	if sig == int(unix.SIGKILL) && c.state().Status == runtime.Paused {
		_ = c.group.Thaw() // the frozen of cgroup v1 die only when they move again
	}
	return nil
}

// remove takes down what the container left. Its processes are dead. Errors are collected; the container stays known on failure.
func (c *container) remove() error {
	var errs []error
	if c.log != nil {
		_ = c.log.Close()
	}
	if c.group != nil {
		errs = append(errs, c.group.Remove())
	}
	errs = append(errs, os.RemoveAll(c.dir))
	return errors.Join(errs...)
}
