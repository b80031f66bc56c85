package layer

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/runtime/handle"
)

const opaqueXattr = "trusted.overlay.opaque"

const inRoot = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS

func openDir(root int, name string) (fd int, err error) {
	return handle.Open(root, name, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: inRoot})
}

// parent returns the handle of a directory of this layer, making it and those above it when no entry did. The handle is the
// extractor's, valid until the next call.
func (x *extractor) parent(dir string) (int, error) {
	if dir == "." || dir == "" || dir == "/" {
		return x.root, nil
	}
	if fd, ok := x.dirs[dir]; ok {
		return fd, nil
	}
	fd, err := openDir(x.root, dir)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		fd, err = x.makeParent(dir)
	}
	if err != nil {
		return -1, fmt.Errorf("directory %.200q: %w", dir, err)
	}
	if len(x.dirs) >= maxOpenDirs {
		x.forget("")
	}
	x.dirs[dir] = fd
	return fd, nil
}

// makeParent creates a directory that the archive only implies. It looks like the one below, if there is one.
func (x *extractor) makeParent(dir string) (int, error) {
	up, base := path.Split(dir)
	parent, err := x.parent(path.Clean(up))
	if err != nil {
		return -1, err
	}
	hidden := false
	var st unix.Stat_t
	if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil {
		if !isWhiteout(&st) {
			return -1, fmt.Errorf("is no directory in this layer: %w", errdefs.ErrInvalidArgument)
		}
		if err := unix.Unlinkat(parent, base, 0); err != nil {
			return -1, err
		}
		hidden = true
	}
	if err := unix.Mkdirat(parent, base, 0o755); err != nil {
		return -1, err
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if hidden {
		err = x.setOpaque(fd)
	} else {
		err = x.adopt(fd, dir)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// forget closes all parents but keep.
func (x *extractor) forget(keep string) {
	for k, v := range x.dirs {
		if k != keep {
			unix.Close(v)
			delete(x.dirs, k)
		}
	}
}

// adoptRoot gives the layer's root the attributes of the root below; an entry "./" may change them.
func (x *extractor) adoptRoot() error { return x.adopt(x.root, ".") }

func (x *extractor) adopt(fd int, dir string) error {
	lower, err := x.lowers.open(dir)
	if err != nil || lower < 0 {
		return err
	}
	defer unix.Close(lower)
	return CopyDirMeta(fd, lower)
}

// CopyDirMeta copies owner, mode, times and harmless extended attributes from one directory to another.
func CopyDirMeta(to, from int) error {
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	if err := unix.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	names := make([]byte, 64<<10)
	n, err := unix.Flistxattr(from, names)
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	for name := range strings.SplitSeq(string(names[:max(n, 0)]), "\x00") {
		if name == "" || !allowedXattr(name) {
			continue
		}
		val := make([]byte, 64<<10)
		m, err := unix.Fgetxattr(from, name, val)
		if err != nil {
			return err
		}
		if err := unix.Fsetxattr(to, name, val[:m], 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return err
		}
	}
	return nil
}

// lowers are the roots of the layers below, topmost first.
type lowers struct{ fds []int }

func openLowers(dirs []string) (lowers, error) {
	var l lowers
	for _, d := range dirs {
		fd, err := unix.Open(d, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			l.close()
			return l, fmt.Errorf("open lower layer %s: %w", d, err)
		}
		l.fds = append(l.fds, fd)
	}
	return l, nil
}

func (l lowers) empty() bool { return len(l.fds) == 0 }

func (l lowers) close() {
	for _, fd := range l.fds {
		unix.Close(fd)
	}
}

// open returns the directory that is visible at dir in the union of the lower layers, or -1.
func (l lowers) open(dir string) (int, error) {
	for _, root := range l.fds {
		fd, visible, err := lookup(root, dir)
		if err != nil || fd >= 0 || !visible {
			return fd, err
		}
	}
	return -1, nil
}

// lookup finds dir in one layer. visible tells whether layers further below show through.
func lookup(root int, dir string) (fd int, visible bool, err error) {
	if dir == "." {
		fd, err = openDir(root, ".")
		return fd, false, err
	}
	at := ""
	for part := range strings.SplitSeq(dir, "/") {
		at = path.Join(at, part)
		// Each component by itself: a link or a file on the way hides everything below it.
		fd, err := handle.Open(root, at, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: inRoot | unix.RESOLVE_NO_SYMLINKS})
		switch {
		case err == unix.ENOENT:
			return -1, true, nil
		case err == unix.ENOTDIR || err == unix.ELOOP:
			return -1, false, nil
		case err != nil:
			return -1, false, err
		}
		if at == dir {
			return fd, false, nil
		}
		opaque := isOpaque(fd)
		unix.Close(fd)
		if opaque {
			return lookupBelowOpaque(root, dir)
		}
	}
	return -1, true, nil
}

// lookupBelowOpaque looks once more: nothing below an opaque directory shows through.
func lookupBelowOpaque(root int, dir string) (int, bool, error) {
	fd, err := handle.Open(root, dir, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: inRoot | unix.RESOLVE_NO_SYMLINKS})
	switch err {
	case nil:
		return fd, false, nil
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP:
		return -1, false, nil
	}
	return -1, false, err
}

func isOpaque(fd int) bool {
	var b [1]byte
	n, err := unix.Fgetxattr(fd, opaqueXattr, b[:])
	return err == nil && n == 1 && b[0] == 'y'
}
