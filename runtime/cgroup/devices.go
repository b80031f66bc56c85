package cgroup

import (
	"fmt"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"unsafe"
)

// eBPF, as far as a device filter needs it: the program gets a context of {access<<16|type, major, minor} and returns 1 to allow.
const (
	bpfProgLoad         = 5
	bpfProgAttach       = 8
	progCgroupDevice    = 15
	attachCgroupDevice  = 6
	maxRules            = 256
	typeBlock, typeChar = 1, 2
)

// insn encodes one eBPF instruction.
func insn(op uint8, dst, src uint8, off int16, imm int32) uint64 {
	return uint64(op) | uint64(src<<4|dst)<<8 | uint64(uint16(off))<<16 | uint64(uint32(imm))<<32
}

// deviceProgram checks the rules from last to first: the last that matches decides; without one everything is denied.
func deviceProgram(rules []specs.LinuxDeviceCgroup) []uint64 {
	const ldw, and, rsh, mov, movImm, jeqImm, jneImm, jneReg, exit = 0x61, 0x54, 0x74, 0xbc, 0xb4, 0x16, 0x56, 0x5e, 0x95
	p := []uint64{
		insn(ldw, 2, 1, 0, 0), insn(and, 2, 0, 0, 0xffff), // r2 type
		insn(ldw, 3, 1, 0, 0), insn(rsh, 3, 0, 0, 16), // r3 access
		insn(ldw, 4, 1, 4, 0), insn(ldw, 5, 1, 8, 0), // r4 major, r5 minor
	}
	for i := len(rules) - 1; i >= 0; i-- {
		r := rules[i]
		var b []uint64
		next := func(op uint8, dst, src uint8, imm int32) { b = append(b, insn(op, dst, src, 0, imm)) }
		switch r.Type {
		case "c":
			next(jneImm, 2, 0, typeChar)
		case "b":
			next(jneImm, 2, 0, typeBlock)
		}
		var acc int32
		for _, c := range r.Access {
			acc |= map[rune]int32{'m': 1, 'r': 2, 'w': 4}[c]
		}
		if acc != 0 && acc != 7 { // to allow, every access asked must be among the rule's; to deny, one
			b = append(b, insn(mov, 0, 3, 0, 0), insn(and, 0, 0, 0, acc))
			if r.Allow {
				next(jneReg, 0, 3, 0)
			} else {
				next(jeqImm, 0, 0, 0)
			}
		}
		if r.Major != nil && *r.Major >= 0 {
			next(jneImm, 4, 0, int32(*r.Major))
		}
		if r.Minor != nil && *r.Minor >= 0 {
			next(jneImm, 5, 0, int32(*r.Minor))
		}
		verdict := int32(0)
		if r.Allow {
			verdict = 1
		}
		b = append(b, insn(movImm, 0, 0, 0, verdict), insn(exit, 0, 0, 0, 0))
		for j, x := range b {
			if op := uint8(x); op == jneImm || op == jneReg || op == jeqImm {
				b[j] = x | uint64(uint16(len(b)-j-1))<<16
			}
		}
		p = append(p, b...)
		if len(b) == 2 { // it matches everything; the kernel refuses code that cannot be reached
			return p
		}
	}
	return append(p, insn(movImm, 0, 0, 0, 0), insn(exit, 0, 0, 0, 0))
}

// devicesV2 attaches a filter to the v2 group.
func (g *Group) devicesV2(rules []specs.LinuxDeviceCgroup) error {
	if len(rules) > maxRules {
		return fmt.Errorf("%d device rules, at most %d", len(rules), maxRules)
	}
	code := deviceProgram(rules)
	license := []byte("Apache-2.0\x00")
	load := struct {
		typ, count    uint32
		insns         unsafe.Pointer
		license       unsafe.Pointer
		level, size   uint32
		buf           uint64
		kern, flags   uint32
		name          [16]byte
		ifindex, kind uint32
	}{typ: progCgroupDevice, count: uint32(len(code)), insns: unsafe.Pointer(&code[0]),
		license: unsafe.Pointer(&license[0]), kind: attachCgroupDevice}
	fd, err := bpf(bpfProgLoad, unsafe.Pointer(&load), unsafe.Sizeof(load))
	if err != nil {
		return fmt.Errorf("load device filter: %w", err)
	}
	defer unix.Close(fd)
	dir, err := unix.Open(g.v2, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("attach device filter: %w", err)
	}
	defer unix.Close(dir)
	attach := struct{ target, prog, typ, flags uint32 }{uint32(dir), uint32(fd), attachCgroupDevice, 0}
	if _, err := bpf(bpfProgAttach, unsafe.Pointer(&attach), unsafe.Sizeof(attach)); err != nil {
		return fmt.Errorf("attach device filter to %s: %w", g.v2, err)
	}
	return nil
}

func bpf(cmd int, attr unsafe.Pointer, size uintptr) (int, error) {
	n, _, e := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
	if e != 0 {
		return -1, e
	}
	return int(n), nil
}
