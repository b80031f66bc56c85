package supervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/cgroup"
	"skein/runtime/logs"
	"skein/runtime/sandbox"
)

var base string // directory with the root filesystem of all test containers

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "supervisor" { // started by Ensure
		if os.Getenv(onlyV2) != "" {
			hideV1()
		}
		heap := ballast()
		defer goruntime.KeepAlive(heap)
		if err := Main(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Geteuid() != 0 {
		fmt.Println("skipped: needs root")
		os.Exit(0)
	}
	dir, err := os.MkdirTemp("", "skein-supervisor-test")
	if err == nil {
		err = buildBase(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	base = filepath.Join(dir, "base")
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// onlyV2 makes a test's supervisor see a host without cgroup v1.
const onlyV2 = "SKEIN_TEST_ONLY_V2"

// hideV1 unmounts the v1 hierarchies in a mount namespace of this process and starts the program again there.
func hideV1() {
	goruntime.LockOSThread()
	err := errors.Join(os.Unsetenv(onlyV2), unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	b, rerr := os.ReadFile("/proc/self/mountinfo")
	err = errors.Join(err, rerr)
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); strings.Contains(l, " - cgroup ") {
			err = errors.Join(err, unix.Unmount(f[4], unix.MNT_DETACH))
		}
	}
	if err == nil {
		err = unix.Exec("/proc/self/exe", os.Args, os.Environ())
	}
	fmt.Fprintln(os.Stderr, "hide cgroup v1:", err)
	os.Exit(1)
}

func TestOnlyV2(t *testing.T) {
	t.Setenv(onlyV2, "1")
	e := newEnv(t)
	c := e.config("v2", "ls", "/sys/fs/cgroup", "read", "/proc/self/cgroup", "mknod", "write", "/dev/null", "x", "write", "/sys/fs/cgroup/cgroup.procs", "1", "sleep")
	e.start(c)
	e.until(func() bool { return strings.Contains(e.log(c), "write /sys") })
	e.must(e.sup.Pause(e.ctx, "v2"))
	e.must(e.sup.Resume(e.ctx, "v2"))
	_, err := e.sup.Exec(e.ctx, "v2", runtime.Process{ID: "x", Args: []string{"/inside", "mknod", "exit", "4"}})
	e.must(err)
	var out lockedBuffer
	e.must(e.sup.Attach(e.ctx, "v2", "x", runtime.Streams{Stdout: &out}))
	if x := e.execExit("x"); x.Code != 4 || !strings.Contains(out.String(), "operation not permitted") {
		t.Errorf("exec: %+v %q", x, out.String())
	}
	e.must(e.sup.Signal(e.ctx, "v2", 9))
	e.wait("v2")
	log := e.log(c)
	for _, want := range []string{"cgroup.controllers", "mknod <nil> open /disk: operation not permitted", "write /dev/null <nil>", "write /sys/fs/cgroup/cgroup.procs open /sys/fs/cgroup/cgroup.procs: read-only"} {
		if !strings.Contains(log, want) {
			t.Errorf("log %q lacks %q", log, want)
		}
	}
	e.must(e.sup.Delete(e.ctx, "v2"))
	mem := int64(64 << 20)
	m := e.config("mem", "exit", "0")
	m.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &mem}
	if err := e.sup.Create(e.ctx, m); err != nil && !errdefs.IsFailedPrecondition(err) {
		t.Errorf("memory limit without its controller: %v", err)
	}
}

func buildBase(dir string) error {
	for _, d := range []string{"base/bin", "base/etc", "base/dev", "base/proc", "base/sys", "base/mnt", "base/tmp", "base/deep"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "base/inside"), "./testdata/inside")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build test program: %w\n%s", err, out)
	}
	if err := os.Symlink("../inside", filepath.Join(dir, "base/bin/inside")); err != nil {
		return err
	}
	if err := os.Symlink("/", filepath.Join(dir, "base/evil")); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "base/etc/notexec"), []byte("text"), 0o755)
}

// env is one supervisor of a test.
type env struct {
	t   *testing.T
	cfg Config
	sup runtime.Supervisor
	ctx context.Context
	dir string
	n   int
}

func newEnv(t *testing.T) *env {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	dir := t.TempDir()
	name := strings.NewReplacer("/", "-").Replace(t.Name())
	e := &env{t: t, ctx: ctx, dir: dir, cfg: Config{StateDir: filepath.Join(dir, "state"), SocketPath: filepath.Join(dir, "s.sock"),
		Cgroup: fmt.Sprintf("/skein-test-%d/%s", os.Getpid(), name)}}
	t.Cleanup(e.end)
	e.ensure()
	return e
}

func (e *env) ensure() {
	e.t.Helper()
	if e.sup != nil {
		_ = e.sup.Close() // it would start a supervisor again when this one ends
	}
	sup, err := Ensure(e.ctx, "/proc/self/exe", e.cfg)
	if err != nil {
		e.t.Fatalf("ensure: %v", err)
	}
	e.sup = sup
}

