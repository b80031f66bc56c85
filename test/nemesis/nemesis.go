package nemesis

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"skein/cmd/dev"
)

const (
	slowWrites = 100 // a second
	flapStep   = 400 * time.Millisecond
	leaderWait = 3 * time.Second // to find out who leads; then a follower is broken instead
)

// Nemesis carries out plans against a rig.
type Nemesis struct {
	rig  *Rig
	wire *wire

	mu     sync.Mutex
	broken map[string]int // node → faults it has now
	errs   []error
	wg     sync.WaitGroup
}

// New returns a nemesis; nothing is broken yet.
func New(r *Rig) *Nemesis {
	return &Nemesis{rig: r, wire: newWire(r.Cluster), broken: map[string]int{}}
}

// Run carries out a plan and returns when everything is whole again: also when ctx ends. The error is a fault that could not be made or
// undone.
func (x *Nemesis) Run(ctx context.Context, plan []Step) error {
	begun := time.Now()
	for _, s := range plan {
		Sleep(ctx, s.At-time.Since(begun))
		if ctx.Err() != nil {
			break
		}
		x.wg.Add(1)
		go func() {
			defer x.wg.Done()
			if err := x.step(ctx, s); err != nil {
				x.mu.Lock()
				x.errs = append(x.errs, fmt.Errorf("%v: %w", s, err))
				x.mu.Unlock()
				x.rig.Say("nemesis: %v: %v", s, err)
			}
		}()
	}
	x.wg.Wait()
	x.mu.Lock()
	defer x.mu.Unlock()
	return errors.Join(x.errs...)
}

// target resolves a step's victim: the leader, or one of the others, that is not broken already. Nil: there is none.
func (x *Nemesis) target(ctx context.Context, s Step) *dev.Node {
	lead, _ := x.rig.Leader(ctx, leaderWait)
	x.mu.Lock()
	defer x.mu.Unlock()
	if s.Leader && lead != nil && x.broken[lead.Name] == 0 {
		x.broken[lead.Name]++
		return lead
	}
	var list []*dev.Node
	for _, m := range x.rig.Managers() {
		if m != lead && x.broken[m.Name] == 0 {
			list = append(list, m)
		}
	}
	if len(list) == 0 {
		return nil
	}
	n := list[s.Pick%len(list)]
	x.broken[n.Name]++
	return n
}

func (x *Nemesis) step(ctx context.Context, s Step) error {
	n := x.target(ctx, s)
	if n == nil {
		x.rig.Say("nemesis: %v: left out, all are broken", s)
		return nil
	}
	defer func() {
		x.mu.Lock()
		x.broken[n.Name]--
		x.mu.Unlock()
	}()
	x.rig.Say("nemesis: %v: %s", s, n.Name)
	undo, err := x.Break(ctx, n, s)
	if err != nil {
		return err
	}
	Sleep(ctx, s.For)
	return undo()
}

// Break makes one fault at a node and returns how to undo it. Step.For matters to Flap alone.
func (x *Nemesis) Break(ctx context.Context, n *dev.Node, s Step) (undo func() error, err error) {
	all := context.WithoutCancel(ctx) // what was broken is healed in any case
	switch s.Kind {
	case Kill:
		return func() error { return x.rig.StartDaemon(all, n) }, x.rig.KillDaemon(n)
	case KillAll:
		return x.killAll(all)
	case Stop:
		return func() error { return x.rig.Signal(n, syscall.SIGCONT) }, x.rig.Signal(n, syscall.SIGSTOP)
	case Cut:
		return x.wire.add(drop{from: n.Name, percent: 100}, drop{to: n.Name, percent: 100})
	case CutIn:
		return x.wire.add(drop{to: n.Name, percent: 100})
	case CutOut:
		return x.wire.add(drop{from: n.Name, percent: 100})
	case CutPair:
		o := x.other(n, s.Pick)
		return x.wire.add(drop{from: n.Name, to: o, percent: 100}, drop{from: o, to: n.Name, percent: 100})
	case Loss:
		p := uint32(s.Percent)
		return x.wire.add(drop{from: n.Name, percent: p}, drop{to: n.Name, percent: p})
	case Flap:
		return x.flap(ctx, n, s.For)
	case Fill:
		return x.fill(n, s.Percent)
	case Slow:
		return x.slow(n)
	case Fail:
		return x.fail(all, n)
	}
	return nil, fmt.Errorf("there is no fault %q", s.Kind)
}

