package overlay

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"testing"
	"time"
)

// TestMain fails when the tests leave goroutines, descriptors or namespace mounts behind.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "overlay")
	if err != nil || os.Setenv("TMPDIR", dir) != nil { // others run tests at the same time
		fmt.Fprintln(os.Stderr, "no directory of our own:", err)
		os.Exit(1)
	}
	fds := descriptors()
	code := m.Run()
	deadline := time.Now().Add(10 * time.Second) // idle TCP connections of DNS clients end after their time
	for runtime.NumGoroutine() > 2 && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
	}
	if n := runtime.NumGoroutine(); n > 2 && code == 0 {
		fmt.Fprintf(os.Stderr, "%d goroutines left\n", n)
		_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
		code = 1
	}
	if n := descriptors(); n > fds+3 && code == 0 { // the poller's own
		fmt.Fprintf(os.Stderr, "%d descriptors before, %d after\n", fds, n)
		links, _ := filepath.Glob("/proc/self/fd/*")
		for _, l := range links {
			to, _ := os.Readlink(l)
			fmt.Fprintln(os.Stderr, l, to)
		}
		code = 1
	}
	if mounts, err := os.ReadFile("/proc/self/mounts"); err == nil && strings.Contains(string(mounts), dir) && code == 0 {
		fmt.Fprintln(os.Stderr, "namespace mounts left")
		code = 1
	}
	if err := os.RemoveAll(dir); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func descriptors() int {
	fds, _ := os.ReadDir("/proc/self/fd")
	return len(fds)
}
