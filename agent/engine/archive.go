package engine

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"

	"skein/agent/dockerapi"
	"skein/runtime"
	"skein/runtime/layer"
)

// maxTreeDepth bounds the nesting of a copied tree: one descriptor per level.
const maxTreeDepth = 256

// withRoot calls f with a handle of the container's root filesystem: of the running process, or of its layers, mounted where nobody else
// sees it. A container that does not run cannot be started meanwhile.
func (e *Engine) withRoot(ctx context.Context, ref, name string, f func(root *os.File, r record) error) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if r := c.snapshot(); r.State.active() {
		if e.remapped(r.HostConfig) { // its files have other owners when seen from here, and new ones none that it knows
			return notBuilt("copying from or to container %s, which runs in a user namespace, is not supported by this version of skein: stop it first", r.Name)
		}
		root, err := e.openRunning(ctx, r)
		if err != nil {
			return err
		}
		defer root.Close()
		return f(root, r)
	}
	if err := c.lock(); err != nil {
		return err
	}
	defer c.op.Unlock()
	r := c.snapshot()
	if r.State.active() {
		return conflict("container %s was started meanwhile: try again", r.ID)
	}
	if m, ok := e.mountOver(r, name); ok {
		return notBuilt("%s is on the mount %s of the stopped container %s: start the container to copy from or to its mounts", name, m, r.Name)
	}
	if err := e.clean(ctx, c); err != nil { // one mount of the writable layer at a time
		return err
	}
	img, err := e.cfg.Images.Get(ctx, r.Image)
	if err != nil {
		return fmt.Errorf("container %s: its image: %w", r.Name, err)
	}
	mounts, err := e.cfg.Images.Prepare(ctx, r.ID, img)
	if err != nil {
		return fmt.Errorf("container %s: root filesystem: %w", r.Name, err)
	}
	root, err := openStopped(mounts)
	if err != nil {
		return fmt.Errorf("container %s: root filesystem: %w", r.Name, err)
	}
	defer root.Close()
	return f(root, r)
}

// openRunning opens the root of a running container's process.
func (e *Engine) openRunning(ctx context.Context, r record) (*os.File, error) {
	root, err := os.OpenFile(fmt.Sprintf("/proc/%d/root", r.State.Pid), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, conflict("container %s ended meanwhile: try again", r.ID)
	}
	// The pid was still the container's when it was opened if it is now: the supervisor has not reaped it.
	if st, err := e.cfg.Supervisor.State(ctx, r.ID); err != nil || st.Pid != r.State.Pid || st.Status == runtime.Stopped {
		root.Close()
		return nil, conflict("container %s ended meanwhile: try again", r.ID)
	}
	return root, nil
}

// mountOver finds a mount of the container that holds the path.
func (e *Engine) mountOver(r record, name string) (string, bool) {
	name = path.Clean("/" + name)
	for _, m := range e.mountPoints(r) {
		if d := path.Clean(m.Destination); m.Type != mount.TypeTmpfs && (name == d || strings.HasPrefix(name, d+"/")) {
			return d, true
		}
	}
	return "", false
}

// absPath makes docker's path absolute; a trailing "/" or "/." that asks for a directory stays.
func absPath(name string) (clean, base string, wantDir bool) {
	wantDir = strings.HasSuffix(name, "/") || strings.HasSuffix(name, "/.") || name == "."
	clean = path.Clean("/" + name)
	base = path.Base(clean)
	if clean == "/" || strings.HasSuffix(name, "/.") || name == "." {
		base = "."
	}
	return clean, base, wantDir
}

