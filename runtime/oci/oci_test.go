package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/cgroup"
	"skein/runtime/sandbox"
)

// world is a root of containers and a bundle, on a tmpfs that is let go of at the end.
type world struct {
	*Runtime
	t      *testing.T
	bundle string
	n      int
}

func newWorld(t *testing.T) *world {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	_ = os.Chmod(filepath.Dir(dir), 0o755) // a mapped root must get there
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Skip("cannot mount: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	w := &world{Runtime: &Runtime{Root: filepath.Join(dir, "state"), Log: slog.New(slog.NewTextHandler(io.Discard, nil))}, t: t, bundle: filepath.Join(dir, "bundle")}
	for _, d := range []string{"rootfs/out", "rootfs/proc", "rootfs/full/sub", "rootfs/tmp", "vol"} {
		if err := os.MkdirAll(filepath.Join(w.bundle, d), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	_ = os.Chmod(filepath.Join(w.bundle, "rootfs/out"), 0o777)
	exe, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(filepath.Join(w.bundle, "rootfs/inside"), exe, 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(w.bundle, "rootfs/full/sub/file"), []byte("content"), 0o640)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(w.bundle, "vol/mine"), nil, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// spec is a plain container that runs the test binary with args.
func (w *world) spec(args ...string) *specs.Spec {
	s := sandbox.DefaultSpec()
	s.Process.Args = append([]string{"/inside", "inside"}, args...)
	s.Root.Path = "rootfs"
	s.Hostname = "inside"
	s.Linux.CgroupsPath = fmt.Sprintf("/skein-test-oci-%d/%s", os.Getpid(), strings.ReplaceAll(w.t.Name(), "/", "-"))
	return s
}

func (w *world) create(s *specs.Spec) (*Container, error) {
	b, err := json.Marshal(s)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.bundle, configFile), b, 0o644); err != nil {
		w.t.Fatal(err)
	}
	w.n++
	return w.Create(CreateOptions{ID: fmt.Sprintf("c%d", w.n), Bundle: w.bundle})
}

// run runs a container to its end and deletes it.
func (w *world) run(s *specs.Spec) (code int) {
	w.t.Helper()
	c, err := w.create(s)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() {
		if err := c.Delete(true); err != nil {
			w.t.Error(err)
		}
	}()
	if err := c.Start(); err != nil {
		w.t.Fatal(err)
	}
	return c.Wait()
}

func (w *world) report() report {
	w.t.Helper()
	var r report
	b, err := os.ReadFile(filepath.Join(w.bundle, "rootfs/out/report"))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// mounts counts those of the host below this test's directory, or of a proc or cgroup filesystem that a container could have left.
func (w *world) mounts() int {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		w.t.Fatal(err)
	}
	return strings.Count(string(b), filepath.Dir(w.bundle)) + strings.Count(string(b), " - proc ") + strings.Count(string(b), " - cgroup ")
}

// clean says that nothing is left of any container.
func (w *world) clean() {
	w.t.Helper()
	if e, _ := os.ReadDir(w.Root); len(e) > 0 {
		w.t.Errorf("state left: %v", e)
	}
	if m, _ := filepath.Glob(fmt.Sprintf("/sys/fs/cgroup/*/skein-test-oci-%d*", os.Getpid())); len(m) > 0 {
		w.t.Errorf("groups left: %v", m)
	}
}

func TestLifecycle(t *testing.T) {
	w := newWorld(t)
	c, err := w.create(w.spec("sleep"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Create(CreateOptions{ID: "c1", Bundle: w.bundle}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second create: %v", err)
	}
	expect := func(want specs.ContainerState) {
		t.Helper()
		if got := c.State(); got.Status != want || (got.Pid == 0) != (want == specs.StateStopped) {
			t.Errorf("status %s, pid %d, want %s", got.Status, got.Pid, want)
		}
	}
	expect(specs.StateCreated)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	expect(specs.StateRunning)
	if err := c.Start(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second start: %v", err)
	}
	p, err := c.Template()
	if err != nil {
		t.Fatal(err)
	}
	p.Args = []string{"/inside", "inside", "exit", "7"}
	pid, err := c.Exec(ExecOptions{Process: p})
	if err != nil {
		t.Fatal(err)
	}
	if code := Wait(pid); code != 7 {
		t.Errorf("exec ended with %d", code)
	}
	p.Args = []string{"nosuch"}
	if _, err := c.Exec(ExecOptions{Process: p}); err == nil || !strings.Contains(err.Error(), "executable file not found in $PATH") {
		t.Errorf("exec of nothing: %v", err)
	}
	if err := c.Pause(); err != nil {
		t.Fatal(err)
	}
	expect(Paused)
	if err := c.Resume(); err != nil {
		t.Fatal(err)
	}
	limit := int64(64 << 20)
	if err := c.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}); err != nil {
		t.Error(err)
	}
	if err := c.Update(&specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: ptr(int64(10)), Minor: ptr(int64(200)), Access: "rwm"}}}); err != nil {
		t.Error(err)
	}
	if list, err := os.ReadFile(filepath.Join("/sys/fs/cgroup/devices", c.rec.Cgroup, "devices.list")); err == nil {
		if !strings.Contains(string(list), "c 10:200 rwm") || !strings.Contains(string(list), "c 1:3 rwm") || strings.Contains(string(list), "a *:*") {
			t.Errorf("devices after update:\n%s", list)
		}
	}
	if err := c.Update(&specs.LinuxResources{Unified: map[string]string{"nosuch.max": "1"}}); err == nil || !strings.Contains(err.Error(), "linux.resources.unified[nosuch.max]") {
		t.Errorf("update of nothing: %v", err)
	}
	if pids, err := c.Processes(); err != nil || len(pids) != 1 || pids[0] != c.PID() {
		t.Errorf("processes %v %v", pids, err)
	}
	if err := c.Delete(false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running container: %v", err)
	}
	if err := c.Kill(unix.SIGKILL, false); err != nil {
		t.Error(err)
	}
	if code := c.Wait(); code != 137 {
		t.Errorf("ended with %d", code)
	}
	expect(specs.StateStopped)
	if err := c.Kill(unix.SIGTERM, false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("kill of a stopped container: %v", err)
	}
	if err := c.Delete(false); err != nil {
		t.Error(err)
	}
	w.clean()
}