// other is another manager.
func (x *Nemesis) other(n *dev.Node, pick int) string {
	var list []string
	for _, m := range x.rig.Managers() {
		if m != n {
			list = append(list, m.Name)
		}
	}
	return list[pick%len(list)]
}

func (x *Nemesis) killAll(ctx context.Context) (func() error, error) {
	var err error
	for _, m := range x.rig.Managers() {
		err = errors.Join(err, x.rig.KillDaemon(m))
	}
	return func() error {
		list := x.rig.Managers()
		errs := make(chan error, len(list))
		for _, m := range list {
			go func() { errs <- x.rig.StartDaemon(ctx, m) }()
		}
		var err error
		for range list {
			err = errors.Join(err, <-errs)
		}
		return err
	}, err
}

// flap cuts and heals for the time; undo waits for its end.
func (x *Nemesis) flap(ctx context.Context, n *dev.Node, d time.Duration) (func() error, error) {
	done := make(chan error, 1)
	go func() {
		var err error
		for begun := time.Now(); time.Since(begun) < d && ctx.Err() == nil && err == nil; {
			var undo func() error
			if undo, err = x.wire.add(drop{from: n.Name, percent: 100}, drop{to: n.Name, percent: 100}); err == nil {
				Sleep(ctx, flapStep)
				err = undo()
			}
			Sleep(ctx, flapStep)
		}
		done <- err
	}()
	return func() error { return <-done }, nil
}

// fill leaves so many MiB of the node's disk: below the reserve, down to nothing.
func (x *Nemesis) fill(n *dev.Node, leave int) (func() error, error) {
	path := filepath.Join(n.StateDir, "ballast")
	undo := func() error { return os.Remove(path) }
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	room := int64(max(0, leave-20)) << 20 // a third of the plans leaves nothing
	for step := int64(64 << 20); step >= 4096; {
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
			return undo, err
		}
		size, err := f.Seek(0, 2)
		if err != nil {
			return undo, err
		}
		want := min(step, int64(st.Bavail)*st.Bsize-room)
		if want <= 0 {
			break
		}
		if err := unix.Fallocate(int(f.Fd()), 0, size, want); errors.Is(err, unix.ENOSPC) {
			step /= 2
		} else if err != nil {
			return undo, err
		}
	}
	return undo, nil
}

// slow throttles the daemon's writes to its own disk.
func (x *Nemesis) slow(n *dev.Node) (func() error, error) {
	var st unix.Stat_t
	if err := unix.Stat(n.StateDir, &st); err != nil {
		return nil, err
	}
	file := filepath.Join("/sys/fs/cgroup/blkio", x.rig.Group(n), "daemon/_node/blkio.throttle.write_iops_device")
	set := func(limit int) error {
		return os.WriteFile(file, fmt.Appendf(nil, "%d:%d %d", unix.Major(st.Dev), unix.Minor(st.Dev), limit), 0)
	}
	return func() error { return set(0) }, set(slowWrites)
}

// Of failing disks.
const (
	ext4Shutdown = 0x8004587d // ioctl(2): from now on the file system answers EIO
	noLogFlush   = 2          // its argument: nothing that is not on the disk yet gets there
	exitStorage  = "exit_code=74"
	dieTime      = 10 * time.Second // for a daemon whose log cannot be written; followers write at every entry, and leaders
)

// fail makes the node's disk fail. The daemon must end with the code of a log that cannot be written: going on could lose what it said is
// safe. Undoing kills what is left of the node, mounts the disk anew and starts it.
func (x *Nemesis) fail(ctx context.Context, n *dev.Node) (func() error, error) {
	log := filepath.Join(filepath.Dir(n.StateDir), "daemon.log")
	before, err := os.ReadFile(log)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(n.StateDir)
	if err != nil {
		return nil, err
	}
	err = unix.IoctlSetPointerInt(int(f.Fd()), ext4Shutdown, noLogFlush)
	_ = f.Close()
	if err != nil {
		return nil, fmt.Errorf("shut the file system on %s down: %w", n.StateDir, err)
	}
	return func() error {
		told := false
		for begun := time.Now(); !told && time.Since(begun) < dieTime; time.Sleep(50 * time.Millisecond) {
			after, err := os.ReadFile(log)
			if err != nil {
				return err
			}
			told = strings.Contains(string(after[min(len(before), len(after)):]), exitStorage)
		}
		err := x.rig.Remount(n)
		if err == nil {
			err = x.rig.StartDaemon(ctx, n)
		}
		if !told {
			err = errors.Join(err, fmt.Errorf("%s did not end itself within %v though its disk failed (see %s)", n.Name, dieTime, log))
		}
		return err
	}, nil
}
