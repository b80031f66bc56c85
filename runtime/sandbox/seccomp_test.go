package sandbox

import (
	"encoding/binary"
	"errors"
	"math"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// call is what the kernel shows a filter.
type call struct {
	nr   uint32
	arch uint32
	args [6]uint64
}

// eval runs a filter as the kernel does.
func eval(t *testing.T, f Filter, c call) uint32 {
	t.Helper()
	data := binary.LittleEndian.AppendUint32(nil, c.nr)
	data = binary.LittleEndian.AppendUint32(data, c.arch)
	data = binary.LittleEndian.AppendUint64(data, 0)
	for _, a := range c.args {
		data = binary.LittleEndian.AppendUint64(data, a)
	}
	var acc uint32
	n := len(f.Code) / 8
	for pc, steps := 0, 0; pc < n; steps++ {
		b := f.Code[8*pc:]
		code, jt, jf, k := binary.LittleEndian.Uint16(b), int(b[2]), int(b[3]), binary.LittleEndian.Uint32(b[4:])
		pc++
		cond := false
		switch code {
		case ldAbs:
			acc = binary.LittleEndian.Uint32(data[k:])
			continue
		case and:
			acc &= k
			continue
		case ja:
			pc += int(k)
			continue
		case retK:
			return k
		case jeq:
			cond = acc == k
		case jge:
			cond = acc >= k
		case jgt:
			cond = acc > k
		default:
			t.Fatalf("instruction %d: code %#x", pc-1, code)
		}
		if cond {
			pc += jt
		} else {
			pc += jf
		}
	}
	t.Fatal("the filter ran off its end")
	return 0
}

const (
	allow = unix.SECCOMP_RET_ALLOW
	eperm = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	nosys = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	amd64 = unix.AUDIT_ARCH_X86_64
)

func TestOperators(t *testing.T) {
	values := []uint64{0, 1, 7, 8, 9, 1<<32 - 1, 1 << 32, 1<<32 + 7, 1<<32 + 8, 1<<40 | 8, math.MaxUint64}
	for op, hold := range map[specs.LinuxSeccompOperator]func(a, v, w uint64) bool{
		specs.OpEqualTo:      func(a, v, _ uint64) bool { return a == v },
		specs.OpNotEqual:     func(a, v, _ uint64) bool { return a != v },
		specs.OpLessThan:     func(a, v, _ uint64) bool { return a < v },
		specs.OpLessEqual:    func(a, v, _ uint64) bool { return a <= v },
		specs.OpGreaterThan:  func(a, v, _ uint64) bool { return a > v },
		specs.OpGreaterEqual: func(a, v, _ uint64) bool { return a >= v },
		specs.OpMaskedEqual:  func(a, v, w uint64) bool { return a&v == w },
	} {
		for _, v := range values {
			for _, w := range []uint64{0, v, 8} {
				f, err := CompileSeccomp(&specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64},
					Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 2, Value: v, ValueTwo: w, Op: op}}}}})
				if err != nil {
					t.Fatal(err)
				}
				for _, a := range values {
					want := uint32(eperm)
					if hold(a, v, w) {
						want = allow
					}
					if got := eval(t, f, call{arch: amd64, args: [6]uint64{2: a}}); got != want {
						t.Errorf("%s %#x %#x on %#x: %#x, want %#x", op, v, w, a, got, want)
					}
				}
			}
		}
	}
}

