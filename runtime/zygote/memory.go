//go:build !cgo

package zygote

// keepMemory: pure Go registers nothing with the kernel, so the zygote lets go of all it does not need.
const keepMemory = false
