package volumes

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// maxDepth bounds the nesting of a copied tree: one descriptor per level and side.
const maxDepth = 256

// copyInto copies the directory src to the existing, empty directory dst.
func copyInto(dst string, src *os.File) error {
	to, err := os.OpenFile(dst, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer to.Close()
	return copyDir(to, src, 0)
}

// copyDir copies the entries of from, then its attributes, so that a read-only directory is filled first.
func copyDir(to, from *os.File, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("directories are nested deeper than %d", maxDepth)
	}
	for {
		names, err := from.Readdirnames(256)
		for _, n := range names {
			if err := copyEntry(to, from, n, depth); err != nil {
				return fmt.Errorf("%s: %w", n, err)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(from.Fd()), &st); err != nil {
		return err
	}
	return setAttributes(to, from, st)
}

func copyEntry(to, from *os.File, name string, depth int) error {
	src, dst := int(from.Fd()), int(to.Fd())
	var st unix.Stat_t
	if err := unix.Fstatat(src, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := unix.Mkdirat(dst, name, 0o700); err != nil {
			return err
		}
		return both(to, from, name, unix.O_DIRECTORY, unix.O_DIRECTORY, func(d, s *os.File) error { return copyDir(d, s, depth+1) })
	case unix.S_IFREG:
		return both(to, from, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, unix.O_NONBLOCK, func(d, s *os.File) error {
			if _, err := io.Copy(d, s); err != nil {
				return err
			}
			return setAttributes(d, s, st)
		})
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(src, name, buf)
		if err == nil {
			err = unix.Symlinkat(string(buf[:n]), dst, name)
		}
		if err != nil {
			return err
		}
	case unix.S_IFSOCK:
		return nil // of a process that is no more
	default:
		if err := unix.Mknodat(dst, name, st.Mode, int(st.Rdev)); err != nil {
			return err
		}
	}
	if err := unix.Fchownat(dst, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Fchmodat(dst, name, st.Mode&0o7777, 0); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(dst, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// both opens name on either side, following no link.
func both(to, from *os.File, name string, toFlags, fromFlags int, f func(d, s *os.File) error) error {
	s, err := openAt(from, name, unix.O_RDONLY|fromFlags)
	if err != nil {
		return err
	}
	defer s.Close()
	d, err := openAt(to, name, toFlags)
	if err != nil {
		return err
	}
	return errors.Join(f(d, s), d.Close())
}

func openAt(dir *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// setAttributes gives to from's owner, mode, times and extended attributes, in the order in which none undoes another.
func setAttributes(to, from *os.File, st unix.Stat_t) error {
	d, s := int(to.Fd()), int(from.Fd())
	if err := unix.Fchown(d, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(d, st.Mode&0o7777); err != nil {
		return err
	}
	if err := copyXattrs(d, s); err != nil {
		return err
	}
	tv := []unix.Timeval{unix.NsecToTimeval(st.Atim.Nano()), unix.NsecToTimeval(st.Mtim.Nano())}
	return unix.Futimes(d, tv)
}

func copyXattrs(d, s int) error {
	buf := make([]byte, 64<<10) // the kernel's limit of a list and of a value
	n, err := unix.Flistxattr(s, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return err
	}
	val := make([]byte, 64<<10)
	for _, attr := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if !strings.HasPrefix(attr, "user.") && attr != "security.capability" {
			continue
		}
		m, err := unix.Fgetxattr(s, attr, val)
		if err == nil {
			err = unix.Fsetxattr(d, attr, val[:m], 0)
		}
		if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("attribute %s: %w", attr, err)
		}
	}
	return nil
}