// openPath opens the directory that holds name and describes what name is there. A link at the end is not followed unless a directory is
// asked for.
func openPath(root *os.File, name string) (f *os.File, st container.PathStat, err error) {
	clean, base, wantDir := absPath(name)
	flags := unix.O_PATH
	if wantDir {
		flags |= unix.O_DIRECTORY
	} else {
		flags |= unix.O_NOFOLLOW
	}
	f, err = openIn(root, clean, flags)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, st, notFound("Could not find the file %s in container", name)
	case errors.Is(err, unix.ENOTDIR):
		return nil, st, invalid("%s is not a directory", name)
	case err != nil:
		return nil, st, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, st, err
	}
	st = container.PathStat{Name: base, Size: info.Size(), Mode: info.Mode(), Mtime: info.ModTime()}
	if base == "." && clean == "/" {
		st.Name = "/"
	}
	if info.Mode()&os.ModeSymlink != 0 {
		target, err := readlinkAt(f, "")
		if err != nil {
			f.Close()
			return nil, st, err
		}
		st.LinkTarget = target
		if !path.IsAbs(target) {
			st.LinkTarget = path.Join(path.Dir(clean), target)
		}
	}
	return f, st, nil
}

func readlinkAt(dir *os.File, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// ArchiveStat describes a path of a container.
func (e *Engine) ArchiveStat(ctx context.Context, ref, name string) (st container.PathStat, err error) {
	err = e.withRoot(ctx, ref, name, func(root *os.File, _ record) error {
		f, s, err := openPath(root, name)
		if err == nil {
			f.Close()
		}
		st = s
		return err
	})
	return st, err
}

// ArchiveGet writes a path of a container as a tar stream.
func (e *Engine) ArchiveGet(ctx context.Context, ref, name string, begin func(container.PathStat) (io.Writer, error)) error {
	return e.withRoot(ctx, ref, name, func(root *os.File, _ record) error {
		f, st, err := openPath(root, name)
		if err != nil {
			return err
		}
		defer f.Close()
		w, err := begin(st)
		if err != nil {
			return err
		}
		_, base, _ := absPath(name)
		p := &packer{ctx: ctx, tw: tar.NewWriter(w)}
		if err := p.add(f, base, 0); err != nil {
			return err
		}
		return p.tw.Close()
	})
}

// packer writes a tree by handles.
type packer struct {
	ctx context.Context
	tw  *tar.Writer
	// mount, unless 0, is the only mount whose files are written; of another one's root there is just an empty file or directory.
	mount uint64
	// links, unless nil, remembers files of several names, so that they are written once.
	links map[inode]string
}

// add writes what the O_PATH handle f is under name, and what is in it.
func (p *packer) add(f *os.File, name string, depth int) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	if depth > maxTreeDepth {
		return invalid("directories are nested deeper than %d at %s", maxTreeDepth, name)
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	link := ""
	switch {
	case info.Mode()&os.ModeSymlink != 0:
		if link, err = readlinkAt(f, ""); err != nil {
			return err
		}
	case info.Mode()&os.ModeSocket != 0:
		return nil // tar has no sockets
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	h.Name, h.Uname, h.Gname = name, "", ""
	if info.IsDir() {
		h.Name += "/"
	}
	foreign, err := p.finish(f, info, h)
	if err != nil {
		return err
	}
	if err := p.tw.WriteHeader(h); err != nil {
		return err
	}
	switch {
	case foreign, h.Typeflag == tar.TypeLink:
	case info.IsDir():
		return p.entries(f, name, depth)
	case info.Mode().IsRegular():
		return p.content(f, h.Size)
	}
	return nil
}

// finish completes a header: further names of a file, capabilities; foreign is what is mounted there.
func (p *packer) finish(f *os.File, info os.FileInfo, h *tar.Header) (foreign bool, err error) {
	if p.mount != 0 {
		id, err := mountID(f)
		if err != nil {
			return false, err
		}
		if id != p.mount {
			if !info.IsDir() {
				h.Typeflag, h.Linkname, h.Size, h.Devmajor, h.Devminor = tar.TypeReg, "", 0, 0, 0
			}
			return true, nil
		}
	}
	if p.links == nil || !info.Mode().IsRegular() {
		return false, nil
	}
	if st := info.Sys().(*syscall.Stat_t); st.Nlink > 1 {
		key := inode{st.Dev, st.Ino}
		if first, ok := p.links[key]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return false, nil
		}
		p.links[key] = h.Name
	}
	var b [64]byte
	if n, err := unix.Getxattr(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), "security.capability", b[:]); err == nil {
		h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": string(b[:n])}
	}
	return false, nil
}

