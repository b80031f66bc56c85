package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
	metaPrefix     = ".wh..wh." // other AUFS bookkeeping, never content
	maxOpenDirs    = 64
	maxTimes       = 32 << 20 // bytes of names of directories whose times are remembered; those of the others stay as they are
)

// extractor writes the entries of one archive below root. Parents are opened with RESOLVE_IN_ROOT, leaves are created exclusively in
// their parent's handle, so neither a name nor a link of the archive leaves root.
type extractor struct {
	root    int
	lowers  lowers
	dirs    map[string]int // open parents
	times   []dirTime      // set last: writing into a directory changes its time
	timed   int            // bytes of the names in times
	buf     []byte
	written *meter
}

type dirTime struct {
	name  string
	times [2]unix.Timespec
}

const dirTimeBytes = 48 // of a dirTime without its name

func (x *extractor) all(tr *tar.Reader, maxEntries int64) (int64, error) {
	for n := int64(0); ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			x.setDirTimes()
			return n, nil
		}
		if err != nil {
			return n, fmt.Errorf("read archive: %w", err)
		}
		if n >= maxEntries {
			return n, fmt.Errorf("layer has more than %d entries: %w", maxEntries, errdefs.ErrInvalidArgument)
		}
		if err := x.entry(tr, h); err != nil {
			return n, fmt.Errorf("extract %.200q: %w", h.Name, err)
		}
	}
}

// cleanName makes an archive's name relative to the layer's root; ".." stops there.
func cleanName(name string) (string, error) {
	if len(name) > maxPath || strings.ContainsRune(name, 0) {
		return "", fmt.Errorf("impossible name: %w", errdefs.ErrInvalidArgument)
	}
	n := path.Clean("/" + name)[1:]
	if n == "" {
		return ".", nil
	}
	return n, nil
}

func (x *extractor) entry(tr *tar.Reader, h *tar.Header) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return nil
		}
		return x.directoryMeta(x.root, name, h)
	}
	dir, base := path.Split(name)
	dir = path.Clean(dir)
	parent, err := x.parent(dir)
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return x.whiteout(parent, base)
	}
	hidden, err := x.clear(parent, dir, base, h.Typeflag == tar.TypeDir)
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return x.directory(parent, name, base, h, hidden)
	case tar.TypeReg, tar.TypeGNUSparse:
		return x.file(tr, parent, base, h)
	case tar.TypeSymlink:
		return x.symlink(parent, base, h)
	case tar.TypeLink:
		return x.hardlink(parent, base, h)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return x.device(parent, base, h)
	}
	return fmt.Errorf("entry type %q is unknown: %w", h.Typeflag, errdefs.ErrInvalidArgument)
}

// clear removes what an earlier entry of this archive put at base, except a directory that a directory updates. It tells whether that
// was a whiteout: then the new directory must hide the one below.
func (x *extractor) clear(parent int, dir, base string, wantDir bool) (hidden bool, err error) {
	var st unix.Stat_t
	switch err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); {
	case err == unix.ENOENT:
		return false, nil
	case err != nil:
		return false, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if wantDir {
			return false, nil
		}
		x.forget(dir)
		return false, removeTree(parent, base)
	}
	return isWhiteout(&st), unix.Unlinkat(parent, base, 0)
}

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// removeTree deletes the directory base of parent by handle.
func removeTree(parent int, base string) error {
	r, err := os.OpenRoot("/proc/self/fd/" + strconv.Itoa(parent))
	if err != nil {
		return err
	}
	defer r.Close()
	return r.RemoveAll(base)
}

func (x *extractor) whiteout(parent int, base string) error {
	if base == opaqueMarker {
		return x.setOpaque(parent)
	}
	if strings.HasPrefix(base, metaPrefix) {
		return nil
	}
	target := base[len(whiteoutPrefix):]
	if target == "" || target == "." || target == ".." {
		return fmt.Errorf("whiteout of %q: %w", target, errdefs.ErrInvalidArgument)
	}
	if x.lowers.empty() {
		return nil
	}
	var st unix.Stat_t
	switch err := unix.Fstatat(parent, target, &st, unix.AT_SYMLINK_NOFOLLOW); {
	case err == unix.ENOENT:
		return unix.Mknodat(parent, target, unix.S_IFCHR, 0)
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		// A whiteout hides only what is below: this archive's own directory stays.
		fd, err := unix.Openat(parent, target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return x.setOpaque(fd)
	}
	return nil
}

func (x *extractor) setOpaque(fd int) error {
	if x.lowers.empty() {
		return nil
	}
	return unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0)
}

