package supervisor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// adopt takes over what an earlier supervisor left: records of stopped containers, running ones by their handle, and the end of those
// that went while nobody looked. What an earlier program of this process handed over goes on.
func (s *server) adopt(events []runtime.Event, given *state) {
	last := map[string]runtime.Event{}
	for _, ev := range events {
		last[ev.ContainerID+"/"+ev.ExecID] = ev
	}
	handed := map[string]*containerState{}
	if given.sameProcess() && given.Stored != nil {
		s.store.m = given.Stored
	}
	if given != nil {
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
		if cs := handed[c.id]; cs != nil && given.sameProcess() {
			if err := c.takeOver(cs); err == nil {
				continue
			} else {
				s.log.Error("a container could not be taken over as it was, it is adopted", "container", c.id, "error", err)
			}
		}
		ev, ended := last[c.id+"/"]
		c.readopt(last, handed[c.id], ended && !ev.Exit.At.Before(c.rec.State.CreatedAt))
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

// same says whether a number still names the process it named when it was recorded.
func (s *server) same(pid int, ticks uint64, boot string) bool {
	now, err := startTicks(pid)
	return err == nil && now == ticks && boot == s.boot
}

// readopt continues a loaded container of an earlier supervisor; cs is what a client kept of it, or nil.
func (c *container) readopt(last map[string]runtime.Event, cs *containerState, ended bool) {
	st := &c.rec.State
	if ended {
		ev := last[c.id+"/"]
		st.Status, st.Pid, st.Exit, st.FinishedAt = runtime.Stopped, 0, ev.Exit, ev.Exit.At
	}
	if st.Status == runtime.Stopped {
		cs.drop()
		return
	}
	if st.Status == runtime.Created {
		// It waited at a gate whose other end died: it is ending or gone.
		if c.srv.same(st.Pid, c.rec.Ticks, c.rec.Boot) {
			_ = unix.Kill(st.Pid, unix.SIGKILL)
		}
	}
	if st.Status == runtime.Running && c.rec.Starting {
		c.rec.Starting = !c.executed()
	}
	if err := c.openLog(); err != nil {
		c.srv.log.Error("cannot continue a container's log", "container", c.id, "error", err)
	}
	c.init = c.readoptProcess(cs, execRecord{PID: st.Pid, Ticks: c.rec.Ticks, Pipes: c.rec.Pipes})
	if c.cfg.Spec.Process.Terminal && c.init.console == nil {
		c.srv.log.Error("a container's terminal was lost with the supervisor, and nobody kept it: the container is hung up", "container", c.id)
	}
	for _, e := range c.rec.Execs {
		ev, ok := last[c.id+"/"+e.ID]
		if ok && !ev.Exit.At.Before(st.StartedAt) {
			continue
		}
		c.execs[e.ID] = c.readoptProcess(cs, e)
		c.follow(c.execs[e.ID], e.Ticks)
	}
	c.follow(c.init, c.rec.Ticks)
	cs.drop()
}

// startSettles bounds the wait for a process that was let go, or found its gate closed, just before its supervisor died.
const startSettles = 2 * time.Second

// executed says whether the first process has executed its program; false: it ends or has ended, with an exit code that tells why. Until
// execve a process of the zygote's has no command line.
func (c *container) executed() bool {
	pid := c.rec.State.Pid
	for end := time.Now().Add(startSettles); c.srv.same(pid, c.rec.Ticks, c.rec.Boot) && time.Now().Before(end); time.Sleep(time.Millisecond) {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && len(b) > 0 {
			return true
		}
		if dead(pid) {
			return false
		}
	}
	return false
}

// dead says whether a process is a zombie or gone.
func dead(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	i := bytes.LastIndexByte(b, ')')
	return err != nil || i < 0 || bytes.HasPrefix(b[i:], []byte(") Z")) || bytes.HasPrefix(b[i:], []byte(") X"))
}

// readoptProcess continues a process with what a client kept of it; output pipes that nobody kept are looked for in the process itself. A
// terminal's master and an open standard input cannot be had again.
func (c *container) readoptProcess(cs *containerState, e execRecord) *process {
	ps := cs.take(e)
	p := &process{id: e.ID, pid: e.PID, done: make(chan struct{}), fd: file(ps.Handle, "pidfd"), stdin: file(ps.Stdin, "stdin"), console: file(ps.Console, "console")}
	p.out = c.srv.newOutput(e.ID != "" && len(ps.Streams)+max(0, ps.Console+1) > 0)
	log := c.log
	if e.ID != "" {
		log = nil
		p.hold = time.AfterFunc(attachLimit, p.out.release)
	}
	if p.console != nil {
		p.stdin = p.console
		f, err := dupFile(p.console)
		if err != nil {
			c.srv.log.Error("cannot continue a terminal's output", "container", c.id, "exec", e.ID, "error", err)
		}
		p.out.add(f, frameStdout, log, nil)
	}
	for i, kind := range []byte{frameStdout, frameStderr} {
		f := ps.stream(kind)
		if f == nil && e.Pipes[i] != 0 {
			f = c.findPipe(e.PID, e.Pipes[i], streamName(kind))
		}
		p.out.add(f, kind, log, nil)
	}
	p.out.pump()
	return p
}

// take returns the process of a record and forgets it; one without anything when there is none.
func (cs *containerState) take(e execRecord) processState {
	none := processState{Handle: -1, Stdin: -1, Console: -1}
	if cs == nil {
		return none
	}
	i := slices.IndexFunc(cs.Processes, func(p processState) bool { return p.ID == e.ID && p.PID == e.PID })
	if i < 0 {
		return none
	}
	p := cs.Processes[i]
	cs.Processes = slices.Delete(cs.Processes, i, i+1)
	return p
}

func (ps *processState) stream(kind byte) *os.File {
	for _, s := range ps.Streams {
		if s.Kind == kind {
			return file(s.File, streamName(kind))
		}
	}
	return nil
}

// drop closes what was kept of processes that are no more.
func (cs *containerState) drop() {
	if cs == nil {
		return
	}
	for _, fd := range (&state{Lock: -1, Listener: -1, Client: -1, Containers: []containerState{*cs}}).files() {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// findPipe opens the reading end of a pipe that a process, or another of its container, has open.
func (c *container) findPipe(pid int, inode uint64, name string) *os.File {
	pids := []int{pid}
	if more, err := c.group.Processes(); err == nil {
		pids = append(pids, more...)
	}
	want := fmt.Sprintf("pipe:[%d]", inode)
	for _, pid := range pids {
		dir := "/proc/" + strconv.Itoa(pid) + "/fd/"
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // gone
		}
		for _, e := range entries {
			if to, err := os.Readlink(dir + e.Name()); err != nil || to != want {
				continue
			}
			if f, err := openPipe(dir+e.Name(), inode); err == nil {
				return os.NewFile(uintptr(f), name)
			}
		}
	}
	if c.group.Populated() {
		c.srv.log.Error("a container's output pipe cannot be found: what is written to it is lost", "container", c.id, "pid", pid, "stream", name)
	}
	return nil
}

// openPipe opens a pipe for reading by a process's link to it, which may be changed meanwhile.
func openPipe(link string, inode uint64) (int, error) {
	fd, err := unix.Open(link, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO || st.Ino != inode {
		return -1, os.ErrNotExist
	}
	return unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
}

// follow waits for a process that is not our child, or records at once that it is gone.
func (c *container) follow(p *process, ticks uint64) {
	if p.fd == nil {
		if fd, err := openPID(p.pid); err == nil && c.srv.same(p.pid, ticks, c.rec.Boot) {
			p.fd = fd
		} else if err == nil {
			fd.Close()
		}
	}
	c.srv.work.Go(func() {
		if p.fd != nil {
			c.watch(p)
			return
		}
		c.srv.gate.enter()
		defer c.srv.gate.leave()
		c.record(p, runtime.Exit{Code: runtime.UnknownExit, At: time.Now().UTC()})
	})
}