// end checks that nothing is left.
func (e *env) end() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_ = e.sup.Close()
	if sup, err := Dial(ctx, e.cfg.SocketPath); err == nil {
		if list, err := sup.List(ctx); err == nil {
			for _, st := range list {
				_ = sup.Signal(ctx, st.ID, 9)
			}
		}
		if err := sup.Shutdown(ctx, true); err != nil {
			e.t.Errorf("shutdown: %v", err)
		}
		_ = sup.Close()
	}
	if err := cgroup.KillTree(filepath.Dir(e.cfg.Cgroup)); err != nil {
		e.t.Errorf("kill tree: %v", err)
	}
	if err := cgroup.RemoveTree(filepath.Dir(e.cfg.Cgroup)); err != nil {
		e.t.Errorf("remove tree: %v", err)
	}
	if b, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(b, []byte(e.dir)) {
		e.t.Errorf("a mount is left below %s", e.dir)
	}
	if b, err := os.ReadFile(filepath.Join(e.cfg.StateDir, "supervisor.log")); err == nil && len(b) > 0 {
		e.t.Logf("supervisor.log: %s", b)
	}
}

// config is a container like the engine makes it.
func (e *env) config(id string, args ...string) runtime.Config {
	e.t.Helper()
	root := filepath.Join(e.dir, id)
	for _, d := range []string{"root", "upper", "work"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			e.t.Fatal(err)
		}
	}
	s := sandbox.DefaultSpec()
	s.Process.Args = append([]string{"/inside"}, args...)
	s.Root.Path = filepath.Join(root, "root")
	s.Hostname = "box"
	return runtime.Config{ID: id, Spec: s, LogPath: filepath.Join(root, "log"), Rootfs: []runtime.Mount{{Type: "overlay", Source: "overlay",
		Options: []string{"lowerdir=" + base, "upperdir=" + filepath.Join(root, "upper"), "workdir=" + filepath.Join(root, "work")}}}}
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) start(c runtime.Config) int {
	e.t.Helper()
	e.must(e.sup.Create(e.ctx, c))
	pid, err := e.sup.Start(e.ctx, c.ID)
	e.must(err)
	return pid
}

// wait waits for the container's end through the journal.
func (e *env) wait(id string) runtime.Exit {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.ctx, 30*time.Second)
	defer cancel()
	ch, err := e.sup.Events(ctx, 0)
	e.must(err)
	for ev := range ch {
		if ev.ContainerID == id && ev.ExecID == "" {
			return ev.Exit
		}
	}
	e.t.Fatalf("container %s did not end", id)
	return runtime.Exit{}
}

// run runs a container to its end and returns exit and log.
func (e *env) run(c runtime.Config) (runtime.Exit, string) {
	e.t.Helper()
	e.start(c)
	x := e.wait(c.ID)
	out := e.log(c)
	e.must(e.sup.Delete(e.ctx, c.ID))
	return x, out
}

func (e *env) log(c runtime.Config) string {
	e.t.Helper()
	var b strings.Builder
	e.must(logs.Read(e.ctx, c.LogPath, logs.Options{}, func(l logs.Line) error { b.Write(l.Text); return nil }))
	return b.String()
}

func TestExitCodes(t *testing.T) {
	e := newEnv(t)
	for _, tc := range []struct {
		args []string
		code int
		err  string
	}{
		{[]string{"/inside", "exit", "0"}, 0, ""},
		{[]string{"/inside", "exit", "42"}, 42, ""},
		{[]string{"inside", "exit", "3"}, 3, ""},
		{[]string{"nope"}, 127, `exec: "nope": executable file not found in $PATH`},
		{[]string{"/nope"}, 127, `exec: "/nope": stat /nope: no such file or directory`},
		{[]string{"/etc"}, 126, `exec: "/etc": permission denied`},
		{[]string{"/etc/notexec"}, 126, "exec /etc/notexec: exec format error"},
	} {
		e.n++
		c := e.config(fmt.Sprintf("c%d", e.n))
		c.Spec.Process.Args = tc.args
		e.must(e.sup.Create(e.ctx, c))
		_, err := e.sup.Start(e.ctx, c.ID)
		if (tc.err == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%q: start: %v, want %q", tc.args, err, tc.err)
		}
		x := e.wait(c.ID)
		if x.Code != tc.code || x.Err != tc.err {
			t.Errorf("%q: exit %+v, want code %d err %q", tc.args, x, tc.code, tc.err)
		}
		st, err := e.sup.State(e.ctx, c.ID)
		if err != nil || st.Status != runtime.Stopped || st.Exit.Code != tc.code || st.Pid != 0 || st.FinishedAt.IsZero() {
			t.Errorf("%q: state %+v %v", tc.args, st, err)
		}
		e.must(e.sup.Delete(e.ctx, c.ID))
	}
	if _, err := e.sup.State(e.ctx, "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("state after delete: %v", err)
	}
}

func TestSignals(t *testing.T) {
	e := newEnv(t)
	c := e.config("sig", "term")
	e.start(c)
	if err := e.sup.Delete(e.ctx, "sig"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running container: %v", err)
	}
	e.until(func() bool { return strings.Contains(e.log(c), "ready") })
	e.must(e.sup.Signal(e.ctx, "sig", 15))
	if x := e.wait("sig"); x.Code != 7 {
		t.Errorf("exit %+v, want 7", x)
	}
	k := e.config("kill", "sleep")
	e.start(k)
	e.must(e.sup.Signal(e.ctx, "kill", 9))
	if x := e.wait("kill"); x.Code != 137 || x.OOMKilled {
		t.Errorf("exit %+v, want 137", x)
	}
	if err := e.sup.Signal(e.ctx, "kill", 15); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("signal to an ended container: %v", err)
	}
	if err := e.sup.Create(e.ctx, k); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create again: %v", err)
	}
}

