#include "textflag.h"

// func program()
//
// The whole program: no stack but what the kernel gave, no data, works at any address. R19 the command's pid, R20 scratch memory: the
// name and later the signal set at 0, the counter and later the status at 16. The kernel keeps all registers but R0.
TEXT ·program(SB),NOSPLIT|NOFRAME,$0-0
	MOVD	RSP, R20
	SUB	$64, R20, R20
	AND	$~15, R20, R20
	MOVD	$0x692d72656b636f64, R9 // "docker-init"
	MOVD	R9, 0(R20)
	MOVD	$0x74696e, R9
	MOVD	R9, 8(R20)
	MOVD	$15, R0 // prctl(PR_SET_NAME, name)
	MOVD	R20, R1
	MOVD	$167, R8
	SVC
	MOVD	$36, R0 // prctl(PR_SET_CHILD_SUBREAPER, 1): for a container in another's pid namespace
	MOVD	$1, R1
	MOVD	$0, R2
	MOVD	$0, R3
	MOVD	$0, R4
	SVC
	MOVD	$9, R0 // read(pidFD, &counter, 8)
	ADD	$16, R20, R1
	MOVD	$8, R2
	MOVD	$63, R8
	SVC
	CMP	$8, R0
	BNE	broken
	MOVD	16(R20), R19
	MOVD	$9, R0 // close(pidFD)
	MOVD	$57, R8
	SVC
	MOVD	$-1, R9
	MOVD	R9, 0(R20)
reap:
	MOVD	$-1, R0 // wait4(-1, &status, WNOHANG, NULL)
	ADD	$16, R20, R1
	MOVD	$1, R2
	MOVD	$0, R3
	MOVD	$260, R8
	SVC
	CMP	R19, R0
	BEQ	ended
	CMP	$0, R0
	BGT	reap
	CMN	$10, R0 // ECHILD: somebody else, a tracer, took the command
	BEQ	broken
wait:
	MOVD	R20, R0 // rt_sigtimedwait(&all, NULL, NULL, 8)
	MOVD	$0, R1
	MOVD	$0, R2
	MOVD	$8, R3
	MOVD	$137, R8
	SVC
	CMP	$17, R0
	BEQ	reap
	CMN	$4, R0
	BEQ	wait
	CMP	$0, R0
	BLE	broken
	MOVD	R0, R1 // kill(command, signal)
	MOVD	R19, R0
	MOVD	$129, R8
	SVC
	B	wait
ended:
	MOVWU	16(R20), R0
	ANDS	$0x7f, R0, R9
	BNE	killed
	LSR	$8, R0, R0
	AND	$0xff, R0, R0
	B	exit
killed:
	ADD	$128, R9, R0
	B	exit
broken:
	MOVD	$125, R0
exit:
	MOVD	$94, R8
	SVC
	WORD	$0xd4200000 // BRK
	WORD	$0xd4200000

// func programAddr() uintptr
TEXT ·programAddr(SB),NOSPLIT,$0-8
	MOVD	$·program(SB), R0
	MOVD	R0, ret+0(FP)
	RET
