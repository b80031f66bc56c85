package zygote

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// NewFilePool maps one arena that lives in a file, so that a process which did not start the child can read how its program ended.
// The file must not exist; it holds arguments and environment and is readable by its owner only.
func NewFilePool(file string) (*Pool, error) {
	fd, err := unix.Open(file, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make program file %s: %w", file, err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, arenaLen); err != nil {
		return nil, fmt.Errorf("make program file %s: %w", file, err)
	}
	m, err := unix.Mmap(fd, 0, arenaLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map program file %s: %w", file, err)
	}
	p := &Pool{mem: m, file: -1, free: make(chan int, 1)}
	p.free <- 0
	return p, nil
}

// Direct is a child that this process forks itself, without a zygote: for a small process that ends soon after, like a command. The
// price is a copy of this process's page tables.
type Direct struct {
	// PID of the forked process.
	PID   int
	prog  *Program
	reply int // reading end of the pipe on which it reports, or -1
	files int
	veil  *veil
}

// firstHigh is where descriptors wait inside a child, above every number it sees later.
const firstHigh = 260

// EnterDirect starts a program for Launch; it comes first and makes Enter do less. The child gets n files as a request's Files, and
// nothing else of this process.
func (p *Program) EnterDirect(n int) *Direct {
	p.direct = true
	d := &Direct{prog: p, reply: -1, files: n}
	var err error
	if d.veil, err = newVeil(); err != nil {
		p.fail("%w", err)
		return d
	}
	// Moved by the child, in two steps: this process shares its table among threads, and growing a shared table waits for a grace period.
	for i := range n + 2 {
		p.Do("take descriptor", unix.SYS_DUP3, -1, firstHigh+i, unix.O_CLOEXEC)
	}
	d.veil.add(p, firstHigh+n+1)
	for i := range n + 1 {
		p.Do("pass descriptor", unix.SYS_DUP3, firstHigh+i, directFD(i), 0)
	}
	p.Do("close", unix.SYS_CLOSE_RANGE, max(FileFD(n), replyFD+1), uintptr(^uint32(0)), 0)
	p.Do("not dumpable", unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	return d
}

// directFD is the child's number of the i-th descriptor that waits above firstHigh: the reply pipe, then the files.
func directFD(i int) int {
	if i == 0 {
		return replyFD
	}
	return FileFD(i - 1)
}

// Launch forks the child with the namespaces of flags, in the cgroup v2 directory open as cgroup, or -1. The child's reports are
// written to replyW and read from replyR, which must not block and which Direct owns from now on. The caller closes the others.
func (d *Direct) Launch(files []int, replyR, replyW int, flags uint64, cgroup int) error {
	d.reply = replyR
	if d.prog.err != nil {
		return d.prog.err
	}
	if len(files) != d.files || len(files) > MaxFiles {
		return fmt.Errorf("%d descriptors for a process that expects %d, at most %d", len(files), d.files, MaxFiles)
	}
	for i, fd := range append(append([]int{replyW}, files...), d.veil.file) {
		binary.LittleEndian.PutUint64(d.prog.mem[opsOff+opSize*i+8:], uint64(fd)) // the program's first calls
	}
	ca := cloneArgs{flags: flags | unix.CLONE_CLEAR_SIGHAND, exitSignal: uint64(unix.SIGCHLD)}
	if cgroup >= 0 {
		ca.flags |= unix.CLONE_INTO_CGROUP
		ca.cgroup = uint64(cgroup)
	}
	pid, err := clone(d.prog, &ca, d.veil.code)
	if err != nil {
		return fmt.Errorf("clone3: %w", err)
	}
	d.PID = pid
	return nil
}

// Close forgets the child.
func (d *Direct) Close() {
	if d.reply >= 0 {
		unix.Close(d.reply)
		d.reply = -1
	}
	if d.veil != nil {
		d.veil.close()
		d.veil = nil
	}
}

// Await waits until the child stands at its next gate.
func (d *Direct) Await(deadline time.Time) error {
	var b [8]byte
	for got := 0; got < len(b); {
		n, err := unix.Read(d.reply, b[got:])
		switch {
		case n > 0:
			got += n
		case err == nil:
			return d.why(io.EOF)
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR):
			return d.why(err)
		default:
			// By poll and not by the runtime's poller, whose threads would wake one another while the child works.
			left := int(time.Until(deadline).Milliseconds())
			if left <= 0 {
				return d.why(os.ErrDeadlineExceeded)
			}
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(d.reply), Events: unix.POLLIN}}, left)
		}
	}
	if binary.LittleEndian.Uint64(b[:]) != ready {
		return fmt.Errorf("process set-up: unexpected report %x", b)
	}
	return nil
}

// Executed waits until execve succeeded or the child ended; the program's results tell which.
func (d *Direct) Executed(deadline time.Time) error {
	for {
		if err := d.Await(deadline); err != nil {
			if errors.Is(err, ErrGone) {
				return nil
			}
			return err
		}
	}
}

func (d *Direct) why(err error) error {
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("process set-up: %w", err)
	}
	if f := d.prog.Failure(); f != nil {
		return f
	}
	return ErrGone
}

// Record is what another process needs to read how a program in a file ended.
type Record struct {
	Base  uint64   `json:"base"`
	First int      `json:"first"`
	Names []string `json:"names"`
}

// Record describes the program from its op number first on, see Ops.
func (p *Program) Record(first int) Record {
	return Record{Base: uint64(p.base()), First: first, Names: p.names[min(first, len(p.names)):]}
}

// Ops counts the calls added so far.
func (p *Program) Ops() int { return p.nops }

// Result is how a program in a file ended.
type Result struct {
	mem []byte
	rec Record
}

// ReadResult reads the file of NewFilePool.
func ReadResult(file string, rec Record) (*Result, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read program file: %w", err)
	}
	defer f.Close()
	r := &Result{mem: make([]byte, argsOff), rec: rec}
	if _, err := io.ReadFull(f, r.mem); err != nil {
		return nil, fmt.Errorf("read program file %s: %w", file, err)
	}
	return r, nil
}

// Slot is the result of a call, 0 when it was not reached.
func (r *Result) Slot(s Slot) int64 {
	return int64(binary.LittleEndian.Uint64(r.mem[slotsOff+8*int(s):]))
}

// Failure is the call that ended the child, nil when none did.
func (r *Result) Failure() *Failure {
	e := binary.LittleEndian.Uint64(r.mem)
	if e == 0 {
		return nil
	}
	f := &Failure{Op: "set-up", Errno: unix.Errno(e)}
	at := (binary.LittleEndian.Uint64(r.mem[8:])-r.rec.Base-opsOff)/opSize - uint64(r.rec.First)
	if at < uint64(len(r.rec.Names)) {
		f.Op = r.rec.Names[at]
	}
	return f
}

// CloneArgs lays out the arguments of a clone3 inside a program: their address and size.
func (p *Program) CloneArgs(flags uint64) (Addr, int) {
	args := make([]uint64, unsafe.Sizeof(cloneArgs{})/8)
	args[0] = flags
	return p.Words(args...), int(unsafe.Sizeof(cloneArgs{}))
}
