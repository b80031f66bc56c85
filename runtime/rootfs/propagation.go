package rootfs

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/zygote"
)

// Propagation is a propagation mode as the flag of mount(2) and whether it is meant for everything below too.
func Propagation(name string) (flag uint64, recursive, ok bool) {
	switch name {
	case "private", "rprivate":
		flag = unix.MS_PRIVATE
	case "shared", "rshared":
		flag = unix.MS_SHARED
	case "slave", "rslave":
		flag = unix.MS_SLAVE
	case "unbindable", "runbindable":
		flag = unix.MS_UNBINDABLE
	default:
		return 0, false, false
	}
	return flag, name[0] == 'r', true
}

// openEarly opens what shall receive or send the host's mount events, before this namespace's mounts are cut off from them: a clone made
// now stays in the host's peer group.
func (b *builder) openEarly() error {
	if mode := b.plan.Spec.Linux.RootfsPropagation; mode != "" {
		flag, _, ok := Propagation(mode)
		if !ok {
			return fmt.Errorf("rootfsPropagation %q is unknown: %w", mode, errdefs.ErrInvalidArgument)
		}
		if flag != unix.MS_PRIVATE && len(b.plan.Rootfs) == 0 {
			b.rootProp = flag
			b.GetInto(b.root, "root "+b.plan.Spec.Root.Path, unix.SYS_OPEN_TREE, unix.AT_FDCWD, b.plan.Spec.Root.Path, cloneTree|unix.AT_RECURSIVE)
		}
	}
	for i, m := range b.plan.Spec.Mounts {
		o, err := parseOptions(m.Options)
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		if _, given := b.plan.Trees[i]; given || o.prop != unix.MS_SHARED && o.prop != unix.MS_SLAVE || m.Type != "bind" && !o.bind {
			continue
		}
		if b.early == nil {
			b.early = map[int]zygote.Slot{}
		}
		rec := 0
		if o.recursive {
			rec = unix.AT_RECURSIVE
		}
		s := b.KeptSlot()
		b.GetInto(s, "bind source "+m.Source, unix.SYS_OPEN_TREE, unix.AT_FDCWD, m.Source, cloneTree|rec)
		b.early[i] = s
	}
	return nil
}

// source is the detached tree of a bind mount.
func (b *builder) source(index int, m specs.Mount, rec int) zygote.Slot {
	if s, ok := b.early[index]; ok {
		// A second clone gets its number in the order of the config's mounts; kernels before 6.15 cannot make it.
		t := b.NewSlot()
		again := b.TryInto(t, "clone source "+m.Source, unix.SYS_OPEN_TREE, s, "", cloneTree|unix.AT_EMPTY_PATH|rec)
		b.GetInto(t, "bind source "+m.Source, unix.SYS_FCNTL, s, unix.F_DUPFD_CLOEXEC, 3)
		b.SkipOnSuccess(again)
		return t
	}
	if s, ok := b.plan.Shared[index]; ok {
		return b.Get("bind source "+m.Source, unix.SYS_FCNTL, s, unix.F_DUPFD_CLOEXEC, 3)
	}
	if fd, ok := b.plan.Trees[index]; ok {
		return b.Get("bind source "+m.Source, unix.SYS_FCNTL, fd, unix.F_DUPFD_CLOEXEC, 3)
	}
	return b.Get("bind source "+m.Source, unix.SYS_OPEN_TREE, unix.AT_FDCWD, m.Source, cloneTree|rec)
}

// propagate sets what a mount's options say; without one it is private already.
func (b *builder) propagate(fd zygote.Slot, dst string, o options) {
	if o.prop == 0 {
		return
	}
	b.setPropagation("propagation of "+dst, fd, o.prop, o.propRec)
}

func (b *builder) setPropagation(name string, fd zygote.Slot, flag uint64, recursive bool) {
	rec := 0
	if recursive {
		rec = unix.AT_RECURSIVE
	}
	b.Do(name, unix.SYS_MOUNT_SETATTR, fd, "", unix.AT_EMPTY_PATH|rec, b.Words(0, 0, flag, 0), 32)
}

// propagateRoot gives the root its mode once it is the root; pivot_root wants it, and its parent, not shared with the host before.
func (b *builder) propagateRoot() {
	if b.rootProp == 0 {
		return
	}
	_, rec, _ := Propagation(b.plan.Spec.Linux.RootfsPropagation)
	b.setPropagation("root propagation", b.root, b.rootProp, rec)
}

// copyUp mounts a tmpfs and remembers what it covers; whoever waits at BeforePivot fills it.
func (b *builder) copyUp(fd zygote.Slot, m specs.Mount, o options) error {
	if m.Type != "tmpfs" || b.plan.BeforePivot == nil {
		return fmt.Errorf("mount %s: option tmpcopyup is for tmpfs and not built here: %w", m.Destination, errdefs.ErrNotImplemented)
	}
	c := CopyUp{From: b.KeptSlot(), To: b.KeptSlot()}
	ro := o.set & unix.MOUNT_ATTR_RDONLY
	o.set &^= unix.MOUNT_ATTR_RDONLY
	b.newFS(fd, m.Type, m.Source, o)
	b.propagate(fd, m.Destination, o)
	t := b.target(m.Destination, true)
	b.GetInto(c.From, "keep "+m.Destination, unix.SYS_OPENAT, t, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	b.GetInto(c.To, "keep tmpfs of "+m.Destination, unix.SYS_OPENAT, fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	b.Do("mount tmpfs on "+m.Destination, unix.SYS_MOVE_MOUNT, fd, "", t, "", moveFlags)
	b.out.CopyUps = append(b.out.CopyUps, c)
	if ro != 0 {
		s := b.KeptSlot()
		b.GetInto(s, "keep mount "+m.Destination, unix.SYS_FCNTL, fd, unix.F_DUPFD_CLOEXEC, 3)
		b.readOnlys = append(b.readOnlys, s)
	}
	return nil
}

func (b *builder) beforePivot() error {
	if b.plan.BeforePivot != nil {
		if err := b.plan.BeforePivot(b.out); err != nil {
			return err
		}
	}
	for _, s := range b.readOnlys {
		b.setAttr("read-only tmpfs", s, 0, unix.MOUNT_ATTR_RDONLY, 0)
	}
	return nil
}
