package supervisor

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// talk is an attached client that a test talks through.
type talk struct {
	in    *io.PipeWriter
	out   lockedBuffer
	ended chan error
	leave func() // without the end of input
}

func (e *env) attach(id, execID string, stdin bool) *talk {
	e.t.Helper()
	r, w := io.Pipe()
	ctx, leave := context.WithCancel(e.ctx)
	e.t.Cleanup(leave)
	x := &talk{in: w, ended: make(chan error, 1), leave: leave}
	on := make(chan struct{})
	streams := runtime.Streams{Stdout: &x.out, Stderr: &x.out, CloseStdin: true, Attached: func() { close(on) }}
	if stdin {
		streams.Stdin = r
	}
	go func() { x.ended <- e.sup.Attach(ctx, id, execID, streams) }()
	select {
	case <-on:
	case err := <-x.ended:
		e.t.Fatalf("attach %s %s: %v", id, execID, err)
	}
	return x
}

// say sends a line and waits for its echo.
func (e *env) say(x *talk, line string) {
	e.t.Helper()
	_, err := io.WriteString(x.in, line+"\n")
	e.must(err)
	e.until(func() bool { return strings.Contains(x.out.String(), line) })
}

func (e *env) upgrade() {
	e.t.Helper()
	e.must(e.sup.(*client).Upgrade(e.ctx, "/proc/self/exe"))
}

// checkBusy makes sure that the output of "inside busy" begins at the beginning and lacks and doubles nothing.
func checkBusy(t *testing.T, what, out string) {
	t.Helper()
	n := 0
	for l := range strings.Lines(out) {
		if !strings.HasSuffix(l, "\n") {
			break
		}
		want := fmt.Sprintf("busy %d\n", n/2)
		if n%2 == 1 {
			want = fmt.Sprintf("busy %d again\n", n/2)
		}
		if l != want {
			t.Fatalf("%s: line %d is %q, want %q", what, n, l, want)
		}
		n++
	}
	if n < 100 {
		t.Errorf("%s: only %d lines", what, n)
	}
}

// TestUpgrades: over twenty changes of the supervisor's program nobody notices anything: terminals, open inputs, additional processes,
// containers that wait for their start, stored descriptors, ends in between, numbered lines of logs and of attached clients.
func TestUpgrades(t *testing.T) {
	e := newEnv(t)
	pid := e.supervisorPID()
	tty := e.config("tty", "cat")
	tty.OpenStdin, tty.Spec.Process.Terminal = true, true
	e.start(tty)
	cat := e.config("cat", "cat")
	cat.OpenStdin = true
	e.start(cat)
	busy := e.config("busy", "busy")
	busy.LogFormat, busy.LogMaxSize, busy.LogMaxFiles, busy.LogCompress = "local", 1<<20, 100, true
	e.must(e.sup.Create(e.ctx, busy))
	fromStart := e.attach("busy", "", false)
	_, err := e.sup.Start(e.ctx, "busy")
	e.must(err)
	_, err = e.sup.Exec(e.ctx, "busy", runtime.Process{ID: "x", Args: []string{"/inside", "busy"}})
	e.must(err)
	exec, atTTY, atCat := e.attach("busy", "x", false), e.attach("tty", "", true), e.attach("cat", "", true)
	late, bad := e.config("late", "exit", "42"), e.config("bad")
	e.must(e.sup.Create(e.ctx, late))
	bad.Spec.Process.Args = []string{"/nope"}
	e.must(e.sup.Create(e.ctx, bad))
	e.must(e.sup.Create(e.ctx, e.config("never", "exit", "0")))
	var p [2]int
	e.must(unix.Pipe2(p[:], unix.O_CLOEXEC))
	defer closeFDs(p[:])
	e.must(e.sup.StoreFD(e.ctx, "pipe", p[0]))
	codes := e.shortLived()
	for i := range 20 {
		e.upgrade()
		e.say(atTTY, fmt.Sprintf("round %d on a terminal", i))
		e.say(atCat, fmt.Sprintf("round %d through a pipe", i))
	}
	codes()
	if e.supervisorPID() != pid {
		t.Error("the supervisor's process was replaced")
	}
	_, err = e.sup.Start(e.ctx, "late")
	e.must(err)
	if x := e.wait("late"); x.Code != 42 {
		t.Errorf("container that waited for its start: %+v", x)
	}
	if _, err := e.sup.Start(e.ctx, "bad"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("start of a missing command: %v", err)
	}
	if x := e.wait("bad"); x.Code != 127 {
		t.Errorf("missing command: %+v", x)
	}
	e.must(e.sup.Delete(e.ctx, "never"))
	_, err = unix.Write(p[1], []byte("kept"))
	e.must(err)
	fds, err := e.sup.LoadFDs(e.ctx, "pipe")
	e.must(err)
	got := make([]byte, 10)
	if n, err := unix.Read(fds["pipe"], got); err != nil || string(got[:n]) != "kept" {
		t.Errorf("stored descriptor: %q %v", got[:max(n, 0)], err)
	}
	unix.Close(fds["pipe"])
	atCat.in.Close()
	e.must(<-atCat.ended)
	if x := e.wait("cat"); x.Code != 0 || !strings.Contains(atCat.out.String(), "eof") {
		t.Errorf("end of input: %+v %q", x, atCat.out.String())
	}
	e.must(e.sup.Resize(e.ctx, "tty", "", 30, 100))
	e.must(e.sup.SignalExec(e.ctx, "busy", "x", 9))
	if x := e.execExit("x"); x.Code != 137 {
		t.Errorf("exec: %+v", x)
	}
	e.must(<-exec.ended)
	e.must(e.sup.Signal(e.ctx, "busy", 15))
	e.must(e.sup.Signal(e.ctx, "busy", 9))
	e.wait("busy")
	e.must(<-fromStart.ended)
	checkBusy(t, "log", e.log(busy))
	checkBusy(t, "attached", fromStart.out.String())
	checkBusy(t, "exec", exec.out.String())
	if st, err := e.sup.State(e.ctx, "busy"); err != nil || st.LogDropped > 0 {
		t.Errorf("dropped %d lines, %v", st.LogDropped, err)
	}
	e.oneZygote(pid)
}

