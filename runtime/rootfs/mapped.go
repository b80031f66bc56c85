package rootfs

import (
	"errors"
	"fmt"
	"path"
	goruntime "runtime"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/zygote"
)

// MapTree shows a detached mount through the maps of a user namespace: what is 0 on disk is the namespace's 0.
func MapTree(fd, user int, source string) error {
	a := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(user)}
	err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &a)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("show %s through the maps of a user namespace: its filesystem cannot: keep the state on ext4, xfs or btrfs, or run the container "+
			"in the host's user namespace: %w: %w", source, err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("show %s through the maps of a user namespace: %w", source, err)
	}
	return nil
}

// MountMapped makes the root filesystem of a container in a user namespace, attached nowhere: an overlay whose layers are seen through the
// namespace's maps, so that the layers on disk are the same for all containers.
//
// The overlay works on its layers with the rights of who makes it, whose own numbers have to be among those of the maps: root is the
// namespace's root outside. Use a thread of its own, see asUser.
func MountMapped(mounts []runtime.Mount, user int, root [2]uint32, lowerdirAppend bool) (int, error) {
	if len(mounts) != 1 {
		return -1, fmt.Errorf("root filesystem of %d mounts: only one is built yet: %w", len(mounts), errdefs.ErrNotImplemented)
	}
	m := mounts[0]
	o, err := parseOptions(m.Options)
	switch {
	case err != nil:
		return -1, fmt.Errorf("root filesystem: %w", err)
	case m.Type == "bind" || o.bind:
		return mappedDir(m.Source, user)
	case m.Type != "overlay":
		return -1, fmt.Errorf("root filesystem of type %q: overlay and bind are offered: %w", m.Type, errdefs.ErrInvalidArgument)
	case !lowerdirAppend:
		return -1, fmt.Errorf("layers seen through the maps of a user namespace need Linux 6.15 or newer: run the container in the host's user namespace: %w", errdefs.ErrFailedPrecondition)
	}
	f, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, failure("fsopen overlay", err)
	}
	defer unix.Close(f)
	l := layers{fs: f, user: user, dirs: map[string]int{}}
	defer l.close()
	for _, kv := range o.data {
		if err := l.set(kv); err != nil {
			return -1, err
		}
	}
	if err := asUser(root, func() error { return unix.FsconfigCreate(f) }); err != nil {
		return -1, failure("create overlay", err)
	}
	fd, err := unix.Fsmount(f, unix.FSMOUNT_CLOEXEC, int(o.set&^unix.MOUNT_ATTR_RDONLY))
	if err != nil {
		return -1, failure("fsmount overlay", err)
	}
	return fd, nil
}

// asUser calls f with the numbers of a user for files, on a thread that is given up afterwards, and with all its capabilities, which the
// change of the number takes.
func asUser(id [2]uint32, f func() error) error {
	done := make(chan error, 1)
	go func() {
		goruntime.LockOSThread() // for good: the thread ends with this function
		h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		err := unix.Capget(&h, &caps[0])
		if err == nil {
			_, err = unix.SetfsgidRetGid(int(id[1]))
		}
		if err == nil {
			_, err = unix.SetfsuidRetUid(int(id[0]))
		}
		if err == nil {
			err = unix.Capset(&h, &caps[0])
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// layers are the mapped directories of one overlay.
type layers struct {
	fs, user int
	dirs     map[string]int
}

func (l *layers) close() {
	for _, fd := range l.dirs {
		unix.Close(fd)
	}
}

// dir is the handle of a mapped directory; upper and work directory need to be on one mount and share their parent's.
func (l *layers) dir(name string) (int, error) {
	if fd, ok := l.dirs[name]; ok {
		return fd, nil
	}
	fd, err := mappedDir(name, l.user)
	if err == nil {
		l.dirs[name] = fd
	}
	return fd, err
}

func (l *layers) set(kv option) error {
	var err error
	switch kv.key {
	case "lowerdir":
		for _, name := range strings.Split(kv.value, ":") {
			fd, err := l.dir(name)
			if err != nil {
				return err
			}
			if err := unix.FsconfigSetString(l.fs, "lowerdir+", fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil {
				return failure("fsconfig overlay lowerdir+", err)
			}
		}
		return nil
	case "upperdir", "workdir":
		fd, err := l.dir(path.Dir(kv.value))
		if err != nil {
			return err
		}
		err = unix.FsconfigSetString(l.fs, kv.key, fmt.Sprintf("/proc/self/fd/%d/%s", fd, path.Base(kv.value)))
		if err != nil {
			return failure("fsconfig overlay "+kv.key, err)
		}
		return nil
	}
	if kv.flag {
		err = unix.FsconfigSetFlag(l.fs, kv.key)
	} else {
		err = unix.FsconfigSetString(l.fs, kv.key, kv.value)
	}
	if err != nil {
		return failure("fsconfig overlay "+kv.key, err)
	}
	return nil
}

func mappedDir(name string, user int) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("clone %s: %w", name, err)
	}
	if err := MapTree(fd, user, name); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// MakeSysfs makes a sysfs of the caller's network namespace, for Plan.Shared: only who has rights over that namespace can.
func MakeSysfs(p *zygote.Program, to zygote.Slot, m specs.Mount) {
	defer p.Scope()()
	o, err := parseOptions(m.Options)
	if err != nil || len(o.data) > 0 {
		return // refused by Add
	}
	f := p.Get("fsopen sysfs", unix.SYS_FSOPEN, "sysfs", unix.FSOPEN_CLOEXEC)
	p.Do("create sysfs", unix.SYS_FSCONFIG, f, unix.FSCONFIG_CMD_CREATE, 0, 0, 0)
	p.GetInto(to, "fsmount sysfs", unix.SYS_FSMOUNT, f, unix.FSMOUNT_CLOEXEC, uintptr(o.set))
	p.Do("close", unix.SYS_CLOSE, f)
}
