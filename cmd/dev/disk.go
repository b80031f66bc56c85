package dev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	minDisk      = 160 // MiB: a manager's reserve twice, and room
	diskAttempts = 10  // somebody else may take the free loop device first
)

// DiskImage is the file behind the node's disk.
func (c *Cluster) DiskImage(n *Node) string { return filepath.Join(c.nodeDir(n), "disk.img") }

// buildDisk gives a node a disk of its own, if the cluster has such: an ext4 file system in a sparse file, mounted on its state directory.
func (c *Cluster) buildDisk(n *Node) error {
	if c.DiskMiB == 0 {
		return nil
	}
	path := c.DiskImage(n)
	if err := os.MkdirAll(c.nodeDir(n), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("disk of node %s: %w", n.Name, err)
	}
	if err := errors.Join(f.Truncate(int64(c.DiskMiB)<<20), f.Close()); err != nil {
		return fmt.Errorf("disk of node %s: %w", n.Name, err)
	}
	// Nothing is kept for root, as the daemons are root; everything is initialised now, so that nothing writes later but the node.
	cmd := exec.Command("mkfs.ext4", "-q", "-F", "-b", "4096", "-N", "16384", "-m", "0", "-J", "size=8", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", path)
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("disk of node %s: mkfs.ext4 (of e2fsprogs): %w: %s", n.Name, err, msg)
	}
	return c.AttachDisk(n)
}

// AttachDisk mounts the node's disk on its state directory, when the cluster's nodes have disks and it is not mounted.
func (c *Cluster) AttachDisk(n *Node) error {
	if c.DiskMiB == 0 {
		return nil
	}
	if on, err := mountedOn(n.StateDir); on || err != nil {
		return err
	}
	if err := os.MkdirAll(n.StateDir, 0o700); err != nil {
		return err
	}
	dev, done, err := attachLoop(c.DiskImage(n))
	if err != nil {
		return fmt.Errorf("disk of node %s: %w", n.Name, err)
	}
	defer done()
	if err := unix.Mount(dev, n.StateDir, "ext4", unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("disk of node %s: mount %s: %w", n.Name, dev, err)
	}
	return nil
}

// DetachDisk unmounts the disk of a node that was killed; the image may be exchanged then.
func (c *Cluster) DetachDisk(n *Node) error {
	if c.DiskMiB == 0 {
		return nil
	}
	if err := unix.Unmount(n.StateDir, unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("disk of node %s: unmount: %w", n.Name, err)
	}
	return nil
}

// attachLoop binds a free loop device to a file. The device frees itself when it is not in use any more; done ends this use.
func attachLoop(file string) (dev string, done func(), err error) {
	img, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return "", nil, err
	}
	defer img.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", nil, err
	}
	defer ctl.Close()
	for range diskAttempts {
		no, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", nil, fmt.Errorf("find a free loop device: %w", err)
		}
		dev = fmt.Sprintf("/dev/loop%d", no)
		if err := loopNode(dev, no); err != nil {
			return "", nil, err
		}
		d, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			return "", nil, err
		}
		conf := unix.LoopConfig{Fd: uint32(img.Fd()), Size: 4096}
		conf.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		err = unix.IoctlLoopConfigure(int(d.Fd()), &conf)
		if err == nil {
			return dev, func() { d.Close() }, nil
		}
		d.Close()
		if !errors.Is(err, unix.EBUSY) {
			return "", nil, fmt.Errorf("bind %s to %s: %w", dev, file, err)
		}
	}
	return "", nil, fmt.Errorf("bind a loop device to %s: others took every free one", file)
}

// loopNode makes the device's file where nothing else (udev) does.
func loopNode(path string, no int) error {
	const major = 7
	err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(major, uint32(no))))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return nil
}

// mountedOn reports whether a file system is mounted on exactly this directory.
func mountedOn(dir string) (bool, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 4 && f[4] == dir {
			return true, nil
		}
	}
	return false, nil
}

// loops names the loop devices that are bound to files below dir.
func loops(dir string) []string {
	var out []string
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), dir+"/") {
			out = append(out, "/dev/"+filepath.Base(filepath.Dir(filepath.Dir(f))))
		}
	}
	return out
}
