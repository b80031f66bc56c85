package supervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// killSupervisor kills it, and waits for the next.
func (e *env) killSupervisor() {
	e.t.Helper()
	victim := e.supervisorPID()
	e.must(unix.Kill(victim, unix.SIGKILL))
	e.until(func() bool { return !processAlive(victim) })
	_, err := e.sup.List(e.ctx)
	e.must(err)
	if e.supervisorPID() == victim {
		e.t.Fatal("the supervisor did not die")
	}
}

func asParent(e *env) {
	_ = e.sup.Close()
	e.cfg.AdoptOrphans = true
	e.ensure()
	e.t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
}

// TestKilledSupervisor: terminals, open standard inputs and additional processes live through three deaths of the supervisor; what is
// said to them is heard, their ends are known.
func TestKilledSupervisor(t *testing.T) {
	e := newEnv(t)
	asParent(e)
	mem := int64(32 << 20)
	for id, tty := range map[string]bool{"tty": true, "pipe": false, "oom": false, "eof": false} {
		c := e.config(id, "shell")
		c.OpenStdin, c.Spec.Process.Terminal = true, tty
		if id == "oom" {
			c.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &mem, Swap: &mem}
		}
		e.start(c)
	}
	log := e.config("log", "count")
	e.start(log)
	for _, p := range []runtime.Process{{ID: "xtty", Terminal: true, OpenStdin: true}, {ID: "xpipe", OpenStdin: true}} {
		p.Args = []string{"/inside", "shell"}
		_, err := e.sup.Exec(e.ctx, "log", p)
		e.must(err)
	}
	_, err := e.sup.Exec(e.ctx, "eof", runtime.Process{ID: "xlate", OpenStdin: true, Args: []string{"/inside", "shell"}})
	e.must(err)
	type end struct{ id, exec string }
	ends := []end{{"tty", ""}, {"pipe", ""}, {"oom", ""}, {"log", "xtty"}, {"log", "xpipe"}}
	early := map[end]*talk{}
	for _, d := range ends {
		early[d] = e.attach(d.id, d.exec, true)
		e.say(early[d], "before")
	}
	for i := range 3 {
		e.killSupervisor()
		for _, d := range ends {
			x := e.attach(d.id, d.exec, true)
			e.say(x, fmt.Sprintf("after death %d", i))
			x.leave()
		}
	}
	e.must(e.sup.Resize(e.ctx, "tty", "", 40, 100))
	for n, d := range ends {
		x := e.attach(d.id, d.exec, true)
		last := fmt.Sprintf("exit %d\n", 42+n)
		if d.id == "oom" {
			last = "eat 64\n"
		}
		_, err := x.in.Write([]byte(last))
		e.must(err)
		var got runtime.Exit
		if d.exec == "" {
			got = e.wait(d.id)
		} else {
			got = e.execExit(d.exec)
		}
		want := runtime.Exit{Code: 42 + n}
		if d.id == "oom" {
			want = runtime.Exit{Code: 137, OOMKilled: true}
		}
		if got.Code != want.Code || got.OOMKilled != want.OOMKilled || got.Err != "" {
			t.Errorf("%s %s ended with %+v, want %+v", d.id, d.exec, got, want)
		}
	}
	late := e.attach("eof", "xlate", true)
	e.say(late, "nobody came before")
	late.in.Close()
	if got := e.execExit("xlate"); got.Code != 3 {
		t.Errorf("end of an additional process's input: %+v", got)
	}
	// The end of input reaches its reader though the descriptor is kept elsewhere, too.
	x := e.attach("eof", "", true)
	x.in.Close()
	if got := e.wait("eof"); got.Code != 3 {
		t.Errorf("end of input: %+v", got)
	}
	e.must(e.sup.Signal(e.ctx, "log", 9))
	e.wait("log")
	checkLines(t, e.log(log))
}

