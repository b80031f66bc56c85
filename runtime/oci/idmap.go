package oci

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/zygote"
)

// writeMaps says which IDs of the host a process's new user namespace has.
func writeMaps(pid int, uids, gids []specs.LinuxIDMapping) error {
	for _, m := range []struct {
		file string
		list []specs.LinuxIDMapping
	}{{"uid_map", uids}, {"gid_map", gids}} {
		var b strings.Builder
		for _, l := range m.list {
			fmt.Fprintf(&b, "%d %d %d\n", l.ContainerID, l.HostID, l.Size)
		}
		if err := os.WriteFile(filepath.Join("/proc", strconv.Itoa(pid), m.file), []byte(b.String()), 0); err != nil {
			return fmt.Errorf("linux.%s: %w", map[string]string{"uid_map": "uidMappings", "gid_map": "gidMappings"}[m.file], err)
		}
	}
	return nil
}

// mapped says whether a mount is to be seen through a map of IDs.
func mapped(s *specs.Spec, m specs.Mount) bool {
	return len(m.UIDMappings)+len(m.GIDMappings) > 0 || slices.Contains(m.Options, "idmap") || slices.Contains(m.Options, "ridmap")
}

// mapsOf are a mount's own maps or else those of the container's user namespace.
func mapsOf(s *specs.Spec, m specs.Mount) (uids, gids []specs.LinuxIDMapping) {
	if len(m.UIDMappings)+len(m.GIDMappings) > 0 {
		return m.UIDMappings, m.GIDMappings
	}
	return s.Linux.UIDMappings, s.Linux.GIDMappings
}

// mappedTree is a detached, id-mapped clone of a bind mount's source. It is made here since a container's own user namespace may not.
func mappedTree(s *specs.Spec, m specs.Mount) (int, error) {
	uids, gids := mapsOf(s, m)
	user, err := userNamespace(uids, gids)
	if err != nil {
		return -1, err
	}
	defer unix.Close(user)
	clone, attr := uint(0), uint(0)
	if m.Type == "rbind" || slices.Contains(m.Options, "rbind") {
		clone = unix.AT_RECURSIVE
	}
	if slices.Contains(m.Options, "ridmap") {
		attr = unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, m.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|clone)
	if err != nil {
		return -1, fmt.Errorf("clone %s: %w", m.Source, err)
	}
	a := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(user)}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|attr, &a); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("id-map %s: its filesystem may not offer that: %w", m.Source, err)
	}
	return fd, nil
}

// userNamespace is one with the maps, held by a descriptor only.
func userNamespace(uids, gids []specs.LinuxIDMapping) (int, error) {
	pool, err := zygote.NewPool(1)
	if err != nil {
		return -1, err
	}
	p, err := pool.Program()
	if err != nil {
		return -1, err
	}
	d := p.EnterDirect(4)
	p.Enter()
	p.Gate(zygote.FileFD(3))
	p.Exit(0)
	defer d.Close()
	var gate [2]int
	if err := unix.Pipe2(gate[:], unix.O_CLOEXEC); err != nil {
		return -1, err
	}
	defer closeFDs(gate[:])
	r, w, err := replyPipe()
	if err != nil {
		return -1, err
	}
	err = d.Launch([]int{0, 1, 2, gate[0]}, r, w, unix.CLONE_NEWUSER, -1)
	unix.Close(w)
	if err != nil {
		return -1, err
	}
	defer func() {
		_ = unix.Kill(d.PID, unix.SIGKILL)
		reap(d.PID)
	}()
	if err := d.Await(time.Now().Add(setupLimit)); err != nil {
		return -1, err
	}
	if err := writeMaps(d.PID, uids, gids); err != nil {
		return -1, err
	}
	return unix.Open("/proc/"+strconv.Itoa(d.PID)+"/ns/user", unix.O_RDONLY|unix.O_CLOEXEC, 0)
}

// replyPipe is for a child whose end this process sees itself.
func replyPipe() (r, w int, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return -1, -1, err
	}
	if err := unix.SetNonblock(p[0], true); err != nil {
		closeFDs(p[:])
		return -1, -1, err
	}
	return p[0], p[1], nil
}
