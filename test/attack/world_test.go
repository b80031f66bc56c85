package attack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/cgroup"
	"skein/runtime/logs"
	"skein/runtime/sandbox"
	"skein/runtime/supervisor"
)

// insideEnv is set in hostile containers: a test binary that finds it was lured inside.
const insideEnv = "SKEIN_ATTACK_INSIDE"

// buildHostile makes the root filesystem of hostile containers, testdata/hostile and little else, and the OCI command.
var buildHostile = sync.OnceValues(func() (string, error) {
	p, err := buildInside() // which makes the directory that is removed at the end
	if err != nil {
		return "", err
	}
	dir := filepath.Join(filepath.Dir(p), "base")
	for _, d := range []string{"bin", "etc", "tmp", "proc"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return "", err
		}
	}
	for out, pkg := range map[string]string{"base/hostile": "./testdata/hostile", "skein-oci": "skein/cmd/skein-oci"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(filepath.Dir(p), out), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s: %w\n%s", pkg, err, msg)
		}
	}
	return dir, os.WriteFile(filepath.Join(dir, "self"), []byte("#!/proc/self/exe\n"), 0o755)
})

// world is a supervisor and hostile containers below it.
type world struct {
	t    testing.TB
	ctx  context.Context
	dir  string
	base string
	cfg  supervisor.Config
	sup  runtime.Supervisor

	mu    sync.Mutex // guards exits
	exits map[[2]string]runtime.Exit
	ends  chan struct{} // something was added
}

// newWorld starts a supervisor. The test fails if it leaves a mount or a group behind.
func newWorld(t testing.TB) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	base, err := buildHostile()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	t.Cleanup(cancel)
	dir := t.TempDir()
	w := &world{t: t, ends: make(chan struct{}, 1), ctx: ctx, dir: dir, base: base, cfg: supervisor.Config{StateDir: filepath.Join(dir, "state"), SocketPath: filepath.Join(dir, "s.sock"),
		Cgroup: ownGroups() + "/" + filepath.Base(filepath.Dir(dir))}}
	t.Cleanup(w.end)
	if w.sup, err = supervisor.Ensure(ctx, "/proc/self/exe", w.cfg); err != nil {
		t.Fatal(err)
	}
	w.follow()
	return w
}

func (w *world) end() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if w.sup != nil {
		if err := w.sup.Shutdown(ctx, true); err != nil {
			w.t.Errorf("shutdown: %v", err)
		}
		_ = w.sup.Close()
	}
	if err := errors.Join(cgroup.KillTree(w.cfg.Cgroup), cgroup.RemoveTree(w.cfg.Cgroup)); err != nil {
		w.t.Errorf("remove groups: %v", err)
	}
	if b, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(b, []byte(w.dir)) {
		w.t.Errorf("a mount is left below %s", w.dir)
	}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// path is a file of this world on the host.
func (w *world) path(name ...string) string {
	return filepath.Join(append([]string{w.dir}, name...)...)
}

// folder makes a directory that everybody may write to.
func (w *world) folder(name string) string {
	w.t.Helper()
	w.must(os.MkdirAll(w.path(name), 0o777))
	w.must(os.Chmod(w.path(name), 0o777))
	return w.path(name)
}

// spec is a container as the engine makes it, running the hostile program with args.
func (w *world) spec(args ...string) *specs.Spec {
	s := sandbox.DefaultSpec()
	s.Process.Args = append([]string{"/hostile"}, args...)
	s.Process.Env = append(s.Process.Env, insideEnv+"=1")
	s.Hostname = "victim"
	return s
}

// config is the same for the supervisor, on an overlay whose upper directory is upper(id).
func (w *world) config(id string, args ...string) runtime.Config {
	w.t.Helper()
	for _, d := range []string{"root", "upper", "work"} {
		w.must(os.MkdirAll(w.path(id, d), 0o755))
	}
	s := w.spec(args...)
	s.Root.Path = w.path(id, "root")
	return runtime.Config{ID: id, Spec: s, LogPath: w.path(id, "log"), Rootfs: []runtime.Mount{{Type: "overlay", Source: "overlay",
		Options: []string{"lowerdir=" + w.base, "upperdir=" + w.upper(id), "workdir=" + w.path(id, "work")}}}}
}

func (w *world) upper(id string) string { return w.path(id, "upper") }

// plant puts links into an image: name to target.
func plant(t testing.TB, root string, links map[string]string) {
	t.Helper()
	for name, target := range links {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, p); err != nil {
			t.Fatal(err)
		}
	}
}

func (w *world) start(c runtime.Config) {
	w.t.Helper()
	w.must(w.sup.Create(w.ctx, c))
	_, err := w.sup.Start(w.ctx, c.ID)
	w.must(err)
}

// follow keeps the ends of processes.
func (w *world) follow() {
	ch, err := w.sup.Events(w.ctx, 0)
	w.must(err)
	w.exits = map[[2]string]runtime.Exit{}
	go func() {
		for ev := range ch {
			w.mu.Lock()
			w.exits[[2]string{ev.ContainerID, ev.ExecID}] = ev.Exit
			w.mu.Unlock()
			select {
			case w.ends <- struct{}{}:
			default:
			}
		}
	}()
}

// ended waits for the end of a container, or of an exec of it. Names are not used twice in a test.
func (w *world) ended(id, exec string) runtime.Exit {
	w.t.Helper()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	for {
		w.mu.Lock()
		x, ok := w.exits[[2]string{id, exec}]
		w.mu.Unlock()
		if ok {
			return x
		}
		select {
		case <-w.ends:
		case <-limit.C:
			w.t.Fatalf("%s %s did not end", id, exec)
		}
	}
}

