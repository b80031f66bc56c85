package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/cmd/dev"
	"skein/runtime"
	"skein/runtime/cgroup"
	"skein/runtime/sandbox"
	"skein/runtime/supervisor"
)

// heapEnv asks a supervisor of this program to hold so many MiB of touched memory.
const heapEnv = "SKEIN_BENCH_HEAP_MIB"

// heapSize is the heap under which starts must take no longer.
const heapSize = 1024

// supervise is this program as a supervisor; its heap grows after the zygote was forked, as a daemon's would.
func supervise(args []string) error {
	if n, err := strconv.Atoi(os.Getenv(heapEnv)); err == nil {
		ballast := make(chan []byte, 1)
		go func() {
			b := make([]byte, n<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			ballast <- b // held until the process ends
		}()
	}
	return supervisor.Main(args)
}

// node is a supervisor without a daemon.
type node struct {
	sup   runtime.Supervisor
	dir   string
	base  string
	group string
	exits <-chan runtime.Event
	pid   int
	netns *os.File // made beforehand, as an engine makes it
}

// newNode starts a supervisor, of this program when it shall hold heap.
func (b *bench) newNode(ctx context.Context, name string, heap int) (*node, error) {
	n := &node{dir: filepath.Join(b.dir, name), group: fmt.Sprintf("/skein-bench-%d/%s", os.Getpid(), name)}
	n.base = filepath.Join(n.dir, "base")
	for _, d := range []string{"dev", "proc", "sys"} { // as images have them
		if err := os.MkdirAll(filepath.Join(n.base, d), 0o755); err != nil {
			return nil, err
		}
	}
	bin, err := os.ReadFile(filepath.Join(b.dir, "noop"))
	if err == nil {
		err = os.WriteFile(filepath.Join(n.base, "noop"), bin, 0o755)
	}
	if err == nil {
		n.netns, err = newNetNS()
	}
	if err != nil {
		return nil, err
	}
	exe := b.opts.binary
	if heap > 0 {
		exe = "/proc/self/exe"
		if err := os.Setenv(heapEnv, strconv.Itoa(heap)); err != nil {
			return nil, err
		}
		defer os.Unsetenv(heapEnv)
	}
	cfg := supervisor.Config{StateDir: filepath.Join(n.dir, "state"), SocketPath: filepath.Join(n.dir, "s"), Cgroup: n.group}
	if n.sup, err = supervisor.Ensure(ctx, exe, cfg); err != nil {
		return nil, err
	}
	if n.exits, err = n.sup.Events(ctx, 0); err != nil {
		return nil, errors.Join(err, n.close())
	}
	if n.pid, err = dev.Listener(cfg.SocketPath); err != nil {
		return nil, errors.Join(err, n.close())
	}
	for begun := time.Now(); heap > 0; time.Sleep(10 * time.Millisecond) {
		if rss, _ := memory(n.pid); rss >= int64(heap)<<20 {
			break
		}
		if time.Since(begun) > upTime {
			return nil, errors.Join(fmt.Errorf("the supervisor has no heap of %d MiB after %v", heap, upTime), n.close())
		}
	}
	return n, nil
}

// close ends the supervisor and removes its groups; a group that is left is an error.
func (n *node) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), upTime)
	defer cancel()
	err := n.sup.Shutdown(ctx, true)
	_ = n.sup.Close()
	n.netns.Close()
	top := filepath.Dir(n.group)
	return errors.Join(err, cgroup.KillTree(n.group), cgroup.RemoveTree(n.group), cgroup.RemoveEmpty(top))
}

// fullSpec is a container like an engine makes it: all namespaces, the default mounts, masks, devices, filter, and limits.
func fullSpec(args ...string) *specs.Spec {
	mem, quota, period, pids, shares := int64(512<<20), int64(100000), uint64(100000), int64(512), uint64(512)
	s := sandbox.DefaultSpec()
	s.Version = "1.0.2" // what older runtimes take
	s.Process.Args = append([]string{"/noop"}, args...)
	s.Hostname = "bench"
	s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &mem}
	s.Linux.Resources.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period, Shares: &shares}
	s.Linux.Resources.Pids = &specs.LinuxPids{Limit: &pids}
	return s
}

func (n *node) config(id string, args ...string) (runtime.Config, error) {
	dir := filepath.Join(n.dir, id)
	for _, sub := range []string{"root", "upper", "work"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return runtime.Config{}, err
		}
	}
	s := fullSpec(args...)
	s.Root.Path = filepath.Join(dir, "root")
	for i := range s.Linux.Namespaces {
		if s.Linux.Namespaces[i].Type == specs.NetworkNamespace {
			s.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.netns.Fd())
		}
	}
	return runtime.Config{ID: id, Spec: s, LogPath: filepath.Join(dir, "log"), Rootfs: []runtime.Mount{{Type: "overlay", Source: "overlay",
		Options: []string{"lowerdir=" + n.base, "upperdir=" + filepath.Join(dir, "upper"), "workdir=" + filepath.Join(dir, "work")}}}}, nil
}