// TestInside looks at containers from within.
func TestInside(t *testing.T) {
	id := func(n uint32) *uint32 { return &n }
	eno := func(n uint) *uint { return &n }
	for name, tc := range map[string]struct {
		change func(*world, *specs.Spec)
		see    []string
		check  func(report) string
	}{
		"plain": {func(*world, *specs.Spec) {}, []string{"/proc/keys"}, func(r report) string {
			own := slices.DeleteFunc(r.FDs, func(s string) bool { return strings.Contains(s, " /sys/fs/cgroup/") }) // Go's own
			if len(own) > 4 || r.Host != "inside" || r.CWD != "/" || r.Files["/proc/keys"] != "" {
				return fmt.Sprint(r)
			}
			return ""
		}},
		"user namespace": {func(w *world, s *specs.Spec) {
			_ = os.Chown(filepath.Join(w.bundle, "rootfs"), 100000, 100000) // as whoever maps an image does
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
			s.Linux.GIDMappings = s.Linux.UIDMappings
			s.Process.User.UID = 5
		}, []string{"/proc/self/uid_map", "stat:/dev/null"}, func(r report) string {
			if strings.Join(strings.Fields(r.Files["/proc/self/uid_map"]), " ") != "0 100000 65536" || r.UID != 5 || !strings.Contains(r.Files["stat:/dev/null"], "1:3") {
				return fmt.Sprint(r)
			}
			return ""
		}},
		"mounts": {func(w *world, s *specs.Spec) {
			s.Root.Readonly = true
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/out", Source: filepath.Join(w.bundle, "rootfs/out"), Options: []string{"bind"}},
				specs.Mount{Destination: "/full", Type: "tmpfs", Options: []string{"tmpcopyup", "ro"}},
				specs.Mount{Destination: "/tmp", Type: "tmpfs", Options: []string{"shared"}},
				specs.Mount{Destination: "/vol", Source: "vol", Options: []string{"rbind", "idmap"},
					UIDMappings: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 4242, Size: 10}}, GIDMappings: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 4242, Size: 10}}})
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/pipe", Type: "p", UID: id(7)}, {Path: "/dev/deep/zero", Type: "c", Major: 1, Minor: 5}}
		}, []string{"/full/sub/file", "stat:/vol/mine", "stat:/dev/pipe", "stat:/dev/deep/zero", "/proc/self/mountinfo"}, func(r report) string {
			f := r.Files
			if r.Errno["mkdir"] != "read-only file system" || f["/full/sub/file"] != "content" || f["stat:/vol/mine"] != "100644 4242 0:0 <nil>" ||
				f["stat:/dev/pipe"] != "10666 7 0:0 <nil>" || !strings.Contains(f["stat:/dev/deep/zero"], "1:5") || !strings.Contains(f["/proc/self/mountinfo"], "/tmp rw,relatime shared:") {
				return fmt.Sprint(r)
			}
			return ""
		}},
		"process": {func(_ *world, s *specs.Spec) {
			adj := 300
			s.Process.OOMScoreAdj = &adj
			s.Process.NoNewPrivileges = false
			s.Process.User = specs.User{UID: 9, GID: 8, AdditionalGids: []uint32{77}}
			s.Process.Cwd = "/tmp/made/here"
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Soft: 1, Hard: 2}}
			c := []string{"CAP_NET_RAW"}
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: c, Permitted: c, Inheritable: c, Ambient: c, Effective: c}
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"getpgid"}, Action: specs.ActErrno, ErrnoRet: eno(uint(unix.EXDEV))},
				{Names: []string{"close_range", "prctl", "setresuid"}, Action: specs.ActErrno}}}
		}, []string{"/proc/self/status", "/proc/self/limits", "/proc/self/oom_score_adj", "/proc/sys/net/ipv4/ip_forward"}, func(r report) string {
			st := strings.Join(strings.Fields(r.Files["/proc/self/status"]), " ")
			for _, want := range []string{"CapEff: 0000000000002000", "CapAmb: 0000000000002000", "CapBnd: 0000000000002000", "Groups: 77", "NoNewPrivs: 0", "Seccomp: 2"} {
				if !strings.Contains(st, want) {
					return want + ": " + st
				}
			}
			if r.Errno["getpgid"] != "invalid cross-device link" || r.CWD != "/tmp/made/here" || r.Files["/proc/self/oom_score_adj"] != "300\n" || r.Files["/proc/sys/net/ipv4/ip_forward"] != "1\n" {
				return fmt.Sprint(r)
			}
			return ""
		}},
		"host's mounts": {func(_ *world, s *specs.Spec) {
			s.Linux.Namespaces = s.Linux.Namespaces[1:]
		}, []string{"stat:/dev/null", "stat:/full/sub/file"}, func(r report) string {
			if !strings.Contains(r.Files["stat:/dev/null"], "1:3") || !strings.Contains(r.Files["stat:/full/sub/file"], "<nil>") {
				return fmt.Sprint(r)
			}
			return ""
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			s := w.spec(append([]string{"see"}, tc.see...)...)
			tc.change(w, s)
			before := w.mounts()
			if code := w.run(s); code != 0 {
				t.Fatalf("ended with %d", code)
			}
			if why := tc.check(w.report()); why != "" {
				t.Error(why)
			}
			if after := w.mounts(); before != after {
				t.Errorf("mounts of the host: %d before, %d after", before, after)
			}
			w.clean()
		})
	}
}

