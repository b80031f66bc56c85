// Package zygote starts processes from a tiny helper process, the zygote, that shares no memory with its parent but the programs.
//
// A Program is a list of system calls built by the supervisor. The zygote, forked before the supervisor's heap grows, runs only an
// assembly interpreter: it waits for a request, makes the child by clone3 with CLONE_PARENT, and the child runs its program up to
// execve. Neither runs Go code, so start time does not depend on the supervisor's heap, an OOM kill in a container's memory group
// cannot reach the supervisor, and nothing of ours is executed inside a container. Children are children of the supervisor.
//
// A child inherits only the descriptors of its request. Until execve it sees its own program, not those of others. Used by
// runtime/supervisor; programs are compiled by runtime/sandbox and runtime/rootfs.
package zygote

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	goruntime "runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	sockFD   = 255 // above the descriptors of a message, at most 253
	memoryFD = 254 // the programs' memory, see Seclude
	replyFD  = 3
	// ReplyFD is the child's number of the pipe on which it reports.
	ReplyFD = replyFD
	// MaxFiles bounds the descriptors of one request.
	MaxFiles = 200
	// requestLen is a message's length: addresses of the program, its clone3's arguments, and where the time before that goes.
	requestLen = 24
	// ready is what a child reports when it waits for its start; no pid and no errno looks like it.
	ready = 0x5245414459
	// parted is what a child reports before the pid of the process that goes on in its place, or minus errno.
	parted = 0x504152544544
)

type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// Zygote is the helper process. Its methods are safe for concurrent use.
type Zygote struct {
	pool *Pool
	mu   sync.Mutex // guards the fields below while the process is replaced
	sock int
	pid  int
	prog *Program // its own; never released
}

// Fork makes the zygote. It should be one of the first things the process does.
func Fork(pool *Pool) (*Zygote, error) {
	z := &Zygote{pool: pool, sock: -1}
	if err := z.fork(); err != nil {
		return nil, err
	}
	return z, nil
}

