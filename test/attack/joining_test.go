package attack

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"skein/runtime"
)

// allowedOfJoining is what a process that joined a container, and has not executed its program yet, may show to one with CAP_SYS_PTRACE
// inside: no more than it will be, but for two pipes. The capabilities are the container's fourteen and SYS_PTRACE.
var allowedOfJoining = regexp.MustCompile(`^(exe "(/memfd:none \(deleted\))?" .*|CapPrm: 00000000a80c25fb|CapEff: 00000000a80c25fb|CapBnd: 00000000a80c25fb|` +
	`NoNewPrivs: 1|Seccomp: 2|Uid: 0 0 0 0|Groups: ?[0 ]*|fd [0-4] pipe|fd 0 /dev/null|fd [0-2] /null \(deleted\)|fd [0-9] /dev/pts/([0-9]+|ptmx)|(cwd|root) /|map [-rwx]{3}p ?(/memfd:programs \(deleted\)|\[.*\])?|large map)$`)

// TestCVE_2016_9962 has a process with CAP_SYS_PTRACE look at every process that joins its container, from the moment it can be seen:
// privileges, descriptors, memory, environment, executable, directories. A runtime that joins first and gives up its privileges later
// fails: a traced child with the host's capabilities is the host's root. So does one that passes descriptors along, or shares memory.
func TestCVE_2016_9962(t *testing.T) {
	if keepsMemory {
		t.Skip("this is about the binary as it is built for users: CGO_ENABLED=0 go test ./test/attack")
	}
	w := newWorld(t)
	other := w.config("other", "sleep")
	other.Spec.Process.Env = append(other.Spec.Process.Env, "X=SECRET-OF-ANOTHER")
	w.start(other)
	c := w.config("hunter", "hunt", "look", "0")
	givePtrace(&c)
	w.start(c)
	w.says(c, "ready")
	stop := w.churn("churn", "SECRET-OF-ANOTHER")
	for i := range manyRounds(100) {
		p := runtime.Process{ID: fmt.Sprintf("x%d", i), Args: []string{"/hostile", "exit", "0"}, Terminal: i%8 == 7}
		_, err := w.exec(c.ID, p)
		w.must(err)
	}
	stop()
	out := w.stop(c)
	if n := looks(t, out); n < 5 {
		t.Errorf("only %d looks at joining processes: the test sees nothing", n)
	}
	for l := range strings.Lines(out) {
		f := strings.SplitN(strings.TrimSpace(l), " ", 3)
		if f[0] == "found" && !allowedOfJoining.MatchString(f[2]) {
			t.Errorf("a joining process showed: %s", f[2])
		}
	}
}

// looks is how often the hunter saw a process before its execve.
func looks(t testing.TB, out string) int {
	t.Helper()
	m := regexp.MustCompile(`(\d+) looks before execve`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("the hunter did not report: %s", out)
	}
	n, _ := strconv.Atoi(m[1])
	return n
}

// churn makes containers with a secret in their environment until the returned function is called, so that other programs are in the
// memory that children are forked from.
func (w *world) churn(prefix, secret string) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			c := w.config(fmt.Sprintf("%s%d", prefix, i%8), "exit", "0")
			c.LogPath = ""
			c.Spec.Process.Env = append(c.Spec.Process.Env, "X="+secret)
			if err := w.sup.Create(w.ctx, c); err != nil {
				w.t.Errorf("create: %v", err)
				return
			}
			if err := w.sup.Delete(w.ctx, c.ID); err != nil {
				w.t.Errorf("delete: %v", err)
				return
			}
		}
	}()
	return func() { close(done); <-ended }
}

