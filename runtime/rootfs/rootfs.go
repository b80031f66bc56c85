// Package rootfs compiles a container's view of the filesystem into a program: its root, mounts, device nodes, masked and read-only
// paths, and the pivot into it.
//
// Everything runs in the child, in its own mount namespace, so nothing is left on the host when it ends. Paths inside the root are
// resolved once by openat2 with RESOLVE_IN_ROOT and only the handles are used; a symbolic link planted in an image or a volume cannot
// lead a mount, a new file or a device node outside. Sources of bind mounts are host paths and trusted. Used by runtime/sandbox.
package rootfs

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/zygote"
)

// Plan is what the container shall see.
type Plan struct {
	Spec *specs.Spec
	// Rootfs is mounted on Spec.Root.Path; empty: that path is the root filesystem already.
	Rootfs []runtime.Mount
	// Root is the child's descriptor of what MountRoot made of Rootfs, 0 without.
	Root int
	// Cgroups are the container's groups, shown under a mount of type cgroup.
	Cgroups []CgroupDir
	// LowerdirAppend: this kernel takes overlay layers one by one (6.8), see Probe.
	LowerdirAppend bool
	// Mounted, when set, adds what must be done with the mounts complete but nothing protected yet: kernel parameters.
	Mounted func(Built) error
	// BeforePivot, when set, adds what must be done while the host's root is still in place, nothing protected yet.
	BeforePivot func(Built) error
	// Trees are detached mounts that the caller prepared as sources of bind mounts: the child's descriptor by index in Spec.Mounts.
	Trees map[int]int
	// TreeDirs says of a tree whether it is a directory, where the source's path does not.
	TreeDirs map[int]bool
	// Shared are such mounts that the program itself took from elsewhere, before.
	Shared map[int]zygote.Slot
	// AttachAt is where the root filesystem is mounted until it is the root, instead of Spec.Root.Path: a directory that the container's own
	// user may enter.
	AttachAt string
	// BindDevices takes the host's device nodes instead of making some: in a user namespace none can be made.
	BindDevices bool
	// AnyMount offers every filesystem type of the kernel, and device nodes without a tmpfs on /dev.
	AnyMount bool
	// Detached builds the root as a tree that is attached nowhere, for a container that shares the host's mount namespace: nothing is
	// mounted on the host, the tree goes with its last process. It is entered by chroot. Needs Linux 6.15.
	Detached bool
}

// CgroupDir is one group of the container: a v1 controller's, or the v2 group with an empty controller.
type CgroupDir struct{ Controller, Path string }

// Built are handles and results that later parts of the program need.
type Built struct {
	// Proc is the container's own procfs, or invalid when the spec mounts none.
	Proc    zygote.Slot
	HasProc bool
	// Console is the master of the terminal made for Spec.Process.Terminal; descriptors 0-2 are its slave.
	Console zygote.Slot
	// CopyUps are the tmpfs mounts to fill at BeforePivot.
	CopyUps []CopyUp
}

// CopyUp is a tmpfs that shall start with what it covers: slots of the two directories' handles.
type CopyUp struct{ From, To zygote.Slot }

const (
	resolve   = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS
	cloneTree = CloneTree
	moveFlags = unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_EMPTY_PATH
)

// CloneTree makes open_tree(2) return a mount of its own.
const CloneTree = unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC

// builder adds ops to one program.
type builder struct {
	*zygote.Program
	plan      Plan
	root      zygote.Slot
	howPath   zygote.Addr
	howDir    zygote.Addr
	empty     zygote.Slot // the mount that masks directories
	dev       zygote.Slot // our tmpfs on /dev
	hasDev    bool
	pts       zygote.Slot
	hasPTS    bool
	out       Built
	early     map[int]zygote.Slot // sources of binds that take part in the host's mount events
	rootProp  uint64
	readOnlys []zygote.Slot // to protect once they are filled
	devBound  bool          // the spec binds its own /dev
	bare      bool          // /dev is the root filesystem's own
	later     []func()      // when all mounts are there
}