// Close ends the zygote, which leaves when its socket closes.
func (z *Zygote) Close() {
	z.mu.Lock()
	defer z.mu.Unlock()
	unix.Close(z.sock)
	var ws unix.WaitStatus
	for {
		if _, err := unix.Wait4(z.pid, &ws, 0, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// PID of the zygote process.
func (z *Zygote) PID() int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.pid
}

func (z *Zygote) fork() error {
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("fork zygote: socketpair: %w", err)
	}
	defer unix.Close(sp[1])
	v, err := newVeil()
	if err != nil {
		unix.Close(sp[0])
		return fmt.Errorf("fork zygote: %w", err)
	}
	defer v.close()
	p, err := z.pool.Program()
	if err != nil {
		unix.Close(sp[0])
		return fmt.Errorf("fork zygote: %w", err)
	}
	loop(p, sp[1], z.pool.file, v)
	ca := cloneArgs{flags: unix.CLONE_CLEAR_SIGHAND, exitSignal: uint64(unix.SIGCHLD)}
	pid, err := clone(p, &ca, v.code)
	if err != nil {
		unix.Close(sp[0])
		return fmt.Errorf("fork zygote: clone3: %w", err)
	}
	z.sock, z.pid, z.prog = sp[0], pid, p
	return nil
}

// died is the error of a zygote that ended: its program says why when it was its own doing.
func (z *Zygote) died() error {
	z.mu.Lock()
	defer z.mu.Unlock()
	if f := z.prog.Failure(); f != nil {
		return fmt.Errorf("%w: %w", errZygoteDied, f)
	}
	return errZygoteDied
}

// loop is the zygote's own program: keep only its socket and the pages it needs, hide the program's file from what it forks, then serve
// requests for ever.
func loop(p *Program, sock, memory int, v *veil) {
	const exe = memoryFD - 1
	for i, fd := range []int{v.file, memory, sock} {
		p.Do("take descriptor", unix.SYS_DUP3, fd, firstHigh+i, unix.O_CLOEXEC)
	}
	for i := range 3 {
		p.Do("keep descriptor", unix.SYS_DUP3, firstHigh+i, exe+i, unix.O_CLOEXEC)
	}
	p.Do("close", unix.SYS_CLOSE_RANGE, 0, exe-1, 0)
	p.Do("close", unix.SYS_CLOSE_RANGE, sockFD+1, uintptr(^uint32(0)), 0)
	p.Do("setsid", unix.SYS_SETSID)
	p.Do("not dumpable", unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	p.Do("name", unix.SYS_PRCTL, unix.PR_SET_NAME, "skein-zygote", 0, 0, 0)
	p.Do("chdir /", unix.SYS_CHDIR, "/")
	if !keepMemory {
		unmap(p, v.code)
	}
	v.add(p, exe)
	p.Do("close", unix.SYS_CLOSE, exe)
	const program, args, begun, result, received = Slot(0), Slot(1), Slot(2), Slot(3), Slot(4)
	p.slots = 5
	slotAt := Addr(p.base() + slotsOff)
	control := p.Bytes(make([]byte, 1040))
	iov := p.Words(uint64(slotAt), requestLen)
	msg := p.Words(0, 0, uint64(iov), 1, uint64(control), 0, 0)
	top0 := Addr(p.base() + opsOff + opSize*uintptr(p.nops))
	p.Do("control length", opStore, msg+40, 1040)
	i := p.Fork(received, "recvmsg", unix.SYS_RECVMSG, sockFD, msg, 0)
	p.Exit(0) // the supervisor is gone
	p.SkipOnSuccess(i)
	p.Try("time", unix.SYS_CLOCK_GETTIME, unix.CLOCK_MONOTONIC, begun)
	p.emit(op{dst: int(result), tolerate: true, enter: true}, "clone3", unix.SYS_CLONE3, []any{args, int(unsafe.Sizeof(cloneArgs{}))})
	p.Try("reply", unix.SYS_WRITE, replyFD, slotAt+Addr(8*result), 8)
	p.Do("close", unix.SYS_CLOSE_RANGE, 0, memoryFD-1, 0)
	p.Do("again", opJump, top0)
	_ = program
}

// unmap lets go of everything but the interpreter's copy and the programs.
func unmap(p *Program, code []byte) {
	span := func(b []byte) [2]uintptr {
		at := uintptr(unsafe.Pointer(&b[0]))
		return [2]uintptr{at, at + uintptr(len(b))}
	}
	first, second := span(code), span(p.pool.mem)
	if first[0] > second[0] {
		first, second = second, first
	}
	p.Try("unmap", unix.SYS_MUNMAP, 0, first[0])
	if gap := second[0] - first[1]; gap > 0 {
		p.Try("unmap", unix.SYS_MUNMAP, first[1], gap)
	}
	for _, bits := range []uint{48, 47, 39} { // user space ends at one of these; beyond it the kernel refuses
		if top := uintptr(1)<<bits - 1<<16; top > second[1] {
			p.Try("unmap", unix.SYS_MUNMAP, second[1], top-second[1])
		}
	}
}

// clone calls clone3 with all signals blocked, by the interpreter or its copy in code; the child keeps them blocked until its program says otherwise.
func clone(p *Program, ca *cloneArgs, code []byte) (int, error) {
	all, old := ^uint64(0), uint64(0)
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&old)), 8, 0, 0)
	var r uintptr
	if code == nil {
		r = cloneRun(unsafe.Pointer(ca), unsafe.Sizeof(*ca), unsafe.Pointer(&p.mem[0]))
	} else {
		r = cloneRunAt(unsafe.Pointer(ca), unsafe.Sizeof(*ca), unsafe.Pointer(&p.mem[0]), unsafe.Pointer(&code[0]))
	}
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&old)), 0, 8, 0, 0)
	if n := int64(r); n < 0 {
		return -1, unix.Errno(-n)
	}
	return int(r), nil
}

// Request is one process to start.
type Request struct {
	Program *Program
	// Flags are the namespaces to make, CLONE_NEW…
	Flags uint64
	// Files become descriptors 0, 1, 2, 4, 5, … of the child (FileFD); the program closes what execve must not keep.
	Files []int
	// Cgroup is the index in Files of a cgroup v2 directory to be born in, or -1.
	Cgroup int
}

// FileFD is the child's number of Files[i]; 3 is the reply pipe.
func FileFD(i int) int {
	if i < replyFD {
		return i
	}
	return i + 1
}

// Enter adds what every program must do first: hide other programs and leave the zygote's session.
func (p *Program) Enter() {
	p.EnterToPart()
	if !p.direct {
		p.Do("leave the programs", unix.SYS_CLOSE, memoryFD)
	}
}

