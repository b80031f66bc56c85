package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// ContainerChanges tells what the container changed of its image, by path.
func (e *Engine) ContainerChanges(ctx context.Context, ref string, emit func(container.FilesystemChange) error) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	return e.withChanges(ctx, c, func(up, low *os.File) error {
		d := &delta{ctx: ctx, each: func(ch change) error {
			return emit(container.FilesystemChange{Kind: ch.kind, Path: ch.path})
		}}
		return d.dir("/", up, low, func() error { return nil })
	})
}

// withChanges opens the container's writable layer and, unless the image is empty, what is below it.
func (e *Engine) withChanges(ctx context.Context, c *entry, f func(up, low *os.File) error) error {
	r := c.snapshot()
	img, err := e.cfg.Images.Get(ctx, r.Image)
	if err != nil {
		return fmt.Errorf("container %s: its image: %w", r.Name, err)
	}
	mounts, err := e.cfg.Images.Prepare(ctx, r.ID, img)
	if err != nil {
		return fmt.Errorf("container %s: root filesystem: %w", r.Name, err)
	}
	up, err := os.OpenFile(upperDir(mounts), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("container %s: writable layer: %w", r.Name, err)
	}
	defer up.Close()
	if mounts[0].Type != "overlay" {
		return f(up, nil)
	}
	low, err := openImage(mounts)
	if err != nil {
		return fmt.Errorf("container %s: image's layers: %w", r.Name, err)
	}
	defer low.Close()
	return f(up, low)
}

// upperDir is where the container's own files are; of an image without layers that is the whole root.
func upperDir(mounts []runtime.Mount) string {
	for _, m := range mounts {
		for _, o := range m.Options {
			if v, ok := strings.CutPrefix(o, "upperdir="); ok {
				return v
			}
		}
	}
	return mounts[0].Source
}

// madeByUs are the mount points that every start makes in the writable layer; they are no change of the container's.
func madeByUs(name string) bool {
	switch name {
	case "/dev", "/proc", "/sys", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf":
		return true
	}
	return false
}

// change is one entry of a writable layer. Of what was deleted there is no file.
type change struct {
	path   string
	kind   container.ChangeType
	file   *os.File
	opaque bool // a directory that hides the one below
}

// delta walks a writable layer beside what is below it, by handles, in the order of names.
type delta struct {
	ctx   context.Context
	each  func(change) error
	depth int
}

