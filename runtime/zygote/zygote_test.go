package zygote

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func newZygote(t *testing.T) (*Pool, *Zygote) {
	t.Helper()
	pool, err := NewPool(8)
	if err != nil {
		t.Fatal(err)
	}
	z, err := Fork(pool)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(z.Close)
	return pool, z
}

func soon() time.Time { return time.Now().Add(10 * time.Second) }

func waitFor(t *testing.T, pid int) unix.WaitStatus {
	t.Helper()
	var ws unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &ws, 0, nil); !errors.Is(err, unix.EINTR) {
			if err != nil {
				t.Fatalf("wait for %d: %v", pid, err)
			}
			return ws
		}
	}
}

func null(t *testing.T) int {
	t.Helper()
	f, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

// TestInterpreter runs every feature of the programs: results, skips, tolerated errors, forks, exit codes.
func TestInterpreter(t *testing.T) {
	pool, z := newZygote(t)
	n := null(t)
	p, err := pool.Program()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Release()
	p.Enter()
	pid := p.Get("getpid", unix.SYS_GETPID)
	ok, bad, after, forked := p.NewSlot(), p.NewSlot(), p.KeptSlot(), p.NewSlot()
	i := p.TryInto(ok, "close", unix.SYS_CLOSE, 0)
	p.Exit(90)
	p.SkipOnSuccess(i)
	i = p.TryInto(bad, "close again", unix.SYS_CLOSE, 0)
	p.Exit(91)
	p.SkipOnError(i)
	p.GetInto(after, "kill self with nothing", unix.SYS_KILL, pid, 0)
	args := make([]uint64, 11)
	args[4] = uint64(unix.SIGCHLD)
	i = p.Fork(forked, "clone3", unix.SYS_CLONE3, p.Words(args...), 88)
	p.Exit(5)
	p.SkipOnSuccess(i)
	p.Do("wait for the forked", unix.SYS_WAIT4, forked, p.Words(0), 0, 0)
	p.Exit(42)
	c, err := z.Spawn(Request{Program: p, Files: []int{n, n, n}, Cgroup: -1}, soon())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Executed(soon()); err != nil {
		t.Errorf("executed: %v", err)
	}
	if ws := waitFor(t, c.PID); ws.ExitStatus() != 42 {
		t.Errorf("exit status %d, want 42 (failure %v)", ws.ExitStatus(), p.Failure())
	}
	if p.Result(pid) != int64(c.PID) || p.Result(ok) != 0 || p.Result(bad) != -int64(unix.EBADF) || p.Result(after) != 0 || p.Result(forked) <= 0 {
		t.Errorf("results: pid %d of %d, ok %d, bad %d, after %d, forked %d", p.Result(pid), c.PID, p.Result(ok), p.Result(bad), p.Result(after), p.Result(forked))
	}
}

func TestFailureNamesTheCall(t *testing.T) {
	pool, z := newZygote(t)
	n := null(t)
	p, err := pool.Program()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Release()
	p.Enter()
	p.Do("enter nowhere", unix.SYS_CHDIR, "/does/not/exist")
	p.Exit(0)
	c, err := z.Spawn(Request{Program: p, Files: []int{n, n, n}, Cgroup: -1}, soon())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var f *Failure
	if err := c.Ready(soon()); !errors.As(err, &f) || f.Op != "enter nowhere" || f.Errno != unix.ENOENT {
		t.Errorf("ready: %v", err)
	}
	if ws := waitFor(t, c.PID); ws.ExitStatus() != 127 {
		t.Errorf("exit status %d, want 127", ws.ExitStatus())
	}
}

// TestGate: a child waits, runs when told, and ends when the other end is gone.
func TestGate(t *testing.T) {
	pool, z := newZygote(t)
	n := null(t)
	for _, open := range []bool{true, false} {
		p, err := pool.Program()
		if err != nil {
			t.Fatal(err)
		}
		var gate [2]int
		if err := unix.Pipe2(gate[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		p.Enter()
		p.Gate(FileFD(3))
		p.Exit(33)
		c, err := z.Spawn(Request{Program: p, Files: []int{n, n, n, gate[0]}, Cgroup: -1}, soon())
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(gate[0])
		if err := c.Ready(soon()); err != nil {
			t.Fatal(err)
		}
		want := NeverStarted
		if open {
			want = 33
			if _, err := unix.Write(gate[1], []byte{1}); err != nil {
				t.Fatal(err)
			}
		}
		unix.Close(gate[1])
		if ws := waitFor(t, c.PID); ws.ExitStatus() != want {
			t.Errorf("gate opened %v: exit status %d, want %d", open, ws.ExitStatus(), want)
		}
		c.Close()
		p.Release()
	}
}

// TestParallel: exit codes reach the right starter, also over the death of the zygote.
func TestParallel(t *testing.T) {
	pool, z := newZygote(t)
	n := null(t)
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			for i := range 50 {
				if err := spawnExit(pool, z, n, (g*50+i)%100); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := unix.Kill(z.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := spawnExit(pool, z, n, 7); err != nil {
		t.Errorf("after the zygote died: %v", err)
	}
}

func spawnExit(pool *Pool, z *Zygote, null, code int) error {
	p, err := pool.Program()
	if err != nil {
		return err
	}
	defer p.Release()
	p.Enter()
	p.Exit(code)
	c, err := z.Spawn(Request{Program: p, Files: []int{null, null, null}, Cgroup: -1}, soon())
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.Executed(soon()); err != nil {
		return err
	}
	var ws unix.WaitStatus
	for {
		if _, err = unix.Wait4(c.PID, &ws, 0, nil); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil || ws.ExitStatus() != code {
		return fmt.Errorf("exit status %d (%v), want %d", ws.ExitStatus(), err, code)
	}
	return nil
}

// TestBounds: what does not fit is refused before anything runs.
func TestBounds(t *testing.T) {
	pool, z := newZygote(t)
	n := null(t)
	for name, build := range map[string]func(*Program){
		"data":      func(p *Program) { p.String(strings.Repeat("x", arenaLen)) },
		"ops":       func(p *Program) { repeat(maxOps+1, func() { p.Do("x", unix.SYS_GETPID) }) },
		"slots":     func(p *Program) { repeat(maxSlots+1, func() { p.NewSlot() }) },
		"zero byte": func(p *Program) { p.String("a\x00b") },
		"bad type":  func(p *Program) { p.Do("x", unix.SYS_GETPID, 1.5) },
	} {
		p, err := pool.Program()
		if err != nil {
			t.Fatal(err)
		}
		build(p)
		if _, err := z.Spawn(Request{Program: p, Files: []int{n, n, n}, Cgroup: -1}, soon()); err == nil || p.Err() == nil {
			t.Errorf("%s: accepted", name)
		}
		p.Release()
	}
	for range 8 - 1 { // the zygote keeps one
		if _, err := pool.Program(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := pool.Program(); err == nil {
		t.Error("more programs than arenas")
	}
}

func repeat(n int, f func()) {
	for range n {
		f()
	}
}

func TestPrivateMemory(t *testing.T) {
	if keepMemory {
		t.Skip("a binary built with cgo keeps the C library's pages")
	}
	pool, z := newZygote(t)
	if err := spawnExit(pool, z, null(t), 0); err != nil { // by now it has unmapped everything
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", z.PID()))
	if err != nil {
		t.Skip(err)
	}
	for l := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(l, "RssAnon:"); ok && strings.Fields(v)[0] != "4" {
			t.Errorf("the zygote keeps anonymous memory besides the page of the interpreter's copy: %s", strings.TrimSpace(v))
		}
	}
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", z.PID())); err != nil || exe != "/memfd:none (deleted)" {
		t.Errorf("the zygote shows %q (%v) as its file", exe, err)
	}
}

// TestSecluded: of the memory that a child shares with the supervisor nothing stays mapped but private copies of its own program.
func TestSecluded(t *testing.T) {
	pool, z := newZygote(t)
	n := null(t)
	p, err := pool.Program()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Release()
	p.EnterToPart()
	p.Seclude()
	vec := p.Bytes(make([]byte, arenaLen/4096))
	for _, at := range []uintptr{opsOff - 4096, opsOff, dataOff} {
		p.Do("look at what is needed", unix.SYS_MINCORE, Addr(p.base()+at), 4096, vec)
	}
	for _, at := range []uintptr{dataOff - 4096, dataOff + 8192, arenaLen - 4096} {
		i := p.Try("look at the rest", unix.SYS_MINCORE, Addr(p.base()+at), 4096, vec)
		p.Exit(1)
		p.SkipOnError(i)
	}
	p.Exit(42)
	c, err := z.Spawn(Request{Program: p, Files: []int{n, n, n}, Cgroup: -1}, soon())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Executed(soon()); err != nil {
		t.Errorf("executed: %v", err)
	}
	if ws := waitFor(t, c.PID); ws.ExitStatus() != 42 {
		t.Errorf("exit status %d, want 42 (failure %v)", ws.ExitStatus(), p.Failure())
	}
}

// TestOpenWhileOthersRename: the kernel refuses names with ".." while anything is renamed anywhere; the interpreter tries again.
func TestOpenWhileOthersRename(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/d", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir+"/x", 0o700); err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for from, to := dir+"/x", dir+"/y"; ; from, to = to, from {
			select {
			case <-stop:
				return
			default:
				_ = os.Rename(from, to)
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	path, how := strings.Repeat("d/../", 60)+"d", unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	for refused := false; !refused; { // until both really meet
		fd, err := unix.Openat2(int(root.Fd()), path, &how)
		if refused = errors.Is(err, unix.EAGAIN); !refused && err != nil {
			t.Fatal(err)
		}
		if err == nil {
			unix.Close(fd)
		}
	}
	pool, z := newZygote(t)
	n := null(t)
	p, err := pool.Program()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Release()
	p.Enter()
	fd := p.NewSlot()
	for range 200 {
		p.GetInto(fd, "open", unix.SYS_OPENAT2, FileFD(3), path, p.Words(unix.O_PATH|unix.O_CLOEXEC, 0, unix.RESOLVE_IN_ROOT), 24)
		p.Do("close", unix.SYS_CLOSE, fd)
	}
	p.Exit(42)
	c, err := z.Spawn(Request{Program: p, Files: []int{n, n, n, int(root.Fd())}, Cgroup: -1}, soon())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if ws := waitFor(t, c.PID); ws.ExitStatus() != 42 {
		t.Errorf("exit status %d, want 42: %v", ws.ExitStatus(), p.Failure())
	}
}
