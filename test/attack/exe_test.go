package attack

import (
	"crypto/sha256"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime"
)

// hostHash is the content of the program that makes containers: in these tests, the test binary.
func hostHash(t testing.TB, file string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// TestCVE_2019_5736 runs the program "/proc/self/exe", as command and as the interpreter of a script, first process and exec, while a
// process inside polls /proc/*/exe: the host's program must never be reachable, let alone run. A runtime whose child still has its own
// file as /proc/self/exe at execve fails here: the test binary prints its warning and exits with 99.
func TestCVE_2019_5736(t *testing.T) {
	w := newWorld(t)
	before := hostHash(t, "/proc/self/exe")
	refused := func(what string, err error) {
		if err == nil {
			t.Errorf("%s was started", what)
		}
	}
	for i, args := range [][]string{{"/self"}, {"/proc/self/exe"}, {"/proc/1/exe"}, {"/proc/thread-self/exe"}} {
		c := w.config(fmt.Sprintf("lure%d", i))
		c.Spec.Process.Args = args
		w.must(w.sup.Create(w.ctx, c))
		_, err := w.sup.Start(w.ctx, c.ID)
		refused(args[0], err)
		x := w.ended(c.ID, "")
		if out := w.log(c); x.Code != 126 && x.Code != 127 || strings.Contains(out, "host") {
			t.Errorf("%v: exit %+v, output %q", args, x, out)
		}
		w.must(w.sup.Delete(w.ctx, c.ID))
	}
	hunter := w.config("hunter", "hunt", "look", "0")
	givePtrace(&hunter)
	w.start(hunter)
	w.says(hunter, "ready")
	for i := range manyRounds(30) {
		p := runtime.Process{ID: fmt.Sprintf("x%d", i), Args: []string{"/self"}, Env: []string{insideEnv + "=1"}}
		if i%2 == 1 {
			p.Args = []string{"/proc/self/exe"}
		}
		_, err := w.sup.Exec(w.ctx, hunter.ID, p)
		refused("exec of "+p.Args[0], err)
	}
	out := w.stop(hunter)
	if !strings.Contains(out, "looks before execve") {
		t.Errorf("the hunter saw nothing: %s", out)
	}
	for l := range strings.Lines(out) {
		if strings.Contains(l, " exe ") && !strings.Contains(l, `exe "" `) && !strings.Contains(l, `exe "/memfd:none (deleted)"`) {
			t.Errorf("a process inside showed %s", l)
		}
	}
	if hostHash(t, "/proc/self/exe") != before {
		t.Fatal("the host's program was changed")
	}
}

// TestCVE_2019_5736_OCI is the same for the OCI command, whose own file is the prize.
func TestCVE_2019_5736_OCI(t *testing.T) {
	w := newWorld(t)
	file := ociBinary(w)
	before := hostHash(t, file)
	for _, args := range [][]string{{"/self"}, {"/proc/self/exe", "--version"}} {
		s := w.spec()
		s.Process.Args = args
		out, code := w.ociRun(w.bundle(s, nil))
		if code == 0 || strings.Contains(out, "spec: "+specs.Version) || strings.Contains(out, "see skein-oci --help") {
			t.Errorf("%v: exit code %d, output %s", args, code, out)
		}
	}
	dir := w.bundle(w.spec("hunt", "look", "0"), nil)
	id := w.ociStart(dir)
	for i := range 20 {
		args := []string{"/self"}
		if i%2 == 1 {
			args = []string{"/proc/self/exe", "--version"}
		}
		if out, code := w.oci(append([]string{"exec", id}, args...)...); code == 0 || strings.Contains(out, "spec: ") {
			t.Errorf("exec %v: exit code %d, output %s", args, code, out)
		}
	}
	w.ociEnd(id)
	if hostHash(t, file) != before {
		t.Fatal("the host's program was changed")
	}
}