func TestConjunctionAndAlternatives(t *testing.T) {
	arg := func(i uint, v uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: i, Value: v, Op: specs.OpEqualTo}
	}
	no := uint(unix.ENOSYS)
	f, err := CompileSeccomp(&specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64}, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{arg(0, 1), arg(1, 2)}},
		{Names: []string{"write"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{arg(0, 1), arg(0, 2)}},
		{Names: []string{"open"}, Action: specs.ActErrno, ErrnoRet: &no},
		{Names: []string{"open"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{arg(0, 5)}},
		{Names: []string{"no_such_call"}, Action: specs.ActAllow},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		nr   uint32
		a, b uint64
		want uint32
	}{{0, 1, 2, allow}, {0, 1, 3, eperm}, {0, 0, 2, eperm}, {1, 1, 0, allow}, {1, 2, 0, allow}, {1, 3, 0, eperm}, {2, 5, 0, allow}, {2, 6, 0, nosys}, {3, 0, 0, nosys}} {
		if got := eval(t, f, call{nr: tc.nr, arch: amd64, args: [6]uint64{tc.a, tc.b}}); got != tc.want {
			t.Errorf("call %d(%d, %d): %#x, want %#x", tc.nr, tc.a, tc.b, got, tc.want)
		}
	}
}

// TestDefaultProfile compares the compiled tree with the profile's rules, call by call.
func TestDefaultProfile(t *testing.T) {
	if nativeArch != specs.ArchX86_64 {
		t.Skip("the profile names this architecture's calls only")
	}
	s := DefaultSeccomp(DefaultCaps())
	f, err := CompileSeccomp(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d instructions", len(f.Code)/8)
	for arch, numbers := range map[uint32]map[string]uint32{amd64: syscallsX8664(), unix.AUDIT_ARCH_I386: syscallsX86()} {
		free := map[string]bool{}
		cond := map[string]bool{}
		for _, r := range s.Syscalls {
			for _, n := range r.Names {
				if len(r.Args) > 0 {
					cond[n] = true
				} else if r.Action == specs.ActAllow {
					free[n] = true
				}
			}
		}
		for n, nr := range numbers {
			got := eval(t, f, call{nr: nr, arch: arch, args: [6]uint64{math.MaxUint64}})
			if free[n] && got != allow {
				t.Errorf("%s: %#x, want allow", n, got)
			}
			if !free[n] && !cond[n] && got == allow {
				t.Errorf("%s is allowed", n)
			}
		}
	}
	for _, tc := range []struct {
		name string
		c    call
		want uint32
	}{
		{"clone with NEWUSER", call{nr: 56, arch: amd64, args: [6]uint64{unix.CLONE_NEWUSER}}, eperm},
		{"clone of a thread", call{nr: 56, arch: amd64, args: [6]uint64{unix.CLONE_VM | unix.CLONE_THREAD}}, allow},
		{"clone3", call{nr: 435, arch: amd64}, nosys},
		{"x32 read", call{nr: 0x40000000, arch: amd64}, nosys},
		{"newer than the profile", call{nr: 5000, arch: amd64}, nosys},
		{"foreign convention", call{nr: 0, arch: unix.AUDIT_ARCH_AARCH64}, eperm},
		{"socket vsock", call{nr: 41, arch: amd64, args: [6]uint64{unix.AF_VSOCK}}, eperm},
		{"socket inet", call{nr: 41, arch: amd64, args: [6]uint64{unix.AF_INET}}, allow},
	} {
		if got := eval(t, f, tc.c); got != tc.want {
			t.Errorf("%s: %#x, want %#x", tc.name, got, tc.want)
		}
	}
}

// TestShareReturns: the shorter filter decides every call as the long one does.
func TestShareReturns(t *testing.T) {
	s := DefaultSeccomp(DefaultCaps())
	def, err := action(s.DefaultAction, s.DefaultErrnoRet)
	if err != nil {
		t.Fatal(err)
	}
	c := compiler{spec: s, def: def}
	var conventions []uint32
	for _, n := range s.Architectures {
		a, ok := archOf(n)
		if !ok {
			continue
		}
		if err := c.arch(a); err != nil {
			t.Fatal(err)
		}
		conventions = append(conventions, a.audit)
	}
	long := append(c.out, ret(def))
	before := Filter{Code: encode(long)}
	after := Filter{Code: encode(shareReturns(long))}
	t.Logf("%d instructions, %d shared", len(before.Code)/8, len(after.Code)/8)
	if len(after.Code) > len(before.Code)*4/5 {
		t.Error("hardly anything is shared")
	}
	values := []uint64{0, 1, 8, 40, 16, 0x20000, 0x20008, 0xffffffff, 1 << 31, 1 << 32, math.MaxUint64, unix.CLONE_NEWUSER, unix.CLONE_VM, unix.AF_VSOCK}
	for _, arch := range append(conventions, 0, unix.AUDIT_ARCH_S390X) {
		for _, base := range []uint32{0, 0x40000000, 0xf0000} {
			for nr := base; nr < base+600; nr++ {
				for _, v := range values {
					x := call{nr: nr, arch: arch, args: [6]uint64{v, v, v, v, v, v}}
					if a, b := eval(t, before, x), eval(t, after, x); a != b {
						t.Fatalf("call %d of %#x with %#x: %#x, shared %#x", nr, arch, v, a, b)
					}
				}
			}
		}
	}
}

func TestSeccompRefusals(t *testing.T) {
	for name, s := range map[string]*specs.LinuxSeccomp{
		"action":   {DefaultAction: "SCMP_ACT_WHAT"},
		"notify":   {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActNotify}}},
		"listener": {DefaultAction: specs.ActAllow, ListenerPath: "/x"},
		"operator": {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: "x"}}}}},
		"index":    {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}}}}},
	} {
		if _, err := CompileSeccomp(s); !errdefs.IsInvalidArgument(err) && !errors.Is(err, errdefs.ErrNotImplemented) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAdmitting: the calls between a filter and an execve pass by their mark and nothing else does.
func TestAdmitting(t *testing.T) {
	if nativeArch != specs.ArchX86_64 {
		t.Skip("numbers of another architecture")
	}
	f, err := CompileSeccomp(&specs.LinuxSeccomp{DefaultAction: specs.ActKillProcess, Architectures: []specs.Arch{specs.ArchX86_64},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"execve"}, Action: specs.ActAllow}}})
	if err != nil {
		t.Fatal(err)
	}
	const mark, kill = uint64(0x1234567890abcdef), uint32(unix.SECCOMP_RET_KILL_PROCESS)
	m := [6]uint64{5: mark}
	clone, shared, tty := m, m, m
	clone[0], shared[0], tty[1] = unix.CLONE_PARENT, unix.CLONE_PARENT|unix.CLONE_NEWUSER, unix.TIOCSCTTY
	g := f.admitting(mark)
	for _, tc := range []struct {
		nr   uint32
		args [6]uint64
		want uint32
	}{
		{unix.SYS_WRITE, m, allow}, {unix.SYS_READ, m, allow}, {unix.SYS_SETSID, m, allow}, {unix.SYS_EXIT_GROUP, m, allow}, {unix.SYS_CLONE, clone, allow},
		{unix.SYS_IOCTL, tty, allow}, {unix.SYS_EXECVE, m, allow}, {unix.SYS_EXECVE, [6]uint64{}, allow},
		{unix.SYS_WRITE, [6]uint64{}, kill}, {unix.SYS_WRITE, [6]uint64{5: mark + 1}, kill}, {unix.SYS_WRITE, [6]uint64{5: mark ^ 1<<63}, kill},
		{unix.SYS_CLONE, shared, kill}, {unix.SYS_CLONE, m, kill}, {unix.SYS_IOCTL, m, kill}, {unix.SYS_UNSHARE, m, kill},
	} {
		if got := eval(t, g, call{nr: tc.nr, arch: amd64, args: tc.args}); got != tc.want {
			t.Errorf("call %d%v: %#x, want %#x", tc.nr, tc.args, got, tc.want)
		}
	}
	if got := eval(t, g, call{nr: unix.SYS_WRITE, arch: unix.AUDIT_ARCH_I386, args: m}); got != kill {
		t.Errorf("another calling convention: %#x", got)
	}
	if len((Filter{}).admitting(mark).Code) != 0 {
		t.Error("no filter became one")
	}
}
