package supervisor

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/sandbox"
	"skein/runtime/zygote"
)

// stateFormat counts the changes of state and what it is made of; a program takes over only from one of the same.
const stateFormat = 1

// maxState bounds what is handed over, most of it output that attached clients have not taken.
const maxState = 256 << 20

// state is what one program of the supervisor process leaves to the next: what is not on disk. Descriptors are numbers of the process, -1
// for none.
type state struct {
	Build      string
	Lock       int
	Listener   int
	Client     int // who asked for it
	Zygote     int // process that ends by itself
	Stored     map[string]int
	Containers []containerState
}

type containerState struct {
	ID        string
	Pending   *pendingState `json:",omitempty"`
	Processes []processState
}

type pendingState struct {
	Child zygote.Kept
	Execs sandbox.Execs
	Gate  int
}

type processState struct {
	ID       string `json:",omitempty"`
	PID      int
	Handle   int
	Stdin    int
	Closed   bool `json:",omitempty"` // there was an open standard input, and it has ended
	Console  int
	Ours     bool `json:",omitempty"`
	Held     bool `json:",omitempty"`
	Lingers  bool `json:",omitempty"`
	Streams  []streamState
	Sessions []sessionState `json:",omitempty"`
}

type streamState struct {
	Kind byte
	File int
	Rest []byte `json:",omitempty"`
}

// number is the descriptor of a file or connection, which stays its own.
func number(f syscall.Conn) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	n := -1
	err = rc.Control(func(fd uintptr) { n = int(fd) })
	return n, err
}

// fileNumber is number for a file that may be missing or closed.
func fileNumber(f *os.File) int {
	if f == nil {
		return -1
	}
	n, err := number(f)
	if err != nil {
		return -1
	}
	return n
}

// unixConn is a connection by number, which it takes over.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "client")
	if f == nil {
		return nil, fmt.Errorf("descriptor %d", fd)
	}
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("descriptor %d is no unix socket", fd)
	}
	return u, nil
}

// save takes down everything while nothing moves.
func (s *server) save(client int) (*state, error) {
	st := &state{Build: s.build, Lock: fileNumber(s.locked), Client: client, Zygote: s.zygote.PID(), Stored: s.store.m}
	var err error
	if st.Listener, err = number(s.listener); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sessions := map[*process][]*session{}
	for x := range s.attached {
		sessions[x.p] = append(sessions[x.p], x)
	}
	for _, c := range s.containers {
		cs, err := c.handOver(sessions)
		if err != nil {
			return nil, c.wrap("hand over", err)
		}
		if cs != nil {
			st.Containers = append(st.Containers, *cs)
		}
	}
	return st, nil
}

// handOver is the part of one container, nil when all of it is on disk.
func (c *container) handOver(sessions map[*process][]*session) (*containerState, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cs := &containerState{ID: c.id}
	if p := c.pending; p != nil {
		k, err := p.child.Keep()
		if err != nil {
			return nil, err
		}
		cs.Pending = &pendingState{Child: k, Execs: p.execs, Gate: p.gate}
	}
	var all []*process
	if c.init != nil && c.rec.State.Status != runtime.Stopped {
		all = append(all, c.init)
	}
	for _, p := range c.execs {
		all = append(all, p)
	}
	for _, p := range all {
		ps := p.save()
		for _, x := range sessions[p] {
			xs, err := x.save()
			if err != nil {
				return nil, err
			}
			ps.Sessions = append(ps.Sessions, xs)
		}
		cs.Processes = append(cs.Processes, ps)
	}
	if len(cs.Processes) == 0 {
		return nil, nil
	}
	return cs, nil
}