// EnterToPart is Enter for a program with Seclude.
func (p *Program) EnterToPart() {
	if p.direct {
		p.Do("setsid", unix.SYS_SETSID)
		return
	}
	lo, n := uintptr(unsafe.Pointer(&p.pool.mem[0])), uintptr(len(p.pool.mem))
	if d := p.base() - lo; d > 0 {
		p.Do("hide below", unix.SYS_MUNMAP, Addr(lo), d)
	}
	if d := lo + n - p.base() - arenaLen; d > 0 {
		p.Do("hide above", unix.SYS_MUNMAP, Addr(p.base()+arenaLen), d)
	}
	p.Do("leave zygote", unix.SYS_CLOSE, sockFD)
	p.Do("setsid", unix.SYS_SETSID)
}

// Seclude gives the child a copy of its program in place of the memory that it shares with the supervisor. It comes before Part: who can
// look at the process that goes on, or write into it, must not get at memory that the supervisor and later programs use. Nothing that
// the child keeps in slots afterwards is seen, but for Part and Report. A program in a process of its own shares with nobody.
func (p *Program) Seclude() {
	if p.direct {
		return
	}
	p.copyAt = p.nops
	for _, from := range copied() { // lengths come with the end of the program, see seal
		at := Addr(p.base() + uintptr(from))
		p.Do("copy the program", unix.SYS_MMAP, at, 0, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_FIXED, memoryFD, p.index*arenaLen+from)
		p.Do("copy the program", unix.SYS_MADVISE, at, 0, unix.MADV_POPULATE_WRITE)
		p.Do("hide the rest", unix.SYS_MUNMAP, at, 0)
	}
	p.Do("leave the programs", unix.SYS_CLOSE, memoryFD)
	p.alone = true
}

// copied are the beginnings of what Seclude copies: calls and data, in one piece where the border of pages is not theirs.
func copied() []int {
	if dataOff%os.Getpagesize() != 0 {
		return []int{0}
	}
	return []int{0, dataOff}
}

// seal gives the calls of Seclude their lengths: only what the program has is copied, a page costs as much as a system call. No page of
// the shared memory stays.
func (p *Program) seal() {
	if !p.alone {
		return
	}
	page := uint64(os.Getpagesize())
	up := func(n int) uint64 { return (uint64(n) + page - 1) &^ (page - 1) }
	ends := []int{opsOff + opSize*p.nops, p.data} // of calls and data
	starts := copied()
	for i, from := range starts {
		used, end := up(ends[len(ends)-1])-uint64(from), uint64(arenaLen)-uint64(from)
		if i+1 < len(starts) {
			used, end = up(ends[i]), uint64(starts[i+1])
		}
		op := func(n int) []byte { return p.mem[opsOff+opSize*(p.copyAt+3*i+n):] }
		binary.LittleEndian.PutUint64(op(0)[16:], used)
		binary.LittleEndian.PutUint64(op(1)[16:], used)
		rest := end - used
		binary.LittleEndian.PutUint64(op(2)[8:], uint64(p.base())+uint64(from)+used)
		binary.LittleEndian.PutUint64(op(2)[16:], rest)
		if rest == 0 {
			binary.LittleEndian.PutUint64(op(2), unix.SYS_GETPID) // nothing to hide, which munmap refuses
		}
	}
}

// PartFlags are those of the clone that Part adds.
const PartFlags = unix.CLONE_PARENT

// Part adds a fork into the pid namespace that was joined. What is added next runs in the new process, a sibling of this one; Parted
// must follow where that has ended.
func (p *Program) Part(s Slot) int {
	return p.emit(op{dst: int(s), ifNonZero: true, tolerate: p.alone}, "clone", unix.SYS_CLONE, []any{PartFlags, 0, 0, 0, 0})
}

// Parted adds the end of the process that parted at i: it reports the pid of the other one.
func (p *Program) Parted(i int, s Slot) {
	p.SkipOnSuccess(i)
	if p.alone {
		p.SkipOnError(i)
		at := p.Words(parted, 0)
		p.emit(op{dst: noSlot}, "keep the pid", opStore, []any{at + 8, s})
		p.Do("report the pid", unix.SYS_WRITE, replyFD, at, 16)
	}
	p.Exit(0)
}

// Report tells what a secluded program kept in slots, which must have been reserved one after the other by KeptSlot.
func (p *Program) Report(list []Slot) {
	if !p.alone || len(list) == 0 {
		return
	}
	last := list[len(list)-1] // the lowest
	for s := last; s <= list[0]; s++ {
		p.report = append(p.report, s)
	}
	p.Do("report results", unix.SYS_WRITE, replyFD, p.SlotAddr(last), 8*len(p.report))
}

