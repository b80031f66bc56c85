package rootfs

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/zygote"
)

// maxValue is what fsconfig takes in one string; maxData what mount(2) takes for all options.
const (
	maxValue = 255
	maxData  = 4095
)

// Probe says whether this kernel's overlayfs takes layers one by one. Before 6.5 it keeps every option unread until the filesystem is
// made: a kernel that takes an option which does not exist knows nothing about layers either.
func Probe() (lowerdirAppend bool) {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.FsconfigSetString(fd, "skein-no-such-option", "/") != nil && unix.FsconfigSetString(fd, "lowerdir+", "/") == nil
}

// mountRoot mounts the root filesystem on Spec.Root.Path and keeps its handle.
func (b *builder) mountRoot() error {
	dst := b.plan.Spec.Root.Path
	if !path.IsAbs(dst) {
		return fmt.Errorf("root path %q is not absolute: %w", dst, errdefs.ErrInvalidArgument)
	}
	if len(b.plan.Rootfs) > 1 {
		return fmt.Errorf("root filesystem of %d mounts: only one is built yet: %w", len(b.plan.Rootfs), errdefs.ErrNotImplemented)
	}
	if len(b.plan.Rootfs) == 0 {
		if b.rootProp != 0 { // opened early
			b.attachRoot(dst)
			return nil
		}
		b.GetInto(b.root, "root "+dst, unix.SYS_OPEN_TREE, unix.AT_FDCWD, dst, cloneTree|unix.AT_RECURSIVE)
		b.attachRoot(dst)
		return nil
	}
	m := b.plan.Rootfs[0]
	o, err := parseOptions(m.Options)
	if err != nil {
		return fmt.Errorf("root filesystem: %w", err)
	}
	if b.plan.Root > 0 {
		b.Set(b.root, b.plan.Root)
		b.attachRoot(dst)
		return nil
	}
	if m.Type == "bind" || o.bind {
		b.GetInto(b.root, "root "+m.Source, unix.SYS_OPEN_TREE, unix.AT_FDCWD, m.Source, cloneTree|unix.AT_RECURSIVE)
		if o.set|o.clr != 0 {
			// A read-only bind may need mount points made inside: protect it at the end, through Root.Readonly.
			b.setAttr("root options", b.root, 0, o.set&^unix.MOUNT_ATTR_RDONLY, o.clr)
		}
		b.attachRoot(dst)
		return nil
	}
	if m.Type == "overlay" {
		return b.overlay(m, o, dst)
	}
	return fmt.Errorf("root filesystem of type %q: overlay and bind are offered: %w", m.Type, errdefs.ErrInvalidArgument)
}

