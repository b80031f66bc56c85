package supervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime"
)

const firstID, idCount = 200000, 65536

// remapped is a container in a user namespace of its own.
func (e *env) remapped(id string, args ...string) runtime.Config {
	c := e.config(id, args...)
	m := []specs.LinuxIDMapping{{ContainerID: 0, HostID: firstID, Size: idCount}}
	c.Spec.Linux.Namespaces = append(c.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	c.Spec.Linux.UIDMappings, c.Spec.Linux.GIDMappings = m, m
	return c
}

func ownerOf(t *testing.T, name string) string {
	t.Helper()
	st, err := os.Stat(name)
	if err != nil {
		t.Error(err)
		return ""
	}
	s := st.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d:%d", s.Uid, s.Gid)
}

// TestUserNamespace: root inside is nobody outside; layers and mapped volumes keep their own numbers on disk, plain binds do not.
func TestUserNamespace(t *testing.T) {
	e := newEnv(t)
	c := e.remapped("box", "status", "host", "fds", "write", "/new", "1", "write", "/vol/f", "1", "write", "/plain/f", "1", "read", "/proc/self/uid_map",
		"ls", "/dev", "ls", "/sys/class/net", "read", "/proc/keys", "write", "/proc/sys/kernel/hostname", "x", "sysctl", "net/ipv4/ip_unprivileged_port_start",
		"sysctl", "kernel/msgmax", "mount", "read", "/vol/secret", "stdout",
		"write", "/engine/record", "1", "read", "/engine/record", "write", "/engine/new", "1")
	vol, plain := filepath.Join(e.dir, "vol"), filepath.Join(e.dir, "plain")
	e.must(os.MkdirAll(vol, 0o755))
	e.must(os.WriteFile(vol+"/secret", []byte("for root"), 0o600))
	e.must(os.MkdirAll(plain, 0o777))
	e.must(os.Chmod(plain, 0o777))
	engine := filepath.Join(e.dir, "engine") // as an engine's own data (CVE-2021-21284): root inside has no say there
	e.must(os.MkdirAll(engine, 0o700))
	e.must(os.WriteFile(engine+"/record", []byte("of root alone"), 0o600))
	c.Spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "kernel.msgmax": "9000"}
	c.Spec.Mounts = append(c.Spec.Mounts,
		specs.Mount{Destination: "/vol", Type: "bind", Source: vol, Options: []string{"rbind", "rprivate", "idmap"}},
		specs.Mount{Destination: "/engine", Type: "bind", Source: engine, Options: []string{"rbind", "rprivate"}},
		specs.Mount{Destination: "/plain", Type: "bind", Source: plain, Options: []string{"rbind", "rprivate"}},
		specs.Mount{Destination: "/ro", Type: "bind", Source: vol, Options: []string{"rbind", "rro", "idmap"}})
	x, out := e.run(c)
	t.Log(out)
	if x.Code != 0 {
		t.Fatalf("exit %+v", x)
	}
	for _, want := range []string{"Uid:\t0\t0\t0\t0", "host box pid 1 cwd /\n", "fds 0 1 2\n", "write /new <nil>", "write /vol/f <nil>", "write /plain/f <nil>", "200000",
		"ls /dev core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero <nil>", "lo", "read /proc/keys 0 <nil>",
		"write /proc/sys/kernel/hostname open", "sysctl net/ipv4/ip_unprivileged_port_start 0 <nil>", "sysctl kernel/msgmax 9000 <nil>", "for root",
		"CapBnd:\t00000000a80425fb", "mount operation not permitted",
		"write /engine/record open /engine/record: permission denied", "read /engine/record 0 open /engine/record: permission denied",
		"write /engine/new open /engine/new: permission denied"} {
		if !strings.Contains(out, want) {
			t.Errorf("missing %q", want)
		}
	}
	for name, want := range map[string]string{filepath.Join(e.dir, "box/upper/new"): "0:0", vol + "/f": "0:0", plain + "/f": fmt.Sprintf("%d:%d", firstID, firstID)} {
		if got := ownerOf(t, name); got != want {
			t.Errorf("%s is %s's on disk, want %s", name, got, want)
		}
	}
}

