//go:build cgo

package oci

// dynamic: a test binary built with cgo needs a loader that containers of these tests do not have.
const dynamic = true
