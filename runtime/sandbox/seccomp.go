package sandbox

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/zygote"
)

// DefaultSeccomp is the filter the field's engines use by default, for a process whose bounding set is caps.
func DefaultSeccomp(caps []string) *specs.LinuxSeccomp {
	s, err := seccomp.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}}})
	if err != nil { // only its own table can be at fault
		panic(fmt.Sprintf("default seccomp profile: %v", err))
	}
	return s
}

// Filter is a compiled seccomp filter: flags for seccomp(2) and the instructions as the kernel reads them.
type Filter struct {
	Flags uint64
	Code  []byte
	// Notify: some calls wait for the answer of whoever holds the filter's listener.
	Notify bool
}

// maxInstructions is the kernel's limit of one filter, less what admitting adds.
const maxInstructions = 4096 - 24

// arch is one calling convention that a filter covers.
type arch struct {
	audit   uint32
	numbers map[string]uint32
	x86_64  bool // numbers with bit 30 set are x32's: refused
}

func archOf(a specs.Arch) (arch, bool) {
	switch a {
	case specs.ArchX86_64:
		return arch{unix.AUDIT_ARCH_X86_64, syscallsX8664(), true}, true
	case specs.ArchX86:
		return arch{unix.AUDIT_ARCH_I386, syscallsX86(), false}, true
	case specs.ArchAARCH64:
		return arch{unix.AUDIT_ARCH_AARCH64, syscallsARM64(), false}, true
	case specs.ArchARM:
		return arch{unix.AUDIT_ARCH_ARM, syscallsARM(), false}, true
	}
	return arch{}, false
}

// CompileSeccomp turns a filter of the OCI specification into instructions. For one system call the first rule whose conditions hold
// decides, rules without conditions after those with; without one the default action. Numbers above every one the profile knows give
// ENOSYS where the default is an errno, so that programs fall back from calls newer than the profile. Names unknown here, and
// conventions this machine cannot run, are left out; x32 is always refused.
func CompileSeccomp(s *specs.LinuxSeccomp) (Filter, error) {
	var f Filter
	if s == nil {
		return f, nil
	}
	if err := CheckSeccomp(s); err != nil {
		return f, err
	}
	f.Notify = notifies(s)
	for _, fl := range s.Flags {
		n, _ := seccompFlag(fl)
		f.Flags |= n
	}
	def, err := action(s.DefaultAction, s.DefaultErrnoRet)
	if err != nil {
		return f, err
	}
	names := s.Architectures
	if len(names) == 0 {
		names = []specs.Arch{nativeArch}
	}
	c := compiler{spec: s, def: def}
	for _, n := range names {
		if a, ok := archOf(n); ok && runnable(n) {
			if err := c.arch(a); err != nil {
				return f, err
			}
		}
	}
	c.out = shareReturns(append(c.out, ret(def))) // any other calling convention
	if len(c.out) > maxInstructions {
		return f, fmt.Errorf("seccomp filter of %d instructions, the kernel takes %d: use fewer conditions: %w", len(c.out), maxInstructions, errdefs.ErrInvalidArgument)
	}
	f.Code = encode(c.out)
	return f, nil
}

// encode lays instructions out as the kernel reads them.
func encode(list []instr) []byte {
	out := make([]byte, 8*len(list))
	for i, x := range list {
		binary.LittleEndian.PutUint16(out[8*i:], x.code)
		out[8*i+2], out[8*i+3] = x.jt, x.jf
		binary.LittleEndian.PutUint32(out[8*i+4:], x.k)
	}
	return out
}

func action(a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	data := uint32(unix.EPERM)
	if errno != nil {
		data = uint32(*errno)
	}
	switch a {
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW, nil
	case specs.ActErrno:
		return unix.SECCOMP_RET_ERRNO | data, nil
	case specs.ActKill, specs.ActKillThread:
		return unix.SECCOMP_RET_KILL_THREAD, nil
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	case specs.ActTrap:
		return unix.SECCOMP_RET_TRAP, nil
	case specs.ActTrace:
		return unix.SECCOMP_RET_TRACE | data, nil
	case specs.ActLog:
		return unix.SECCOMP_RET_LOG, nil
	case specs.ActNotify:
		return unix.SECCOMP_RET_USER_NOTIF, nil
	}
	return 0, fmt.Errorf("action %q is unknown: %w", a, errdefs.ErrInvalidArgument)
}

// leaf is what happens for one system call: conditional rules in order, then an action.
type leaf struct {
	rules []rule
	act   uint32
}

type rule struct {
	args []specs.LinuxSeccompArg
	act  uint32
}

type span struct {
	start uint32
	leaf  leaf
}

type compiler struct {
	spec *specs.LinuxSeccomp
	def  uint32
	out  []instr
}

// arch adds the block for one calling convention; it falls through when another one called.
func (c *compiler) arch(a arch) error {
	leaves, max, err := c.leaves(a)
	if err != nil {
		return err
	}
	spans := c.spans(leaves, max)
	body := append(make([]instr, 0, 512), load(0))
	if a.x86_64 {
		const x32 = 0x40000000
		body = append(body, jump(jge, x32, 0, 1), ret(unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS)))
	}
	body = tree(body, spans)
	c.out = append(c.out, load(4), jump(jeq, a.audit, 1, 0), instr{code: ja, k: uint32(len(body))})
	c.out = append(c.out, body...)
	return nil
}