// TestUserNamespaceLife: a process outside the container's root, additional processes, a terminal, a joined namespace, a second start of the
// supervisor.
func TestUserNamespaceLife(t *testing.T) {
	e := newEnv(t)
	c := e.remapped("box", "status", "sleep")
	c.Spec.Process.User = specs.User{UID: 1000, GID: 1000}
	pid := e.start(c)
	if got := ownerOf(t, fmt.Sprintf("/proc/%d", pid)); got != fmt.Sprintf("%d:%d", firstID+1000, firstID+1000) {
		t.Errorf("the process is %s's outside", got)
	}
	out := e.execIn("box", "x1", "/inside", "status", "host", "fds", "write", "/by-exec", "1")
	if !strings.Contains(out, "Uid:\t0\t0\t0\t0") || !strings.Contains(out, "write /by-exec <nil>") || !strings.Contains(out, "fds 0 1 2\n") || strings.Contains(out, "pid 1 ") {
		t.Errorf("exec:\n%s", out)
	}
	if got := ownerOf(t, filepath.Join(e.dir, "box/upper/by-exec")); got != "0:0" {
		t.Errorf("a file of an additional process is %s's on disk", got)
	}
	_, err := e.sup.Exec(e.ctx, "box", runtime.Process{ID: "x2", Args: []string{"/inside", "tty"}, Terminal: true, OpenStdin: true})
	e.must(err)
	var tty lockedBuffer
	e.must(e.sup.Attach(e.ctx, "box", "x2", runtime.Streams{Stdin: strings.NewReader("hi\n"), Stdout: &tty}))
	if !strings.Contains(tty.String(), "got hi") {
		t.Errorf("exec terminal: %q", tty.String())
	}
	j := e.joining("friend", "box", "host", "status", "write", "/f", "1")
	j.Spec.Linux.Namespaces = append(j.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: runtime.ContainerPath + "box"})
	x, out := e.run(j)
	if x.Code != 0 || strings.Contains(out, "pid 1 ") || !strings.Contains(out, "write /f <nil>") {
		t.Errorf("joined: %+v\n%s", x, out)
	}
	if got := ownerOf(t, filepath.Join(e.dir, "friend/upper/f")); got != "0:0" {
		t.Errorf("a file of a container that joined is %s's on disk", got)
	}
	con := e.remapped("con", "tty")
	con.Spec.Process.Terminal = true
	con.OpenStdin = true
	e.must(e.sup.Create(e.ctx, con))
	_, err = e.sup.Start(e.ctx, "con")
	e.must(err)
	var con2 lockedBuffer
	e.must(e.sup.Attach(e.ctx, "con", "", runtime.Streams{Stdin: strings.NewReader("hi\n"), Stdout: &con2}))
	if !strings.Contains(con2.String(), "got hi") {
		t.Errorf("terminal: %q", con2.String())
	}
}

func TestUserNamespaceRefusals(t *testing.T) {
	e := newEnv(t)
	for name, change := range map[string]func(*runtime.Config){
		"no maps":      func(c *runtime.Config) { c.Spec.Linux.UIDMappings = nil },
		"no namespace": func(c *runtime.Config) { c.Spec.Linux.Namespaces = c.Spec.Linux.Namespaces[:6] },
		"overlap": func(c *runtime.Config) {
			c.Spec.Linux.UIDMappings = append(c.Spec.Linux.UIDMappings, specs.LinuxIDMapping{ContainerID: 5, HostID: 7, Size: 10})
		},
		"unmapped user": func(c *runtime.Config) { c.Spec.Process.User.UID = 70000 },
	} {
		e.n++
		c := e.remapped(fmt.Sprintf("r%d", e.n), "exit", "0")
		change(&c)
		err := e.sup.Create(e.ctx, c)
		if err == nil {
			_, err = e.sup.Start(e.ctx, c.ID)
		}
		if err == nil {
			t.Errorf("%s: started", name)
		}
		t.Log(name, "→", err)
	}
}