// until polls a condition that has no event of its own.
func (e *env) until(cond func() bool) {
	e.t.Helper()
	for range 500 {
		if cond() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	e.t.Fatal("condition did not come true")
}

func TestConfinement(t *testing.T) {
	e := newEnv(t)
	c := e.config("box", "host", "status", "fds", "stdout", "read", "/proc/keys", "ls", "/sys/firmware", "write", "/proc/sys/kernel/hostname", "x",
		"write", "/proc/irq/default_smp_affinity", "1", "mount", "unshare", "keyctl", "clone3", "personality", "mknod", "write", "/sys/x", "y",
		"ls", "/dev", "ls", "/sys/fs/cgroup", "rlimit", "ls", "/", "read", "/proc/self/cgroup")
	x, out := e.run(c)
	t.Log(out)
	if x.Code != 0 {
		t.Fatalf("exit %+v", x)
	}
	for _, want := range []string{"host box pid 1 cwd /\n", "CapEff:\t00000000a80425fb", "CapBnd:\t00000000a80425fb", "CapInh:\t0000000000000000",
		"CapAmb:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "fds 0 1 2\n", "stdout pipe:[", "read /proc/keys 0 <nil>", "ls /sys/firmware <nil>",
		"write /proc/sys/kernel/hostname open", "write /proc/irq/default_smp_affinity open /proc/irq/default_smp_affinity: read-only", "mount operation not permitted",
		"unshare operation not permitted", "keyctl operation not permitted", "clone3 function not implemented", "personality errno 0 operation not permitted",
		"mknod <nil> open /disk: operation not permitted", "ls /dev core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero <nil>",
		"SigBlk:\t0000000000000000", "0::/\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("missing %q", want)
		}
	}
	if strings.Contains(out, "skein-test") {
		t.Error("the container sees its cgroup path on the host")
	}
}

func TestUserAndFiles(t *testing.T) {
	e := newEnv(t)
	c := e.config("u", "status", "host", "env", "read", "/data/f", "write", "/data/g", "1", "write", "/ro/f", "1", "read", "/new/dir/file", "write", "/root-owned", "1", "sysctl", "net/ipv4/ip_unprivileged_port_start")
	src := filepath.Join(e.dir, "src")
	e.must(os.MkdirAll(src, 0o777))
	e.must(os.Chmod(src, 0o777))
	e.must(os.WriteFile(filepath.Join(src, "f"), []byte("bound"), 0o644))
	e.must(os.Chmod(filepath.Join(src, "f"), 0o666))
	umask := uint32(0o77)
	c.Spec.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5, 6}, Umask: &umask}
	c.Spec.Process.Cwd = "/work/here"
	c.Spec.Process.Env = append(c.Spec.Process.Env, "A=b c")
	c.Spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
	c.Spec.Mounts = append(c.Spec.Mounts,
		specs.Mount{Destination: "/data", Type: "bind", Source: src, Options: []string{"rbind", "rprivate"}},
		specs.Mount{Destination: "/evil/evil/ro", Type: "bind", Source: src, Options: []string{"rbind", "ro"}},
		specs.Mount{Destination: "/new/dir/file", Type: "bind", Source: filepath.Join(src, "f"), Options: []string{"bind"}})
	x, out := e.run(c)
	t.Log(out)
	if x.Code != 0 {
		t.Fatalf("exit %+v", x)
	}
	for _, want := range []string{"Uid:\t1000\t1000\t1000\t1000", "Gid:\t1001", "Groups:\t5 6", "CapEff:\t0000000000000000", "cwd /work/here", "env A=b c",
		"read /data/f 5 <nil>\nbound", "write /data/g <nil>", "write /ro/f open /ro/f: read-only", "read /new/dir/file 5 <nil>", "write /root-owned open /root-owned: permission denied",
		"sysctl net/ipv4/ip_unprivileged_port_start 0 <nil>"} {
		if !strings.Contains(out, want) {
			t.Errorf("missing %q", want)
		}
	}
	st, err := os.Stat(filepath.Join(src, "g"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("file made inside: %v %v, want mode 0600", st, err)
	}
}

func TestRefusals(t *testing.T) {
	e := newEnv(t)
	for name, change := range map[string]func(*runtime.Config){
		"bad id":      func(c *runtime.Config) { c.ID = "../x" },
		"no args":     func(c *runtime.Config) { c.Spec.Process.Args = nil },
		"host sysctl": func(c *runtime.Config) { c.Spec.Linux.Sysctl = map[string]string{"kernel.core_pattern": "x"} },
		"missing source": func(c *runtime.Config) {
			c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/does/not/exist"})
		},
		"missing netns": func(c *runtime.Config) {
			c.Spec.Linux.Namespaces[2].Path = "/does/not/exist"
		},
		"missing cwd parent": func(c *runtime.Config) { c.Spec.Process.Cwd = "/inside/x" },
		"bad capability":     func(c *runtime.Config) { c.Spec.Process.Capabilities.Bounding = []string{"CAP_NOPE"} },
		"bad rlimit":         func(c *runtime.Config) { c.Spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_X"}} },
	} {
		e.n++
		c := e.config(fmt.Sprintf("r%d", e.n), "exit", "0")
		change(&c)
		err := e.sup.Create(e.ctx, c)
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want an invalid argument", name, err)
		}
		t.Log(name, "→", err)
	}
	if list, err := e.sup.List(e.ctx); err != nil || len(list) != 0 {
		t.Errorf("after refusals: %v %v", list, err)
	}
	if err := e.sup.Signal(e.ctx, "none", 9); !errdefs.IsNotFound(err) {
		t.Errorf("unknown container: %v", err)
	}
}

