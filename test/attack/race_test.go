package attack

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// corePattern is the kernel parameter that an escape would change.
func corePattern(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// swapper runs a container that exchanges two names of a shared directory for ever.
func (w *world) swapper(shared, a, b string) (stop func()) {
	w.t.Helper()
	c := w.config("swapper", "swap", "/shared/"+a, "/shared/"+b)
	c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/shared", Type: "bind", Source: shared, Options: []string{"rbind"}})
	w.start(c)
	w.says(c, "ready")
	return func() { w.kill("swapper") }
}

// naively does by path, on the host, what a runtime without handles does, until the race is lost once: that the attack works.
func naively(t testing.TB, outside string, attempt func(round int)) {
	t.Helper()
	for i := range 200_000 {
		attempt(i)
		left, err := os.ReadDir(outside)
		if err != nil {
			t.Fatal(err)
		}
		if len(left) > 0 {
			t.Logf("by path the race is lost in round %d", i)
			for _, e := range left {
				_ = os.Remove(filepath.Join(outside, e.Name()))
			}
			return
		}
	}
	t.Error("the race was never won by path: the test attacks nothing")
}

// TestCVE_2021_30465_2024_45310_2025_24965: a container exchanges a directory of a shared volume and a link to the host while others mount a
// filesystem, a directory and a file below it. Making mount points by path makes directories and files on the host, and mounts there.
func TestCVE_2021_30465_2024_45310_2025_24965(t *testing.T) {
	w := newWorld(t)
	outside, volume := w.folder("outside"), w.folder("volume")
	w.must(os.Mkdir(filepath.Join(volume, "a"), 0o777))
	w.must(os.Symlink(outside, filepath.Join(volume, "b")))
	stop := w.swapper(volume, "a", "b")
	naively(t, outside, func(i int) {
		p := filepath.Join(volume, "a", fmt.Sprintf("naive%d", i))
		_ = os.MkdirAll(p, 0o755)
		_ = os.Remove(p)
		_ = os.Mkdir(filepath.Join(volume, "a", "naive"), 0o755)
	})
	made := 0
	for i, n := 0, manyRounds(60); i < n || (made == 0 && i < 50*n); i++ { // until one was made, too
		c := w.config(fmt.Sprintf("m%d", i%16), "exit", "0")
		c.LogPath = ""
		c.Spec.Mounts = append(c.Spec.Mounts,
			specs.Mount{Destination: "/v", Type: "bind", Source: volume, Options: []string{"rbind"}},
			specs.Mount{Destination: fmt.Sprintf("/v/a/fs%d", i), Type: "tmpfs", Source: "tmpfs"},
			specs.Mount{Destination: fmt.Sprintf("/v/a/dir%d", i), Type: "bind", Source: "/etc", Options: []string{"bind", "ro"}},
			specs.Mount{Destination: fmt.Sprintf("/v/a/file%d", i), Type: "bind", Source: "/etc/hosts", Options: []string{"bind"}})
		if err := w.sup.Create(w.ctx, c); err == nil {
			made++
			w.must(w.sup.Delete(w.ctx, c.ID))
		}
		if i%100 == 0 {
			empty(t, outside)
			w.clear(volume)
		}
	}
	stop()
	empty(t, outside)
	if made == 0 {
		t.Error("no container was made: nothing was tested")
	}
	t.Logf("%d of %d containers made", made, manyRounds(60))
}

// clear removes the mount points that are piling up in a volume, in whichever of the two names is the directory.
func (w *world) clear(volume string) {
	for _, n := range []string{"a", "b"} {
		d, err := os.OpenRoot(volume)
		w.must(err)
		if sub, err := d.OpenRoot(n); err == nil {
			f, err := sub.Open(".")
			w.must(err)
			names, _ := f.Readdirnames(-1)
			f.Close()
			for _, x := range names {
				_ = sub.Remove(x)
			}
			sub.Close()
		}
		d.Close()
	}
}

// TestCVE_2021_30465_OCI is the same race for the OCI command.
func TestCVE_2021_30465_OCI(t *testing.T) {
	w := newWorld(t)
	outside, volume := w.folder("outside"), w.folder("volume")
	w.must(os.Mkdir(filepath.Join(volume, "a"), 0o777))
	w.must(os.Symlink(outside, filepath.Join(volume, "b")))
	s := w.spec("exit", "0")
	dir := w.bundle(s, nil)
	mounts := s.Mounts
	stop := w.swapper(volume, "a", "b")
	made := 0
	for i, n := 0, manyRounds(20); i < n || (made == 0 && i < 50*n); i++ { // until one was made, too
		s.Mounts = append(mounts[:len(mounts):len(mounts)],
			specs.Mount{Destination: "/v", Type: "bind", Source: volume, Options: []string{"rbind"}},
			specs.Mount{Destination: fmt.Sprintf("/v/a/fs%d", i), Type: "tmpfs", Source: "tmpfs"},
			specs.Mount{Destination: fmt.Sprintf("/v/a/file%d", i), Type: "bind", Source: "/etc/hosts", Options: []string{"bind"}})
		w.writeSpec(dir, s)
		if _, code := w.ociRun(dir); code == 0 {
			made++
		}
		if i%100 == 0 {
			empty(t, outside)
			w.clear(volume)
		}
	}
	stop()
	empty(t, outside)
	if made == 0 {
		t.Error("no container was made: nothing was tested")
	}
}

// sharedRoot is a container whose root filesystem is a directory that another one can change.
func (w *world) sharedRoot(id, root string, args ...string) runtime.Config {
	c := w.config(id, args...)
	c.Rootfs = []runtime.Mount{{Type: "bind", Source: root}}
	return c
}

// copyBase makes a root filesystem of its own.
func (w *world) copyBase(name string) string {
	w.t.Helper()
	root := w.folder(name)
	w.must(os.CopyFS(root, os.DirFS(w.base)))
	w.must(os.Chmod(filepath.Join(root, "hostile"), 0o755))
	return root
}

// TestCVE_2025_31133_2025_52565_2026_41579 exchanges /dev of a root filesystem with a link to the host while containers, every other with
// a terminal, are made on it: no device, console or mount point is made outside, and what is masked stays masked. A runtime that makes
// devices, binds /dev/console or masks by the path of the container's /dev/null is led outside, or binds what the link names.
func TestCVE_2025_31133_2025_52565_2026_41579(t *testing.T) {
	w := newWorld(t)
	pattern := corePattern(t)
	outside, root := w.folder("outside"), w.copyBase("root")
	w.must(os.MkdirAll(filepath.Join(root, "dev/pts"), 0o755))
	w.must(os.Symlink(outside, filepath.Join(root, "dev2")))
	w.must(os.MkdirAll(filepath.Join(root, outside), 0o777)) // so that the link resolves inside too
	stop := w.swapper(root, "dev", "dev2")
	naively(t, outside, func(int) { _ = os.WriteFile(filepath.Join(root, "dev/console"), nil, 0o600) })
	guarded := 0
	for i, n := 0, manyRounds(40); i < n || (guarded == 0 && i < 50*n); i++ {
		c := w.sharedRoot(fmt.Sprintf("d%d", i), root, "guard")
		c.LogPath = filepath.Join(w.dir, fmt.Sprintf("log%d", i))
		c.Spec.Process.Terminal = i%2 == 1
		if err := w.sup.Create(w.ctx, c); err != nil {
			continue
		}
		if _, err := w.sup.Start(w.ctx, c.ID); err == nil {
			switch x := w.ended(c.ID, ""); x.Code {
			case 0:
				guarded++
			default:
				t.Errorf("round %d: exit code %d: %s", i, x.Code, w.log(c))
			}
		}
		w.must(w.sup.Delete(w.ctx, c.ID))
		if i%100 == 0 {
			empty(t, outside)
		}
	}
	stop()
	empty(t, outside)
	if now := corePattern(t); now != pattern {
		t.Errorf("core_pattern is %q, was %q", now, pattern)
	}
	if guarded == 0 {
		t.Error("no container ran: nothing was tested")
	}
}

// TestCVE_2025_52881_2019_16884_Race exchanges /proc of a root filesystem with a link to a look-alike while containers that set kernel
// parameters are made on it. Parameters written by path go to what the link names: another parameter, or the host.
func TestCVE_2025_52881_2019_16884_Race(t *testing.T) {
	w := newWorld(t)
	outside, root := w.folder("outside"), w.copyBase("root")
	fake := filepath.Join(outside, "sys/net/ipv4/ip_unprivileged_port_start")
	w.must(os.MkdirAll(filepath.Dir(fake), 0o777))
	w.must(os.WriteFile(fake, []byte("untouched"), 0o666))
	w.must(os.CopyFS(filepath.Join(root, outside), os.DirFS(outside)))
	w.must(os.Symlink(outside, filepath.Join(root, "proc2")))
	own := "/proc/sys/net/ipv4/ip_unprivileged_port_start"
	before, err := os.ReadFile(own)
	w.must(err)
	stop := w.swapper(root, "proc", "proc2")
	made := 0
	for i, n := 0, manyRounds(60); i < n || (made == 0 && i < 50*n); i++ {
		c := w.sharedRoot(fmt.Sprintf("p%d", i%16), root, "exit", "0")
		c.LogPath = ""
		c.Spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "77"}
		if err := w.sup.Create(w.ctx, c); err == nil {
			made++
			w.must(w.sup.Delete(w.ctx, c.ID))
		}
	}
	stop()
	for _, f := range []string{fake, filepath.Join(root, fake)} {
		if b, err := os.ReadFile(f); err != nil || string(b) != "untouched" {
			t.Errorf("%s is %q (%v): a parameter was written by path", f, b, err)
		}
	}
	if now, _ := os.ReadFile(own); string(now) != string(before) {
		t.Errorf("the host's parameter is %s, was %s", now, before)
	}
	if made == 0 {
		t.Error("no container was made: nothing was tested")
	}
}

