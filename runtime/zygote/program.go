package zygote

import (
	"encoding/binary"
	"fmt"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Layout of an arena, known to the assembly:
//
//	+0     errno of the fatal failure, +8 address of the failing op
//	+16    times, of 16 bytes each: before the clone3, at the last gate, after it
//	+64    240 result slots of 8 bytes
//	+2048  the arguments of the clone3 that makes the child
//	+4096  ops of 64 bytes: number, six arguments, control word
//	then   data: strings and structures
//
// Control word: bits 0-4 argument n is a slot number; 6 the success skip applies to a non-zero result only, and a zero result (the
// child's side of a fork) is not stored; 7 on result zero run the program whose clone arguments the call was given; 8-15 result slot,
// 255 none; 16-31 ops to skip on success; 32-47 ops to skip on error, 0xffff: an error is fatal.
const (
	timesOff = 16
	slotsOff = 64
	maxSlots = 240
	argsOff  = 2048
	opsOff   = 4096
	opSize   = 64
	maxOps   = 1536
	dataOff  = opsOff + opSize*maxOps
	arenaLen = 1 << 18
	noSlot   = 255
	fatal    = 0xffff
)

// Slot is a result of an earlier call, used as an argument of a later one.
type Slot uint8

// Addr is an address inside the program's arena.
type Addr uintptr

// Program is a list of system calls with their data, built in an arena that child and supervisor share. Building never fails half-way:
// the first problem is kept and reported by Err and by Spawn.
type Program struct {
	mem    []byte
	pool   *Pool
	index  int
	nops   int
	data   int
	slots  int // used from below
	kept   int // used from above
	names  []string
	strs   map[string]Addr
	err    error
	trace  bool
	direct bool // see EnterDirect
	mark   uint64
	alone  bool   // see Seclude
	copyAt int    // the first call of Seclude
	report []Slot // of a secluded program, in the order in which they are reported
	args   []string
	built  uintptr // of one that an earlier program of this process built, see Resume: where its arena was
	file   int     // of the same: the memory it lies in
}

// Release gives the arena back. The child must have executed or ended.
func (p *Program) Release() {
	if p.pool == nil {
		p.drop()
		return
	}
	p.pool.put(p)
}

// Err is the first problem met while building.
func (p *Program) Err() error { return p.err }

// Trace makes Dump show arguments; it must be called before the first op.
func (p *Program) Trace() { p.trace = true }

// Dump is the program as text, one op a line, the same on every architecture.
func (p *Program) Dump() string {
	var b strings.Builder
	for i, n := range p.names {
		fmt.Fprintf(&b, "%s", n)
		if p.trace {
			b.WriteString(p.args[i])
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func (p *Program) base() uintptr { return uintptr(unsafe.Pointer(&p.mem[0])) }

func (p *Program) fail(format string, args ...any) {
	if p.err == nil {
		p.err = fmt.Errorf(format, args...)
	}
}

// Bytes copies b into the arena, aligned to 16 bytes.
func (p *Program) Bytes(b []byte) Addr {
	p.data = (p.data + 15) &^ 15
	off := p.data
	if off+len(b) > len(p.mem) {
		p.fail("arguments, environment and mounts need more than %d KiB: make them smaller", (arenaLen-dataOff)>>10)
		return 0
	}
	copy(p.mem[off:], b)
	p.data += len(b)
	return Addr(p.base() + uintptr(off))
}

// String copies s with a closing zero; equal strings share their bytes.
func (p *Program) String(s string) Addr {
	if a, ok := p.strs[s]; ok {
		return a
	}
	if strings.IndexByte(s, 0) >= 0 {
		p.fail("%q contains a zero byte", s)
	}
	a := p.Bytes(append([]byte(s), 0))
	p.strs[s] = a
	return a
}

// Strings is the vector of pointers that execve wants.
func (p *Program) Strings(list []string) Addr {
	b := make([]byte, 8*(len(list)+1))
	for i, s := range list {
		binary.LittleEndian.PutUint64(b[8*i:], uint64(p.String(s)))
	}
	return p.Bytes(b)
}

// Words lays out 64-bit values one after the other.
func (p *Program) Words(w ...uint64) Addr {
	b := make([]byte, 8*len(w))
	for i, v := range w {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return p.Bytes(b)
}

// NewSlot reserves a result slot.
func (p *Program) NewSlot() Slot {
	if p.slots+p.kept == maxSlots {
		p.fail("too many results in one program")
		return 0
	}
	p.slots++
	return Slot(p.slots - 1)
}

// SlotAddr is where the slot is, for calls that take a pointer.
func (p *Program) SlotAddr(s Slot) Addr { return Addr(p.base() + slotsOff + 8*uintptr(s)) }

// KeptSlot reserves a slot that no other call ever writes, so that 0 means the call was not reached.
func (p *Program) KeptSlot() Slot {
	if p.slots+p.kept == maxSlots {
		p.fail("too many results in one program")
		return 0
	}
	p.kept++
	return Slot(maxSlots - p.kept)
}

// Scope returns a function that frees the slots reserved since: `defer p.Scope()()`.
func (p *Program) Scope() func() {
	n := p.slots
	return func() { p.slots = n }
}

// op is how a call ends: dst keeps its result; a tolerated error continues after skipping.
type op struct {
	dst       int
	tolerate  bool
	ifNonZero bool
	enter     bool
}

func (p *Program) emit(o op, name string, nr uintptr, args []any) int {
	if p.nops == maxOps {
		p.fail("too many mounts, devices or limits for one container (%d system calls)", maxOps)
		return 0
	}
	b := p.mem[opsOff+opSize*p.nops:]
	binary.LittleEndian.PutUint64(b, uint64(nr))
	clear(b[8:opSize])
	var ctl uint64
	for i, a := range args {
		var v uintptr
		switch x := a.(type) {
		case int:
			v = uintptr(x)
		case uintptr:
			v = x
		case Addr:
			v = uintptr(x)
		case string:
			v = uintptr(p.String(x))
		case Slot:
			v = uintptr(x)
			ctl |= 1 << i
		default:
			p.fail("%s: argument of type %T", name, a)
		}
		binary.LittleEndian.PutUint64(b[8+8*i:], uint64(v))
	}
	if p.mark != 0 && len(args) < 6 {
		binary.LittleEndian.PutUint64(b[48:], p.mark)
	}
	if o.ifNonZero {
		ctl |= 64
	}
	if o.enter {
		ctl |= 128
	}
	ctl |= uint64(uint8(o.dst)) << 8
	if !o.tolerate {
		ctl |= fatal << 32
	}
	binary.LittleEndian.PutUint64(b[56:], ctl)
	p.names = append(p.names, name)
	if p.trace {
		p.args = append(p.args, render(o, args))
	}
	p.nops++
	return p.nops - 1
}

func render(o op, args []any) string {
	var b strings.Builder
	for _, a := range args {
		switch x := a.(type) {
		case string:
			fmt.Fprintf(&b, " %q", x)
		case Slot:
			fmt.Fprintf(&b, " $%d", x)
		case Addr:
			b.WriteString(" &")
		default:
			fmt.Fprintf(&b, " %#x", a)
		}
	}
	if o.dst != noSlot {
		fmt.Fprintf(&b, " -> $%d", o.dst)
	}
	if o.tolerate {
		b.WriteString(" (may fail)")
	}
	return b.String()
}

// Do adds a call whose failure ends the child.
func (p *Program) Do(name string, nr uintptr, args ...any) int {
	return p.emit(op{dst: noSlot}, name, nr, args)
}

// Try adds a call whose failure does not matter; see SkipOnError and SkipOnSuccess.
func (p *Program) Try(name string, nr uintptr, args ...any) int {
	return p.emit(op{dst: noSlot, tolerate: true}, name, nr, args)
}

// Get adds a call whose result is needed; its failure ends the child.
func (p *Program) Get(name string, nr uintptr, args ...any) Slot {
	s := p.NewSlot()
	p.emit(op{dst: int(s)}, name, nr, args)
	return s
}

// GetInto is Get into a given slot.
func (p *Program) GetInto(s Slot, name string, nr uintptr, args ...any) int {
	return p.emit(op{dst: int(s)}, name, nr, args)
}

// TryInto is Try that keeps the result, or minus errno, in the slot.
func (p *Program) TryInto(s Slot, name string, nr uintptr, args ...any) int {
	return p.emit(op{dst: int(s), tolerate: true}, name, nr, args)
}

// Set gives a slot a value without a system call, so that what uses it before a call did fails.
func (p *Program) Set(s Slot, value int) {
	p.Do("set", opStore, Addr(p.base()+slotsOff+8*uintptr(s)), value)
}

// Fork adds a call that returns twice, clone3: the parent's side continues where SkipOnSuccess says, the child's with the next op.
func (p *Program) Fork(s Slot, name string, nr uintptr, args ...any) int {
	return p.emit(op{dst: int(s), ifNonZero: true}, name, nr, args)
}

// Unless0 adds a call that is followed by the next op on result 0 and otherwise continues where SkipOnSuccess says.
func (p *Program) Unless0(name string, nr uintptr, args ...any) int {
	return p.emit(op{dst: noSlot, ifNonZero: true}, name, nr, args)
}

// Mark gives all calls added from now on a sixth argument, for a filter to know them by; no call with fewer arguments looks at it.
func (p *Program) Mark(m uint64) { p.mark = m }

// SkipOnSuccess makes a success of op i continue at the op added next.
func (p *Program) SkipOnSuccess(i int) { p.setSkip(i, 16) }

// SkipOnError makes a tolerated failure of op i continue at the op added next.
func (p *Program) SkipOnError(i int) { p.setSkip(i, 32) }

func (p *Program) setSkip(i int, shift uint) {
	b := p.mem[opsOff+opSize*i+56:]
	v := binary.LittleEndian.Uint64(b)
	binary.LittleEndian.PutUint64(b, v&^(0xffff<<shift)|uint64(p.nops-i-1)<<shift)
}

// Exit ends the child.
func (p *Program) Exit(code int) { p.Do("exit", unix.SYS_EXIT_GROUP, code) }

// Result is what the call that wrote to the slot returned, read by the supervisor once the child has stopped writing.
func (p *Program) Result(s Slot) int64 {
	return int64(binary.LittleEndian.Uint64(p.mem[slotsOff+8*int(s):]))
}

// Failure is the call that ended the child, nil when none did.
func (p *Program) Failure() *Failure {
	e := binary.LittleEndian.Uint64(p.mem)
	if e == 0 {
		return nil
	}
	f := &Failure{Op: "unknown call", Errno: syscall.Errno(e)}
	at := binary.LittleEndian.Uint64(p.mem[8:]) - uint64(p.builtAt()) - opsOff
	if i := at / opSize; i < uint64(len(p.names)) {
		f.Op = p.names[i]
	}
	return f
}

// Failure names the call of a program that failed and why.
type Failure struct {
	Op    string
	Errno syscall.Errno
}

func (f *Failure) Error() string { return f.Op + ": " + f.Errno.Error() }

// Unwrap gives the errno.
func (f *Failure) Unwrap() error { return f.Errno }
