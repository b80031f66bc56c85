#include "textflag.h"

// func program()
//
// The whole program: no stack but what the kernel gave, no data, works at any address. R12 the command's pid, R13 scratch memory: the
// name and later the signal set at 0, the counter and later the status at 16.
TEXT ·program(SB),NOSPLIT|NOFRAME,$0-0
	MOVQ	SP, R13
	SUBQ	$64, R13
	ANDQ	$~15, R13
	MOVQ	$0x692d72656b636f64, AX // "docker-init"
	MOVQ	AX, 0(R13)
	MOVQ	$0x74696e, AX
	MOVQ	AX, 8(R13)
	MOVQ	$157, AX // prctl(PR_SET_NAME, name)
	MOVQ	$15, DI
	MOVQ	R13, SI
	SYSCALL
	MOVQ	$157, AX // prctl(PR_SET_CHILD_SUBREAPER, 1): for a container in another's pid namespace
	MOVQ	$36, DI
	MOVQ	$1, SI
	XORQ	DX, DX
	XORQ	R10, R10
	XORQ	R8, R8
	SYSCALL
	XORQ	AX, AX // read(pidFD, &counter, 8)
	MOVQ	$9, DI
	LEAQ	16(R13), SI
	MOVQ	$8, DX
	SYSCALL
	CMPQ	AX, $8
	JNE	broken
	MOVQ	16(R13), R12
	MOVQ	$3, AX // close(pidFD)
	MOVQ	$9, DI
	SYSCALL
	MOVQ	$-1, AX
	MOVQ	AX, 0(R13)
reap:
	MOVQ	$61, AX // wait4(-1, &status, WNOHANG, NULL)
	MOVQ	$-1, DI
	LEAQ	16(R13), SI
	MOVQ	$1, DX
	XORQ	R10, R10
	SYSCALL
	CMPQ	AX, R12
	JEQ	ended
	TESTQ	AX, AX
	JGT	reap
	CMPQ	AX, $-10 // ECHILD: somebody else, a tracer, took the command
	JEQ	broken
wait:
	MOVQ	$128, AX // rt_sigtimedwait(&all, NULL, NULL, 8)
	MOVQ	R13, DI
	XORQ	SI, SI
	XORQ	DX, DX
	MOVQ	$8, R10
	SYSCALL
	CMPQ	AX, $17
	JEQ	reap
	CMPQ	AX, $-4
	JEQ	wait
	TESTQ	AX, AX
	JLE	broken
	MOVQ	AX, SI // kill(command, signal)
	MOVQ	R12, DI
	MOVQ	$62, AX
	SYSCALL
	JMP	wait
ended:
	MOVL	16(R13), DI
	MOVL	DI, AX
	ANDL	$0x7f, AX
	JNZ	killed
	SHRL	$8, DI
	ANDL	$0xff, DI
	JMP	exit
killed:
	LEAL	128(AX), DI
	JMP	exit
broken:
	MOVQ	$125, DI
exit:
	MOVQ	$231, AX
	SYSCALL
	INT	$3
	INT	$3
	INT	$3
	INT	$3

// func programAddr() uintptr
TEXT ·programAddr(SB),NOSPLIT,$0-8
	LEAQ	·program(SB), AX
	MOVQ	AX, ret+0(FP)
	RET
