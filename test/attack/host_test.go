package attack

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// asNobody runs the hostile program on the host as a user without rights.
func asNobody(t testing.TB, args ...string) string {
	t.Helper()
	base, err := buildHostile()
	if err != nil {
		t.Fatal(err)
	}
	// Everybody may run a copy that lies in a directory of everybody's.
	dir, err := os.MkdirTemp("/tmp", "skein-attack-nobody-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	bin, err := os.ReadFile(filepath.Join(base, "hostile"))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "hostile"), bin, 0o755)
	}
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(dir, "hostile"), args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	_ = cmd.Run()
	return out.String()
}

// TestCVE_2024_25621_2021_41091_2021_41103: a user of the host without rights can neither list nor enter what engine, image store and
// supervisor keep, nor use a setuid program in there, nor reach their sockets. A state directory of mode 0711 or 0755 fails.
func TestCVE_2024_25621_2021_41091_2021_41103(t *testing.T) {
	n := newNode(t)
	for d := n.dir; d != "/tmp" && d != "/"; d = filepath.Dir(d) { // nothing above protects them
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.hostileImage("state")
	n.must("POST", "/volumes/create", map[string]any{"Name": "data"})
	n.run("box", "state", map[string]any{"Binds": []string{"data:/data"}}, "create", "/setuid", "create", "/data/file", "say", "ready", "sleep")
	eventually(t, "it is ready", func() bool { return strings.Contains(n.output("box"), "ready") })
	var args []string
	seen := 0
	err := filepath.WalkDir(n.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == n.dir {
			return nil
		}
		seen++
		if seen > 400 {
			return fs.SkipAll
		}
		switch {
		case d.IsDir():
			args = append(args, "ls", p)
		case d.Type()&fs.ModeSocket != 0:
			args = append(args, "dial", p)
		default:
			args = append(args, "read", p)
		}
		return nil
	})
	if err != nil || seen < 20 {
		t.Fatalf("%d files to look at: %v", seen, err)
	}
	for l := range strings.Lines(asNobody(t, args...)) {
		if !strings.Contains(l, "permission denied") {
			t.Errorf("a user without rights: %s", l)
		}
	}
}

// TestCVE_2020_15257: a container in the host's network reaches no socket of ours: none is abstract, where network namespaces are the only
// wall, and none has a path inside. A supervisor or engine with an abstract socket fails.
func TestCVE_2020_15257(t *testing.T) {
	w := newWorld(t)
	c := w.config("hostnet", "connect", w.dir, "dial", w.cfg.SocketPath)
	var own []specs.LinuxNamespace
	for _, ns := range c.Spec.Linux.Namespaces {
		if ns.Type != specs.NetworkNamespace {
			own = append(own, ns)
		}
	}
	c.Spec.Linux.Namespaces = own
	_, out := w.run(c)
	lines(t, out, "connects done true", "dial "+w.cfg.SocketPath+" .*no such file or directory")
	for l := range strings.Lines(out) {
		if strings.HasPrefix(l, "connected") && strings.Contains(l, w.dir) {
			t.Errorf("from inside: %s", l)
		}
	}
	n := newNode(t)
	n.hostileImage("net")
	n.run("box", "net", nil, "sleep")
	abstract := abstractSockets(t)
	for _, pid := range ours(t, n.dir) {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, fd := range fds {
			l, _ := os.Readlink(fd)
			if name, ok := abstract[l]; ok {
				t.Errorf("process %d of ours has the abstract socket %s", pid, name)
			}
		}
	}
}

// abstractSockets are the host's, by what their descriptors are called.
func abstractSockets(t testing.TB) map[string]string {
	t.Helper()
	b, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) == 8 && strings.HasPrefix(f[7], "@") {
			out["socket:["+f[6]+"]"] = f[7]
		}
	}
	return out
}