// oneZygote makes sure that no earlier zygote nor any zombie is left.
func (e *env) oneZygote(pid int) {
	e.t.Helper()
	e.until(func() bool {
		n := 0
		lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		for _, l := range lists {
			b, _ := os.ReadFile(l)
			for f := range bytes.FieldsSeq(b) {
				if c, _ := os.ReadFile("/proc/" + string(f) + "/comm"); string(c) == "skein-zygote\n" {
					n++
				}
				if s, _ := os.ReadFile("/proc/" + string(f) + "/status"); bytes.Contains(s, []byte("Z (zombie)")) {
					return false
				}
			}
		}
		return n == 1
	})
}

// shortLived runs containers and additional processes that end all the time; the function it returns stops that and checks their codes.
func (e *env) shortLived() (stop func()) {
	e.t.Helper()
	over := make(chan struct{})
	var wg sync.WaitGroup
	codes := map[string]int{}
	var mu sync.Mutex
	e.start(e.config("host", "sleep"))
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-over:
				return
			default:
			}
			id := fmt.Sprintf("s%d", i)
			if err := e.sup.Create(e.ctx, e.config(id, "wait", fmt.Sprint(i%7*5), "exit", fmt.Sprint(i%100))); err != nil {
				e.t.Errorf("create %s: %v", id, err)
				return
			}
			if _, err := e.sup.Start(e.ctx, id); err != nil {
				e.t.Errorf("start %s: %v", id, err)
				return
			}
			var out lockedBuffer
			_, err := e.sup.Exec(e.ctx, "host", runtime.Process{ID: id, Args: []string{"/inside", "echo", id, "exit", "9"}})
			if err == nil {
				time.Sleep(time.Duration(i%5) * 5 * time.Millisecond) // it may end before the client comes
				err = e.sup.Attach(e.ctx, "host", id, runtime.Streams{Stdout: &out})
			}
			if err != nil || out.String() != id+"\n" {
				e.t.Errorf("exec %s: %q %v", id, out.String(), err)
				return
			}
			mu.Lock()
			codes[id+"/"], codes["host/"+id] = i%100, 9
			mu.Unlock()
		}
	})
	return func() {
		e.t.Helper()
		close(over)
		wg.Wait()
		ctx, cancel := context.WithTimeout(e.ctx, 30*time.Second)
		defer cancel()
		events, err := e.sup.Events(ctx, 0)
		e.must(err)
		n, next := len(codes), uint64(1)
		for ev := range events {
			key := ev.ContainerID + "/" + ev.ExecID
			want, ok := codes[key]
			if ev.Seq != next {
				e.t.Errorf("event %d follows %d", ev.Seq, next-1)
			}
			next = ev.Seq + 1
			if ok && ev.Exit.Code != want {
				e.t.Errorf("%s ended with %+v, want %d", key, ev.Exit, want)
			}
			if delete(codes, key); len(codes) == 0 {
				e.t.Logf("%d ends meanwhile", n)
				return
			}
		}
		e.t.Errorf("%d of %d ends are missing: %v", len(codes), n, codes)
	}
}

