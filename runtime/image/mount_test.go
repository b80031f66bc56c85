package image_test

import (
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"skein/runtime"
)

// checkTree mounts m where nobody else sees it and compares files: content, "-" for absent, "mode NNN" for a directory.
func checkTree(t *testing.T, m runtime.Mount, want map[string]string) {
	t.Helper()
	at := t.TempDir()
	problems := make(chan []string)
	go func() {
		// The thread keeps its mount namespace and ends with the goroutine, and the mount with it.
		goruntime.LockOSThread()
		problems <- compareTree(at, m, want)
	}()
	for _, p := range <-problems {
		t.Error(p)
	}
}

func compareTree(at string, m runtime.Mount, want map[string]string) (problems []string) {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return []string{fmt.Sprintf("unshare: %v", err)}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return []string{fmt.Sprintf("private: %v", err)}
	}
	flags, data := uintptr(0), strings.Join(m.Options, ",")
	if m.Type == "bind" {
		flags, data = unix.MS_BIND|unix.MS_REC, ""
	}
	if err := unix.Mount(m.Source, at, m.Type, flags, data); err != nil {
		return []string{fmt.Sprintf("mount %+v: %v", m, err)}
	}
	// Links of the image are meant inside of it.
	if err := unix.Chroot(at); err != nil {
		return []string{fmt.Sprintf("chroot: %v", err)}
	}
	for name, w := range want {
		got := ""
		p := filepath.Join("/", name)
		st, err := os.Lstat(p)
		switch {
		case os.IsNotExist(err):
			got = "-"
		case err != nil:
			got = err.Error()
		case st.IsDir():
			got = fmt.Sprintf("mode %04o", st.Mode().Perm())
		default:
			b, err := os.ReadFile(p)
			got = string(b)
			if err != nil {
				got = err.Error()
			}
		}
		if got != w {
			problems = append(problems, fmt.Sprintf("%s: got %q, want %q", name, got, w))
		}
	}
	return problems
}
