package rootfs

import (
	"strings"

	"golang.org/x/sys/unix"
)

// options are the parsed options of one mount.
type options struct {
	bind, recursive bool
	set, clr        uint64 // MOUNT_ATTR_… of the mount itself
	recSet, recClr  uint64 // of the mount and everything below
	data            []option
	prop            uint64 // propagation, MS_SHARED …; 0 private
	propRec         bool
	idmap           bool // through a user namespace's maps: the caller prepares the tree, see Plan.Trees
	copyUp          bool // a tmpfs that starts with what it covers
}

type option struct {
	key, value string
	flag       bool
}

type attr struct {
	set, clr uint64
}

func attrOf(name string) (attr, bool) {
	switch name {
	case "ro":
		return attr{set: unix.MOUNT_ATTR_RDONLY}, true
	case "rw":
		return attr{clr: unix.MOUNT_ATTR_RDONLY}, true
	case "nosuid":
		return attr{set: unix.MOUNT_ATTR_NOSUID}, true
	case "suid":
		return attr{clr: unix.MOUNT_ATTR_NOSUID}, true
	case "nodev":
		return attr{set: unix.MOUNT_ATTR_NODEV}, true
	case "dev":
		return attr{clr: unix.MOUNT_ATTR_NODEV}, true
	case "noexec":
		return attr{set: unix.MOUNT_ATTR_NOEXEC}, true
	case "exec":
		return attr{clr: unix.MOUNT_ATTR_NOEXEC}, true
	case "nosymfollow":
		return attr{set: unix.MOUNT_ATTR_NOSYMFOLLOW}, true
	case "noatime":
		return attr{set: unix.MOUNT_ATTR_NOATIME, clr: unix.MOUNT_ATTR__ATIME}, true
	case "strictatime":
		return attr{set: unix.MOUNT_ATTR_STRICTATIME, clr: unix.MOUNT_ATTR__ATIME}, true
	case "symfollow":
		return attr{clr: unix.MOUNT_ATTR_NOSYMFOLLOW}, true
	case "relatime", "atime", "norelatime", "nostrictatime": // what kernels do unless told otherwise
		return attr{clr: unix.MOUNT_ATTR__ATIME}, true
	case "nodiratime":
		return attr{set: unix.MOUNT_ATTR_NODIRATIME}, true
	case "diratime":
		return attr{clr: unix.MOUNT_ATTR_NODIRATIME}, true
	}
	return attr{}, false
}

// parseOptions splits mount options into attributes and data for the filesystem.
func parseOptions(list []string) (options, error) {
	var o options
	for _, s := range list {
		switch s {
		case "", "defaults", "async", "nolazytime", "nomand", "noiversion", "loud", "silent":
			continue // how a mount is made anyway; the kernel logs nothing about one that is made by handle
		case "tmpcopyup":
			o.copyUp = true
			continue
		case "bind":
			o.bind = true
			continue
		case "rbind":
			o.bind, o.recursive = true, true
			continue
		case "idmap", "ridmap":
			o.idmap = true
			continue
		}
		if p, rec, ok := Propagation(s); ok {
			if p == unix.MS_PRIVATE {
				p, rec = 0, false
			}
			o.prop, o.propRec = p, rec
			continue
		}
		if a, ok := attrOf(s); ok {
			o.set, o.clr = o.set&^a.clr|a.set, o.clr&^a.set|a.clr
			continue
		}
		if a, ok := attrOf(strings.TrimPrefix(s, "r")); ok && s != "relatime" && strings.HasPrefix(s, "r") {
			o.recSet, o.recClr = o.recSet&^a.clr|a.set, o.recClr&^a.set|a.clr
			continue
		}
		k, v, kv := strings.Cut(s, "=")
		o.data = append(o.data, option{key: k, value: v, flag: !kv})
	}
	return o, nil
}

// mountFlags are the attributes in the words of mount(2).
func (o options) mountFlags() uint64 {
	var f uint64
	for a, m := range map[uint64]uint64{
		unix.MOUNT_ATTR_NOSUID: unix.MS_NOSUID, unix.MOUNT_ATTR_NODEV: unix.MS_NODEV, unix.MOUNT_ATTR_NOEXEC: unix.MS_NOEXEC,
		unix.MOUNT_ATTR_NOATIME: unix.MS_NOATIME, unix.MOUNT_ATTR_NODIRATIME: unix.MS_NODIRATIME,
	} {
		if o.set&a != 0 {
			f |= m
		}
	}
	return f
}
