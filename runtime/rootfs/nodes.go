package rootfs

import (
	"path"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/zygote"
)

// makeNode makes one device node in a directory that is held by handle. In a user namespace the host's node of the same path is bound
// over an empty file instead; named pipes can be made there too.
func (b *builder) makeNode(dir zygote.Slot, rel string, d specs.LinuxDevice, mode uint32) {
	dev := uintptr(unix.Mkdev(uint32(d.Major), uint32(d.Minor)))
	switch {
	case b.plan.BindDevices && d.Type != "p":
		end := b.Scope()
		src := b.Get("bind source "+d.Path, unix.SYS_OPEN_TREE, unix.AT_FDCWD, d.Path, cloneTree)
		b.Try("create "+d.Path, unix.SYS_MKNODAT, dir, rel, unix.S_IFREG|0o600, 0)
		t := b.Get("open "+d.Path, unix.SYS_OPENAT2, dir, rel, b.howBeneath(), 24)
		b.Do("bind "+d.Path, unix.SYS_MOVE_MOUNT, src, "", t, "", moveFlags)
		b.Do("close", unix.SYS_CLOSE, src)
		b.Do("close", unix.SYS_CLOSE, t)
		end()
	case b.bare || dir != b.dev:
		// The root filesystem may hold the node already, from an earlier run: then that one is used.
		i := b.Try("mknod "+d.Path, unix.SYS_MKNODAT, dir, rel, uintptr(mode), dev)
		end := b.Scope()
		t := b.Get("open "+d.Path, unix.SYS_OPENAT2, dir, rel, b.howBeneath(), 24)
		b.Do("close", unix.SYS_CLOSE, t)
		end()
		b.SkipOnSuccess(i)
	default:
		b.Do("mknod "+d.Path, unix.SYS_MKNODAT, dir, rel, uintptr(mode), dev)
	}
}

// howBeneath opens a name below a handle, following nothing.
func (b *builder) howBeneath() zygote.Addr {
	return b.Words(unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
}

// bareDevices makes the default nodes in the root filesystem's own /dev when the spec mounts nothing there.
func (b *builder) bareDevices() error {
	if !b.plan.AnyMount || b.hasDev || b.devBound {
		return nil
	}
	b.bare = true
	end := b.Scope()
	t := b.target("/dev", true)
	b.GetInto(b.dev, "open /dev", unix.SYS_OPENAT, t, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	end()
	return b.devices()
}

// deviceElsewhere makes a node outside /dev.
func (b *builder) deviceElsewhere(d specs.LinuxDevice) error {
	mode, err := nodeMode(d)
	if err != nil {
		return err
	}
	b.later = append(b.later, func() {
		defer b.Scope()()
		dir, name := path.Split(path.Clean(d.Path))
		t := b.target(dir, true)
		b.makeNode(t, name, d, mode)
		if uid, gid := deref(d.UID), deref(d.GID); uid != 0 || gid != 0 {
			b.Do("chown "+d.Path, unix.SYS_FCHOWNAT, t, name, uintptr(uid), uintptr(gid), unix.AT_SYMLINK_NOFOLLOW)
		}
	})
	return nil
}