// NeverStarted is the exit status of a child whose supervisor died before it was told to go on.
const NeverStarted = 125

// Gate adds the wait between create and start: report ready, then block until one byte arrives on fd; end of file ends the child.
func (p *Program) Gate(fd int) {
	p.stamp(1)
	p.GateBy(replyFD, fd)
	p.stamp(2)
}

// GateBy is a gate whose reply pipe is at another number than ReplyFD.
func (p *Program) GateBy(reply, fd int) {
	buf := p.Words(ready)
	p.Do("report ready", unix.SYS_WRITE, reply, buf, 8)
	i := p.Unless0("wait for start", unix.SYS_READ, fd, buf, 1)
	p.Exit(NeverStarted)
	p.SkipOnSuccess(i)
}

// stamp keeps the n-th of the program's times.
func (p *Program) stamp(n int) {
	if p.alone {
		return
	}
	p.Try("time", unix.SYS_CLOCK_GETTIME, unix.CLOCK_MONOTONIC, Addr(p.base()+timesOff+16*uintptr(n)))
}

func (p *Program) time(n int) time.Duration {
	b := p.mem[timesOff+16*n:]
	return time.Duration(binary.LittleEndian.Uint64(b))*time.Second + time.Duration(binary.LittleEndian.Uint64(b[8:]))
}

// Child is a process that runs its program.
type Child struct {
	PID   int
	prog  *Program
	reply *os.File
	ready bool
	ended bool
	took  time.Duration

	parted  int64
	reports int
}

// SetUp is the time from the clone3 to the execve of a child that executed, without its wait at a gate.
func (c *Child) SetUp() time.Duration { return c.took }

// ErrGone reports a child that ended before it got where it should.
var ErrGone = errors.New("the process ended during its set-up")

// Spawn starts a process; a dead zygote is replaced once. The reply of a started child must be read to its end by Ready and Executed.
func (z *Zygote) Spawn(r Request, deadline time.Time) (*Child, error) {
	if r.Program.err != nil {
		return nil, r.Program.err
	}
	if len(r.Files) > MaxFiles {
		return nil, fmt.Errorf("%d descriptors for one process, at most %d", len(r.Files), MaxFiles)
	}
	pid := z.PID()
	c, err := z.spawn(r, deadline)
	if !errors.Is(err, errZygoteDied) {
		return c, err
	}
	if err := z.replace(pid); err != nil {
		return nil, err
	}
	return z.spawn(r, deadline)
}

var errZygoteDied = errors.New("the zygote died")

// replace forks a new zygote for the given one, which died; the fork copies the page tables of the whole supervisor this once. A dying
// process closes its descriptors before it can be waited for, so that its end is seen here first: wait for it.
func (z *Zygote) replace(pid int) error {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.pid != pid {
		return nil // somebody replaced it before us
	}
	unix.Close(z.sock)
	_ = unix.Kill(pid, unix.SIGKILL) // without its socket it is of no use
	var ws unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &ws, 0, nil); !errors.Is(err, unix.EINTR) {
			z.prog.Release()
			return z.fork() // also after ECHILD: somebody else reaped it
		}
	}
}

func (z *Zygote) spawn(r Request, deadline time.Time) (*Child, error) {
	p := r.Program
	p.seal()
	clear(p.mem[:opsOff])
	ca := (*cloneArgs)(unsafe.Pointer(&p.mem[argsOff]))
	// CLONE_PARENT wants no exit signal: the kernel takes the zygote's own, SIGCHLD.
	*ca = cloneArgs{flags: r.Flags | unix.CLONE_CLEAR_SIGHAND | unix.CLONE_PARENT}
	if r.Cgroup >= 0 {
		ca.flags |= unix.CLONE_INTO_CGROUP
		ca.cgroup = uint64(FileFD(r.Cgroup))
	}
	pr, pw, err := pipe()
	if err != nil {
		return nil, fmt.Errorf("reply pipe: %w", err)
	}
	head := min(replyFD, len(r.Files))
	fds := append(append(append(make([]int, 0, len(r.Files)+1), r.Files[:head]...), pw), r.Files[head:]...)
	var msg [requestLen]byte
	binary.LittleEndian.PutUint64(msg[0:], uint64(p.base()))
	binary.LittleEndian.PutUint64(msg[8:], uint64(p.base()+argsOff))
	binary.LittleEndian.PutUint64(msg[16:], uint64(p.base()+timesOff))
	z.mu.Lock()
	err = unix.Sendmsg(z.sock, msg[:], unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL)
	z.mu.Unlock()
	unix.Close(pw)
	c := &Child{prog: p, reply: pr}
	if err != nil {
		pr.Close()
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			return nil, z.died()
		}
		return nil, fmt.Errorf("ask the zygote: %w", err)
	}
	if err := pr.SetReadDeadline(deadline); err != nil {
		pr.Close()
		return nil, err
	}
	for c.PID == 0 {
		v, err := c.read()
		switch {
		case errors.Is(err, io.EOF):
			err = z.died()
		case err == nil && v < 0:
			err = fmt.Errorf("clone3: %w", unix.Errno(-v))
		}
		if err != nil {
			pr.Close()
			return nil, err
		}
	}
	return c, nil
}

