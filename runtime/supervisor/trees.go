package supervisor

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
	"skein/runtime/handle"
	"skein/runtime/rootfs"
	"skein/runtime/sandbox"
)

// openTrees makes the mounts that the container's process cannot make itself: what lies below a source, for the way there is another
// container's to change, so that it is gone once, by handle, and only the result is mounted; and for a container in a user namespace all
// binds, since its user may not go where they are. The descriptors are the caller's to close, also after an error.
func (c *container) openTrees() (trees []sandbox.Tree, fds []int, err error) {
	spec := c.cfg.Spec
	inUser := sandbox.InUser(spec)
	for i, m := range spec.Mounts {
		sub, isSub := c.cfg.Subpaths[m.Destination]
		bind := m.Type == "bind" && !strings.HasPrefix(m.Source, runtime.ContainerPath)
		if !isSub && (!inUser || !bind) {
			continue
		}
		fd, dir, err := openSubpath(m.Source, sub, isSub || slices.Contains(m.Options, "rbind"))
		if err != nil {
			return trees, fds, fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		trees, fds = append(trees, sandbox.Tree{Mount: i, Dir: dir}), append(fds, fd)
		if inUser && slices.Contains(m.Options, "idmap") {
			user, err := c.userNamespace()
			if err == nil {
				err = rootfs.MapTree(fd, user, m.Source)
			}
			if err != nil {
				return trees, fds, fmt.Errorf("mount %s: %w", m.Destination, err)
			}
		}
	}
	return trees, fds, nil
}

// openSubpath clones the mounts at a path below a source, which no link leads out of; an empty path is the source itself.
func openSubpath(source, sub string, recursive bool) (fd int, dir bool, err error) {
	base, err := unix.Open(source, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, false, fmt.Errorf("source %s: %w: create it first: %w", source, err, errdefs.ErrInvalidArgument)
	}
	defer unix.Close(base)
	at := base
	if sub != "" {
		if at, err = openBeneath(base, sub); err != nil {
			return -1, false, fmt.Errorf("cannot access path %s/%s: %w: %w", source, sub, err, errdefs.ErrInvalidArgument)
		}
		defer unix.Close(at)
	}
	var st unix.Stat_t
	if err := unix.Fstat(at, &st); err != nil {
		return -1, false, fmt.Errorf("cannot access path %s/%s: %w", source, sub, err)
	}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	if fd, err = unix.OpenTree(at, "", flags); err != nil {
		return -1, false, fmt.Errorf("clone %s/%s: %w", source, sub, err)
	}
	return fd, st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}

func openBeneath(base int, sub string) (int, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS}
	at, err := handle.Open(base, sub, &how)
	if errors.Is(err, unix.EXDEV) {
		err = errors.New("it leads out of the volume")
	}
	return at, err
}

// openGroup names the container's groups: below the supervisor's parent, or below one that others may use too.
func (c *container) openGroup() (err error) {
	if p := c.cfg.CgroupParent; p != "" {
		c.group, err = c.srv.cgroups.OpenPath(path.Join(p, c.id))
	} else {
		c.group, err = c.srv.cgroups.Open(c.srv.cfg.Cgroup, c.id)
	}
	return err
}

// makeGroup makes them.
func (c *container) makeGroup(r *specs.LinuxResources) (err error) {
	if c.cfg.CgroupParent == "" {
		c.group, err = c.srv.groups.Create(c.id, r)
		return err
	}
	if err := c.openGroup(); err != nil {
		return err
	}
	_, err = c.group.Make(r)
	return err
}