func (b *builder) attachRoot(dst string) {
	if b.plan.AttachAt != "" {
		dst = b.plan.AttachAt
	}
	if b.plan.Detached {
		b.setPropagation("make the root private", b.root, unix.MS_PRIVATE, true)
		return
	}
	b.Do("mount root on "+dst, unix.SYS_MOVE_MOUNT, b.root, "", unix.AT_FDCWD, dst, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// overlay mounts layers by fsconfig where every value fits, otherwise by mount(2) relative to the layers' common directory.
func (b *builder) overlay(m runtime.Mount, o options, dst string) error {
	list, fits := overlayOptions(o, b.plan.LowerdirAppend)
	if !fits {
		return b.overlayByMount(o, dst)
	}
	defer b.Scope()()
	o.data = list
	o.set &^= unix.MOUNT_ATTR_RDONLY // mount points are still to be made; Root.Readonly protects at the end
	b.newFS(b.root, "overlay", overlaySource(m), o)
	b.attachRoot(dst)
	return nil
}

func overlaySource(m runtime.Mount) string {
	if m.Source == "" {
		return "overlay"
	}
	return m.Source
}

// overlayOptions are the options as fsconfig takes them; false when a value is too long for it.
func overlayOptions(o options, lowerdirAppend bool) (list []option, fits bool) {
	fits = true
	for _, kv := range o.data {
		if kv.key == "lowerdir" && lowerdirAppend {
			for _, l := range strings.Split(kv.value, ":") {
				list = append(list, option{key: "lowerdir+", value: l})
				fits = fits && len(l) <= maxValue
			}
			continue
		}
		list = append(list, kv)
		fits = fits && len(kv.value) <= maxValue
	}
	return list, fits
}

// MountRoot makes the root filesystem of a plan as a mount that is attached nowhere, for Plan.Root: making an overlay takes as long as
// all else in a container's set-up, and can be done before. -1 says that the child has to do it: nothing but an overlay is made, only
// where its options fit, and never for a container with a user namespace, whose overlay is its own.
func MountRoot(spec *specs.Spec, mounts []runtime.Mount, lowerdirAppend bool) (int, error) {
	if len(mounts) != 1 || mounts[0].Type != "overlay" || slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace }) {
		return -1, nil
	}
	o, err := parseOptions(mounts[0].Options)
	if err != nil {
		return -1, fmt.Errorf("root filesystem: %w", err)
	}
	list, fits := overlayOptions(o, lowerdirAppend)
	if !fits || o.bind {
		return -1, nil
	}
	f, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, failure("fsopen overlay", err)
	}
	defer unix.Close(f)
	if err := unix.FsconfigSetString(f, "source", overlaySource(mounts[0])); err != nil {
		return -1, failure("fsconfig source", err)
	}
	for _, kv := range list {
		if kv.flag {
			err = unix.FsconfigSetFlag(f, kv.key)
		} else {
			err = unix.FsconfigSetString(f, kv.key, kv.value)
		}
		if err != nil {
			return -1, failure("fsconfig overlay "+kv.key, err)
		}
	}
	if err := unix.FsconfigCreate(f); err != nil {
		return -1, failure("create overlay", err)
	}
	fd, err := unix.Fsmount(f, unix.FSMOUNT_CLOEXEC, int(o.set&^unix.MOUNT_ATTR_RDONLY))
	if err != nil {
		return -1, failure("fsmount overlay", err)
	}
	return fd, nil
}

// failure is an error as the child would report it.
func failure(op string, err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return &zygote.Failure{Op: op, Errno: errno}
	}
	return fmt.Errorf("%s: %w", op, err)
}

func (b *builder) overlayByMount(o options, dst string) error {
	var dirs []string
	for _, kv := range o.data {
		if kv.key == "lowerdir" || kv.key == "upperdir" || kv.key == "workdir" {
			dirs = append(dirs, strings.Split(kv.value, ":")...)
		}
	}
	base := commonDir(dirs)
	var data []string
	for _, kv := range o.data {
		switch {
		case kv.flag:
			data = append(data, kv.key)
		case kv.key == "lowerdir" || kv.key == "upperdir" || kv.key == "workdir":
			parts := strings.Split(kv.value, ":")
			for i, p := range parts {
				parts[i] = strings.TrimPrefix(p, base+"/")
			}
			data = append(data, kv.key+"="+strings.Join(parts, ":"))
		default:
			data = append(data, kv.key+"="+kv.value)
		}
	}
	all := strings.Join(data, ",")
	if len(all) > maxData {
		return fmt.Errorf("root filesystem: %d layers need %d bytes of mount options, this kernel takes %d: use an image of fewer layers: %w",
			len(dirs)-2, len(all), maxData, errdefs.ErrInvalidArgument)
	}
	if base == "" {
		base = "/"
	}
	b.Do("chdir "+base, unix.SYS_CHDIR, base)
	b.Do("mount overlay on "+dst, unix.SYS_MOUNT, "overlay", dst, "overlay", uintptr(o.mountFlags()), all)
	b.GetInto(b.root, "open "+dst, unix.SYS_OPEN_TREE, unix.AT_FDCWD, dst, unix.OPEN_TREE_CLOEXEC)
	return nil
}

// commonDir is the longest directory that holds all paths, empty for the root.
func commonDir(paths []string) string {
	if len(paths) == 0 {
		return ""
	}
	base := path.Dir(paths[0])
	for _, p := range paths[1:] {
		for base != "/" && base != "." && !strings.HasPrefix(p, base+"/") {
			base = path.Dir(base)
		}
	}
	if base == "/" || base == "." {
		return ""
	}
	return base
}
