package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// removeTries bounds the wait for a group to become empty; v1 tells nobody when it does, so this looks again, less and less often.
const removeTries = 40

// Kill kills every process in the group with SIGKILL, frozen ones too.
func (g *Group) Kill() error {
	if g.v2 != "" {
		return killV2(g.v2)
	}
	if err := g.setFrozen(false); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, d := range g.v1 {
		if err := killV1(d.Path); err != nil {
			return err
		}
	}
	return nil
}

func killV2(dir string) error {
	err := write(dir, "cgroup.kill", "1")
	if errors.Is(err, os.ErrNotExist) {
		if _, serr := os.Stat(dir); serr != nil {
			return nil
		}
		return killV1(dir) // before 5.14
	}
	if err != nil {
		return fmt.Errorf("kill cgroup %s: %w", dir, err)
	}
	return nil
}

// killV1 kills what is listed, below dir too, until nothing is left: a process may fork while it reads.
func killV1(dir string) error {
	for range removeTries {
		left := 0
		err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
			if err != nil || d.Name() != "cgroup.procs" {
				return ignoreGone(err)
			}
			b, err := os.ReadFile(p)
			for _, f := range bytes.Fields(b) {
				if pid, err := strconv.Atoi(string(f)); err == nil && pid > 1 {
					left++
					_ = unix.Kill(pid, unix.SIGKILL)
				}
			}
			return ignoreGone(err)
		})
		if err != nil || left == 0 {
			return err
		}
		pause(0)
	}
	return nil
}

func ignoreGone(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// pause is the one sleep of this package, see removeTries.
func pause(try int) { time.Sleep(min(time.Millisecond<<min(try/4, 6), 50*time.Millisecond)) }

// Freeze stops all processes of the group and returns when they stand still, Thaw lets them go on.
func (g *Group) Freeze(ctx context.Context) error {
	if err := g.setFrozen(true); err != nil {
		return fmt.Errorf("freeze cgroup %s: %w", g.name, err)
	}
	if err := g.awaitFrozen(ctx); err != nil {
		return errors.Join(fmt.Errorf("freeze cgroup %s: %w", g.name, err), g.setFrozen(false))
	}
	return nil
}

// Thaw undoes Freeze.
func (g *Group) Thaw() error {
	if err := g.setFrozen(false); err != nil {
		return fmt.Errorf("thaw cgroup %s: %w", g.name, err)
	}
	return nil
}

func (g *Group) setFrozen(on bool) error {
	if g.v2 != "" {
		return write(g.v2, "cgroup.freeze", map[bool]string{true: "1", false: "0"}[on])
	}
	m, ok := g.host.v1["freezer"]
	if !ok {
		return errors.New("this host has no freezer cgroup controller")
	}
	return write(filepath.Join(m, g.name), "freezer.state", map[bool]string{true: "FROZEN", false: "THAWED"}[on])
}

// Frozen says whether the group is, or is being, frozen.
func (g *Group) Frozen() bool {
	if g.v2 != "" {
		b, err := read(filepath.Join(g.v2, "cgroup.freeze"))
		return err == nil && strings.TrimSpace(string(b)) == "1"
	}
	b, err := os.ReadFile(filepath.Join(g.host.v1["freezer"], g.name, "freezer.state"))
	return err == nil && strings.TrimSpace(string(b)) != "THAWED"
}

func (g *Group) awaitFrozen(ctx context.Context) error {
	if g.v2 == "" {
		for try := range removeTries {
			b, err := os.ReadFile(filepath.Join(g.host.v1["freezer"], g.name, "freezer.state"))
			if err != nil || strings.TrimSpace(string(b)) == "FROZEN" {
				return err
			}
			pause(try)
		}
		return errors.New("processes did not stop")
	}
	return awaitEvent(ctx, g.v2, "frozen 1")
}

// awaitEvent waits for a line of cgroup.events; the kernel wakes pollers at each change.
func awaitEvent(ctx context.Context, dir, line string) error {
	f, err := unix.Open(filepath.Join(dir, "cgroup.events"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(f)
	for ctx.Err() == nil {
		var b [256]byte
		n, err := unix.Pread(f, b[:], 0)
		if err != nil {
			return err
		}
		if strings.Contains(string(b[:n]), line+"\n") {
			return nil
		}
		p := []unix.PollFd{{Fd: int32(f), Events: unix.POLLPRI}}
		if _, err := unix.Poll(p, 100); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return ctx.Err()
}

// Populated says whether any process is in the group; true when it cannot be told.
func (g *Group) Populated() bool {
	if g.v2 != "" {
		b, err := os.ReadFile(filepath.Join(g.v2, "cgroup.events"))
		return err == nil && strings.Contains(string(b), "populated 1")
	}
	for _, d := range g.v1 {
		if b, err := os.ReadFile(filepath.Join(d.Path, "cgroup.procs")); err == nil && len(b) > 0 {
			return true
		}
	}
	return false
}

// OOMKills counts the processes that the kernel killed in the group for lack of memory.
func (g *Group) OOMKills() uint64 {
	dir, v1, ok := g.dir("memory")
	if !ok {
		return 0
	}
	file := "memory.events"
	if v1 {
		file = "memory.oom_control"
	}
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k == "oom_kill" {
			n, _ := strconv.ParseUint(v, 10, 64)
			return n
		}
	}
	return 0
}

// Remove removes the group's directories; groups that are gone already are fine.
func (g *Group) Remove() error {
	var errs []error
	for _, d := range g.Dirs() {
		errs = append(errs, removeDir(d.Path))
	}
	return errors.Join(errs...)
}

// removeDir removes a group and the groups its processes made below it.
func removeDir(dir string) error {
	var err error
	for try := range removeTries {
		if err = removeOnce(dir); err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		pause(try)
	}
	return fmt.Errorf("remove cgroup %s: %w", dir, err)
}

func removeOnce(dir string) error {
	err := unix.Rmdir(dir)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	entries, rerr := os.ReadDir(dir)
	if rerr != nil {
		return ignoreGone(rerr)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeOnce(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}