// dir walks one directory. mark tells of the directory itself that something was added to it or deleted from it.
func (d *delta) dir(name string, up, low *os.File, mark func() error) error {
	if d.depth++; d.depth > maxTreeDepth {
		return invalid("directories are nested deeper than %d at %s", maxTreeDepth, name)
	}
	defer func() { d.depth-- }()
	names, err := namesIn(up)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, n := range names {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		if p := path.Join(name, n); !madeByUs(p) {
			if err := d.child(p, n, up, low, mark); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *delta) child(p, n string, up, low *os.File, mark func() error) error {
	f, info, err := openChild(up, n)
	if err != nil || f == nil {
		return err
	}
	defer f.Close()
	var below *os.File
	var belowInfo os.FileInfo
	if low != nil {
		if below, belowInfo, err = openChild(low, n); err != nil {
			return err
		}
	}
	if below != nil {
		defer below.Close()
	}
	st := info.Sys().(*syscall.Stat_t)
	ch := change{path: p, kind: container.ChangeAdd, file: f}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0:
		if below == nil {
			return nil
		}
		ch.kind, ch.file = container.ChangeDelete, nil
	case below != nil:
		ch.kind = container.ChangeModify
	}
	if !info.IsDir() || ch.file == nil {
		if ch.kind != container.ChangeModify {
			if err := mark(); err != nil {
				return err
			}
		}
		return d.each(ch)
	}
	return d.tree(ch, info, below, belowInfo, mark)
}

// tree is a directory of the writable layer. One that is there only for what is in it is told of when something was added or deleted.
func (d *delta) tree(ch change, info os.FileInfo, below *os.File, belowInfo os.FileInfo, mark func() error) error {
	merged := below != nil && belowInfo.IsDir()
	ch.opaque = merged && hidesBelow(ch.file)
	told := false
	tell := func() error {
		if told {
			return nil
		}
		told = true
		return d.each(ch)
	}
	if !merged {
		below = nil
		if ch.kind == container.ChangeAdd {
			if err := mark(); err != nil {
				return err
			}
		}
	}
	if !merged || ch.opaque || !d.alike(ch, info, belowInfo) {
		if err := tell(); err != nil {
			return err
		}
	}
	if ch.opaque {
		if err := d.hidden(ch, below); err != nil {
			return err
		}
		below = nil
	}
	return d.dir(ch.path, ch.file, below, tell)
}

// alike tells whether a directory differs from the one below in nothing of its own. Mount points of ours in it change its time.
func (d *delta) alike(ch change, a, b os.FileInfo) bool {
	sa, sb := a.Sys().(*syscall.Stat_t), b.Sys().(*syscall.Stat_t)
	if sa.Mode != sb.Mode || sa.Uid != sb.Uid || sa.Gid != sb.Gid {
		return false
	}
	if a.ModTime().Equal(b.ModTime()) {
		return true
	}
	names, err := namesIn(ch.file)
	return err == nil && len(names) > 0 && !slices.ContainsFunc(names, func(n string) bool { return !madeByUs(path.Join(ch.path, n)) })
}

// hidden tells what of the directory below is gone.
func (d *delta) hidden(ch change, below *os.File) error {
	names, err := namesIn(below)
	if err != nil {
		return err
	}
	for _, n := range names {
		f, _, err := openChild(ch.file, n)
		if err != nil {
			return err
		}
		if f != nil {
			f.Close()
		} else if err := d.each(change{path: path.Join(ch.path, n), kind: container.ChangeDelete}); err != nil {
			return err
		}
	}
	return nil
}

// openChild opens an entry of a directory without following it; nil when there is none.
func openChild(dir *os.File, name string) (*os.File, os.FileInfo, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// maxNames bounds the names of one directory that are held in memory.
const maxNames = 5_000_000

func namesIn(dir *os.File) ([]string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(maxNames)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

// hidesBelow tells whether a directory of the writable layer is opaque.
func hidesBelow(dir *os.File) bool {
	var b [8]byte
	n, err := unix.Getxattr(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), "trusted.overlay.opaque", b[:])
	return err == nil && bytes.Equal(b[:n], []byte("y"))
}

// ContainerExport writes the container's root filesystem as a tar stream, without what is mounted in it.
func (e *Engine) ContainerExport(ctx context.Context, ref string, begin func() io.Writer) error {
	return e.withRoot(ctx, ref, "/", func(root *os.File, _ record) error {
		id, err := mountID(root)
		if err != nil {
			return err
		}
		p := &packer{ctx: ctx, tw: tar.NewWriter(begin()), mount: id, links: map[inode]string{}}
		if err := p.entries(root, "", 0); err != nil {
			return err
		}
		return p.tw.Close()
	})
}

// mountID tells which mount an open file is on.
func mountID(f *os.File) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return 0, fmt.Errorf("statx: %w", err)
	}
	return st.Mnt_id, nil
}

type inode struct{ dev, ino uint64 }

// sizes are how many bytes the container has in files of its own, and with those of its image.
func (e *Engine) sizes(ctx context.Context, r record) (rw, all int64) {
	rw = e.sizeRw(ctx, r)
	if img, err := e.cfg.Images.Get(ctx, r.Image); err == nil {
		return rw, rw + img.Size
	}
	return rw, rw
}

// sizeRw is how many bytes the container has in files of its own.
func (e *Engine) sizeRw(ctx context.Context, r record) (sum int64) {
	mounts, err := e.cfg.Images.Mounts(ctx, r.ID)
	if err != nil || len(mounts) == 0 {
		return 0 // it was never started
	}
	up, err := os.OpenFile(upperDir(mounts), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0
	}
	defer up.Close()
	seen := map[uint64]bool{}
	d := &delta{ctx: ctx, each: func(ch change) error {
		info, err := ch.file.Stat()
		if err != nil || !info.Mode().IsRegular() {
			return nil
		}
		st := info.Sys().(*syscall.Stat_t)
		if st.Nlink > 1 {
			if seen[st.Ino] {
				return nil
			}
			seen[st.Ino] = true
		}
		sum += info.Size()
		return nil
	}}
	if err := d.dir("/", up, nil, func() error { return nil }); err != nil {
		e.log.Warn("measure a container's writable layer", "container", r.Name, "err", err)
	}
	return sum
}