func TestLimits(t *testing.T) {
	e := newEnv(t)
	mem, pids := int64(24<<20), int64(20)
	c := e.config("oom", "eat", "64", "echo", "survived")
	c.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &mem, Swap: &mem}
	if x, out := e.run(c); x.Code != 137 || !x.OOMKilled || strings.Contains(out, "survived") {
		t.Errorf("memory limit: exit %+v, log %q", x, out)
	}
	c = e.config("forks", "fork")
	c.Spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: &pids}
	if x, out := e.run(c); x.Code != 0 || x.OOMKilled || !strings.Contains(out, "forked true") {
		t.Errorf("pids limit: exit %+v, log %q", x, out)
	}
	c = e.config("ok", "echo", "alive")
	if x, out := e.run(c); x.Code != 0 || out != "alive\n" {
		t.Errorf("after an OOM kill: exit %+v, log %q", x, out)
	}
}

// A limit that does not even leave room for the set-up is the caller's to mend, and nobody else's end.
func TestHopelessMemoryLimit(t *testing.T) {
	e := newEnv(t)
	was := e.supervisorPID()
	mem := int64(4 << 10)
	c := e.config("tiny", "exit", "0")
	c.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &mem}
	if err := e.sup.Create(e.ctx, c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "memory limit") {
		t.Errorf("create: %v", err)
	}
	if _, err := e.sup.State(e.ctx, "tiny"); !errdefs.IsNotFound(err) {
		t.Errorf("state: %v", err)
	}
	if x, _ := e.run(e.config("ok", "exit", "3")); x.Code != 3 || e.supervisorPID() != was {
		t.Errorf("afterwards: exit %+v, supervisor %d, was %d", x, e.supervisorPID(), was)
	}
}

func TestRestarts(t *testing.T) {
	e := newEnv(t)
	c := e.config("long", "count")
	pid := e.start(c)
	e.must(e.sup.Create(e.ctx, e.config("waiting", "exit", "0")))
	e.until(func() bool { return strings.Contains(e.log(c), "line 3\n") })

	// The daemon goes and comes back.
	e.must(e.sup.Close())
	sup, err := Dial(e.ctx, e.cfg.SocketPath)
	e.must(err)
	e.sup = sup
	st, err := e.sup.State(e.ctx, "long")
	if err != nil || st.Status != runtime.Running || st.Pid != pid {
		t.Fatalf("after a new client: %+v %v", st, err)
	}
	e.ensure()

	// The supervisor dies; the client brings up another.
	victim := e.supervisorPID()
	e.must(unix.Kill(victim, unix.SIGKILL))
	e.until(func() bool { return !processAlive(victim) })
	before := len(e.log(c))
	st, err = e.sup.State(e.ctx, "long")
	if err != nil || st.Status != runtime.Running || st.Pid != pid {
		t.Fatalf("after a new supervisor: %+v %v", st, err)
	}
	if e.supervisorPID() == victim {
		t.Fatal("same supervisor")
	}
	e.until(func() bool { return len(e.log(c)) > before })
	if x := e.wait("waiting"); x.Code != runtime.UnknownExit && x.Code != 125 {
		t.Errorf("created container after its supervisor died: %+v", x)
	}
	e.must(e.sup.Signal(e.ctx, "long", 9))
	if x := e.wait("long"); x.Code != 137 && x.Code != runtime.UnknownExit {
		t.Errorf("adopted container: %+v", x)
	} else {
		t.Logf("adopted container: code %d", x.Code)
	}
	checkLines(t, e.log(c))
	e.must(e.sup.Delete(e.ctx, "long"))
	e.must(e.sup.Delete(e.ctx, "waiting"))
}

// A container writes on while nobody at all is there to read: neither supervisor nor daemon.
func TestNobodyReads(t *testing.T) {
	e := newEnv(t)
	c := e.config("long", "count")
	pid := e.start(c)
	e.until(func() bool { return strings.Contains(e.log(c), "line 3\n") })
	victim := e.supervisorPID()
	e.must(e.sup.Close())
	e.must(unix.Kill(victim, unix.SIGKILL))
	e.until(func() bool { return !processAlive(victim) })
	before := len(e.log(c))
	time.Sleep(100 * time.Millisecond) // that is some fifty lines that nobody waits for
	e.ensure()
	e.until(func() bool { return len(e.log(c)) > before })
	if st, err := e.sup.State(e.ctx, "long"); err != nil || st.Status != runtime.Running || st.Pid != pid {
		t.Errorf("state %+v %v, want running", st, err)
	}
	e.must(e.sup.Signal(e.ctx, "long", 9))
	e.wait("long")
	checkLines(t, e.log(c))
}

// Whoever is told of an end finds the container ended: it can be deleted at once.
func TestDeleteWhenTold(t *testing.T) {
	e := newEnv(t)
	events, err := e.sup.Events(e.ctx, 0)
	e.must(err)
	for i := range 40 {
		id := fmt.Sprintf("c%d", i)
		e.start(e.config(id, "exit", "0"))
		<-events
		if err := e.sup.Delete(e.ctx, id); err != nil {
			t.Fatalf("delete after the end was told: %v", err)
		}
	}
}