func TestHooks(t *testing.T) {
	w := newWorld(t)
	s := w.spec("exit", "0")
	log := filepath.Join(w.bundle, "rootfs/out/log")
	exe := filepath.Join(w.bundle, "rootfs/inside")
	one := 1
	hook := func(path, name, file string) []specs.Hook {
		return []specs.Hook{{Path: path, Args: []string{"inside", "inside", "hook", name, file}, Timeout: &one}}
	}
	s.Annotations = map[string]string{"big": strings.Repeat("x", 200<<10)} // more than a pipe holds
	s.Hooks = &specs.Hooks{Prestart: hook(exe, "prestart", log), CreateRuntime: hook(exe, "createRuntime", log), CreateContainer: hook(exe, "createContainer", log),
		StartContainer: hook("/inside", "startContainer", "/out/log"), Poststart: append([]specs.Hook{{Path: exe, Args: []string{"inside", "inside", "exit", "1"}}}, hook(exe, "poststart", log)...),
		Poststop: hook(exe, "poststop", log)}
	w.run(s)
	got, _ := os.ReadFile(log)
	want := "prestart created false\ncreateRuntime created false\ncreateContainer created false\nstartContainer created true\npoststart running false\npoststop stopped false\n"
	if string(got) != want {
		t.Errorf("hooks wrote:\n%s", got)
	}
	s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: exe, Args: []string{"inside", "inside", "sleep"}, Timeout: &one}}}
	began := time.Now()
	if _, err := w.create(s); err == nil || !strings.Contains(err.Error(), "longer than 1 s") || time.Since(began) > 4*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	s.Hooks = &specs.Hooks{StartContainer: []specs.Hook{{Path: "/inside", Args: []string{"inside", "inside", "exit", "9"}}}}
	c, err := w.create(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err == nil || !strings.Contains(err.Error(), "exit status 9") || c.Status() != specs.StateStopped {
		t.Errorf("start: %v, then %s", err, c.Status())
	}
	reap(c.PID())
	if err := c.Delete(false); err != nil {
		t.Error(err)
	}
	w.clean()
}