// TestCVE_2026_41579_2026_47766: an image whose /dev is a link to the host. Devices made by path are made there.
func TestCVE_2026_41579_2026_47766(t *testing.T) {
	w := newWorld(t)
	outside := w.folder("outside")
	for i, target := range []string{outside, strings.Repeat("../", 20) + outside, "/proc/1/root" + outside, "/proc/self/cwd"} {
		links := map[string]string{"dev": target}
		c := w.config(fmt.Sprintf("dev%d", i), "guard")
		plant(t, w.upper(c.ID), links)
		w.must(os.MkdirAll(filepath.Join(w.upper(c.ID), outside), 0o777))
		if err := w.sup.Create(w.ctx, c); err == nil {
			_, err = w.sup.Start(w.ctx, c.ID)
			w.must(err)
			if x := w.ended(c.ID, ""); x.Code != 0 {
				t.Errorf("/dev to %s: exit code %d %s", target, x.Code, w.log(c))
			}
			w.must(w.sup.Delete(w.ctx, c.ID))
		}
		for _, bare := range []bool{false, true} {
			s := w.spec("guard")
			if bare { // the devices go into the image's own /dev
				s.Mounts = s.Mounts[:1]
			}
			out, code := w.ociRun(w.bundle(s, links))
			if code == 3 {
				t.Errorf("OCI, /dev to %s: %s", target, out)
			}
		}
		empty(t, outside)
	}
}

