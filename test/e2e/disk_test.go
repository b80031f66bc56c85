package e2e

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/test/lab"
)

// TestFullDisk: with no space left every write is refused with the disk and the way out named, reads go on, and freed space heals it.
func TestFullDisk(t *testing.T) {
	lab.NeedRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("skein-e2e", dir, "tmpfs", 0, "size=320m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	t.Setenv("SKEIN_DEV_DIR", filepath.Join(dir, "d"))
	l := lab.New(t, "e4", 1, 0)
	l.Must(0, "pull", "-q", l.Image("v1"))
	ballast := filepath.Join(dir, "ballast")
	fill(t, ballast)
	for _, args := range [][]string{
		{"pull", l.Image("v2")},
		{"run", "--rm", l.Image("v1")},
		{"service", "create", "-d", "--name", "web", l.Image("v1")},
		{"network", "create", "-d", "overlay", "backend"},
	} {
		_, errOut, code := l.Docker(0, args...)
		if code == 0 || !strings.Contains(errOut, "free") || !strings.Contains(errOut, dir) {
			t.Errorf("docker %v: exit code %d, want an error that names the disk and the fix:\n%s", args, code, errOut)
		}
	}
	l.Must(0, "node", "ls")
	if out := l.Must(0, "ps", "-aq"); out != "" {
		t.Errorf("containers are left of refused requests: %s", out)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	l.Eventually(5*time.Second, "writes are taken again", func() (bool, string) {
		_, e, code := l.Docker(0, "service", "create", "-d", "--name", "web", l.Image("v1"))
		return code == 0, e
	})
	running(t, l, 0, "web", 1, 10*time.Second)
}

// fill writes until the disk is full.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(f, zeros{}); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("fill the disk: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
