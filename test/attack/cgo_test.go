//go:build cgo

package attack

// keepsMemory: the zygote of a binary built with cgo keeps the C library's pages, and what they hold can be seen.
const keepsMemory = true