// TestHostNullDevice: standard input of a container without one is a null device. A runtime that passes the host's lets root inside
// change its mode and owner.
func TestHostNullDevice(t *testing.T) {
	w := newWorld(t)
	var before, after unix.Stat_t
	w.must(unix.Stat("/dev/null", &before))
	defer func() {
		_ = os.Chmod("/dev/null", os.FileMode(before.Mode&0o777))
		_ = os.Chown("/dev/null", int(before.Uid), int(before.Gid))
	}()
	c := w.config("seize", "seize0", "until", "/go", "seize0")
	w.start(c)
	_, err := w.exec(c.ID, runtime.Process{ID: "x", Args: []string{"/hostile", "seize0", "create", "/go"}})
	w.must(err)
	w.ended(c.ID, "")
	w.must(w.sup.Delete(w.ctx, c.ID))
	dir := w.bundle(w.spec("seize0", "say", "ready", "sleep"), nil)
	id := w.ociStart(dir)
	w.oci("exec", id, "/hostile", "seize0")
	w.ociEnd(id)
	w.must(unix.Stat("/dev/null", &after))
	if before.Mode != after.Mode || before.Uid != after.Uid || before.Gid != after.Gid {
		t.Errorf("the host's null device is %o %d:%d, was %o %d:%d", after.Mode, after.Uid, after.Gid, before.Mode, before.Uid, before.Gid)
	}
}