// TestJoiningProcessIsTamperedWith is our own extra class: a process with CAP_SYS_PTRACE inside writes the pid of an innocent process of
// the host into the memory and the report pipe of every process that joins. A supervisor that believes what such a process reports
// signals, reaps or changes the wrong one; ours must survive, keep its containers, and start processes again afterwards.
func TestJoiningProcessIsTamperedWith(t *testing.T) {
	w := newWorld(t)
	innocent := exec.Command("sleep", "1000")
	w.must(innocent.Start())
	died := make(chan error, 1)
	go func() { died <- innocent.Wait() }()
	defer func() { _ = innocent.Process.Kill(); <-died }()
	score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", innocent.Process.Pid))
	w.must(err)
	other := w.config("other", "sleep")
	w.start(other)
	c := w.config("vandal", "hunt", "vandal", strconv.Itoa(innocent.Process.Pid))
	givePtrace(&c)
	adj := 500
	c.Spec.Process.OOMScoreAdj = &adj
	w.start(c)
	w.says(c, "ready")
	rounds := min(manyRounds(10), 500) // each that the vandal wins takes seconds
	for i := range rounds {
		p := runtime.Process{ID: fmt.Sprintf("x%d", i), Args: []string{"/hostile", "sleep"}}
		if _, err := w.sup.Exec(w.ctx, c.ID, p); err == nil {
			_ = w.sup.SignalExec(w.ctx, c.ID, p.ID, int(unix.SIGKILL))
			w.must(w.sup.Attach(w.ctx, c.ID, p.ID, runtime.Streams{}))
		}
		select {
		case err := <-died:
			died <- err
			t.Fatalf("round %d: an innocent process of the host ended: %v", i, err)
		default:
		}
	}
	if now, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", innocent.Process.Pid)); err != nil || string(now) != string(score) {
		t.Errorf("oom_score_adj of an innocent process: %s, was %s (%v)", now, score, err)
	}
	out := w.stop(c)
	if rounds >= 100 && !strings.Contains(out, "wrote to memory") {
		t.Errorf("the vandal reached nothing, so nothing was tested: %s", out)
	}
	if st, err := w.sup.State(w.ctx, "other"); err != nil || st.Status != runtime.Running {
		t.Errorf("another container: %+v %v", st, err)
	}
	_, err = w.sup.Exec(w.ctx, "other", runtime.Process{ID: "after", Args: []string{"/hostile", "exit", "7"}})
	w.must(err)
	if x := w.ended("other", "after"); x.Code != 7 {
		t.Errorf("exec afterwards: %+v", x)
	}
}

// TestTracedProcessIsKilled: a process inside traces another one, which is killed, and ends itself later. The kernel tells the parent of
// the first's end only then; a supervisor that looks once never learns of it, and the container can never end.
func TestTracedProcessIsKilled(t *testing.T) {
	w := newWorld(t)
	c := w.config("box", "say", "ready", "sleep")
	givePtrace(&c)
	w.start(c)
	w.says(c, "ready")
	host, err := w.sup.Exec(w.ctx, "box", runtime.Process{ID: "traced", Args: []string{"/hostile", "sleep"}})
	w.must(err)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", host))
	w.must(err)
	inner := regexp.MustCompile(`NSpid:.*\s(\d+)\n`).FindStringSubmatch(string(b))[1]
	_, err = w.sup.Exec(w.ctx, "box", runtime.Process{ID: "tracer", Args: []string{"/hostile", "trace", inner}})
	w.must(err)
	eventually(t, "it is traced", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", host))
		w.must(err)
		return regexp.MustCompile(`TracerPid:\t[1-9]`).Match(b)
	})
	w.must(w.sup.SignalExec(w.ctx, "box", "traced", int(unix.SIGKILL)))
	eventually(t, "it is dead", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", host))
		return strings.Contains(string(b), "State:\tZ")
	})
	w.must(w.sup.SignalExec(w.ctx, "box", "tracer", int(unix.SIGKILL)))
	w.ended("box", "tracer")
	if x := w.ended("box", "traced"); x.Code != 137 {
		t.Errorf("the traced process: %+v", x)
	}
	w.kill("box")
}