// ours are this process and the supervisors below dir.
func ours(t testing.TB, dir string) []int {
	t.Helper()
	out := []int{os.Getpid()}
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		b, _ := os.ReadFile(p)
		var pid int
		if bytes.Contains(b, []byte("supervisor\x00")) && bytes.Contains(b, []byte(dir)) {
			if _, err := fmt.Sscanf(p, "/proc/%d/cmdline", &pid); err == nil {
				out = append(out, pid)
			}
		}
	}
	if len(out) < 2 {
		t.Fatal("no supervisor was found")
	}
	return out
}

// TestCVE_2022_0811: kernel parameters that are not a namespace's own, by whatever spelling, and values with separators that set another
// one, are refused before anything is made. Handing names and values on as they come sets core_pattern on the host.
func TestCVE_2022_0811(t *testing.T) {
	w := newWorld(t)
	n := newNode(t)
	n.hostileImage("sysctl")
	before := corePattern(t)
	for i, kv := range [][2]string{
		{"kernel.core_pattern", "|/evil"}, {"kernel/core_pattern", "|/evil"}, {"kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil"},
		{"kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/evil"}, {"net.ipv4.ip_forward", "1\nkernel.core_pattern=|/evil"},
		{"net/../kernel/core_pattern", "|/evil"}, {"net/ipv4/../../kernel/core_pattern", "|/evil"}, {"fs.mqueue/../../kernel/core_pattern", "|/evil"},
		{"fs/mqueue/../../kernel/core_pattern", "|/evil"}, {"/proc/sys/kernel/core_pattern", "|/evil"}, {"net./proc/sys/kernel/core_pattern", "|/evil"},
		{"kernel.domainname\nkernel.core_pattern", "|/evil"}, {"net.ipv4.ip_forward=1 kernel.core_pattern", "|/evil"}, {"vm.overcommit_memory", "1"},
		{"kernel.modprobe", "/evil"}, {"kernel.sysrq", "1"}, {"net.ipv4.ip_forward\x00", "1"}, {"net.ipv4.ip_forward", "1\x00"}, {"", "1"}, {"net", "1"}, {"..", "1"},
	} {
		c := w.config(fmt.Sprintf("s%d", i), "exit", "0")
		c.Spec.Linux.Sysctl = map[string]string{kv[0]: kv[1]}
		if err := w.sup.Create(w.ctx, c); err == nil {
			t.Errorf("%q=%q was accepted", kv[0], kv[1])
			w.must(w.sup.Delete(w.ctx, c.ID))
		}
		name := fmt.Sprintf("s%d", i)
		if code, _ := n.startAs(name, "sysctl", "", map[string]any{"Sysctls": map[string]string{kv[0]: kv[1]}}, "exit", "0"); code < 400 {
			t.Errorf("%q=%q was accepted by the engine", kv[0], kv[1])
		}
		s := w.spec("exit", "0")
		s.Linux.Sysctl = c.Spec.Linux.Sysctl
		if out, code := w.ociRun(w.bundle(s, nil)); code == 0 {
			t.Errorf("OCI: %q=%q was accepted: %s", kv[0], kv[1], out)
		}
		if now := corePattern(t); now != before {
			t.Fatalf("%q=%q: core_pattern is %q now", kv[0], kv[1], now)
		}
	}
}

