//go:build cgo

package zygote

// keepMemory: the C library registers restartable sequences (rseq(2)) in its thread's memory, and the kernel kills a process that has
// unmapped them. A binary built with cgo, as `go run` does where there is a C compiler, keeps its pages; they are shared until
// somebody writes to them.
const keepMemory = true