// newNetNS makes a network namespace that lives as long as its file is open.
func newNetNS() (*os.File, error) {
	var f *os.File
	made := make(chan error, 1)
	go func() {
		goruntime.LockOSThread() // the thread ends with its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			f, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	return f, <-made
}

// cycle is one container from its creation to its deletion; the watch is told of each step that is over.
func (n *node) cycle(ctx context.Context, id string, w *stopwatch) error {
	mark := w.mark
	cfg, err := n.config(id, "true")
	if err != nil {
		return err
	}
	mark("")
	if err := n.sup.Create(ctx, cfg); err != nil {
		return err
	}
	mark("create")
	if _, err := n.sup.Start(ctx, id); err != nil {
		return err
	}
	mark("start")
	select {
	case ev := <-n.exits:
		if ev.ContainerID != id || ev.Exit.Code != 0 {
			return fmt.Errorf("container %s: told of %+v", id, ev)
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	mark("exit told")
	st, err := n.sup.State(ctx, id)
	if err != nil {
		return err
	}
	w.add("clone to execve", st.SetUp)
	mark("")
	if err := n.sup.Delete(ctx, id); err != nil {
		return err
	}
	mark("delete")
	return os.RemoveAll(filepath.Join(n.dir, id))
}

// stopwatch gathers the steps of rounds.
type stopwatch struct {
	last  time.Time
	order []string
	took  map[string][]time.Duration
}

func newStopwatch() *stopwatch { return &stopwatch{took: map[string][]time.Duration{}} }

// mark ends a step; the empty one only begins the next.
func (w *stopwatch) mark(step string) {
	now := time.Now()
	if step != "" {
		w.add(step, now.Sub(w.last))
	}
	w.last = now
}

// add counts a step that was measured by somebody else.
func (w *stopwatch) add(step string, d time.Duration) {
	if w.took[step] == nil {
		w.order = append(w.order, step)
	}
	w.took[step] = append(w.took[step], d)
}

func (w *stopwatch) rows(prefix string) {
	for _, step := range w.order {
		row(prefix+step, w.took[step], 0)
	}
	if c, s := w.took["create"], w.took["start"]; len(c) == len(s) {
		sum := make([]time.Duration, len(c))
		for i := range c {
			sum[i] = c[i] + s[i]
		}
		row(prefix+"create + start", sum, 0)
	}
}

// supervisors measures containers and processes of a supervisor: with a small heap and a large one in turns, warm and rested.
func (b *bench) supervisors(ctx context.Context) (err error) {
	small, err := b.newNode(ctx, "small", 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, small.close()) }()
	large, err := b.newNode(ctx, "large", heapSize)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, large.close()) }()
	for _, rest := range []time.Duration{0, restTime} {
		for i, n := range []*node{small, large} {
			if err := n.cycle(ctx, fmt.Sprintf("warm%d", i), newStopwatch()); err != nil {
				return err
			}
		}
		watches := []*stopwatch{newStopwatch(), newStopwatch()}
		for round := range b.opts.rounds {
			for i, n := range []*node{small, large} {
				time.Sleep(rest)
				if err := n.cycle(ctx, fmt.Sprintf("c%d-%d", rest, round), watches[i]); err != nil {
					return err
				}
			}
		}
		watches[0].rows(label("", rest))
		watches[1].rows(label(fmt.Sprintf("%d MiB heap: ", heapSize), rest))
	}
	return b.supervisorExecs(ctx, small)
}

const restTime = 100 * time.Millisecond

func label(what string, rest time.Duration) string {
	if rest > 0 {
		return what + "rested: "
	}
	return what
}

func (b *bench) supervisorExecs(ctx context.Context, n *node) error {
	cfg, err := n.config("box")
	if err != nil {
		return err
	}
	if err := n.sup.Create(ctx, cfg); err != nil {
		return err
	}
	if _, err := n.sup.Start(ctx, "box"); err != nil {
		return err
	}
	for _, rest := range []time.Duration{0, restTime} {
		w := newStopwatch()
		for i := range b.opts.rounds {
			time.Sleep(rest)
			w.mark("")
			if _, err := n.sup.Exec(ctx, "box", runtime.Process{ID: fmt.Sprintf("x%d-%d", rest, i), Args: []string{"/noop", "true"}}); err != nil {
				return err
			}
			w.mark("exec")
			<-n.exits
		}
		w.rows(label("", rest))
	}
	if err := n.sup.Signal(ctx, "box", 9); err != nil {
		return err
	}
	<-n.exits
	return n.sup.Delete(ctx, "box")
}

// crowd runs many containers at once and says what they cost.
func (b *bench) crowd(ctx context.Context) (err error) {
	n, err := b.newNode(ctx, "crowd", 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close()) }()
	if err := n.cycle(ctx, "warm", newStopwatch()); err != nil {
		return err
	}
	_, before := memory(n.pid)
	begun := time.Now()
	for i := range b.opts.crowd {
		cfg, err := n.config(fmt.Sprintf("m%d", i))
		if err == nil {
			err = n.sup.Create(ctx, cfg)
		}
		if err == nil {
			_, err = n.sup.Start(ctx, cfg.ID)
		}
		if err != nil {
			return fmt.Errorf("container %d: %w", i, err)
		}
	}
	took := time.Since(begun)
	_, after := memory(n.pid)
	fmt.Printf("  %d containers run after %v, %s each, one client; supervisor's private memory grew by %s: %.1f KiB each\n", b.opts.crowd, took.Round(time.Millisecond),
		ms(took/time.Duration(b.opts.crowd)), mib(after-before), float64(after-before)/1024/float64(b.opts.crowd))
	begun = time.Now()
	for i := range b.opts.crowd {
		if err := n.sup.Signal(ctx, fmt.Sprintf("m%d", i), 9); err != nil {
			return err
		}
	}
	for range b.opts.crowd {
		ev := <-n.exits
		if err := n.sup.Delete(ctx, ev.ContainerID); err != nil {
			return err
		}
	}
	fmt.Printf("  killed and deleted after %v\n", time.Since(begun).Round(time.Millisecond))
	return nil
}
