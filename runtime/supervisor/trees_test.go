package supervisor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestSubpath: what lies below a volume is mounted, directory or file, and no link leads out of it.
func TestSubpath(t *testing.T) {
	e := newEnv(t)
	vol, outside := filepath.Join(e.dir, "vol"), filepath.Join(e.dir, "outside")
	for _, d := range []string{vol + "/a/b", outside} {
		e.must(os.MkdirAll(d, 0o755))
		e.must(os.WriteFile(d+"/f", []byte("in "+filepath.Base(d)), 0o644))
	}
	for name, to := range map[string]string{"in": "a/b", "out": "../outside", "abs": outside, "proc": "/proc/self/root" + outside} {
		e.must(os.Symlink(to, filepath.Join(vol, name)))
	}
	for i, tc := range []struct{ sub, target, read, want string }{
		{"a", "/m", "/m/b/f", "in b"}, {"a/b/f", "/m", "/m", "in b"}, {"in", "/m", "/m/f", "in b"},
		{"out", "/m", "", "leads out of the volume"}, {"abs", "/m", "", "leads out of the volume"}, {"proc", "/m", "", "leads out of the volume"},
		{"none", "/m", "", "cannot access path"},
	} {
		c := e.config("s"+strings.Repeat("x", i), "read", tc.read)
		c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: tc.target, Type: "bind", Source: vol, Options: []string{"rbind", "rro"}})
		c.Subpaths = map[string]string{tc.target: tc.sub}
		if tc.read == "" {
			if err := e.sup.Create(e.ctx, c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: %v, want %q", tc.sub, err, tc.want)
			}
			continue
		}
		if x, out := e.run(c); x.Code != 0 || !strings.Contains(out, tc.want) {
			t.Errorf("%s: exit %+v\n%s", tc.sub, x, out)
		}
	}
}

// TestSubpathRace: another holder of the volume changes the path all the time; the outside is never mounted.
func TestSubpathRace(t *testing.T) {
	dir := t.TempDir()
	vol, outside := filepath.Join(dir, "vol"), filepath.Join(dir, "outside")
	for _, d := range []string{vol + "/dir", outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, vol+"/link"); err != nil {
		t.Fatal(err)
	}
	var bad unix.Stat_t
	if err := unix.Stat(outside, &bad); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, vol+"/dir", unix.AT_FDCWD, vol+"/link", unix.RENAME_EXCHANGE)
			}
		}
	}()
	mounted := 0
	for range 2000 {
		fd, _, err := openSubpath(vol, "dir", true)
		if err != nil {
			continue
		}
		mounted++
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Ino == bad.Ino {
			t.Fatalf("the outside was mounted (%v)", err)
		}
		unix.Close(fd)
	}
	close(stop)
	<-done
	t.Logf("%d of 2000 found the directory", mounted)
}