func (p *process) save() processState {
	ps := processState{ID: p.id, PID: p.pid, Handle: fileNumber(p.fd), Stdin: fileNumber(p.stdin), Console: fileNumber(p.console), Ours: p.ours,
		Held: !p.out.begunReading(), Lingers: p.lingers}
	ps.Closed = p.stdin != nil && ps.Stdin < 0
	p.out.mu.Lock()
	defer p.out.mu.Unlock()
	for _, s := range p.out.streams {
		if s.ended {
			continue
		}
		one := streamState{Kind: s.kind, File: fileNumber(s.f)}
		if s.log != nil {
			one.Rest = s.log.Rest()
		}
		ps.Streams = append(ps.Streams, one)
	}
	return ps
}

// sameProcess says whether an earlier program of this process left the state, and not a client that kept what it could.
func (st *state) sameProcess() bool { return st != nil && st.Lock >= 0 }

// files are all descriptors of a state.
func (st *state) files() []int {
	list := []int{st.Lock, st.Listener, st.Client}
	for _, fd := range st.Stored {
		list = append(list, fd)
	}
	for _, c := range st.Containers {
		if p := c.Pending; p != nil {
			list = append(list, p.Gate, p.Child.Memory, p.Child.Reply)
		}
		for _, p := range c.Processes {
			list = append(list, p.Handle, p.Stdin, p.Console)
			for _, s := range p.Streams {
				list = append(list, s.File)
			}
			for _, x := range p.Sessions {
				list = append(list, x.Conn)
			}
		}
	}
	return list
}

// keepOpen makes the descriptors survive, or not survive, the next program.
func (st *state) keepOpen(yes bool) error {
	flags := unix.FD_CLOEXEC
	if yes {
		flags = 0
	}
	var errs []error
	for _, fd := range st.files() {
		if fd >= 0 {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, flags); err != nil {
				errs = append(errs, fmt.Errorf("descriptor %d: %w", fd, err))
			}
		}
	}
	return errors.Join(errs...)
}

func stateHeader() []byte { return fmt.Appendf(nil, "skein supervisor state %d\n", stateFormat) }

// seal writes the state to memory that nobody can change any more, and returns what a program that understands it answers to a check.
func (st *state) seal() (f *os.File, answer string, err error) {
	b, err := json.Marshal(st)
	if err != nil {
		return nil, "", err
	}
	b = append(stateHeader(), b...)
	if len(b) > maxState {
		return nil, "", fmt.Errorf("state of %d MiB, at most %d: too many attached clients do not read", len(b)>>20, maxState>>20)
	}
	fd, err := unix.MemfdCreate("supervisor-state", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, "", err
	}
	f = os.NewFile(uintptr(fd), "state")
	_, err = f.Write(b)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
	}
	if err != nil {
		f.Close()
		return nil, "", err
	}
	return f, stateAnswer(b), nil
}

func stateAnswer(b []byte) string { return fmt.Sprintf("state %d %x\n", stateFormat, sha256.Sum256(b)) }

// readState reads a sealed state, nil without one. It refuses what this program does not understand wholly.
func readState(f *os.File) (*state, error) {
	if f == nil {
		return nil, nil
	}
	defer f.Close()
	st, _, err := parseState(f)
	if err == nil {
		err = st.keepOpen(false)
	}
	if err != nil {
		return nil, fmt.Errorf("take over: %w", err)
	}
	return st, nil
}

func parseState(f *os.File) (*state, []byte, error) {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxState+1))
	if err != nil {
		return nil, nil, err
	}
	body, ok := bytes.CutPrefix(b, stateHeader())
	if !ok || len(b) > maxState {
		first, _, _ := bytes.Cut(b[:min(len(b), 100)], []byte("\n"))
		return nil, nil, fmt.Errorf("state is of format %q, this program understands %q", first, bytes.TrimSpace(stateHeader()))
	}
	st := &state{}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(st); err != nil {
		return nil, nil, fmt.Errorf("state: %w", err)
	}
	return st, b, nil
}

