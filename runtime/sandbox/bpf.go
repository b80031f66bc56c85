package sandbox

import (
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// instr is one instruction of classic BPF.
type instr struct {
	code   uint16
	jt, jf uint8
	k      uint32
}

const (
	ldAbs = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	jeq   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jge   = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	jgt   = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
	ja    = unix.BPF_JMP | unix.BPF_JA
	and   = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	retK  = unix.BPF_RET | unix.BPF_K
)

// no marks the jump to the next rule, patched when the rule's length is known.
const no = 0xff

func load(off uint32) instr                          { return instr{code: ldAbs, k: off} }
func ret(k uint32) instr                             { return instr{code: retK, k: k} }
func jump(code uint16, k uint32, jt, jf uint8) instr { return instr{code, jt, jf, k} }
func argOffsets(index uint) (low uint32, high uint32) {
	return uint32(16 + 8*index), uint32(20 + 8*index)
}

// code tests all conditions and returns the action, or falls through to what follows.
func (r rule) code() []instr {
	var out []instr
	for _, a := range r.args {
		out = append(out, condition(a)...)
	}
	out = append(out, ret(r.act))
	for i := range out {
		if out[i].jt == no {
			out[i].jt = uint8(len(out) - i - 1)
		}
		if out[i].jf == no {
			out[i].jf = uint8(len(out) - i - 1)
		}
	}
	return out
}

// condition compares one 64-bit argument half by half: it falls through when the condition holds and jumps to no when it does not.
func condition(a specs.LinuxSeccompArg) []instr {
	low, high := argOffsets(a.Index)
	vl, vh := uint32(a.Value), uint32(a.Value>>32)
	switch a.Op {
	case specs.OpEqualTo:
		return []instr{load(high), jump(jeq, vh, 0, no), load(low), jump(jeq, vl, 0, no)}
	case specs.OpNotEqual:
		return []instr{load(high), jump(jeq, vh, 0, 2), load(low), jump(jeq, vl, no, 0)}
	case specs.OpGreaterThan:
		return []instr{load(high), jump(jgt, vh, 3, 0), jump(jeq, vh, 0, no), load(low), jump(jgt, vl, 0, no)}
	case specs.OpGreaterEqual:
		return []instr{load(high), jump(jgt, vh, 3, 0), jump(jeq, vh, 0, no), load(low), jump(jge, vl, 0, no)}
	case specs.OpLessThan:
		return []instr{load(high), jump(jgt, vh, no, 0), jump(jeq, vh, 0, 2), load(low), jump(jge, vl, no, 0)}
	case specs.OpLessEqual:
		return []instr{load(high), jump(jgt, vh, no, 0), jump(jeq, vh, 0, 2), load(low), jump(jgt, vl, no, 0)}
	case specs.OpMaskedEqual: // value is the mask, valueTwo the expected bits
		wl, wh := uint32(a.ValueTwo), uint32(a.ValueTwo>>32)
		return []instr{load(high), {code: and, k: vh}, jump(jeq, wh, 0, no), load(low), {code: and, k: vl}, jump(jeq, wl, 0, no)}
	}
	// An unknown operator never holds; checked before compilation.
	return []instr{load(low), jump(jge, 0, no, no)}
}

func knownOp(o specs.LinuxSeccompOperator) bool {
	switch o {
	case specs.OpEqualTo, specs.OpNotEqual, specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpMaskedEqual:
		return true
	}
	return false
}

// shareReturns lets jumps to equal returns share one, as far as a jump reaches, and drops what nothing leads to any more. The kernel
// translates a filter anew for each process that gets it, so that every instruction less is time less.
func shareReturns(list []instr) []instr {
	for i := range list {
		if list[i].branches() {
			list[i].jt = furthest(list, i, list[i].jt)
			list[i].jf = furthest(list, i, list[i].jf)
		}
	}
	used := make([]bool, len(list)+1)
	used[0] = true
	for i, x := range list {
		switch {
		case !used[i] || x.code == retK:
		case x.code == ja:
			used[i+1+int(x.k)] = true
		case x.branches():
			used[i+1+int(x.jt)], used[i+1+int(x.jf)] = true, true
		default:
			used[i+1] = true
		}
	}
	at := make([]int, len(list)+1) // new position
	for i := range list {
		at[i+1] = at[i]
		if used[i] {
			at[i+1]++
		}
	}
	out := make([]instr, 0, at[len(list)])
	for i, x := range list {
		if !used[i] {
			continue
		}
		if x.code == ja {
			x.k = uint32(at[i+1+int(x.k)] - at[i+1])
		} else if x.branches() {
			x.jt, x.jf = uint8(at[i+1+int(x.jt)]-at[i+1]), uint8(at[i+1+int(x.jf)]-at[i+1])
		}
		out = append(out, x)
	}
	return out
}

// branches tells a conditional jump.
func (x instr) branches() bool { return x.code == jeq || x.code == jge || x.code == jgt }

// furthest is the longest jump from i to a return equal to the one that off leads to, or off.
func furthest(list []instr, i int, off uint8) uint8 {
	target := list[i+1+int(off)]
	if target.code != retK {
		return off
	}
	for far := min(i+1+255, len(list)-1); far > i+1+int(off); far-- {
		if list[far] == target {
			return uint8(far - i - 1)
		}
	}
	return off
}