// A deletion whose answer died with the supervisor is asked for again, and is done if the container is gone.
func TestDeleteIsRepeated(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for i := 0; ; i++ {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 4096))
			if i > 0 {
				_ = newWire(conn).writeJSON(frameResponse, toResponse(errdefs.ErrNotFound))
			}
			conn.Close()
		}
	}()
	c := &client{socket: l.Addr().String(), done: make(chan struct{}), revive: func(context.Context) error { return nil }}
	if err := c.Delete(t.Context(), "c"); err != nil {
		t.Errorf("delete: %v", err)
	}
	if err := c.Delete(t.Context(), "c"); !errdefs.IsNotFound(err) {
		t.Errorf("delete of what is not there: %v", err)
	}
}

// checkLines: the numbers are consecutive, so no line was lost over the restarts.
func checkLines(t *testing.T, log string) {
	t.Helper()
	next := 0
	for l := range strings.Lines(log) {
		var n int
		if _, err := fmt.Sscanf(l, "line %d\n", &n); err != nil || n != next {
			t.Fatalf("log line %q, want number %d", l, next)
		}
		next++
	}
	t.Logf("%d consecutive lines", next)
}

// processAlive is true until the process, a child of this one, is reaped: a zombie's threads may still hold its socket.
func processAlive(pid int) bool { return unix.Kill(pid, 0) == nil }

func (e *env) supervisorPID() int {
	e.t.Helper()
	c, err := dial(e.ctx, e.cfg.SocketPath)
	e.must(err)
	defer c.Close()
	resp, err := c.once(e.ctx, &request{Op: "hello"})
	e.must(err)
	return resp.PID
}

func TestEventsReplay(t *testing.T) {
	e := newEnv(t)
	for i := range 5 {
		e.run(e.config(fmt.Sprintf("c%d", i), "exit", fmt.Sprint(i)))
	}
	ch, err := e.sup.Events(e.ctx, 2)
	e.must(err)
	for want := uint64(3); want <= 5; want++ {
		ev := <-ch
		if ev.Seq != want || ev.Exit.Code != int(want-1) || ev.ContainerID != fmt.Sprintf("c%d", want-1) {
			t.Errorf("event %+v, want seq %d", ev, want)
		}
	}
	victim := e.supervisorPID()
	e.must(unix.Kill(victim, unix.SIGKILL))
	e.until(func() bool { return !processAlive(victim) })
	e.run(e.config("c5", "exit", "5")) // starts a new supervisor; the stream goes on by itself
	if ev := <-ch; ev.Seq != 6 || ev.Exit.Code != 5 {
		t.Errorf("event after the restart: %+v", ev)
	}
}

func TestAttach(t *testing.T) {
	e := newEnv(t)
	c := e.config("cat", "cat")
	c.OpenStdin = true
	e.must(e.sup.Create(e.ctx, c))
	var out lockedBuffer
	attached, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- e.sup.Attach(e.ctx, "cat", "", runtime.Streams{Stdin: strings.NewReader("hello\n"), Stdout: &out, Stderr: &out, CloseStdin: true,
			Attached: func() { close(attached) }})
	}()
	<-attached
	_, err := e.sup.Start(e.ctx, "cat")
	e.must(err)
	e.must(<-ended)
	if out.String() != "hello\neof 6 <nil>\n" {
		t.Errorf("attached output %q", out.String())
	}
	if x := e.wait("cat"); x.Code != 0 || e.log(c) != out.String() {
		t.Errorf("exit %+v, log %q", x, e.log(c))
	}
	f := e.config("flood", "flood", "50000")
	e.must(e.sup.Create(e.ctx, f))
	var got lockedBuffer
	on := make(chan struct{})
	go func() {
		ended <- e.sup.Attach(e.ctx, "flood", "", runtime.Streams{Stdout: &got, Attached: func() { close(on) }})
	}()
	<-on
	_, err = e.sup.Start(e.ctx, "flood")
	e.must(err)
	e.must(<-ended)
	e.wait("flood")
	if l := e.log(f); got.String() != l || !strings.HasSuffix(l, "flood 49999\n") {
		t.Errorf("attached %d bytes, logged %d", len(got.String()), len(l))
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestTerminal(t *testing.T) {
	e := newEnv(t)
	c := e.config("tty", "tty")
	c.OpenStdin = true
	c.Spec.Process.Terminal = true
	c.Spec.Process.ConsoleSize = &specs.Box{Height: 24, Width: 80}
	e.must(e.sup.Create(e.ctx, c))
	var out lockedBuffer
	on, ended := make(chan struct{}), make(chan error, 1)
	r, w, err := os.Pipe()
	e.must(err)
	defer r.Close()
	defer w.Close()
	go func() {
		ended <- e.sup.Attach(e.ctx, "tty", "", runtime.Streams{Stdin: r, Stdout: &out, Attached: func() { close(on) }})
	}()
	<-on
	e.must(e.sup.Resize(e.ctx, "tty", "", 40, 132))
	_, err = e.sup.Start(e.ctx, "tty")
	e.must(err)
	_, err = w.WriteString("typed\n")
	e.must(err)
	e.must(<-ended)
	for _, want := range []string{"tty errno 0 40 132 /dev/pts/0", "devtty <nil>", "got typed"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("terminal output %q lacks %q", out.String(), want)
		}
	}
	if x := e.wait("tty"); x.Code != 0 {
		t.Errorf("exit %+v", x)
	}
}