func (w *world) log(c runtime.Config) string {
	w.t.Helper()
	var b strings.Builder
	w.must(logs.Read(w.ctx, c.LogPath, logs.Options{}, func(l logs.Line) error { b.Write(l.Text); return nil }))
	return b.String()
}

// run runs a container to its end.
func (w *world) run(c runtime.Config) (runtime.Exit, string) {
	w.t.Helper()
	w.start(c)
	x := w.ended(c.ID, "")
	out := w.log(c)
	w.must(w.sup.Delete(w.ctx, c.ID))
	return x, out
}

// stop ends a container with TERM and returns what it said.
func (w *world) stop(c runtime.Config) string {
	w.t.Helper()
	w.must(w.sup.Signal(w.ctx, c.ID, int(unix.SIGTERM)))
	w.ended(c.ID, "")
	out := w.log(c)
	w.must(w.sup.Delete(w.ctx, c.ID))
	return out
}

// kill ends a container.
func (w *world) kill(id string) {
	w.t.Helper()
	w.must(w.sup.Signal(w.ctx, id, int(unix.SIGKILL)))
	w.ended(id, "")
	w.must(w.sup.Delete(w.ctx, id))
}

// says waits until the container has printed text.
func (w *world) says(c runtime.Config, text string) {
	w.t.Helper()
	eventually(w.t, c.ID+" says "+text, func() bool { return strings.Contains(w.log(c), text) })
}

// lines asserts that every pattern is found in the output.
func lines(t testing.TB, out string, want ...string) {
	t.Helper()
	for _, p := range want {
		if !regexp.MustCompile("(?m)^" + p + "$").MatchString(out) {
			t.Errorf("no line %q in\n%s", p, out)
		}
	}
}

// empty asserts that nothing was made in a directory of the host.
func empty(t testing.TB, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		t.Errorf("made on the host: %s", filepath.Join(dir, e.Name()))
	}
}

// bundle makes an OCI bundle of the spec on a root filesystem of its own and returns its directory.
func (w *world) bundle(s *specs.Spec, links map[string]string) string {
	w.t.Helper()
	dir, err := os.MkdirTemp(w.dir, "bundle")
	w.must(err)
	root := filepath.Join(dir, "rootfs")
	plant(w.t, root, links)
	for _, d := range []string{"proc", "tmp", "etc"} {
		if _, err := os.Lstat(filepath.Join(root, d)); err != nil {
			w.must(os.MkdirAll(filepath.Join(root, d), 0o755))
		}
	}
	for _, f := range []string{"hostile", "self"} {
		b, err := os.ReadFile(filepath.Join(w.base, f))
		w.must(err)
		w.must(os.WriteFile(filepath.Join(root, f), b, 0o755))
	}
	s.Root.Path = "rootfs"
	s.Linux.CgroupsPath = w.cfg.Cgroup + "/" + filepath.Base(dir)
	w.writeSpec(dir, s)
	return dir
}

func (w *world) writeSpec(dir string, s *specs.Spec) {
	w.t.Helper()
	b, err := json.Marshal(s)
	w.must(err)
	w.must(os.WriteFile(filepath.Join(dir, "config.json"), b, 0o644))
}

// oci runs the OCI command and returns what it and its container printed.
func (w *world) oci(args ...string) (out string, code int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, ociBinary(w), append([]string{"--root", w.path("oci")}, args...)...)
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	err := cmd.Run()
	if cmd.ProcessState == nil || ctx.Err() != nil {
		w.t.Fatalf("skein-oci %v: %v %s", args, err, b.String())
	}
	return b.String(), cmd.ProcessState.ExitCode()
}

// ociRun runs a bundle to its end.
func (w *world) ociRun(dir string) (string, int) {
	w.t.Helper()
	return w.oci("run", "--bundle", dir, filepath.Base(dir))
}

func ociBinary(w *world) string { return filepath.Join(filepath.Dir(w.base), "skein-oci") }

// ociStart starts a bundle whose container runs on, and waits for its first word, "ready".
func (w *world) ociStart(dir string) (id string) {
	w.t.Helper()
	id = filepath.Base(dir)
	f, err := os.Create(filepath.Join(dir, "log"))
	w.must(err)
	defer f.Close()
	cmd := exec.Command(ociBinary(w), "--root", w.path("oci"), "create", "--bundle", dir, id)
	cmd.Stdout, cmd.Stderr = f, f
	w.must(cmd.Run())
	if out, code := w.oci("start", id); code != 0 {
		w.t.Fatalf("start: %s", out)
	}
	eventually(w.t, "the container is ready", func() bool {
		b, _ := os.ReadFile(f.Name())
		return bytes.Contains(b, []byte("ready"))
	})
	return id
}

// ociEnd kills and deletes it.
func (w *world) ociEnd(id string) {
	w.t.Helper()
	if out, code := w.oci("delete", "--force", id); code != 0 {
		w.t.Errorf("delete: %s", out)
	}
}

// givePtrace lets the container look at whatever is in its pid namespace.
func givePtrace(c *runtime.Config) {
	caps := append(c.Spec.Process.Capabilities.Bounding, "CAP_SYS_PTRACE")
	p := c.Spec.Process.Capabilities
	p.Bounding, p.Effective, p.Permitted = caps, caps, caps
}

// exec starts a process in a container and follows its output to its end.
func (w *world) exec(id string, p runtime.Process) (string, error) {
	w.t.Helper()
	if _, err := w.sup.Exec(w.ctx, id, p); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
	defer cancel()
	var out bytes.Buffer
	err := w.sup.Attach(ctx, id, p.ID, runtime.Streams{Stdout: &out, Stderr: &out})
	return out.String(), err
}
