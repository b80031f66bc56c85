package main

import (
	"context"
	"os"
	"testing"
	"time"
)

// TestGuest runs all checks in a machine of its own, when told where qemu and a kernel are.
func TestGuest(t *testing.T) {
	root := os.Getenv("SKEIN_VM_ROOT")
	if root == "" {
		t.Skip("SKEIN_VM_ROOT does not name a directory with the extracted packages of qemu and a kernel, see go doc skein/test/vm")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	if err := host(ctx, config{root: root, busybox: "/usr/bin/busybox", accel: "tcg", memory: 3072}, t.Output()); err != nil {
		t.Fatal(err)
	}
}

// TestImageArchive: the archive is made of what the host's busybox offers.
func TestImageArchive(t *testing.T) {
	if _, err := os.Stat("/usr/bin/busybox"); err != nil {
		t.Skip(err)
	}
	b, err := imageArchive("/usr/bin/busybox")
	if err != nil || len(b) < 1<<20 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}
