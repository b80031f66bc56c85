#include "textflag.h"

// func cloneRun(args unsafe.Pointer, size uintptr, arena unsafe.Pointer) (ret uintptr)
//
// The layout of arena and ops is in program.go. R12 arena, R13 op, BX its control word, R15 how often openat2 may still be repeated: it fails
// with EAGAIN where a name leads through ".." while anything on the machine is renamed or mounted (openat2(2)).
TEXT ·cloneRun(SB),NOSPLIT,$0-32
	MOVQ	args+0(FP), DI
	MOVQ	size+8(FP), SI
	MOVQ	arena+16(FP), R12
	MOVQ	$435, AX
	SYSCALL
	TESTQ	AX, AX
	JZ	child
	MOVQ	AX, ret+24(FP)
	RET
child:
	LEAQ	4096(R12), R13
	MOVQ	$0x10000, R15
loop:
	MOVQ	56(R13), BX
	MOVQ	8(R13), DI
	MOVQ	16(R13), SI
	MOVQ	24(R13), DX
	MOVQ	32(R13), R10
	MOVQ	40(R13), R8
	MOVQ	48(R13), R9
	TESTQ	$1, BX
	JZ	n1
	MOVQ	64(R12)(DI*8), DI
n1:
	TESTQ	$2, BX
	JZ	n2
	MOVQ	64(R12)(SI*8), SI
n2:
	TESTQ	$4, BX
	JZ	n3
	MOVQ	64(R12)(DX*8), DX
n3:
	TESTQ	$8, BX
	JZ	n4
	MOVQ	64(R12)(R10*8), R10
n4:
	TESTQ	$16, BX
	JZ	n5
	MOVQ	64(R12)(R8*8), R8
n5:
	MOVQ	0(R13), AX
	CMPQ	AX, $0x10000
	JCC	pseudo
	SYSCALL
	CMPQ	AX, $-11
	JEQ	again
done:
	TESTQ	AX, AX
	JNZ	store
	TESTQ	$128, BX
	JNZ	enter
	TESTQ	$64, BX // the child's side of a fork: the slot is the parent's
	JNZ	nostore
store:
	MOVQ	BX, CX
	SHRQ	$8, CX
	ANDQ	$255, CX
	CMPQ	CX, $255
	JEQ	nostore
	MOVQ	AX, 64(R12)(CX*8)
nostore:
	CMPQ	AX, $0xfffffffffffff001
	JCC	bad
	TESTQ	$64, BX
	JZ	skip
	TESTQ	AX, AX
	JNZ	skip
	XORQ	BX, BX
	JMP	next
skip:
	SHRQ	$16, BX
	ANDQ	$0xffff, BX
	JMP	next
bad:
	NEGQ	AX
	MOVQ	BX, CX
	SHRQ	$32, CX
	ANDQ	$0xffff, CX
	CMPQ	CX, $0xffff
	JEQ	fatal
	MOVQ	CX, BX
next:
	INCQ	BX
	SHLQ	$6, BX
	ADDQ	BX, R13
	JMP	loop
again:
	CMPQ	0(R13), $437
	JNE	done
	SUBQ	$1, R15
	JHI	loop
	MOVQ	$1, R15
	JMP	done
pseudo:
	CMPQ	AX, $0x10001
	JEQ	jump
	MOVQ	SI, (DI)
	XORQ	BX, BX
	JMP	next
jump:
	MOVQ	DI, R13
	JMP	loop
enter: // from a register: the zygote may already overwrite its slots
	LEAQ	-2048(DI), R12
	JMP	child
fatal:
	MOVQ	AX, 0(R12)
	MOVQ	R13, 8(R12)
	MOVQ	$231, AX
	MOVQ	$127, DI
	SYSCALL
	INT	$3

// func interpAddr() uintptr
TEXT ·interpAddr(SB),NOSPLIT,$0-8
	LEAQ	·cloneRun(SB), AX
	MOVQ	AX, ret+0(FP)
	RET

// func cloneRunAt(args unsafe.Pointer, size uintptr, arena unsafe.Pointer, code unsafe.Pointer) (ret uintptr)
TEXT ·cloneRunAt(SB),NOSPLIT,$32-40
	MOVQ	args+0(FP), AX
	MOVQ	AX, 0(SP)
	MOVQ	size+8(FP), AX
	MOVQ	AX, 8(SP)
	MOVQ	arena+16(FP), AX
	MOVQ	AX, 16(SP)
	MOVQ	code+24(FP), AX
	CALL	AX
	MOVQ	24(SP), AX
	MOVQ	AX, ret+32(FP)
	RET
