package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"skein/cmd/dev"
)

// diskBytes of the small disk: the raft log, its reserve of 64 MiB, and room.
const diskBytes = 256 << 20

// fullDisk gives the leader's raft log a small disk, waits until that node leads again and fills the disk: another manager must lead soon
// and take writes; with room again the node must be whole without a restart.
func fullDisk(ctx context.Context, w *world) error {
	n, err := w.leader(ctx)
	if err != nil {
		return err
	}
	dir := filepath.Join(n.StateDir, raftDir)
	if err := w.smallDisk(ctx, n, dir); err != nil {
		return err
	}
	if err := w.makeLeader(ctx, n); err != nil {
		return err
	}
	ballast := filepath.Join(dir, "ballast")
	defer os.Remove(ballast)
	for _, leave := range []int64{40 << 20, 0} {
		if err := fill(ballast, leave); err != nil {
			return err
		}
		w.say("  disk of leader %s: %d MiB left", n.Name, leave>>20)
		err := w.firstWrite(ctx)
		for range 5 { // not by luck
			_, perr := w.persist(ctx, failoverTime, "sf", nil)
			err = errors.Join(err, perr)
			sleep(ctx, 300*time.Millisecond)
		}
		if err != nil {
			return err
		}
	}
	if n.PID == 0 || syscall.Kill(n.PID, 0) != nil {
		return fmt.Errorf("the daemon of %s ended because its disk is full", n.Name)
	}
	return nil
}

// smallDisk restarts the node with its raft log on a tmpfs. It goes with the cluster.
func (w *world) smallDisk(ctx context.Context, n *dev.Node, dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if st.Type == unix.TMPFS_MAGIC {
		return nil
	}
	w.away(n, true)
	defer w.away(n, false)
	if err := w.Kill(n); err != nil {
		return err
	}
	old := dir + ".old"
	if err := os.Rename(dir, old); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("skein-chaos", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", diskBytes)); err != nil {
		return err
	}
	if msg, err := exec.Command("cp", "-a", old+"/.", dir).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, msg)
	}
	if err := os.RemoveAll(old); err != nil {
		return err
	}
	return w.start(ctx, n)
}

// makeLeader kills leaders until the node leads.
func (w *world) makeLeader(ctx context.Context, n *dev.Node) error {
	for range 12 {
		lead, err := w.leader(ctx)
		if err != nil {
			return err
		}
		if lead == n {
			return nil
		}
		if err := errors.Join(killDaemon(lead), w.start(ctx, lead)); err != nil {
			return err
		}
		sleep(ctx, 3*time.Second)
	}
	return fmt.Errorf("%s does not come to lead", n.Name)
}

// fill leaves so many bytes of the file's disk.
func fill(path string, leave int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return err
	}
	have, err := f.Stat()
	if err != nil {
		return err
	}
	return unix.Fallocate(int(f.Fd()), 0, 0, have.Size()+int64(st.Bavail)*st.Bsize-leave)
}
