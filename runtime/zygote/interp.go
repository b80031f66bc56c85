package zygote

import "unsafe"

// Pseudo system calls of the interpreter; all real numbers are far below.
const (
	opStore = 0x10000 // store the second argument at the address of the first
	opJump  = 0x10001 // continue at the op whose address is the first argument
)

// cloneRun calls clone3 and, in the child, interprets the program in the arena without stack, heap or Go code; it returns in the
// parent only. interpAddr is the address of its text, which the zygote keeps mapped.
//
//go:noescape
func cloneRun(args unsafe.Pointer, size uintptr, arena unsafe.Pointer) (ret uintptr)

func interpAddr() uintptr