func TestExec(t *testing.T) {
	e := newEnv(t)
	c := e.config("box", "sleep")
	e.start(c)
	exec := func(p runtime.Process) (string, error) {
		if _, err := e.sup.Exec(e.ctx, "box", p); err != nil {
			return "", err
		}
		var out lockedBuffer
		err := e.sup.Attach(e.ctx, "box", p.ID, runtime.Streams{Stdout: &out, Stderr: &out})
		return out.String(), err
	}
	out, err := exec(runtime.Process{ID: "x1", Args: []string{"/inside", "host", "status", "fds", "read", "/proc/self/cgroup", "mount", "exit", "9"}, Cwd: "/tmp", Env: []string{"A=1"}})
	e.must(err)
	t.Log(out)
	for _, want := range []string{"host box pid ", "cwd /tmp", "CapEff:\t00000000a80425fb", "NoNewPrivs:\t1", "Seccomp:\t2", "fds 0 1 2\n", "0::/\n", "mount operation not permitted"} {
		if !strings.Contains(out, want) {
			t.Errorf("exec output lacks %q", want)
		}
	}
	if strings.Contains(out, "pid 1 ") {
		t.Error("exec is pid 1")
	}
	if x := e.execExit("x1"); x.Code != 9 {
		t.Errorf("exec exit %+v, want 9", x)
	}
	if _, err := exec(runtime.Process{ID: "x2", Args: []string{"nope"}, Env: []string{"PATH=/bin"}}); err == nil || !strings.Contains(err.Error(), `exec: "nope": executable file not found in $PATH`) {
		t.Errorf("exec of nothing: %v", err)
	}
	out, err = exec(runtime.Process{ID: "x3", Args: []string{"/inside", "status"}, Privileged: true, User: specs.User{UID: 0}})
	e.must(err)
	if strings.Contains(out, "CapEff:\t00000000a80425fb") || !strings.Contains(out, "Seccomp:\t0") {
		t.Errorf("privileged exec: %s", out)
	}
	_, err = e.sup.Exec(e.ctx, "box", runtime.Process{ID: "x4", Args: []string{"/inside", "sleep"}})
	e.must(err)
	e.must(e.sup.SignalExec(e.ctx, "box", "x4", 9))
	if x := e.execExit("x4"); x.Code != 137 {
		t.Errorf("exec exit %+v, want 137", x)
	}
	_, err = e.sup.Exec(e.ctx, "box", runtime.Process{ID: "x5", Args: []string{"/inside", "tty"}, Terminal: true, OpenStdin: true})
	e.must(err)
	e.must(e.sup.Resize(e.ctx, "box", "x5", 10, 20))
	var tty lockedBuffer
	e.must(e.sup.Attach(e.ctx, "box", "x5", runtime.Streams{Stdin: strings.NewReader("hi\n"), Stdout: &tty}))
	if !strings.Contains(tty.String(), "got hi") || !strings.Contains(tty.String(), "devtty <nil>") {
		t.Errorf("exec terminal: %q", tty.String())
	}
	_, err = e.sup.Exec(e.ctx, "box", runtime.Process{ID: "x6", Args: []string{"/inside", "sleep"}})
	e.must(err)
	e.must(e.sup.Signal(e.ctx, "box", 9))
	if x := e.execExit("x6"); x.Code != 137 {
		t.Errorf("exec of an ended container: %+v", x)
	}
	if x := e.wait("box"); x.Code != 137 {
		t.Errorf("exit %+v", x)
	}
}

func (e *env) execExit(id string) runtime.Exit {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.ctx, 20*time.Second)
	defer cancel()
	ch, err := e.sup.Events(ctx, 0)
	e.must(err)
	for ev := range ch {
		if ev.ExecID == id {
			return ev.Exit
		}
	}
	e.t.Fatalf("exec %s did not end", id)
	return runtime.Exit{}
}

func TestPauseAndUpdate(t *testing.T) {
	e := newEnv(t)
	c := e.config("p", "count")
	e.start(c)
	e.until(func() bool { return len(e.log(c)) > 0 })
	e.must(e.sup.Pause(e.ctx, "p"))
	time.Sleep(20 * time.Millisecond) // what was in the pipe
	frozen := e.log(c)
	time.Sleep(50 * time.Millisecond)
	if e.log(c) != frozen {
		t.Error("a paused container went on")
	}
	if st, _ := e.sup.State(e.ctx, "p"); st.Status != runtime.Paused {
		t.Errorf("state %+v", st)
	}
	if err := e.sup.Pause(e.ctx, "p"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("pause twice: %v", err)
	}
	e.must(e.sup.Resume(e.ctx, "p"))
	e.until(func() bool { return len(e.log(c)) > len(frozen) })
	mem, shares := int64(64<<20), uint64(512)
	e.must(e.sup.Update(e.ctx, "p", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &mem}, CPU: &specs.LinuxCPU{Shares: &shares}}))
	e.must(e.sup.Pause(e.ctx, "p"))
	e.must(e.sup.Signal(e.ctx, "p", 9))
	if x := e.wait("p"); x.Code != 137 {
		t.Errorf("exit %+v", x)
	}
}

func TestFDStore(t *testing.T) {
	e := newEnv(t)
	var want []string
	for i := range 70 {
		f, err := os.CreateTemp(e.dir, "fd")
		e.must(err)
		name := fmt.Sprintf("dns/%03d", i)
		_, err = f.WriteString(name)
		e.must(err)
		e.must(e.sup.StoreFD(e.ctx, name, int(f.Fd())))
		f.Close()
		want = append(want, name)
	}
	e.must(e.sup.ReleaseFD(e.ctx, "dns/000"))
	got, err := e.sup.LoadFDs(e.ctx, "dns/")
	e.must(err)
	if len(got) != len(want)-1 {
		t.Errorf("%d descriptors, want %d", len(got), len(want)-1)
	}
	for name, fd := range got {
		b := make([]byte, 16)
		n, err := unix.Pread(fd, b, 0)
		if err != nil || string(b[:n]) != name || !slices.Contains(want, name) {
			t.Errorf("%s: %q %v", name, b[:n], err)
		}
		unix.Close(fd)
	}
	if err := e.sup.ReleaseFD(e.ctx, "dns/000"); !errdefs.IsNotFound(err) {
		t.Errorf("release twice: %v", err)
	}
}

