#include "textflag.h"

// func cloneRun(args unsafe.Pointer, size uintptr, arena unsafe.Pointer) (ret uintptr)
//
// The layout of arena and ops is in program.go. R19 arena, R20 op, R21 its control word, R23 how often openat2 may still be repeated (see
// interp_amd64.s). The kernel keeps all registers but R0.
TEXT ·cloneRun(SB),NOSPLIT|NOFRAME,$0-32
	MOVD	args+0(FP), R0
	MOVD	size+8(FP), R1
	MOVD	arena+16(FP), R19
	MOVD	$435, R8
	SVC
	CBZ	R0, child
	MOVD	R0, ret+24(FP)
	RET
child:
	MOVD	$4096, R9
	ADD	R9, R19, R20
	MOVD	$0x10000, R23
loop:
	MOVD	56(R20), R21
	MOVD	8(R20), R0
	MOVD	16(R20), R1
	MOVD	24(R20), R2
	MOVD	32(R20), R3
	MOVD	40(R20), R4
	MOVD	48(R20), R5
	ADD	$64, R19, R10
	TBZ	$0, R21, n1
	MOVD	(R10)(R0<<3), R0
n1:
	TBZ	$1, R21, n2
	MOVD	(R10)(R1<<3), R1
n2:
	TBZ	$2, R21, n3
	MOVD	(R10)(R2<<3), R2
n3:
	TBZ	$3, R21, n4
	MOVD	(R10)(R3<<3), R3
n4:
	TBZ	$4, R21, n5
	MOVD	(R10)(R4<<3), R4
n5:
	MOVD	0(R20), R8
	MOVD	$0x10000, R9
	CMP	R9, R8
	BHS	pseudo
	MOVD	R0, R22
	SVC
	CMN	$11, R0
	BEQ	again
done:
	CBNZ	R0, store
	TBNZ	$7, R21, enter
	TBNZ	$6, R21, nostore // the child's side of a fork: the slot is the parent's
store:
	LSR	$8, R21, R11
	AND	$255, R11, R11
	CMP	$255, R11
	BEQ	nostore
	ADD	$64, R19, R10
	MOVD	R0, (R10)(R11<<3)
nostore:
	CMN	$4095, R0
	BHS	bad
	TBZ	$6, R21, skip
	CBNZ	R0, skip
	MOVD	$0, R11
	B	next
skip:
	LSR	$16, R21, R11
	AND	$0xffff, R11, R11
	B	next
bad:
	NEG	R0, R0
	LSR	$32, R21, R11
	AND	$0xffff, R11, R11
	MOVD	$0xffff, R9
	CMP	R9, R11
	BEQ	fatal
next:
	ADD	$1, R11, R11
	ADD	R11<<6, R20, R20
	B	loop
again:
	MOVD	0(R20), R9
	CMP	$437, R9
	BNE	done
	SUBS	$1, R23, R23
	BNE	loop
	MOVD	$1, R23
	B	done
pseudo:
	MOVD	$0x10001, R9
	CMP	R9, R8
	BEQ	jump
	MOVD	R1, (R0)
	MOVD	$0, R11
	B	next
jump:
	MOVD	R0, R20
	B	loop
enter: // from a register: the zygote may already overwrite its slots
	SUB	$2048, R22, R19
	B	child
fatal:
	MOVD	R0, 0(R19)
	MOVD	R20, 8(R19)
	MOVD	$127, R0
	MOVD	$94, R8
	SVC
	BRK

// func interpAddr() uintptr
TEXT ·interpAddr(SB),NOSPLIT,$0-8
	MOVD	$·cloneRun(SB), R0
	MOVD	R0, ret+0(FP)
	RET

// func cloneRunAt(args unsafe.Pointer, size uintptr, arena unsafe.Pointer, code unsafe.Pointer) (ret uintptr)
TEXT ·cloneRunAt(SB),NOSPLIT,$40-40
	MOVD	args+0(FP), R0
	MOVD	R0, 8(RSP)
	MOVD	size+8(FP), R0
	MOVD	R0, 16(RSP)
	MOVD	arena+16(FP), R0
	MOVD	R0, 24(RSP)
	MOVD	code+24(FP), R0
	BL	(R0)
	MOVD	32(RSP), R0
	MOVD	R0, ret+32(FP)
	RET