func (c *compiler) leaves(a arch) (map[uint32]leaf, uint32, error) {
	leaves := map[uint32]leaf{}
	always := map[uint32]bool{}
	var max uint32
	for _, r := range c.spec.Syscalls {
		act, err := action(r.Action, r.ErrnoRet)
		if err != nil {
			return nil, 0, err
		}
		for _, n := range r.Names {
			nr, ok := a.numbers[n]
			if !ok {
				continue
			}
			l, seen := leaves[nr]
			if !seen {
				l.act = c.def
			}
			switch {
			case len(r.Args) > 0:
				l.rules = append(l.rules, split(r.Args, act)...)
			case !always[nr]:
				l.act, always[nr] = act, true
			}
			leaves[nr] = l
			if nr < 1<<16 && nr > max {
				max = nr
			}
		}
	}
	return leaves, max, nil
}

// split makes several conditions on one argument alternatives and conditions on different arguments a conjunction, as runtimes do.
func split(args []specs.LinuxSeccompArg, act uint32) []rule {
	seen := map[uint]bool{}
	for _, a := range args {
		if seen[a.Index] {
			var out []rule
			for _, a := range args {
				out = append(out, rule{[]specs.LinuxSeccompArg{a}, act})
			}
			return out
		}
		seen[a.Index] = true
	}
	return []rule{{args, act}}
}

// spans are the leaves as ranges of numbers that start where behaviour changes.
func (c *compiler) spans(leaves map[uint32]leaf, max uint32) []span {
	numbers := make([]uint32, 0, len(leaves))
	for nr := range leaves {
		numbers = append(numbers, nr)
	}
	slices.Sort(numbers)
	beyond := leaf{act: c.def}
	if c.def&unix.SECCOMP_RET_ACTION_FULL == unix.SECCOMP_RET_ERRNO {
		beyond.act = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	}
	out := []span{{0, leaf{act: c.def}}}
	add := func(start uint32, l leaf) {
		last := &out[len(out)-1]
		if last.start == start {
			last.leaf = l
			if n := len(out); n > 1 && same(out[n-2].leaf, l) {
				out = out[:n-1]
			}
		} else if !same(last.leaf, l) {
			out = append(out, span{start, l})
		}
	}
	for _, nr := range numbers {
		add(nr, leaves[nr])
		if nr < max {
			add(nr+1, leaf{act: c.def})
		} else {
			add(nr+1, beyond)
		}
	}
	return out
}

func same(a, b leaf) bool { return len(a.rules) == 0 && len(b.rules) == 0 && a.act == b.act }

// tree is a balanced search over the spans, the number being in the accumulator.
func tree(out []instr, s []span) []instr {
	if len(s) == 1 {
		for _, r := range s[0].leaf.rules {
			out = append(out, r.code()...)
		}
		return append(out, ret(s[0].leaf.act))
	}
	mid := len(s) / 2
	at := len(out)
	out = tree(append(out, instr{}), s[:mid])
	if left := len(out) - at - 1; left < 255 {
		out[at] = jump(jge, s[mid].start, uint8(left), 0)
	} else { // a jump reaches only so far; all are relative, so what is between can move
		out = slices.Insert(out, at, jump(jge, s[mid].start, 0, 1))
		out[at+1] = instr{code: ja, k: uint32(left)}
	}
	return tree(out, s[mid:])
}

// admitting is the filter with an exception for the few calls between it and the execve of an additional process. They are marked by a
// secret sixth argument: a program that learnt it could not do more with them than a fork, a new session, taking a terminal, or the
// use of descriptors that it has.
func (f Filter) admitting(mark uint64) Filter {
	if len(f.Code) == 0 {
		return f
	}
	native, _ := archOf(nativeArch)
	low, high := argOffsets(5)
	code := []instr{load(high), jump(jeq, uint32(mark>>32), 0, no), load(low), jump(jeq, uint32(mark), 0, no), load(4), jump(jeq, native.audit, 0, no), load(0)}
	for _, nr := range []uint32{unix.SYS_READ, unix.SYS_WRITE, unix.SYS_SETSID, unix.SYS_EXIT_GROUP} {
		code = append(code, jump(jeq, nr, 0, 1), ret(unix.SECCOMP_RET_ALLOW))
	}
	flags, _ := argOffsets(0)
	request, _ := argOffsets(1)
	for _, c := range []struct{ nr, arg, value uint32 }{{unix.SYS_CLONE, flags, zygote.PartFlags}, {unix.SYS_IOCTL, request, unix.TIOCSCTTY}} {
		code = append(code, jump(jeq, c.nr, 0, 3), load(c.arg), jump(jeq, c.value, 0, no), ret(unix.SECCOMP_RET_ALLOW))
	}
	for i := range code {
		if code[i].jf == no {
			code[i].jf = uint8(len(code) - i - 1)
		}
	}
	f.Code = append(encode(code), f.Code...)
	return f
}