func TestShutdown(t *testing.T) {
	e := newEnv(t)
	e.start(e.config("run", "sleep"))
	if err := e.sup.Shutdown(e.ctx, false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("shutdown while running: %v", err)
	}
	pid := e.supervisorPID()
	e.must(e.sup.Shutdown(e.ctx, true))
	e.until(func() bool { return !processAlive(pid) })
	if _, err := Dial(e.ctx, e.cfg.SocketPath); !errdefs.IsUnavailable(err) {
		t.Errorf("dial after shutdown: %v", err)
	}
	e.ensure()
	if x := e.wait("run"); x.Code != 137 { // another supervisor knows what happened
		t.Errorf("exit %+v", x)
	}
	if errors.Is(e.ctx.Err(), context.DeadlineExceeded) {
		t.Error("too slow")
	}
}

// TestHostPID: without a pid namespace the whole group dies with the first process, and nobody stays a zombie.
func TestHostPID(t *testing.T) {
	e := newEnv(t)
	c := e.config("hostpid", "spawn", "echo", "done")
	c.Spec.Linux.Namespaces = slices.DeleteFunc(c.Spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace })
	if x, out := e.run(c); x.Code != 0 || !strings.HasSuffix(out, "done\n") {
		t.Errorf("exit %+v, log %q", x, out)
	}
	e.until(func() bool {
		pid := e.supervisorPID()
		lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		n := 0
		for _, l := range lists {
			b, _ := os.ReadFile(l)
			n += len(strings.Fields(string(b)))
		}
		return n == 1 // the zygote
	})
}

// TestNoLeaks: descriptors and children of the supervisor are the same after much work and many broken connections.
func TestNoLeaks(t *testing.T) {
	e := newEnv(t)
	pid := e.supervisorPID()
	count := func() int {
		d, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		e.must(err)
		return len(d)
	}
	e.run(e.config("first", "exit", "0"))
	before := count()
	box := e.config("box", "flood", "100", "sleep")
	e.start(box)
	for i := range 20 {
		e.run(e.config(fmt.Sprintf("c%d", i), "exit", "0"))
		bad := e.config(fmt.Sprintf("b%d", i), "exit", "0")
		bad.Spec.Process.Cwd = "/inside/x"
		if e.sup.Create(e.ctx, bad) == nil {
			t.Error("bad working directory accepted")
		}
		ctx, cancel := context.WithCancel(e.ctx)
		gone := make(chan error, 1)
		go func() {
			gone <- e.sup.Attach(ctx, "box", "", runtime.Streams{Stdout: &lockedBuffer{}, Attached: cancel})
		}()
		<-gone
		var out lockedBuffer
		_, err := e.sup.Exec(e.ctx, "box", runtime.Process{ID: fmt.Sprintf("x%d", i), Args: []string{"/inside", "echo", "hi"}})
		e.must(err)
		e.must(e.sup.Attach(e.ctx, "box", fmt.Sprintf("x%d", i), runtime.Streams{Stdout: &out}))
		if out.String() != "hi\n" {
			t.Errorf("exec output %q", out.String())
		}
	}
	e.must(e.sup.Signal(e.ctx, "box", 9))
	e.wait("box")
	e.must(e.sup.Delete(e.ctx, "box"))
	e.until(func() bool { return count() <= before })
}

// TestManyLayers: paths too long for one option of the new mount API, and a read-only root.
func TestManyLayers(t *testing.T) {
	e := newEnv(t)
	c := e.config("deep", "ls", "/", "write", "/x", "1", "write", "/dev/shm/x", "1", "host")
	long := filepath.Join(e.dir, strings.Repeat("d", 200), strings.Repeat("e", 100))
	lower := base
	for i := range 20 {
		d := filepath.Join(long, fmt.Sprint(i))
		e.must(os.MkdirAll(filepath.Join(d, fmt.Sprintf("layer%d", i)), 0o755))
		lower = d + ":" + lower
	}
	for _, d := range []string{"upper", "work"} {
		e.must(os.MkdirAll(filepath.Join(long, d), 0o755))
	}
	c.Rootfs[0].Options = []string{"lowerdir=" + lower, "upperdir=" + filepath.Join(long, "upper"), "workdir=" + filepath.Join(long, "work")}
	c.Spec.Root.Readonly = true
	if err := e.sup.Create(e.ctx, c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "fewer layers") {
		t.Errorf("options longer than a page: %v", err)
	}
	c.Rootfs[0].Options[0] = "lowerdir=" + filepath.Join(long, "1") + ":" + filepath.Join(long, "0") + ":" + base
	x, out := e.run(c)
	if x.Code != 0 || !strings.Contains(out, "layer0 layer1") || !strings.Contains(out, "write /x open /x: read-only") || !strings.Contains(out, "write /dev/shm/x <nil>") {
		t.Errorf("exit %+v: %s", x, out)
	}
}