// Add appends the whole set-up up to a working directory of "/" inside the new root.
func Add(p *zygote.Program, plan Plan) (Built, error) {
	b := &builder{Program: p, plan: plan}
	if err := checkPaths(plan.Spec); err != nil {
		return b.out, err
	}
	b.howPath = p.Words(unix.O_PATH|unix.O_CLOEXEC, 0, resolve)
	b.howDir = p.Words(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0, resolve)
	b.root, b.dev, b.pts, b.out.Proc, b.out.Console, b.empty = b.NewSlot(), b.NewSlot(), b.NewSlot(), b.NewSlot(), b.NewSlot(), b.NewSlot()
	p.Do("umask", unix.SYS_UMASK, 0)
	if err := b.openEarly(); err != nil {
		return b.out, err
	}
	if !plan.Detached {
		p.Do("make mounts private", unix.SYS_MOUNT, 0, "/", 0, unix.MS_REC|unix.MS_PRIVATE, 0)
	}
	if err := b.mountRoot(); err != nil {
		return b.out, err
	}
	for i, m := range plan.Spec.Mounts {
		if err := b.mount(i, m); err != nil {
			return b.out, err
		}
	}
	if err := b.bareDevices(); err != nil {
		return b.out, err
	}
	for _, f := range b.later {
		f()
	}
	if err := b.console(); err != nil {
		return b.out, err
	}
	if plan.Mounted != nil {
		if err := plan.Mounted(b.out); err != nil {
			return b.out, err
		}
	}
	if err := b.beforePivot(); err != nil {
		return b.out, err
	}
	b.protect()
	if cwd := plan.Spec.Process.Cwd; cwd != "/" {
		if !path.IsAbs(cwd) {
			return b.out, fmt.Errorf("working directory %q is not absolute: %w", cwd, errdefs.ErrInvalidArgument)
		}
		done := p.Scope()
		b.target(cwd, true)
		done()
	}
	if plan.Spec.Root.Readonly {
		b.setAttr("read-only root", b.root, 0, unix.MOUNT_ATTR_RDONLY, 0)
	}
	p.Do("enter root", unix.SYS_FCHDIR, b.root)
	if plan.Detached {
		p.Do("chroot", unix.SYS_CHROOT, ".")
		return b.out, nil
	}
	p.Do("pivot_root", unix.SYS_PIVOT_ROOT, ".", ".")
	p.Do("detach old root", unix.SYS_UMOUNT2, ".", unix.MNT_DETACH)
	p.Do("chdir /", unix.SYS_CHDIR, "/")
	b.propagateRoot()
	return b.out, nil
}

// checkPaths refuses paths that no kernel takes before work is spent on them: each directory of a path is a step.
func checkPaths(s *specs.Spec) error {
	tooLong := func(what, p string) error {
		if len(p) < unix.PathMax {
			return nil
		}
		return fmt.Errorf("%s %.64q… has %d bytes, %d are allowed: %w", what, p, len(p), unix.PathMax-1, errdefs.ErrInvalidArgument)
	}
	if err := tooLong("working directory", s.Process.Cwd); err != nil {
		return err
	}
	for _, m := range s.Mounts {
		if err := tooLong("mount on", m.Destination); err != nil {
			return err
		}
	}
	return nil
}

// setAttr changes mount attributes of a handle.
func (b *builder) setAttr(name string, fd zygote.Slot, flags int, set, clr uint64) {
	b.Do(name, unix.SYS_MOUNT_SETATTR, fd, "", unix.AT_EMPTY_PATH|flags, b.Words(set, clr, 0, 0), 32)
}

// clean is a path relative to the root, "." for the root itself.
func clean(p string) string {
	if p = strings.TrimPrefix(path.Clean("/"+p), "/"); p == "" {
		return "."
	}
	return p
}

// target resolves dst inside the root and makes it, directory or empty file, when it is missing.
func (b *builder) target(dst string, dir bool) zygote.Slot {
	dst = clean(dst)
	t := b.NewSlot()
	found := b.TryInto(t, "open "+dst, unix.SYS_OPENAT2, b.root, dst, b.howPath, 24)
	parts := strings.Split(dst, "/")
	parent := b.root
	for i, name := range parts {
		sub := strings.Join(parts[:i+1], "/")
		if i == len(parts)-1 && !dir {
			b.Try("create "+sub, unix.SYS_MKNODAT, parent, name, unix.S_IFREG|0o644, 0)
		} else {
			b.Try("mkdir "+sub, unix.SYS_MKDIRAT, parent, name, 0o755)
		}
		next := t
		if i < len(parts)-1 {
			next = b.NewSlot()
		}
		if i == len(parts)-1 && !dir {
			there := b.TryInto(next, "open "+sub, unix.SYS_OPENAT2, b.root, sub, b.howPath, 24)
			b.mend(sub, parent, name)
			b.GetInto(next, "open "+sub, unix.SYS_OPENAT2, b.root, sub, b.howPath, 24)
			b.SkipOnSuccess(there)
			break
		}
		b.GetInto(next, "open "+sub, unix.SYS_OPENAT2, b.root, sub, b.howPath, 24)
		parent = next
	}
	b.SkipOnSuccess(found)
	return t
}

