package supervisor

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime"
)

// joining is a container in namespaces of another, with the other's shared memory.
func (e *env) joining(id, other string, args ...string) runtime.Config {
	c := e.config(id, args...)
	for i, n := range c.Spec.Linux.Namespaces {
		if n.Type == specs.PIDNamespace || n.Type == specs.IPCNamespace || n.Type == specs.UTSNamespace {
			c.Spec.Linux.Namespaces[i].Path = runtime.ContainerPath + other
		}
	}
	c.Spec.Hostname = ""
	for i, m := range c.Spec.Mounts {
		if m.Destination == "/dev/shm" {
			c.Spec.Mounts[i] = specs.Mount{Destination: m.Destination, Type: "bind", Source: runtime.ContainerPath + other, Options: []string{"bind"}}
		}
	}
	return c
}

// TestJoinContainer: pid, ipc and uts namespaces and the shared memory are the other container's; its end is the end.
func TestJoinContainer(t *testing.T) {
	e := newEnv(t)
	e.start(e.config("donor", "write", "/dev/shm/f", "shared", "sleep"))
	e.until(func() bool { // the file is there when the first joiner reads it
		e.n++
		x, out := e.run(e.joining("j"+strings.Repeat("x", e.n), "donor", "host", "read", "/dev/shm/f", "fds"))
		if x.Code != 0 {
			t.Fatalf("exit %+v\n%s", x, out)
		}
		if strings.Contains(out, "pid 1 ") || !strings.Contains(out, "host box ") || !strings.Contains(out, "fds 0 1 2\n") {
			t.Fatalf("not in the donor's namespaces:\n%s", out)
		}
		return strings.Contains(out, "shared")
	})
	e.start(e.joining("stays", "donor", "sleep"))
	out := e.execIn("stays", "x1", "/inside", "host")
	if strings.Contains(out, "pid 1 ") || !strings.Contains(out, "host box ") {
		t.Errorf("exec is not in the donor's namespaces:\n%s", out)
	}
	for id, change := range map[string]func(*runtime.Config){
		"nobody": func(c *runtime.Config) { *c = e.joining("nobody", "none", "exit", "0") },
		"self":   func(c *runtime.Config) { *c = e.joining("self", "self", "exit", "0") },
		"shm": func(c *runtime.Config) {
			c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: runtime.ContainerPath + "donor"})
		},
	} {
		c := e.config(id, "exit", "0")
		change(&c)
		if err := e.sup.Create(e.ctx, c); err == nil {
			t.Errorf("%s was created", id)
		} else {
			t.Log(id, "→", err)
		}
	}
	e.must(e.sup.Signal(e.ctx, "donor", 9))
	if x := e.wait("stays"); x.Code != 137 {
		t.Errorf("after the donor's end: %+v, want 137", x)
	}
	if err := e.sup.Create(e.ctx, e.joining("late", "donor", "exit", "0")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("join of an ended container: %v", err)
	}
}

// execIn runs an additional process and returns its output.
func (e *env) execIn(id, execID string, args ...string) string {
	e.t.Helper()
	_, err := e.sup.Exec(e.ctx, id, runtime.Process{ID: execID, Args: args})
	e.must(err)
	var out lockedBuffer
	e.must(e.sup.Attach(e.ctx, id, execID, runtime.Streams{Stdout: &out, Stderr: &out}))
	return out.String()
}
