//go:build !cgo

package oci

const dynamic = false