// takeOver continues a loaded container that an earlier program of this process handed over.
func (c *container) takeOver(cs *containerState) error {
	if c.rec.State.Status != runtime.Stopped {
		if err := c.openLog(); err != nil {
			c.srv.log.Error("cannot continue a container's log", "container", c.id, "error", err)
		}
	}
	if k := cs.Pending; k != nil {
		child, prog, err := zygote.Resume(k.Child)
		if err != nil {
			return err
		}
		c.pending = &pendingStart{prog: prog, child: child, execs: k.Execs, gate: k.Gate}
	}
	for i := range cs.Processes {
		c.takeProcess(&cs.Processes[i])
	}
	return nil
}

// takeProcess continues a process: its output, its clients, the wait for its end.
func (c *container) takeProcess(ps *processState) {
	p := &process{id: ps.ID, pid: ps.PID, ours: ps.Ours, lingers: ps.Lingers, done: make(chan struct{}), out: c.srv.newOutput(ps.Held),
		fd: file(ps.Handle, "pidfd")}
	switch {
	case ps.Console >= 0:
		p.console = file(ps.Console, "console")
		p.stdin = p.console
	case ps.Closed:
		p.stdin = closedFile()
	default:
		p.stdin = file(ps.Stdin, "stdin")
	}
	if p.ours {
		c.srv.orphans.add(p.pid)
	}
	for _, s := range ps.Streams {
		log := c.log
		if p.id != "" {
			log = nil
		}
		p.out.add(file(s.File, streamName(s.Kind)), s.Kind, log, s.Rest)
	}
	if p.id == "" {
		c.init = p
	} else {
		c.execs[p.id] = p
	}
	for _, xs := range ps.Sessions {
		x, err := c.srv.resumeSession(p, xs)
		if err != nil {
			c.srv.log.Error("an attached client is lost", "container", c.id, "exec", p.id, "error", err)
			continue
		}
		c.srv.slots <- struct{}{}
		c.srv.conns.Go(func() {
			defer func() { <-c.srv.slots }()
			x.run()
		})
	}
	p.out.pump()
	if ps.Held {
		p.hold = time.AfterFunc(attachLimit, p.out.release)
	}
	if p.lingers {
		close(p.done)
		c.srv.work.Go(func() {
			c.srv.gate.enter()
			defer c.srv.gate.leave()
			c.linger(p)
			c.forgetExec(p)
		})
		return
	}
	c.srv.work.Go(func() { c.watch(p) })
}

func file(fd int, name string) *os.File {
	if fd < 0 {
		return nil
	}
	return os.NewFile(uintptr(fd), name)
}

// closedFile takes the place of a standard input that has ended.
func closedFile() *os.File {
	f, err := os.Open(os.DevNull)
	if err != nil {
		return nil
	}
	f.Close()
	return f
}

// dropShared closes the memory of waiting children, which each has duplicated.
func (st *state) dropShared() {
	seen := map[int]bool{}
	for _, c := range st.Containers {
		if p := c.Pending; p != nil && !seen[p.Child.Memory] {
			seen[p.Child.Memory] = true
			unix.Close(p.Child.Memory)
		}
	}
}

// tookOver tells who asked for the upgrade that it is done, and waits for the earlier program's zygote.
func (s *server) tookOver(st *state) {
	st.dropShared()
	_ = os.WriteFile("/proc/self/comm", []byte("skein"), 0) // was made of the descriptor's number
	s.log.Info("the supervisor runs a new program", "build", s.build, "before", st.Build, "containers", len(st.Containers))
	s.orphans.add(st.Zygote)
	s.work.Go(func() {
		reap(st.Zygote) // its socket closed with the earlier program
		s.orphans.remove(st.Zygote)
	})
	if st.Client < 0 {
		return
	}
	conn, err := unixConn(st.Client)
	if err != nil {
		s.log.Error("cannot answer who asked for the upgrade", "error", err)
		return
	}
	w := newWire(conn)
	_ = w.writeJSON(frameResponse, response{PID: os.Getpid(), Build: s.build})
	w.close()
}
