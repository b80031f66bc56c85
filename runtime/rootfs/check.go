package rootfs

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// CheckMount refuses a mount whose type or options this kernel does not know; the error names the field. Nothing is mounted: filesystems
// that are always there are looked at only when an option is not a usual one, others are asked.
func CheckMount(m specs.Mount) error {
	o, err := parseOptions(m.Options)
	if err != nil {
		return fmt.Errorf("options: %w", err)
	}
	bind := m.Type == "bind" || o.bind
	switch {
	case clean(m.Destination) == ".":
		return fmt.Errorf("destination: %q is the root filesystem itself: set root.path: %w", m.Destination, errdefs.ErrInvalidArgument)
	case strings.IndexByte(m.Destination, 0) >= 0:
		return fmt.Errorf("destination: %q contains a zero byte: %w", m.Destination, errdefs.ErrInvalidArgument)
	case o.copyUp && (bind || m.Type != "tmpfs"):
		return fmt.Errorf("options: tmpcopyup is for tmpfs, not for %s: %w", m.Type, errdefs.ErrInvalidArgument)
	case o.idmap && !bind:
		return fmt.Errorf("options: idmap is for bind mounts, not for %s: %w", m.Type, errdefs.ErrNotImplemented)
	case bind || m.Type == "cgroup" || m.Type == "cgroup2":
		return nil
	}
	usual := slices.Contains([]string{"proc", "sysfs", "tmpfs", "devpts", "mqueue"}, m.Type)
	for _, kv := range o.data {
		usual = usual && plain(m.Type, kv)
	}
	if usual {
		return nil
	}
	return ask(m.Type, o)
}

// plain options are those of nearly every config, in a form that is certainly right.
func plain(typ string, kv option) bool {
	if kv.flag {
		return typ == "devpts" && kv.key == "newinstance"
	}
	digits := strings.Trim(kv.value, "0123456789") == "" && kv.value != "" && len(kv.value) < 10
	octal := digits && strings.Trim(kv.value, "01234567") == "" && len(kv.value) < 5
	switch typ + " " + kv.key {
	case "tmpfs mode", "devpts mode", "devpts ptmxmode":
		return octal
	case "tmpfs uid", "tmpfs gid", "devpts gid", "devpts uid", "tmpfs size":
		return digits
	}
	return false
}

// ask gives type and options to the kernel without making a filesystem.
func ask(typ string, o options) error {
	fd, err := unix.Fsopen(typ, unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("type: this kernel knows no filesystem %q: %w", typ, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("type: filesystem %q: %w", typ, err)
	}
	defer unix.Close(fd)
	for _, kv := range o.data {
		if kv.flag {
			err = unix.FsconfigSetFlag(fd, kv.key)
		} else {
			err = unix.FsconfigSetString(fd, kv.key, kv.value)
		}
		if err != nil {
			return fmt.Errorf("options: %s does not take %q: %w: %w", typ, strings.TrimSuffix(kv.key+"="+kv.value, "="), err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
