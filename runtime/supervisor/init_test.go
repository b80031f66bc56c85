package supervisor

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"

	"skein/runtime"
)

// TestInit runs commands below the init: exit codes, signals and failed commands are theirs, orphans are reaped.
func TestInit(t *testing.T) {
	e := newEnv(t)
	run := func(args ...string) (runtime.Exit, string) {
		t.Helper()
		e.n++
		c := e.config(fmt.Sprintf("i%d", e.n), args...)
		c.Init = true
		return e.run(c)
	}
	if x, out := run("host", "fds", "status", "orphans", "20", "exit", "42"); x.Code != 42 || !strings.Contains(out, "pid 2 cwd /") ||
		!strings.Contains(out, "fds 0 1 2\n") || !strings.Contains(out, "SigBlk:\t0000000000000000") || !strings.Contains(out, "orphans are gone") {
		t.Errorf("exit %+v, output %s", x, out)
	}
	if x, out := run("write", "/proc/1/exe", "x", "exit", "0"); x.Code != 0 || !strings.Contains(out, "write /proc/1/exe open /proc/1/exe: ") {
		t.Errorf("a write to the init's file: %+v, %s", x, out)
	}
	c := e.config("none")
	c.Init, c.Spec.Process.Args = true, []string{"nope"}
	e.must(e.sup.Create(e.ctx, c))
	if _, err := e.sup.Start(e.ctx, "none"); err == nil || !strings.Contains(err.Error(), "executable file not found in $PATH") {
		t.Errorf("start of a command that is not there: %v", err)
	}
	if x := e.wait("none"); x.Code != 127 {
		t.Errorf("exit %+v, want 127", x)
	}
	e.must(e.sup.Delete(e.ctx, "none"))
	for sig, want := range map[int]int{15: 7, 1: 129} {
		c := e.config(fmt.Sprintf("sig%d", sig), "term")
		c.Init = true
		pid := e.start(c)
		e.until(func() bool { return strings.Contains(e.log(c), "ready") })
		if kb := privateKiB(t, pid); kb > 100 {
			t.Errorf("the init has %d KiB of its own, want at most 100", kb)
		}
		e.must(e.sup.Signal(e.ctx, c.ID, sig))
		if x := e.wait(c.ID); x.Code != want {
			t.Errorf("signal %d: exit %+v, want %d", sig, x, want)
		}
		e.must(e.sup.Delete(e.ctx, c.ID))
	}
}

// TestInitTerminal gives the terminal to the command, not to the init.
func TestInitTerminal(t *testing.T) {
	e := newEnv(t)
	c := e.config("tty", "cat")
	c.Init, c.Spec.Process.Terminal = true, true
	e.must(e.sup.Create(e.ctx, c))
	in, out := newPipe(t), &lockedBuffer{}
	attached := make(chan struct{})
	go func() { // ends with the container
		_ = e.sup.Attach(e.ctx, "tty", "", runtime.Streams{Stdin: in, Stdout: out, Attached: func() { close(attached) }})
	}()
	<-attached
	_, err := e.sup.Start(e.ctx, "tty")
	e.must(err)
	in.write("here\n")
	e.until(func() bool { return strings.Count(out.String(), "here") == 2 })
	in.write("\x03")
	if x := e.wait("tty"); x.Code != 130 {
		t.Errorf("exit %+v, want 130: the interrupt goes to the command", x)
	}
	e.must(e.sup.Delete(e.ctx, "tty"))
}

type inputPipe struct {
	*os.File
	w *os.File
}

func newPipe(t *testing.T) inputPipe {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return inputPipe{r, w}
}

func (p inputPipe) write(s string) { _, _ = p.w.WriteString(s) }

// privateKiB is the memory that a process shares with nobody.
func privateKiB(t *testing.T, pid int) (sum int) {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		var n int
		if k, v, ok := strings.Cut(sc.Text(), ":"); ok && strings.HasPrefix(k, "Private_") {
			if _, err := fmt.Sscan(v, &n); err != nil {
				t.Fatal(err)
			}
			sum += n
		}
	}
	return sum
}
