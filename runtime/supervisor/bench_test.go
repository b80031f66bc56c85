package supervisor

import (
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/runtime"
)

// ballastEnv is how many MiB a test's supervisor keeps in its heap.
const ballastEnv = "SKEIN_TEST_BALLAST"

func ballast() []byte {
	n, _ := strconv.Atoi(os.Getenv(ballastEnv))
	b := make([]byte, n<<20)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	return b
}

// newNetNS makes a network namespace as the node gives it to a container, and its path.
func newNetNS(t *testing.T) string {
	t.Helper()
	made := make(chan error, 1)
	fd := -1
	go func() {
		goruntime.LockOSThread() // the thread ends with its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
}

// TestFigures prints what a container costs; run it by hand with SKEIN_FIGURES=n. SKEIN_TEST_BALLAST=1024 gives the supervisor a heap of
// a GiB, which must change nothing.
func TestFigures(t *testing.T) {
	var n int
	if _, err := fmt.Sscan(os.Getenv("SKEIN_FIGURES"), &n); err != nil {
		t.Skip("set SKEIN_FIGURES to a number of rounds")
	}
	e := newEnv(t)
	ch, err := e.sup.Events(e.ctx, 0)
	e.must(err)
	netns := newNetNS(t)
	steps := []string{"clone to execve", "create", "start", "exit told", "delete", "exec"}
	took := map[string][]time.Duration{}
	for i := range n {
		c := e.config(fmt.Sprintf("c%d", i), "exit", "0")
		c.Spec.Linux.Namespaces[2].Path = netns
		t0 := time.Now()
		mark := func(name string) {
			now := time.Now()
			took[name] = append(took[name], now.Sub(t0))
			t0 = now
		}
		e.must(e.sup.Create(e.ctx, c))
		mark("create")
		_, err := e.sup.Start(e.ctx, c.ID)
		e.must(err)
		mark("start")
		<-ch
		mark("exit told")
		st, err := e.sup.State(e.ctx, c.ID)
		e.must(err)
		took["clone to execve"] = append(took["clone to execve"], st.SetUp)
		t0 = time.Now()
		e.must(e.sup.Delete(e.ctx, c.ID))
		mark("delete")
	}
	box := e.config("box", "sleep")
	e.start(box)
	for i := range n {
		t0 := time.Now()
		_, err := e.sup.Exec(e.ctx, "box", runtime.Process{ID: fmt.Sprintf("x%d", i), Args: []string{"/inside", "exit", "0"}})
		e.must(err)
		took["exec"] = append(took["exec"], time.Since(t0))
		<-ch
	}
	for _, s := range steps {
		l := took[s]
		slices.Sort(l)
		t.Logf("%-15s min %v median %v p95 %v", s, l[0], l[len(l)/2], l[len(l)*95/100])
	}
	before := e.memory()
	for i := range n {
		e.start(e.config(fmt.Sprintf("r%d", i), "sleep"))
	}
	t.Logf("supervisor private memory: %d KiB empty, %d KiB with %d containers", before, e.memory(), n)
	fds, _ := os.ReadDir(filepath.Join("/proc", fmt.Sprint(e.supervisorPID()), "fd"))
	kinds := map[string]int{}
	for _, f := range fds {
		to, _ := os.Readlink(filepath.Join("/proc", fmt.Sprint(e.supervisorPID()), "fd", f.Name()))
		kinds[filepath.Base(strings.SplitN(to, "[", 2)[0])]++
	}
	t.Logf("supervisor descriptors: %d %v", len(fds), kinds)
}

// memory is the supervisor's private memory in KiB.
func (e *env) memory() int {
	e.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", e.supervisorPID()))
	e.must(err)
	sum := 0
	for l := range strings.Lines(string(b)) {
		var v int
		if strings.HasPrefix(l, "Private_") {
			if _, err := fmt.Sscanf(strings.SplitN(l, ":", 2)[1], "%d", &v); err == nil {
				sum += v
			}
		}
	}
	return sum
}
