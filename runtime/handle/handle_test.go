package handle

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// While names are renamed elsewhere on the host, a name with ".." still opens, and never leads out of the directory.
func TestOpenWhileNamesMove(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"root/a/b", "elsewhere"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root, err := unix.Open(filepath.Join(dir, "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(root)
	stop, done := make(chan struct{}), sync.WaitGroup{}
	done.Go(func() {
		x, y := filepath.Join(dir, "elsewhere"), filepath.Join(dir, "moved")
		for {
			select {
			case <-stop:
				return
			default:
				_ = os.Rename(x, y)
				x, y = y, x
			}
		}
	})
	defer done.Wait()
	defer close(stop)
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for i := range 2000 {
		fd, err := Open(root, "a/../a/b/../../../../a/b", how)
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		unix.Close(fd)
	}
	how.Resolve = unix.RESOLVE_BENEATH
	if _, err := Open(root, "../elsewhere", how); !errors.Is(err, unix.EXDEV) {
		t.Errorf("a way out: %v, want EXDEV", err)
	}
}