// TestUpgradeRefused: a program that is none, or does not know the state, changes nothing.
func TestUpgradeRefused(t *testing.T) {
	e := newEnv(t)
	cat := e.config("cat", "cat")
	cat.OpenStdin = true
	e.start(cat)
	x := e.attach("cat", "", true)
	zygote := e.supervisorPID()
	script := filepath.Join(e.dir, "script")
	e.must(os.WriteFile(script, []byte("#!/bin/sh\necho state 999 00\n"), 0o755))
	text := filepath.Join(e.dir, "text")
	e.must(os.WriteFile(text, []byte("text"), 0o755))
	for i, file := range []string{"/bin/true", "/bin/false", script, text, e.dir} {
		if err := e.sup.(*client).Upgrade(e.ctx, file); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("upgrade to %s: %v", file, err)
		}
		e.say(x, fmt.Sprintf("still there %d", i))
	}
	if err := e.sup.(*client).Upgrade(e.ctx, filepath.Join(e.dir, "none")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("upgrade to a missing file: %v", err)
	}
	if e.supervisorPID() != zygote {
		t.Error("another supervisor")
	}
}

// TestUpgradeAbandoned: an upgrade that fails at its last step, all being interrupted already, lets everything go on.
func TestUpgradeAbandoned(t *testing.T) {
	e := newEnv(t)
	busy := e.config("busy", "busy")
	e.must(e.sup.Create(e.ctx, busy))
	x := e.attach("busy", "", false)
	_, err := e.sup.Start(e.ctx, "busy")
	e.must(err)
	// It knows an empty state and refuses any other.
	script := filepath.Join(e.dir, "script")
	self, err := os.Executable()
	e.must(err)
	e.must(os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\ngrep -q busy <&3 && exit 1\nexec %s \"$@\"\n", self), 0o755))
	for range 10 {
		if err := e.sup.(*client).Upgrade(e.ctx, script); !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("upgrade: %v", err)
		}
		before := len(x.out.String())
		e.until(func() bool { return len(x.out.String()) > before })
	}
	e.upgrade()
	e.must(e.sup.Signal(e.ctx, "busy", 9))
	e.must(<-x.ended)
	checkBusy(t, "attached", x.out.String())
	checkBusy(t, "log", e.log(busy))
}

// TestUpgradeSlowClient: what a client has not read when the program changes reaches it afterwards, once.
func TestUpgradeSlowClient(t *testing.T) {
	e := newEnv(t)
	c := e.config("flood", "flood", "200000")
	e.must(e.sup.Create(e.ctx, c))
	slow := &slowWriter{open: make(chan struct{})}
	ended, on := make(chan error, 1), make(chan struct{})
	go func() {
		ended <- e.sup.Attach(e.ctx, "flood", "", runtime.Streams{Stdout: slow, Attached: func() { close(on) }})
	}()
	<-on
	_, err := e.sup.Start(e.ctx, "flood")
	e.must(err)
	for range 3 {
		e.upgrade()
	}
	close(slow.open)
	e.must(<-ended)
	e.wait("flood")
	if got, want := slow.out.String(), e.log(c); got != want || strings.Count(want, "\n") != 200000 {
		t.Errorf("attached %d bytes, logged %d", len(got), len(want))
	}
}

// slowWriter takes nothing until it is told to.
type slowWriter struct {
	open chan struct{}
	out  lockedBuffer
}

func (w *slowWriter) Write(b []byte) (int, error) {
	<-w.open
	return w.out.Write(b)
}

// TestEnsureUpgrades: a client of another build upgrades the supervisor, whose program's file may be gone; descriptors do not pile up.
func TestEnsureUpgrades(t *testing.T) {
	e := newEnv(t)
	for id, change := range map[string]func(*runtime.Config){
		"cat": func(c *runtime.Config) { c.OpenStdin = true },
		"tty": func(c *runtime.Config) { c.Spec.Process.Terminal = true },
	} {
		c := e.config(id, "cat")
		change(&c)
		e.start(c)
	}
	e.must(e.sup.Create(e.ctx, e.config("late1", "exit", "3")))
	e.must(e.sup.Create(e.ctx, e.config("late2", "exit", "4")))
	pid, build := e.supervisorPID(), e.sup.(*client).build
	self, err := os.ReadFile("/proc/self/exe")
	e.must(err)
	fds := 0
	for i := range 10 {
		other := []byte(build)
		other[len(other)-1] = byte('0' + i)
		exe := filepath.Join(e.dir, "other")
		_ = os.Remove(exe) // in use
		e.must(os.WriteFile(exe, bytes.ReplaceAll(self, []byte(build), other), 0o755))
		sup, err := Ensure(e.ctx, exe, e.cfg)
		e.must(err)
		e.must(sup.Close())
		c, err := dial(e.ctx, e.cfg.SocketPath)
		e.must(err)
		c.Close()
		if c.build != string(other) || e.supervisorPID() != pid {
			t.Fatalf("the supervisor's build is %s, want %s", c.build, other)
		}
		e.until(func() bool { // connections end a little later
			d, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
			e.must(err)
			if i == 1 {
				fds = len(d)
			}
			return i < 1 || len(d) <= fds+2
		})
	}
	for id, code := range map[string]int{"late1": 3, "late2": 4} {
		_, err := e.sup.Start(e.ctx, id)
		e.must(err)
		if x := e.wait(id); x.Code != code {
			t.Errorf("%s: %+v", id, x)
		}
	}
}
