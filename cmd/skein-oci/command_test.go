package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"golang.org/x/sys/unix"

	"skein/runtime/sandbox"
)

// shell runs the command, which is built once, static, and is the program inside the containers too.
type shell struct {
	t            *testing.T
	bin, dir     string
	stdin        string
	out, err     string
	extra        []*os.File
	bundle, root string
}

func newShell(t *testing.T) *shell {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Skip("cannot mount: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s := &shell{t: t, dir: dir, bundle: filepath.Join(dir, "bundle"), root: filepath.Join(dir, "state"), bin: filepath.Join(dir, "bundle/rootfs/skein-oci")}
	for _, d := range []string{"bundle/rootfs/proc", "bundle/rootfs/dev"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-o", s.bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return s
}

// config writes a bundle whose process is the command with args.
func (s *shell) config(args ...string) {
	s.t.Helper()
	c := sandbox.DefaultSpec()
	c.Process.Args = append([]string{"/skein-oci"}, args...)
	c.Root.Path = "rootfs"
	c.Linux.CgroupsPath = fmt.Sprintf("/skein-test-cmd-%d", os.Getpid())
	b, err := json.Marshal(c)
	if err == nil {
		err = os.WriteFile(filepath.Join(s.bundle, "config.json"), b, 0o644)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// run runs the command and returns its exit code.
func (s *shell) run(args ...string) int {
	s.t.Helper()
	cmd := exec.Command(s.bin, append([]string{"--root", s.root}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.Dir, cmd.ExtraFiles = strings.NewReader(s.stdin), &out, &errs, s.bundle, s.extra
	cmd.WaitDelay = 20 * time.Second
	err := cmd.Run()
	s.out, s.err = out.String(), errs.String()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode()
}

// want fails unless the command ends with the code and says the words, anywhere.
func (s *shell) want(code int, words string, args ...string) {
	s.t.Helper()
	if got := s.run(args...); got != code || !strings.Contains(s.out+s.err, words) {
		s.t.Errorf("%q: ended with %d, want %d saying %q:\n%s%s", args, got, code, words, s.out, s.err)
	}
}

// TestUsage: what is not offered is an error that says so.
func TestUsage(t *testing.T) {
	s := newShell(t)
	s.config("--version")
	s.want(0, "spec: "+specs.Version, "--version")
	s.want(0, "Commands:", "--help")
	s.want(0, "Flags:", "exec", "--help")
	s.want(1, "is not a command", "fly")
	s.want(1, "is not offered", "checkpoint", "x")
	s.want(1, "is not offered", "restore", "x")
	s.want(1, "is not offered", "events", "--stats", "x")
	s.want(1, "flag provided but not defined", "create", "--fast", "x")
	s.want(1, "container id is missing", "state")
	s.want(1, "want only a container id", "start", "a", "b")
	s.want(1, "--systemd-cgroup", "--systemd-cgroup", "create", "x")
	s.want(1, "--rootless=true", "--rootless=true", "list")
	s.want(1, "--no-pivot", "create", "--no-pivot", "x")
	s.want(1, "want text or json", "--log-format", "xml", "list")
	s.want(1, "does not exist", "state", "x")
	s.want(1, "does not exist", "kill", "x")
	s.want(1, "does not exist", "delete", "x")
	s.want(0, "", "delete", "--force", "x")
	s.want(255, "does not exist", "exec", "x", "true")
	s.want(1, "read config", "create", "--bundle", "/no/such", "x")
	s.want(1, "signal", "kill", "x", "SIGNONE")
	s.want(0, "[]", "list", "--format", "json")
	log := filepath.Join(s.dir, "log")
	s.want(1, "does not exist", "--log", log, "--log-format", "json", "state", "x")
	b, _ := os.ReadFile(log)
	var line struct{ Level, Msg, Time string }
	if err := json.Unmarshal(b, &line); err != nil || line.Level != "error" || !strings.Contains(line.Msg, `"x" does not exist`) || line.Time == "" {
		t.Errorf("log %s: %v", b, err)
	}
	var f features.Features
	s.want(0, "ociVersionMax", "features")
	if err := json.Unmarshal([]byte(s.out), &f); err != nil || f.OCIVersionMax == "" || len(f.Linux.Namespaces) != 8 {
		t.Error(err, s.out)
	}
}

// TestRun: exit codes of the foreground, and descriptors that are passed.
func TestRun(t *testing.T) {
	s := newShell(t)
	s.config("--version")
	s.want(0, "skein-oci version", "run", "a")
	s.config("fly")
	s.want(1, "is not a command", "run", "a")
	s.config("exec", "x", "y")
	s.want(255, "does not exist", "run", "a")
	s.config("--version")
	s.want(1, "", "run", "--console-socket", "/no/such", "a")
	s.want(0, "", "run", "--keep", "a")
	s.want(0, `"status": "stopped"`, "state", "a")
	s.want(0, "", "delete", "a")
	f, err := os.CreateTemp(s.dir, "")
	if err == nil {
		_, err = f.WriteString(`{"memory":{"limit":"passed"}}`)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, _ = f.Seek(0, 0)
	s.extra = []*os.File{f}
	s.config("update", "--resources", "/proc/self/fd/3", "x")
	s.want(1, "memory.limit", "run", "--preserve-fds", "1", "a")
	if s.run("run", "a"); strings.Contains(s.out+s.err, "memory.limit") {
		t.Errorf("a descriptor that was not asked for is passed: %s%s", s.out, s.err)
	}
	s.want(1, "4 is not open", "run", "--preserve-fds", "2", "a")
	s.extra = nil
	if e, _ := os.ReadDir(s.root); len(e) > 0 {
		t.Errorf("state left: %v", e)
	}
}

// TestCommands drives one container as an engine would.
func TestCommands(t *testing.T) {
	s := newShell(t)
	s.config("update", "--resources", "-", "x") // reads its input to the end
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	pidFile := filepath.Join(s.dir, "pid")
	create := exec.Command(s.bin, "--root", s.root, "create", "--bundle", s.bundle, "--pid-file", pidFile, "--no-new-keyring", "c")
	create.Stdin = r // nothing else, which the container would hold open
	if err := create.Run(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.run("delete", "--force", "c") })
	r.Close()
	b, _ := os.ReadFile(pidFile)
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		t.Fatal(err)
	}
	s.want(1, "exists", "create", "c")
	s.want(0, fmt.Sprintf(`"pid": %d`, pid), "state", "c")
	s.want(0, `"status": "created"`, "state", "c")
	s.want(0, "", "start", "c")
	s.want(1, "it is running, not created", "start", "c")
	s.want(1, "it is running, not stopped", "delete", "c")
	s.want(0, fmt.Sprint(pid), "ps", "c")
	s.want(0, fmt.Sprint(pid), "ps", "--format", "json", "c")
	var pids []int
	if err := json.Unmarshal([]byte(s.out), &pids); err != nil || len(pids) != 1 || pids[0] != pid {
		t.Error(pids, err)
	}
	s.want(0, "c\n", "list", "-q")
	s.want(0, "skein-oci version", "exec", "c", "/skein-oci", "--version")
	s.want(1, "is not a command", "exec", "c", "/skein-oci", "fly")
	s.want(255, "not found", "exec", "c", "nosuch")
	s.want(255, "capability", "exec", "--cap", "CAP_FLY", "c", "/skein-oci")
	proc := filepath.Join(s.dir, "process")
	if err := os.WriteFile(proc, []byte(`{"cwd":"/","args":["/skein-oci","fly"]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	s.want(1, "is not a command", "exec", "--process", proc, "c")
	s.want(0, "", "exec", "-d", "--pid-file", filepath.Join(s.dir, "execpid"), "c", "/skein-oci", "--version")
	s.stdin = `{"pids":{"limit":77}}`
	s.want(0, "", "update", "-r", "-", "c")
	s.stdin = `{"pids":{"limit":-9}}`
	s.want(1, "linux.resources.pids.limit", "update", "-r", "-", "c")
	s.stdin = ""
	s.want(0, "", "update", "--memory", "67108864", "--cpu-quota", "50000", "c")
	s.want(0, "", "pause", "c")
	s.want(0, `"status": "paused"`, "state", "c")
	s.want(0, "", "resume", "c")
	s.want(0, "", "kill", "--all", "c", "CONT")
	s.want(0, "", "kill", "c", "9")
	deadline := time.Now().Add(20 * time.Second)
	for s.run("state", "c"); !strings.Contains(s.out, `"stopped"`) && time.Now().Before(deadline); s.run("state", "c") {
	}
	s.want(1, "is not running", "kill", "c", "TERM")
	s.want(0, "", "delete", "c")
	s.want(1, "does not exist", "state", "c")
	if m, _ := filepath.Glob(fmt.Sprintf("/sys/fs/cgroup/*/skein-test-cmd-%d*", os.Getpid())); len(m) > 0 {
		t.Errorf("groups left: %v", m)
	}
}

// TestSmall: the command starts once per operation and must not link what takes long to start or what only a cluster needs.
func TestSmall(t *testing.T) {
	b, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		switch p := strings.TrimSpace(line); {
		case p == "net", strings.HasPrefix(p, "net/"), strings.HasPrefix(p, "crypto/"), p == "regexp", strings.HasSuffix(p, "/template"),
			strings.Contains(p, "protobuf"), strings.Contains(p, "cobra"), strings.Contains(p, "grpc"):
			t.Errorf("%s is linked", p)
		}
	}
}
