//go:build !cgo

package attack

const keepsMemory = false