func (x *extractor) directory(parent int, name, base string, h *tar.Header, hidden bool) error {
	err := unix.Mkdirat(parent, base, 0o700)
	if err != nil && err != unix.EEXIST {
		return err
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if hidden {
		if err := x.setOpaque(fd); err != nil {
			return err
		}
	}
	return x.directoryMeta(fd, name, h)
}

func (x *extractor) directoryMeta(fd int, name string, h *tar.Header) error {
	if err := setMeta(fd, h); err != nil {
		return err
	}
	if x.timed += len(name) + dirTimeBytes; x.timed <= maxTimes {
		x.times = append(x.times, dirTime{name, timesOf(h)})
	}
	return nil
}

func (x *extractor) file(tr *tar.Reader, parent int, base string, h *tar.Header) error {
	fd, err := unix.Openat(parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	defer f.Close()
	for {
		n, err := tr.Read(x.buf)
		if n > 0 {
			// Sparse entries expand to more than was read from the stream.
			if e := x.written.add(int64(n)); e != nil {
				return e
			}
			if _, e := f.Write(x.buf[:n]); e != nil {
				return e
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if err := setMeta(fd, h); err != nil {
		return err
	}
	ts := timesOf(h)
	if err := unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	return f.Close()
}

// setMeta sets owner, mode, and extended attributes, in the order in which the kernel keeps them.
func setMeta(fd int, h *tar.Header) error {
	if err := unix.Fchown(fd, h.Uid, h.Gid); err != nil {
		return fmt.Errorf("owner %d:%d: %w", h.Uid, h.Gid, err)
	}
	if err := unix.Fchmod(fd, uint32(h.Mode)&0o7777); err != nil {
		return err
	}
	for k, v := range h.PAXRecords {
		attr, ok := strings.CutPrefix(k, "SCHILY.xattr.")
		if !ok || !allowedXattr(attr) {
			continue
		}
		if err := unix.Fsetxattr(fd, attr, []byte(v), 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("attribute %.80q: %w", attr, err)
		}
	}
	return nil
}

// allowedXattr leaves out what steers overlayfs, integrity measurement and security modules of this machine.
func allowedXattr(attr string) bool {
	switch {
	case attr == "security.capability", attr == "system.posix_acl_access", attr == "system.posix_acl_default":
		return true
	case strings.HasPrefix(attr, "user.overlay."):
		return false
	}
	return strings.HasPrefix(attr, "user.")
}

func (x *extractor) symlink(parent int, base string, h *tar.Header) error {
	if err := unix.Symlinkat(h.Linkname, parent, base); err != nil {
		return err
	}
	return leafMeta(parent, base, h, unix.S_IFLNK)
}

// leafMeta sets owner, mode and time of the link or node of that type that was made at base just now. By handle: whatever else has come
// to be there is not touched.
func leafMeta(parent int, base string, h *tar.Header, typ uint32) error {
	fd, err := unix.Openat(parent, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != typ {
		return fmt.Errorf("something else took its place: %w", errdefs.ErrFailedPrecondition)
	}
	if err := unix.Fchownat(fd, "", h.Uid, h.Gid, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("owner %d:%d: %w", h.Uid, h.Gid, err)
	}
	if typ != unix.S_IFLNK {
		if err := unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), uint32(h.Mode)&0o7777); err != nil {
			return err
		}
	}
	ts := timesOf(h)
	return unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH)
}

func (x *extractor) hardlink(parent int, base string, h *tar.Header) error {
	target, err := cleanName(h.Linkname)
	if err != nil {
		return err
	}
	dir, tbase := path.Split(target)
	// A second parent is looked up while the first is in use.
	parent, err = unix.FcntlInt(uintptr(parent), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	tparent, err := x.parent(path.Clean(dir))
	if err != nil {
		return err
	}
	err = unix.Linkat(tparent, tbase, parent, base, 0)
	if err == unix.ENOENT {
		return fmt.Errorf("hard link to %.200q, which is not in this layer: %w", h.Linkname, errdefs.ErrInvalidArgument)
	}
	return err // owner, mode and time belong to the first name
}

func (x *extractor) device(parent int, base string, h *tar.Header) error {
	typ, dev := uint32(unix.S_IFIFO), 0
	switch h.Typeflag {
	case tar.TypeBlock:
		typ, dev = unix.S_IFBLK, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))
	case tar.TypeChar:
		typ, dev = unix.S_IFCHR, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))
	}
	if err := unix.Mknodat(parent, base, typ|0o600, dev); err != nil {
		return err
	}
	return leafMeta(parent, base, h, typ)
}

func (x *extractor) setDirTimes() {
	for i := len(x.times) - 1; i >= 0; i-- {
		t := x.times[i]
		if t.name == "." {
			p := "/proc/self/fd/" + strconv.Itoa(x.root)
			_ = unix.UtimesNanoAt(unix.AT_FDCWD, p, t.times[:], 0) // times of directories are best effort
			continue
		}
		dir, base := path.Split(t.name)
		if fd, err := x.parent(path.Clean(dir)); err == nil {
			_ = unix.UtimesNanoAt(fd, base, t.times[:], unix.AT_SYMLINK_NOFOLLOW)
		}
	}
}

// timesOf bounds an archive's time to what file systems store.
func timesOf(h *tar.Header) [2]unix.Timespec {
	t := h.ModTime
	if t.Before(time.Unix(0, 0)) || t.After(time.Unix(1<<33, 0)) {
		t = time.Unix(0, 0)
	}
	ts := unix.NsecToTimespec(t.UnixNano())
	return [2]unix.Timespec{ts, ts}
}