// mend makes a file where the image has a link to nothing: what the link names, or, for the files that every container gets, a file in its
// place, since what it names may be in a directory that is not there (an image made for systemd has such an /etc/resolv.conf).
func (b *builder) mend(sub string, parent zygote.Slot, name string) {
	switch sub {
	case "etc/hosts", "etc/hostname", "etc/resolv.conf":
		b.Try("remove link "+sub, unix.SYS_UNLINKAT, parent, name, 0)
		b.Try("create "+sub, unix.SYS_MKNODAT, parent, name, unix.S_IFREG|0o644, 0)
		return
	}
	made := b.NewSlot()
	how := b.Words(unix.O_CREAT|unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0o644, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
	i := b.TryInto(made, "create "+sub, unix.SYS_OPENAT2, b.root, sub, how, 24)
	b.Do("close", unix.SYS_CLOSE, made)
	b.SkipOnError(i)
}

func (b *builder) mount(index int, m specs.Mount) error {
	defer b.Scope()()
	o, err := parseOptions(m.Options)
	if err != nil {
		return fmt.Errorf("mount %s: %w", m.Destination, err)
	}
	if !path.IsAbs(m.Destination) {
		return fmt.Errorf("mount %q: the destination is not absolute: %w", m.Destination, errdefs.ErrInvalidArgument)
	}
	if err := checkProc(m, m.Type == "bind" || o.bind); err != nil {
		return err
	}
	if m.Type == "bind" || o.bind {
		return b.bind(index, m, o)
	}
	switch m.Type {
	case "cgroup", "cgroup2":
		return b.cgroups(m, o)
	case "proc", "sysfs", "tmpfs", "devpts", "mqueue", "overlay", "ramfs":
	case "":
		return fmt.Errorf("mount %s: neither a type nor the option bind: %w", m.Destination, errdefs.ErrInvalidArgument)
	default:
		if b.plan.AnyMount {
			break
		}
		return fmt.Errorf("mount %s: filesystem type %q is not offered: mount it on the host and bind it: %w", m.Destination, m.Type, errdefs.ErrInvalidArgument)
	}
	o.set = o.set&^o.recClr | o.recSet // nothing is below a new filesystem
	// The slots of handles that are used later must outlive this mount's scope; they are reserved by mountRoot.
	fd := b.NewSlot()
	switch dst := clean(m.Destination); {
	case dst == "dev" && m.Type == "tmpfs":
		fd, b.hasDev = b.dev, true
	case m.Type == "devpts" && dst == "dev/pts":
		fd, b.hasPTS = b.pts, true
	case m.Type == "proc" && dst == "proc":
		fd, b.out.HasProc = b.out.Proc, true
	}
	if o.copyUp {
		return b.copyUp(fd, m, o)
	}
	if s, made := b.plan.Shared[index]; made {
		t := b.target(m.Destination, true)
		b.Do("mount "+m.Type+" on "+m.Destination, unix.SYS_MOVE_MOUNT, s, "", t, "", moveFlags)
		return nil
	}
	b.newFS(fd, m.Type, m.Source, o)
	b.propagate(fd, m.Destination, o)
	if fd == b.dev && !b.plan.BindDevices {
		if err := b.devices(); err != nil {
			return err
		}
	}
	t := b.target(m.Destination, true)
	b.Do("mount "+m.Type+" on "+m.Destination, unix.SYS_MOVE_MOUNT, fd, "", t, "", moveFlags)
	if fd == b.dev && b.plan.BindDevices {
		return b.devices()
	}
	return nil
}

// newFS makes a detached mount of a new filesystem.
func (b *builder) newFS(fd zygote.Slot, typ, source string, o options) {
	f := b.Get("fsopen "+typ, unix.SYS_FSOPEN, typ, unix.FSOPEN_CLOEXEC)
	if source != "" && (typ == "overlay" || b.plan.AnyMount) {
		b.Do("fsconfig source", unix.SYS_FSCONFIG, f, unix.FSCONFIG_SET_STRING, "source", source, 0)
	}
	for _, kv := range o.data {
		if kv.flag {
			b.Do("fsconfig "+typ+" "+kv.key, unix.SYS_FSCONFIG, f, unix.FSCONFIG_SET_FLAG, kv.key, 0, 0)
		} else {
			b.Do("fsconfig "+typ+" "+kv.key, unix.SYS_FSCONFIG, f, unix.FSCONFIG_SET_STRING, kv.key, kv.value, 0)
		}
	}
	b.Do("create "+typ, unix.SYS_FSCONFIG, f, unix.FSCONFIG_CMD_CREATE, 0, 0, 0)
	b.GetInto(fd, "fsmount "+typ, unix.SYS_FSMOUNT, f, unix.FSMOUNT_CLOEXEC, uintptr(o.set))
	b.Do("close", unix.SYS_CLOSE, f)
}

func (b *builder) bind(index int, m specs.Mount, o options) error {
	dir, err := b.sourceIsDir(index, m)
	if err != nil {
		return fmt.Errorf("bind mount on %s: source %s: %w: create it first: %w", m.Destination, m.Source, err, errdefs.ErrInvalidArgument)
	}
	if len(o.data) > 0 && !b.plan.AnyMount { // OCI runtimes let a bind mount pass with them, as the kernel does
		return fmt.Errorf("bind mount on %s: option %q does not apply to a bind mount: %w", m.Destination, o.data[0].key, errdefs.ErrInvalidArgument)
	}
	rec := 0
	if o.recursive {
		rec = unix.AT_RECURSIVE
	}
	src := b.source(index, m, rec)
	if o.idmap && b.plan.Trees == nil {
		return fmt.Errorf("bind mount on %s: option idmap is not built here: %w", m.Destination, errdefs.ErrNotImplemented)
	}
	b.propagate(src, m.Destination, o)
	b.devBound = b.devBound || clean(m.Destination) == "dev"
	if o.set|o.clr != 0 {
		b.setAttr("options of "+m.Destination, src, 0, o.set, o.clr)
	}
	if o.recSet|o.recClr != 0 {
		b.setAttr("recursive options of "+m.Destination, src, unix.AT_RECURSIVE, o.recSet, o.recClr)
	}
	t := b.target(m.Destination, dir)
	b.Do("bind "+m.Source+" on "+m.Destination, unix.SYS_MOVE_MOUNT, src, "", t, "", moveFlags)
	return nil
}

// sourceIsDir says what the target of a bind mount has to be.
func (b *builder) sourceIsDir(index int, m specs.Mount) (bool, error) {
	if _, shared := b.plan.Shared[index]; shared {
		return true, nil
	}
	if dir, known := b.plan.TreeDirs[index]; known {
		return dir, nil
	}
	st, err := os.Stat(m.Source)
	if err != nil {
		return false, err
	}
	return st.IsDir(), nil
}

// cgroups shows the container its own groups: the v2 filesystem, or a tmpfs with one bind per v1 controller.
func (b *builder) cgroups(m specs.Mount, o options) error {
	t := b.target(m.Destination, true)
	v1 := slices.ContainsFunc(b.plan.Cgroups, func(c CgroupDir) bool { return c.Controller != "" })
	if !v1 {
		for _, c := range b.plan.Cgroups {
			src := b.Get("cgroup2", unix.SYS_OPEN_TREE, unix.AT_FDCWD, c.Path, cloneTree)
			b.setAttr("cgroup2 options", src, 0, o.set, o.clr)
			b.Do("mount cgroup2 on "+m.Destination, unix.SYS_MOVE_MOUNT, src, "", t, "", moveFlags)
		}
		return nil
	}
	tmp := b.NewSlot()
	ro := o.set & unix.MOUNT_ATTR_RDONLY
	top := options{set: o.set &^ unix.MOUNT_ATTR_RDONLY}
	top.data = []option{{key: "mode", value: "755"}, {key: "size", value: "64k"}}
	b.newFS(tmp, "tmpfs", "", top)
	attach := func() { b.Do("mount cgroup tmpfs on "+m.Destination, unix.SYS_MOVE_MOUNT, tmp, "", t, "", moveFlags) }
	if b.plan.Detached { // only the top of such a tree can be protected
		defer attach()
	} else {
		attach()
	}
	for _, c := range b.plan.Cgroups {
		name := c.Controller
		if name == "" {
			name = "unified"
		}
		end := b.Scope()
		src := b.Get("cgroup "+name, unix.SYS_OPEN_TREE, unix.AT_FDCWD, c.Path, cloneTree)
		b.setAttr("cgroup options", src, 0, o.set, o.clr)
		b.Do("mkdir "+name, unix.SYS_MKDIRAT, tmp, name, 0o755)
		b.Do("mount cgroup "+name, unix.SYS_MOVE_MOUNT, src, "", tmp, name, unix.MOVE_MOUNT_F_EMPTY_PATH)
		b.Do("close", unix.SYS_CLOSE, src)
		end()
	}
	if ro != 0 {
		b.setAttr("cgroup tmpfs read-only", tmp, 0, ro, 0)
	}
	return nil
}

// within is where a path to protect is looked for: below /proc in our own filesystem, whatever an image or a volume puts in its place.
func (b *builder) within(p string) (at zygote.Slot, rel string) {
	if rel, ok := strings.CutPrefix(p, "proc/"); ok && b.out.HasProc {
		return b.out.Proc, rel
	}
	return b.root, p
}

// protect masks and write-protects paths, by objects of our own making.
func (b *builder) protect() {
	b.Set(b.empty, -1)
	for _, m := range b.plan.Spec.Linux.MaskedPaths {
		b.mask(clean(m))
	}
	for _, m := range b.plan.Spec.Linux.ReadonlyPaths {
		m = clean(m)
		end := b.Scope()
		t, n := b.NewSlot(), b.NewSlot()
		at, rel := b.within(m)
		missing := b.TryInto(t, "open "+m, unix.SYS_OPENAT2, at, rel, b.howPath, 24)
		b.GetInto(n, "clone "+m, unix.SYS_OPEN_TREE, t, "", cloneTree|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
		b.setAttr("protect "+m, n, unix.AT_RECURSIVE, unix.MOUNT_ATTR_RDONLY, 0)
		b.Do("read-only "+m, unix.SYS_MOVE_MOUNT, n, "", t, "", moveFlags)
		b.Do("close", unix.SYS_CLOSE, n)
		b.Do("close", unix.SYS_CLOSE, t)
		b.SkipOnError(missing)
		end()
	}
}

// mask covers a file by the null device and a directory by an empty read-only tmpfs, the same for all; what does not exist needs no mask.
// What it is must be known before: closing a mount that was made and not used waits for a grace period.
func (b *builder) mask(m string) {
	defer b.Scope()()
	t, n := b.NewSlot(), b.NewSlot()
	at, rel := b.within(m)
	file := b.TryInto(t, "open directory "+m, unix.SYS_OPENAT2, at, rel, b.howDir, 24)
	first := b.TryInto(n, "clone empty", unix.SYS_OPEN_TREE, b.empty, "", cloneTree|unix.AT_EMPTY_PATH)
	b.Do("mask directory "+m, unix.SYS_MOVE_MOUNT, n, "", t, "", moveFlags)
	made := b.Do("close", unix.SYS_CLOSE, n)
	b.SkipOnError(first)
	std := uint64(unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC)
	b.newFS(b.empty, "tmpfs", "", options{set: std, data: []option{{key: "size", value: "4k"}}})
	b.Do("mask directory "+m, unix.SYS_MOVE_MOUNT, b.empty, "", t, "", moveFlags)
	b.SkipOnSuccess(made)
	directory := b.Do("close", unix.SYS_CLOSE, t)
	b.SkipOnError(file)
	missing := b.TryInto(t, "open "+m, unix.SYS_OPENAT2, at, rel, b.howPath, 24)
	if b.hasDev {
		b.GetInto(n, "null", unix.SYS_OPEN_TREE, b.dev, "null", cloneTree)
	} else {
		b.GetInto(n, "null", unix.SYS_OPEN_TREE, unix.AT_FDCWD, "/dev/null", cloneTree)
		b.setAttr("null read-only", n, 0, unix.MOUNT_ATTR_RDONLY, 0)
	}
	b.Do("mask file "+m, unix.SYS_MOVE_MOUNT, n, "", t, "", moveFlags)
	b.Do("close", unix.SYS_CLOSE, n)
	b.Do("close", unix.SYS_CLOSE, t)
	b.SkipOnError(missing)
	b.SkipOnSuccess(directory)
}