// TestEndBetweenSupervisors: the exit code of a container that ended while no supervisor ran is known to the next.
func TestEndBetweenSupervisors(t *testing.T) {
	e := newEnv(t)
	_ = e.sup.Close()
	e.cfg.AdoptOrphans = true
	e.ensure()
	t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
	pid := e.start(e.config("box", "sleep"))
	victim := e.supervisorPID()
	e.must(unix.Kill(victim, unix.SIGKILL))
	e.until(func() bool { return !processAlive(victim) })
	e.must(unix.Kill(pid, unix.SIGKILL))
	time.Sleep(50 * time.Millisecond) // whoever is too fast has time to reap it
	if x := e.wait("box"); x.Code != 137 {
		t.Errorf("end told as %+v, want 137", x)
	}
	e.until(func() bool { return !processAlive(pid) }) // and it is no zombie for ever
}

// TestEndBeforeItIsKept: an end that the supervisor had seen, but not yet recorded when it died, is known to the next one. What keeps it
// from recording here is a full disk.
func TestEndBeforeItIsKept(t *testing.T) {
	e := newEnv(t)
	e.must(e.sup.Shutdown(e.ctx, true)) // this test's lives elsewhere
	_ = e.sup.Close()
	e.cfg.AdoptOrphans = true
	e.cfg.StateDir = filepath.Join(e.dir, "small")
	e.cfg.SocketPath = filepath.Join(e.dir, "small.sock")
	e.must(os.Mkdir(e.cfg.StateDir, 0o700))
	e.must(unix.Mount("small", e.cfg.StateDir, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { _ = unix.Unmount(e.cfg.StateDir, unix.MNT_DETACH) })
	e.ensure()
	t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
	c := e.config("box", "sleep")
	pid := e.start(c)
	fill := filepath.Join(e.cfg.StateDir, "fill")
	if err := os.WriteFile(fill, make([]byte, 2<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("fill the disk: %v", err)
	}
	victim := e.supervisorPID()
	e.must(unix.Kill(pid, unix.SIGKILL))
	e.until(func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
	time.Sleep(200 * time.Millisecond) // it tries to record the end
	e.must(unix.Kill(victim, unix.SIGKILL))
	e.until(func() bool { return !processAlive(victim) })
	e.must(os.Remove(fill))
	if x := e.wait("box"); x.Code != 137 {
		t.Errorf("end told as %+v, want 137", x)
	}
	e.must(e.sup.Delete(e.ctx, "box"))
	e.must(e.sup.Shutdown(e.ctx, true))
}

// TestStartThatNobodySaw: a supervisor that dies while it starts a container leaves it executed or not, and the next one says which.
func TestStartThatNobodySaw(t *testing.T) {
	e := newEnv(t)
	_ = e.sup.Close()
	e.cfg.AdoptOrphans = true
	e.ensure()
	t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
	e.start(e.config("executed", "sleep"))
	e.must(e.sup.Create(e.ctx, e.config("waiting", "sleep")))
	victim := e.supervisorPID()
	e.must(unix.Kill(victim, unix.SIGSTOP))              // the client starts another as soon as this one is dead
	for _, id := range []string{"executed", "waiting"} { // as it is between the two writes of a start
		path := filepath.Join(e.cfg.StateDir, "containers", id, "state.json")
		var r record
		b, err := os.ReadFile(path)
		e.must(err)
		e.must(json.Unmarshal(b, &r))
		r.State.Status, r.State.StartedAt, r.Starting = runtime.Running, time.Now().UTC(), true
		b, err = json.Marshal(r)
		e.must(err)
		e.must(os.WriteFile(path, b, 0o600))
	}
	e.must(unix.Kill(victim, unix.SIGKILL))
	e.until(func() bool { return !processAlive(victim) })
	if x := e.wait("waiting"); x.Code != 125 || !strings.Contains(x.Err, "never executed") {
		t.Errorf("end of what was not executed: %+v", x)
	}
	if st, err := e.sup.State(e.ctx, "waiting"); err != nil || st.Status != runtime.Stopped || !st.StartedAt.IsZero() {
		t.Errorf("what was not executed: %+v, %v", st, err)
	}
	if st, err := e.sup.State(e.ctx, "executed"); err != nil || st.Status != runtime.Running || st.StartedAt.IsZero() {
		t.Errorf("what was executed: %+v, %v", st, err)
	}
	e.must(e.sup.Signal(e.ctx, "executed", 9)) // while it is known who reaps it
	e.wait("executed")
}

// TestAdoptOrphans: with the daemon as the parent of orphans the exit code of a container is known though its supervisor died.
func TestAdoptOrphans(t *testing.T) {
	e := newEnv(t)
	_ = e.sup.Close()
	e.cfg.AdoptOrphans = true
	e.ensure()
	t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
	events, err := e.sup.Events(e.ctx, 0)
	e.must(err)
	e.start(e.config("box", "sleep"))
	victim := e.supervisorPID()
	e.must(unix.Kill(victim, unix.SIGKILL))
	_, err = e.sup.State(e.ctx, "box") // starts another
	e.must(err)
	if e.supervisorPID() == victim {
		t.Fatal("the supervisor did not die")
	}
	begun := time.Now()
	e.must(e.sup.Signal(e.ctx, "box", int(unix.SIGKILL)))
	if ev := <-events; ev.ContainerID != "box" || ev.Exit.Code != 137 {
		t.Errorf("end told as %+v, want 137", ev)
	}
	if d := time.Since(begun); d > time.Second {
		t.Errorf("the end was told after %v", d)
	}
}
