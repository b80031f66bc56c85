package oci

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/runtime/rootfs"
	"skein/runtime/zygote"
)

// maxDepth bounds how deep a copied directory may be.
const maxDepth = 64

// copyUps fills the tmpfs mounts that shall start with what they cover, through handles taken from the waiting child: no path of the
// container is walked, and no link followed.
func copyUps(pid int, p *zygote.Program, list []rootfs.CopyUp) error {
	for _, c := range list {
		from, err := fetchFD(pid, int(p.Result(c.From)))
		if err != nil {
			return fmt.Errorf("tmpcopyup: %w", err)
		}
		to, err := fetchFD(pid, int(p.Result(c.To)))
		if err == nil {
			err = copyDir(from, to, 0)
			unix.Close(to)
		}
		unix.Close(from)
		if err != nil {
			return fmt.Errorf("tmpcopyup: %w", err)
		}
	}
	return nil
}

// copyDir copies the entries of one directory into another, owner, mode and type kept.
func copyDir(from, to, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("directories are nested deeper than %d: %w", maxDepth, errdefs.ErrInvalidArgument)
	}
	fd, err := unix.Openat(from, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	d := os.NewFile(uintptr(fd), "directory")
	defer d.Close()
	for {
		names, err := d.Readdirnames(256)
		for _, n := range names {
			if err := copyEntry(from, to, n, depth); err != nil {
				return fmt.Errorf("%s: %w", n, err)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func copyEntry(from, to int, name string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(from, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		err = copySub(from, to, name, depth)
	case unix.S_IFREG:
		err = copyFile(from, to, name)
	case unix.S_IFLNK:
		b := make([]byte, unix.PathMax)
		n, rerr := unix.Readlinkat(from, name, b)
		if err = rerr; err == nil {
			err = unix.Symlinkat(string(b[:n]), to, name)
		}
	default:
		return nil // devices, pipes and sockets are not content
	}
	if err != nil {
		return err
	}
	if err := unix.Fchownat(to, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return nil
	}
	return unix.Fchmodat(to, name, st.Mode&0o7777, 0)
}

func copySub(from, to int, name string, depth int) error {
	src, err := unix.Openat(from, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	if err := unix.Mkdirat(to, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	dst, err := unix.Openat(to, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dst)
	return copyDir(src, dst, depth+1)
}

func copyFile(from, to int, name string) error {
	fd, err := unix.Openat(from, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	src := os.NewFile(uintptr(fd), name)
	defer src.Close()
	if st, err := src.Stat(); err != nil || !st.Mode().IsRegular() {
		return errors.Join(err, fmt.Errorf("changed while it was copied: %w", errdefs.ErrAborted))
	}
	fd, err = unix.Openat(to, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	dst := os.NewFile(uintptr(fd), name)
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}