// TestJoin lets a second container share every namespace of the first.
func TestJoin(t *testing.T) {
	w := newWorld(t)
	c, err := w.create(w.spec("sleep"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Delete(true); err != nil {
			t.Error(err)
		}
		w.clean()
	}()
	s := w.spec("sleep")
	s.Hostname = ""
	s.Linux.CgroupsPath += "-second"
	names := map[specs.LinuxNamespaceType]string{specs.PIDNamespace: "pid", specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts", specs.CgroupNamespace: "cgroup"}
	for i, n := range s.Linux.Namespaces {
		if f := names[n.Type]; f != "" {
			s.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/%s", c.PID(), f)
		}
	}
	d, err := w.create(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range names {
		a, err1 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", c.PID(), f))
		b, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", d.PID(), f))
		if a != b || errors.Join(err1, err2) != nil {
			t.Errorf("%s: %s and %s: %v", f, a, b, errors.Join(err1, err2))
		}
	}
	if err := d.Delete(true); err != nil {
		t.Error(err)
	}
	reap(d.PID()) // the pid namespace goes only with all its processes
}

// TestDiscard: what a creator that was killed leaves can be removed: without the final record, without any, without a config.
func TestDiscard(t *testing.T) {
	w := newWorld(t)
	for _, lost := range [][]string{{}, {recordFile}, {recordFile, configFile}} {
		s := w.spec("sleep")
		s.Linux.CgroupsPath = ""
		c, err := w.create(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(c.dir, recordFile), filepath.Join(c.dir, recordFile+".new")); err != nil {
			t.Fatal(err)
		}
		for _, f := range lost {
			if f == recordFile {
				f += ".new"
			}
			if err := os.Remove(filepath.Join(c.dir, f)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := w.Open(c.rec.ID, false); !errdefs.IsNotFound(err) {
			t.Errorf("open: %v", err)
		}
		done := make(chan error, 1)
		go func() { done <- w.Discard(c.rec.ID) }() // waits for the creator's lock
		c.Close()
		if err := <-done; err != nil {
			t.Errorf("without %q: %v", lost, err)
		}
		if len(lost) == 2 { // nothing says which groups these were
			if err := errors.Join(c.stop(), cgroup.Unmake(c.rec.Made)); err != nil {
				t.Error(err)
			}
		}
		if c.alive() {
			t.Errorf("without %q: its process still waits", lost)
		}
		reap(c.PID())
		if left, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent + "/" + c.rec.ID); len(left) > 0 {
			t.Errorf("without %q: %v is left", lost, left)
		}
		w.clean()
	}
	if err := w.Discard("nobody"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// TestDefaultGroups: containers without a path of their own share a parent that goes with the last of them.
func TestDefaultGroups(t *testing.T) {
	w := newWorld(t)
	before, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent)
	if len(before) > 0 {
		t.Skip("other containers are there")
	}
	var list []*Container
	for range 2 {
		s := w.spec("sleep")
		s.Linux.CgroupsPath = ""
		c, err := w.create(s)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, c)
	}
	for i, c := range list { // the first made the parent, the second leaves last
		if made, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent + "/" + c.rec.ID); len(made) == 0 {
			t.Errorf("container %d has no groups", i)
		}
		if err := c.Delete(true); err != nil {
			t.Error(err)
		}
	}
	if left, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	w.clean()
}

// TestHostile are images that want to reach the host.
func TestHostile(t *testing.T) {
	t.Run("own file", func(t *testing.T) {
		w := newWorld(t)
		s := w.spec()
		if err := os.WriteFile(filepath.Join(w.bundle, "rootfs/script"), []byte("#!/proc/self/exe inside\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, cmd := range []string{"/proc/self/exe", "/script", "/proc/thread-self/exe"} {
			s.Process.Args = []string{cmd, "inside", "exit", "0"}
			c, err := w.create(s)
			if err != nil {
				t.Fatal(err)
			}
			if l, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", c.PID())); !strings.HasPrefix(l, "/memfd:none") {
				t.Errorf("a waiting process shows %s", l)
			}
			if err := c.Start(); !errors.Is(err, unix.ENOEXEC) && (err == nil || !strings.Contains(err.Error(), "format error")) {
				t.Errorf("%s: %v", cmd, err)
			}
			reap(c.PID())
			if err := c.Delete(true); err != nil {
				t.Error(err)
			}
		}
		w.clean()
	})
	for name, link := range map[string]string{"dev": "dev", "mount point": "mnt", "proc": "proc", "working directory": "work"} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			host := filepath.Join(w.bundle, "host")
			at := filepath.Join(w.bundle, "rootfs", link)
			_ = os.Remove(at)
			if err := errors.Join(os.Mkdir(host, 0o755), os.Symlink(host, at)); err != nil {
				t.Fatal(err)
			}
			s := w.spec("exit", "0")
			s.Process.Cwd = "/work/x"
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/mnt/a/b", Type: "tmpfs"}, specs.Mount{Destination: "/mnt/file", Type: "bind", Source: "/dev/null", Options: []string{"bind"}})
			if name == "dev" { // without a tmpfs nodes are made in the image's own directory
				s.Mounts = s.Mounts[:1]
			}
			if c, err := w.create(s); err == nil {
				_ = c.Delete(true)
			}
			if e, err := os.ReadDir(host); err != nil || len(e) > 0 {
				t.Errorf("made on the host: %v %v", e, err)
			}
			w.clean()
		})
	}
}

func TestTerminal(t *testing.T) {
	w := newWorld(t)
	s := w.spec("tty")
	s.Process.Terminal, s.Process.ConsoleSize = true, &specs.Box{Height: 33, Width: 44}
	if _, err := w.create(s); err == nil || !strings.Contains(err.Error(), "process.terminal") {
		t.Errorf("without anybody to take the terminal: %v", err)
	}
	var master *os.File
	w.n++
	c, err := w.Create(CreateOptions{ID: "tty", Bundle: w.bundle, Console: func(f *os.File) error { master = f; return nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	got, _ := io.ReadAll(master) // EIO at its end
	if strings.TrimSpace(string(got)) != "rows 33 <nil>" {
		t.Errorf("%q", got)
	}
	c.Wait()
	if err := c.Delete(false); err != nil {
		t.Error(err)
	}
	w.clean()
}