// read takes one report: the zygote's with the pid (or minus errno), or the child's that it is ready; they come in any order.
func (c *Child) read() (int64, error) {
	var b [8]byte
	if _, err := io.ReadFull(c.reply, b[:]); err != nil {
		return 0, err
	}
	v := int64(binary.LittleEndian.Uint64(b[:]))
	switch {
	case v == ready:
		c.ready = true
	case v == parted:
		if _, err := io.ReadFull(c.reply, b[:]); err != nil {
			return 0, err
		}
		if c.parted == 0 {
			c.parted = int64(binary.LittleEndian.Uint64(b[:]))
		}
	case c.PID == 0:
		c.PID = int(max(v, 0))
	default:
		return v, c.result(v)
	}
	return v, nil
}

// result takes one result of a secluded program. More than it can have are not its own: somebody inside the container writes them.
func (c *Child) result(v int64) error {
	if c.reports++; c.reports > maxSlots {
		return errors.New("the process was tampered with from inside the container")
	}
	if c.reports <= len(c.prog.report) {
		binary.LittleEndian.PutUint64(c.prog.mem[slotsOff+8*int(c.prog.report[c.reports-1]):], uint64(v))
	}
	return nil
}

// Parted waits until the child has parted and returns the pid of the process that goes on. It is the word of a process that others may
// have written into: the caller makes sure that it is a child, and where.
func (c *Child) Parted(deadline time.Time) (int, error) {
	if err := c.reply.SetReadDeadline(deadline); err != nil {
		return 0, err
	}
	for c.parted == 0 {
		if _, err := c.read(); err != nil {
			return 0, c.why(err)
		}
	}
	if c.parted < 0 {
		return 0, &Failure{Op: "clone", Errno: unix.Errno(-c.parted)}
	}
	return int(c.parted), nil
}

// Ready waits until the child stands at its gate.
func (c *Child) Ready(deadline time.Time) error {
	if err := c.reply.SetReadDeadline(deadline); err != nil {
		return err
	}
	for !c.ready {
		if _, err := c.read(); err != nil {
			return c.why(err)
		}
	}
	return nil
}

// Next forgets that the child stood at a gate, so that Ready waits for the one after.
func (c *Child) Next() { c.ready = false }

// Executed waits until execve succeeded (nil) or the child ended.
func (c *Child) Executed(deadline time.Time) error {
	if err := c.reply.SetReadDeadline(deadline); err != nil {
		return err
	}
	for {
		if _, err := c.read(); err != nil {
			err = c.why(err)
			if errors.Is(err, ErrGone) {
				return nil
			}
			return err
		}
	}
}

// why turns the end of the reply pipe into its reason. Without a recorded failure the child executed or was killed.
func (c *Child) why(err error) error {
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("process set-up: %w", err)
	}
	c.ended = true
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err == nil {
		c.took = time.Duration(now.Nano()) - c.prog.time(0) - (c.prog.time(2) - c.prog.time(1))
	}
	if f := c.prog.Failure(); f != nil {
		return f
	}
	return ErrGone
}

// Close forgets the child; it must have executed or be dead, otherwise its program may still be in use.
func (c *Child) Close() { c.reply.Close() }

func pipe() (r *os.File, w int, err error) {
	var pp [2]int
	if err := unix.Pipe2(pp[:], unix.O_CLOEXEC); err != nil {
		return nil, -1, err
	}
	if err := unix.SetNonblock(pp[0], true); err != nil {
		unix.Close(pp[0])
		unix.Close(pp[1])
		return nil, -1, err
	}
	return os.NewFile(uintptr(pp[0]), "reply"), pp[1], nil
}
