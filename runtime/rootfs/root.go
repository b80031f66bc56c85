package rootfs

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/runtime"
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
	if b.plan.Detached {
		b.setPropagation("make the root private", b.root, unix.MS_PRIVATE, true)
		return
	}
	b.Do("mount root on "+dst, unix.SYS_MOVE_MOUNT, b.root, "", unix.AT_FDCWD, dst, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// overlay mounts layers by fsconfig where every value fits, otherwise by mount(2) relative to the layers' common directory.
func (b *builder) overlay(m runtime.Mount, o options, dst string) error {
	fits := true
	var list []option
	for _, kv := range o.data {
		if kv.key == "lowerdir" && b.plan.LowerdirAppend {
			for _, l := range strings.Split(kv.value, ":") {
				list = append(list, option{key: "lowerdir+", value: l})
				fits = fits && len(l) <= maxValue
			}
			continue
		}
		list = append(list, kv)
		fits = fits && len(kv.value) <= maxValue
	}
	if fits {
		defer b.Scope()()
		o.data = list
		source := m.Source
		if source == "" {
			source = "overlay"
		}
		o.set &^= unix.MOUNT_ATTR_RDONLY // mount points are still to be made; Root.Readonly protects at the end
		b.newFS(b.root, "overlay", source, o)
		b.attachRoot(dst)
		return nil
	}
	return b.overlayByMount(o, dst)
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