// TestCVE_2021_43784: what is longer than a message's or a structure's field is refused, never cut off or wrapped round, and the supervisor
// lives on. The original was a length of 16 bits before the maps of a user namespace.
func TestCVE_2021_43784(t *testing.T) {
	w := newWorld(t)
	long := strings.Repeat("x", 1<<16)
	many := make([]string, 1<<16)
	for i := range many {
		many[i] = "A=b"
	}
	for name, change := range map[string]func(s *specs.Spec){
		"namespace path": func(s *specs.Spec) { s.Linux.Namespaces[2].Path = "/" + long },
		"hostname":       func(s *specs.Spec) { s.Hostname = long },
		"cwd":            func(s *specs.Spec) { s.Process.Cwd = "/" + long },
		"args":           func(s *specs.Spec) { s.Process.Args = append(s.Process.Args, strings.Repeat(long, 8)) },
		"env":            func(s *specs.Spec) { s.Process.Env = many },
		"mounts": func(s *specs.Spec) {
			for i := range 1 << 12 {
				s.Mounts = append(s.Mounts, specs.Mount{Destination: fmt.Sprintf("/m%d", i), Type: "tmpfs", Source: "tmpfs"})
			}
		},
		"masks":  func(s *specs.Spec) { s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, many...) },
		"groups": func(s *specs.Spec) { s.Process.User.AdditionalGids = make([]uint32, 1<<17) },
		"sysctl": func(s *specs.Spec) {
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_local_port_range": strings.Repeat("1 ", 1<<17)}
		},
	} {
		c := w.config("long-"+strings.ReplaceAll(name, " ", ""), "exit", "0")
		change(c.Spec)
		if err := w.sup.Create(w.ctx, c); err == nil {
			_, err = w.sup.Start(w.ctx, c.ID)
			if err == nil {
				t.Errorf("%s: accepted", name)
			}
			w.must(w.sup.Delete(w.ctx, c.ID))
		}
		s := w.spec("exit", "0")
		change(s)
		if out, code := w.ociRun(w.bundle(s, nil)); code == 0 {
			t.Errorf("OCI, %s: accepted: %s", name, out)
		}
	}
	s := w.spec("exit", "0")
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	for i := range 1 << 12 {
		m := specs.LinuxIDMapping{ContainerID: uint32(2 * i), HostID: uint32(100000 + 2*i), Size: 1}
		s.Linux.UIDMappings, s.Linux.GIDMappings = append(s.Linux.UIDMappings, m), append(s.Linux.GIDMappings, m)
	}
	if out, code := w.ociRun(w.bundle(s, nil)); code == 0 {
		t.Errorf("OCI: %d maps were accepted: %s", 1<<12, out)
	}
	if x, _ := w.run(w.config("after", "exit", "7")); x.Code != 7 {
		t.Errorf("afterwards: %+v", x)
	}
}

// TestLabelsAreRefused: where the kernel has neither AppArmor nor SELinux, a container that asks for a label does not run without it.
func TestLabelsAreRefused(t *testing.T) {
	w := newWorld(t)
	n := newNode(t)
	n.hostileImage("labels")
	for name, change := range map[string]func(s *specs.Spec){
		"apparmor":   func(s *specs.Spec) { s.Process.ApparmorProfile = "docker-default" },
		"selinux":    func(s *specs.Spec) { s.Process.SelinuxLabel = "system_u:system_r:container_t:s0" },
		"mountlabel": func(s *specs.Spec) { s.Linux.MountLabel = "system_u:object_r:container_file_t:s0" },
	} {
		c := w.config(name, "exit", "0")
		change(c.Spec)
		if err := w.sup.Create(w.ctx, c); !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", name, err)
		}
		s := w.spec("exit", "0")
		change(s)
		if out, code := w.ociRun(w.bundle(s, nil)); code == 0 {
			t.Errorf("OCI, %s: accepted: %s", name, out)
		}
	}
	for i, o := range []string{"apparmor=docker-default", "apparmor:mine", "label=type:container_t", "label=level:s0"} {
		if code, out := n.startAs(fmt.Sprintf("l%d", i), "labels", "", map[string]any{"SecurityOpt": []string{o}}, "exit", "0"); code < 400 {
			t.Errorf("--security-opt %s was accepted: %s", o, out)
		}
	}
}

// TestInitIsNotTheHosts: the init that is put before a command is a sealed file of ours, in no way the host's program.
func TestInitIsNotTheHosts(t *testing.T) {
	w := newWorld(t)
	c := w.config("init", "exe")
	c.Init = true
	_, out := w.run(c)
	lines(t, out, `exe /memfd:docker-init \(deleted\) <nil> true`)
}
