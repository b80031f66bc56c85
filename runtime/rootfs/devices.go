package rootfs

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// defaultDevices are the nodes every container gets.
func defaultDevices() []specs.LinuxDevice {
	mode := func(name string, major, minor int64) specs.LinuxDevice {
		return specs.LinuxDevice{Path: "/dev/" + name, Type: "c", Major: major, Minor: minor}
	}
	return []specs.LinuxDevice{mode("null", 1, 3), mode("zero", 1, 5), mode("full", 1, 7), mode("random", 1, 8), mode("urandom", 1, 9), mode("tty", 5, 0)}
}

// devices fills our /dev while it is still detached, where nobody else can reach it.
func (b *builder) devices() error {
	made := map[string]bool{}
	list := b.plan.Spec.Linux.Devices
	own := map[string]bool{}
	for _, d := range list {
		own[path.Clean(d.Path)] = true
	}
	defaults := slices.DeleteFunc(defaultDevices(), func(d specs.LinuxDevice) bool { return own[d.Path] })
	for _, d := range append(defaults, list...) {
		rel, ok := strings.CutPrefix(path.Clean(d.Path), "/dev/")
		if !ok && path.IsAbs(d.Path) {
			if err := b.deviceElsewhere(d); err != nil {
				return err
			}
			continue
		}
		if !ok {
			return fmt.Errorf("device %q: the path is not absolute: %w", d.Path, errdefs.ErrInvalidArgument)
		}
		if made[rel] {
			continue
		}
		made[rel] = true
		if err := b.device(rel, d); err != nil {
			return err
		}
	}
	for _, l := range [][2]string{{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
		{"/proc/self/fd/2", "stderr"}, {"/proc/kcore", "core"}, {"pts/ptmx", "ptmx"}} {
		switch {
		case made[l[1]]:
		case b.bare:
			b.Try("symlink /dev/"+l[1], unix.SYS_SYMLINKAT, l[0], b.dev, l[1])
		default:
			b.Do("symlink /dev/"+l[1], unix.SYS_SYMLINKAT, l[0], b.dev, l[1])
		}
	}
	return nil
}

// nodeMode is type and permissions of a device node.
func nodeMode(d specs.LinuxDevice) (uint32, error) {
	mode := uint32(0o666)
	if d.FileMode != nil {
		mode = uint32(d.FileMode.Perm())
	}
	switch d.Type {
	case "c", "u":
		mode |= unix.S_IFCHR
	case "b":
		mode |= unix.S_IFBLK
	case "p":
		mode |= unix.S_IFIFO
	default:
		return 0, fmt.Errorf("device %s has type %q, want c, b, u or p: %w", d.Path, d.Type, errdefs.ErrInvalidArgument)
	}
	return mode, nil
}

func (b *builder) device(rel string, d specs.LinuxDevice) error {
	mode, err := nodeMode(d)
	if err != nil {
		return err
	}
	for dir, i := rel, strings.IndexByte(rel, '/'); i >= 0; {
		b.Try("mkdir /dev/"+dir[:i], unix.SYS_MKDIRAT, b.dev, dir[:i], 0o755)
		next := strings.IndexByte(dir[i+1:], '/')
		if next < 0 {
			break
		}
		i += 1 + next
	}
	b.makeNode(b.dev, rel, d, mode)
	if uid, gid := deref(d.UID), deref(d.GID); uid != 0 || gid != 0 {
		b.Do("chown /dev/"+rel, unix.SYS_FCHOWNAT, b.dev, rel, uintptr(uid), uintptr(gid), unix.AT_SYMLINK_NOFOLLOW)
	}
	return nil
}

func deref(p *uint32) uint32 {
	if p == nil {
		return 0
	}
	return *p
}

// console makes a terminal in the container's own devpts: its slave becomes descriptors 0-2 and /dev/console, its master is fetched by
// the supervisor.
func (b *builder) console() error {
	if !b.plan.Spec.Process.Terminal {
		return nil
	}
	if !b.hasPTS || !b.hasDev {
		return fmt.Errorf("a terminal needs a devpts mount on /dev/pts and a tmpfs on /dev: %w", errdefs.ErrInvalidArgument)
	}
	defer b.Scope()()
	AddTerminal(b.Program, b.out.Console, func() {
		b.GetInto(b.out.Console, "open ptmx", unix.SYS_OPENAT, b.pts, "ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	}, b.plan.Spec.Process.ConsoleSize, b.plan.Spec.Process.User.UID)
	// The instance is new, so its first terminal is number 0.
	n := b.Get("clone console", unix.SYS_OPEN_TREE, b.pts, "0", cloneTree)
	b.Do("create /dev/console", unix.SYS_MKNODAT, b.dev, "console", unix.S_IFREG|0o600, 0)
	b.Do("mount /dev/console", unix.SYS_MOVE_MOUNT, n, "", b.dev, "console", unix.MOVE_MOUNT_F_EMPTY_PATH)
	return nil
}