// TestKilledAlone: a supervisor and all clients die. Output is not lost; a terminal hangs up and says so; the next client keeps again.
func TestKilledAlone(t *testing.T) {
	e := newEnv(t)
	tty := e.config("tty", "shell")
	tty.OpenStdin, tty.Spec.Process.Terminal = true, true
	e.start(tty)
	log := e.config("log", "count")
	e.start(log)
	e.until(func() bool { return strings.Contains(e.log(log), "line 3\n") })
	victim := e.supervisorPID()
	e.must(e.sup.Close())
	e.until(func() bool { return e.keptBy() == 0 })
	e.must(unix.Kill(victim, unix.SIGKILL))
	e.until(func() bool { return !processAlive(victim) })
	time.Sleep(50 * time.Millisecond) // lines are written meanwhile
	e.ensure()
	if x := e.wait("tty"); x.Code == 0 {
		t.Errorf("a terminal without its master: %+v", x)
	}
	if b, err := os.ReadFile(filepath.Join(e.cfg.StateDir, "supervisor.log")); err != nil || !strings.Contains(string(b), "terminal was lost") {
		t.Errorf("the loss of a terminal is not told: %s %v", b, err)
	}
	before := len(e.log(log))
	e.until(func() bool { return len(e.log(log)) > before })
	e.killSupervisor()
	before = len(e.log(log))
	e.until(func() bool { return len(e.log(log)) > before })
	e.must(e.sup.Signal(e.ctx, "log", 9))
	e.wait("log")
	checkLines(t, e.log(log))
}

// TestKeptIsRefused: a program that does not understand what was kept is started without it.
func TestKeptIsRefused(t *testing.T) {
	e := newEnv(t)
	self, err := os.Executable()
	e.must(err)
	exe := filepath.Join(e.dir, "older")
	e.must(os.WriteFile(exe, fmt.Appendf(nil, "#!/bin/sh\ncase \"$*\" in *take-over*) exit 1;; esac\nexec %s \"$@\"\n", self), 0o755))
	e.must(e.sup.Close())
	e.sup, err = Ensure(e.ctx, exe, e.cfg)
	e.must(err)
	c := e.config("log", "count")
	e.start(c)
	e.killSupervisor()
	before := len(e.log(c))
	e.until(func() bool { return len(e.log(c)) > before })
}

// keptBy counts the descriptors that this process keeps.
func (e *env) keptBy() int {
	c := e.sup.(*client)
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, set := range []map[keptKey]*keptProcess{c.kept.m, c.kept.old} {
		for _, p := range set {
			n += len(p.fds)
		}
	}
	return n
}

// TestKeptBound: the client keeps at most its bound of a container's descriptors, and nothing of one that ended.
func TestKeptBound(t *testing.T) {
	e := newEnv(t)
	c := e.config("box", "shell")
	c.OpenStdin = true
	e.start(c)
	for i := range 20 {
		_, err := e.sup.Exec(e.ctx, "box", runtime.Process{ID: fmt.Sprint("x", i), Args: []string{"/inside", "shell"}, OpenStdin: true})
		e.must(err)
	}
	e.until(func() bool { return e.keptBy() == maxKept })
	for i := range 20 {
		e.must(e.sup.SignalExec(e.ctx, "box", fmt.Sprint("x", i), 9))
		e.must(e.sup.Attach(e.ctx, "box", fmt.Sprint("x", i), runtime.Streams{Stdout: &lockedBuffer{}}))
	}
	e.until(func() bool { return e.keptBy() == 4 })
	_, err := e.sup.Exec(e.ctx, "box", runtime.Process{ID: "again", Args: []string{"/inside", "shell"}, OpenStdin: true})
	e.must(err)
	e.attach("box", "again", false)
	e.until(func() bool { return e.keptBy() == 8 })
	e.must(e.sup.Signal(e.ctx, "box", 9))
	e.until(func() bool { return e.keptBy() == 0 })
}
