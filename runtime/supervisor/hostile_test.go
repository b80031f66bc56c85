package supervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// plant makes an upper layer full of traps over the base image.
func plant(t *testing.T, c runtime.Config, links map[string]string) {
	t.Helper()
	upper := filepath.Join(filepath.Dir(c.LogPath), "upper")
	for name, to := range links {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(upper, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(upper, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHostileImage: links in the image lead neither mounts nor devices nor new files outside, and masks stay on.
func TestHostileImage(t *testing.T) {
	e := newEnv(t)
	outside := filepath.Join(e.dir, "outside")
	e.must(os.Mkdir(outside, 0o777))
	up := "../../../../../../../.."
	c := e.config("evil", "read", "/proc/keys", "write", "/proc/irq/default_smp_affinity", "1", "ls", "/dev/shm", "read", "/proc/self/cgroup", "host")
	plant(t, c, map[string]string{"proc": "/t/proc", "dev": up + "/t/dev", "sys": "/t/sys", "data": outside, "work": up + outside, "etc/hosts": outside + "/hosts"})
	for _, d := range []string{outside, "t/proc", "t/dev", "t/sys"} { // so that the links resolve inside
		e.must(os.MkdirAll(filepath.Join(filepath.Dir(c.LogPath), "upper", d), 0o777))
	}
	e.must(os.WriteFile(filepath.Join(filepath.Dir(c.LogPath), "upper", outside, "hosts"), nil, 0o644))
	c.Spec.Process.Cwd = "/work/new"
	c.Spec.Mounts = append(c.Spec.Mounts,
		specs.Mount{Destination: "/data/x/y", Type: "bind", Source: outside, Options: []string{"rbind"}},
		specs.Mount{Destination: "/etc/hosts", Type: "bind", Source: "/etc/hosts", Options: []string{"bind", "ro"}})
	_, out := e.run(c)
	for _, want := range []string{"read /proc/keys 0 <nil>", "write /proc/irq/default_smp_affinity open /proc/irq/default_smp_affinity: read-only", "ls /dev/shm <nil>",
		"cwd " + outside + "/new"} {
		if !strings.Contains(out, want) {
			t.Errorf("missing %q in %s", want, out)
		}
	}
	if left, _ := os.ReadDir(outside); len(left) != 0 {
		t.Errorf("made on the host: %v", left)
	}
}

// TestDanglingLinks: what is bound onto a link that leads to nothing is there all the same, and nothing is made outside.
func TestDanglingLinks(t *testing.T) {
	e := newEnv(t)
	outside := filepath.Join(e.dir, "outside")
	e.must(os.Mkdir(outside, 0o777))
	c := e.config("dangling", "read", "/etc/resolv.conf", "read", "/etc/hostname", "read", "/etc/hosts", "read", "/data")
	plant(t, c, map[string]string{"etc/resolv.conf": "../run/systemd/resolve/stub-resolv.conf", "etc/hostname": "../../../../../../.." + outside + "/name",
		"etc/hosts": "loop", "etc/loop": "hosts", "data": "etc/made"})
	source := filepath.Join(e.dir, "source")
	e.must(os.WriteFile(source, []byte("seven b"), 0o644))
	for _, dst := range []string{"/etc/resolv.conf", "/etc/hostname", "/etc/hosts", "/data"} {
		c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: dst, Type: "bind", Source: source, Options: []string{"bind", "ro"}})
	}
	_, out := e.run(c)
	for _, m := range c.Spec.Mounts[len(c.Spec.Mounts)-4:] {
		if want := "read " + m.Destination + " 7 <nil>"; !strings.Contains(out, want) {
			t.Errorf("missing %q in %s", want, out)
		}
	}
	if left, _ := os.ReadDir(outside); len(left) != 0 {
		t.Errorf("made on the host: %v", left)
	}
}

// TestWorkingDirectory: no working directory leads to a directory that the set-up had open.
func TestWorkingDirectory(t *testing.T) {
	e := newEnv(t)
	e.start(e.config("box", "sleep"))
	for n := range 24 {
		c := e.config(fmt.Sprintf("wd%d", n), "ls", ".", "host")
		c.Spec.Process.Cwd = fmt.Sprintf("/proc/self/fd/%d", n)
		if n == 23 {
			c.Spec.Process.Cwd = "/proc/1/cwd/../../../.."
		}
		if err := e.sup.Create(e.ctx, c); err != nil {
			continue
		}
		if _, err := e.sup.Start(e.ctx, c.ID); err != nil {
			continue
		}
		e.wait(c.ID)
		if out := e.log(c); !strings.Contains(out, "inside") || strings.Contains(out, "home") {
			t.Errorf("working directory %s: %s", c.Spec.Process.Cwd, out)
		}
	}
	for n := range 24 {
		p := runtime.Process{ID: fmt.Sprintf("x%d", n), Args: []string{"/inside", "ls", "."}, Cwd: fmt.Sprintf("/proc/self/fd/%d", n)}
		if _, err := e.sup.Exec(e.ctx, "box", p); err == nil {
			t.Errorf("exec in %s was started", p.Cwd)
		}
	}
}

// TestSwappedMountPoint: one container swaps a directory of a shared volume for a link while others mount below it.
func TestSwappedMountPoint(t *testing.T) {
	e := newEnv(t)
	outside, volume := filepath.Join(e.dir, "outside"), filepath.Join(e.dir, "volume")
	for _, d := range []string{outside, volume, volume + "/a"} {
		e.must(os.Mkdir(d, 0o777))
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		link := filepath.Join(volume, "link")
		_ = os.Symlink(outside, link)
		for {
			select {
			case <-stop:
				return
			default:
				_ = os.Rename(filepath.Join(volume, "a"), filepath.Join(volume, "b"))
				_ = os.Rename(link, filepath.Join(volume, "a"))
				_ = os.Rename(filepath.Join(volume, "a"), link)
				_ = os.Rename(filepath.Join(volume, "b"), filepath.Join(volume, "a"))
			}
		}
	})
	ok := 0
	for i := range 40 {
		c := e.config(fmt.Sprintf("m%d", i), "exit", "0")
		c.Spec.Mounts = append(c.Spec.Mounts,
			specs.Mount{Destination: "/v", Type: "bind", Source: volume, Options: []string{"rbind"}},
			specs.Mount{Destination: fmt.Sprintf("/v/a/new%d", i), Type: "tmpfs", Source: "tmpfs"},
			specs.Mount{Destination: fmt.Sprintf("/v/a/file%d", i), Type: "bind", Source: "/etc/hosts", Options: []string{"bind"}})
		if err := e.sup.Create(e.ctx, c); err == nil {
			ok++
			e.must(e.sup.Delete(e.ctx, c.ID))
		}
	}
	close(stop)
	wg.Wait()
	if left, _ := os.ReadDir(outside); len(left) != 0 {
		t.Errorf("made outside: %v", left)
	}
	t.Logf("%d of 40 created", ok)
}

// TestCrashes: the supervisor is killed at arbitrary moments of arbitrary work; nothing is left and every end is known once.
func TestCrashes(t *testing.T) {
	e := newEnv(t)
	for i := range 6 {
		id := fmt.Sprintf("c%d", i)
		done := make(chan struct{})
		go func() {
			defer close(done)
			if e.sup.Create(e.ctx, e.config(id, "echo", "x", "exit", "3")) == nil {
				_, _ = e.sup.Start(e.ctx, id)
			}
		}()
		time.Sleep(time.Duration(i*i) * time.Millisecond)
		pid := e.supervisorPID()
		e.must(unix.Kill(pid, unix.SIGKILL))
		<-done
		e.until(func() bool { return !processAlive(pid) })
		e.ensure()
		st, err := e.sup.State(e.ctx, id)
		if err != nil {
			continue // it never came to be
		}
		if st.Status != runtime.Stopped {
			x := e.wait(id)
			t.Logf("killed after %d ms: %s, then %+v", i*i, st.Status, x)
		}
		e.must(e.sup.Delete(e.ctx, id))
	}
	if list, err := e.sup.List(e.ctx); err != nil || len(list) != 0 {
		t.Errorf("left: %v %v", list, err)
	}
}