// content writes a file's bytes: exactly as many as its header says, whatever happens to it meanwhile.
func (p *packer) content(f *os.File, size int64) error {
	in, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd())) // a regular file: opening it cannot block
	if err != nil {
		return err
	}
	defer in.Close()
	n, err := io.Copy(p.tw, io.LimitReader(in, size))
	if err == nil && n < size {
		_, err = io.CopyN(p.tw, zeros{}, size-n)
	}
	return err
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

func (p *packer) entries(f *os.File, name string, depth int) error {
	dir, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(256)
		for _, n := range names {
			fd, err := unix.Openat(int(dir.Fd()), n, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if errors.Is(err, unix.ENOENT) {
				continue // removed meanwhile
			}
			if err != nil {
				return fmt.Errorf("%s/%s: %w", name, n, err)
			}
			child := os.NewFile(uintptr(fd), n)
			err = p.add(child, path.Join(name, n), depth+1)
			child.Close()
			if err != nil {
				return err
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

// ArchivePut extracts a tar stream into a directory of a container.
func (e *Engine) ArchivePut(ctx context.Context, ref, name string, o dockerapi.ArchiveOptions, r io.Reader) error {
	return e.withRoot(ctx, ref, name, func(root *os.File, rec record) error {
		if rec.HostConfig.ReadonlyRootfs {
			if _, onMount := e.mountOver(rec, name); !onMount {
				return errf(errDenied, "container rootfs is marked read-only")
			}
		}
		clean, _, _ := absPath(name)
		dir, err := openIn(root, clean, unix.O_RDONLY|unix.O_DIRECTORY)
		switch {
		case errors.Is(err, os.ErrNotExist):
			return notFound("Could not find the file %s in container %s", name, rec.ID)
		case errors.Is(err, unix.ENOTDIR):
			return invalid("extraction point is not a directory")
		case err != nil:
			return err
		}
		defer dir.Close()
		u := &unpacker{ctx: ctx, dir: dir, o: o}
		if o.CopyUIDGID {
			if u.uid, u.gid, err = e.owner(ctx, rec); err != nil {
				return err
			}
		}
		in, err := layer.Decompress(bufio.NewReader(r))
		if err != nil {
			return invalid("the archive cannot be read: %v", err)
		}
		defer in.Close()
		return u.all(tar.NewReader(in))
	})
}

// owner is the container's user, to whom copied files are given when that is asked for.
func (e *Engine) owner(ctx context.Context, r record) (uid, gid int, err error) {
	mounts, err := e.cfg.Images.Mounts(ctx, r.ID)
	if err != nil {
		return 0, 0, err
	}
	u, _, err := resolveUser(mounts, r.Config.User, nil)
	return int(u.UID), int(u.GID), err
}

// unpacker extracts a stream below one directory. The stream is hostile: names are resolved beneath the directory, links out of it are
// refused, and device nodes are not made.
type unpacker struct {
	ctx      context.Context
	dir      *os.File
	o        dockerapi.ArchiveOptions
	uid, gid int
}

func (u *unpacker) all(tr *tar.Reader) error {
	for {
		if err := u.ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return invalid("the archive cannot be read: %v", err)
		}
		name := path.Clean(h.Name)
		if path.IsAbs(name) {
			name = strings.TrimPrefix(name, "/")
		}
		if name == ".." || strings.HasPrefix(name, "../") {
			return invalid("the archive names %q, which is outside of it", h.Name)
		}
		if name == "." || name == "" {
			continue
		}
		if layer.IsSparse(h) {
			return invalid("extract %s: sparse files are not extracted: a few bytes could fill the disk", name)
		}
		if err := u.entry(tr, h, name); err != nil {
			return fmt.Errorf("extract %s: %w", name, err)
		}
	}
}

// beneath opens a path that must stay below the directory of the extraction.
func (u *unpacker) beneath(name string, flags int) (*os.File, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS}
	return openHow(u.dir, name, &how)
}

func (u *unpacker) entry(tr *tar.Reader, h *tar.Header, name string) error {
	parent, err := u.beneath(path.Dir(name), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer parent.Close()
	at, base := int(parent.Fd()), path.Base(name)
	there, err := u.makeWay(at, base, h.Typeflag == tar.TypeDir)
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return u.directory(at, base, h, there)
	case tar.TypeReg:
		return u.file(at, base, h, tr)
	case tar.TypeSymlink:
		return u.symlink(at, base, h)
	case tar.TypeLink:
		return u.hardLink(at, base, h.Linkname) // shares its attributes with what it links to
	case tar.TypeXGlobalHeader:
		return nil
	}
	return invalid("entries of type %q are not extracted", h.Typeflag)
}

// makeWay removes what an entry takes the place of; a directory that is there already is done.
func (u *unpacker) makeWay(at int, base string, isDir bool) (done bool, err error) {
	var st unix.Stat_t
	err = unix.Fstatat(at, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	wasDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	switch {
	case wasDir && isDir:
		return true, nil
	case wasDir != isDir && u.o.NoOverwriteDirNonDir:
		return false, invalid("cannot overwrite a directory with a file or a file with a directory")
	case wasDir:
		return false, unix.Unlinkat(at, base, unix.AT_REMOVEDIR) // an empty one only
	}
	return false, unix.Unlinkat(at, base, 0)
}

func (u *unpacker) file(at int, base string, h *tar.Header, r io.Reader) error {
	fd, err := unix.Openat(at, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	_, err = io.Copy(f, r)
	if err == nil {
		err = u.attributes(fd, h)
	}
	return errors.Join(err, f.Close())
}

func (u *unpacker) directory(at int, base string, h *tar.Header, there bool) error {
	if !there {
		if err := unix.Mkdirat(at, base, 0o700); err != nil {
			return err
		}
	}
	fd, err := unix.Openat(at, base, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !there {
		if err := isOurs(fd); err != nil {
			return err
		}
	}
	return u.attributes(fd, h)
}

func (u *unpacker) symlink(at int, base string, h *tar.Header) error {
	if err := unix.Symlinkat(h.Linkname, at, base); err != nil {
		return err
	}
	fd, err := unix.Openat(at, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := isOurs(fd); err != nil {
		return err
	}
	return u.attributes(fd, h)
}

// isOurs refuses the handle of something that the container has put in the place of a link or a private directory made there just now.
func isOurs(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	link, private := st.Mode&unix.S_IFMT == unix.S_IFLNK, st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Mode&0o077 == 0
	if !link && !private || int(st.Uid) != os.Geteuid() {
		return conflict("it was replaced by something else meanwhile")
	}
	return nil
}

func (u *unpacker) hardLink(at int, base, target string) error {
	from, err := u.beneath(path.Clean(target), unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer from.Close()
	return unix.Linkat(int(from.Fd()), "", at, base, unix.AT_EMPTY_PATH)
}

// attributes sets owner, mode and time of what the handle is, never of a name: the container may have given that to a file of its own.
func (u *unpacker) attributes(fd int, h *tar.Header) error {
	uid, gid := h.Uid, h.Gid
	if u.o.CopyUIDGID {
		uid, gid = u.uid, u.gid
	}
	if err := unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), uint32(h.Mode)&0o7777); err != nil {
			return err
		}
	}
	mtime := h.ModTime
	if mtime.IsZero() || mtime.Unix() < 0 {
		mtime = time.Now()
	}
	ts, err := unix.TimeToTimespec(mtime)
	if err != nil {
		return err
	}
	return unix.UtimesNanoAt(fd, "", []unix.Timespec{ts, ts}, unix.AT_EMPTY_PATH)
}
