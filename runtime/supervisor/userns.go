package supervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/rootfs"
	"skein/runtime/zygote"
)

// maxUsers bounds the user namespaces that are kept for mounts.
const maxUsers = 16

// hostID is the host's number of one of the container's.
func hostID(id uint32, maps []specs.LinuxIDMapping) (uint32, bool) {
	for _, m := range maps {
		if id >= m.ContainerID && id-m.ContainerID < m.Size {
			return m.HostID + id - m.ContainerID, true
		}
	}
	return id, len(maps) == 0
}

// hostUID is the host's number of one of the container's users; of one that has none, the container's root's.
func (c *container) hostUID(uid uint32) uint32 {
	maps := c.maps().UIDMappings
	if id, ok := hostID(uid, maps); ok {
		return id
	}
	id, _ := hostID(0, maps)
	return id
}

// maps are the container's: its own, or those of the container whose user namespace it joins.
func (c *container) maps() *specs.Linux {
	l := c.cfg.Spec.Linux
	for _, n := range l.Namespaces {
		if n.Type != specs.UserNamespace || n.Path == "" {
			continue
		}
		if o, err := c.donor(n.Path); err == nil && o != c {
			o.mu.Lock()
			defer o.mu.Unlock()
			return o.cfg.Spec.Linux
		}
	}
	return l
}

// giveMaps writes the maps of a process's new user namespace and lets it go on.
func (c *container) giveMaps(pid int, start *pendingStart) error {
	if err := writeMaps(pid, c.cfg.Spec.Linux); err != nil {
		return err
	}
	start.child.Next()
	return openGate(start)
}

// writeMaps says which of the host's IDs a process's user namespace has. The process is a child that was not waited for: its number is its own.
func writeMaps(pid int, l *specs.Linux) error {
	for _, m := range []struct {
		file string
		list []specs.LinuxIDMapping
	}{{"uid_map", l.UIDMappings}, {"gid_map", l.GIDMappings}} {
		var b strings.Builder
		for _, x := range m.list {
			fmt.Fprintf(&b, "%d %d %d\n", x.ContainerID, x.HostID, x.Size)
		}
		err := os.WriteFile("/proc/"+strconv.Itoa(pid)+"/"+m.file, []byte(b.String()), 0)
		if errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("user namespace: the kernel refuses the %s %q: %w: %w", m.file, b.String(), err, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return fmt.Errorf("user namespace: %w", err)
		}
	}
	return nil
}

// mappedRoot makes the root filesystem of a container in a user namespace.
func (c *container) mappedRoot() (int, error) {
	user, err := c.userNamespace()
	if err != nil {
		return -1, err
	}
	l := c.maps()
	uid, ok := hostID(0, l.UIDMappings)
	gid, ok2 := hostID(0, l.GIDMappings)
	if !ok || !ok2 {
		return -1, fmt.Errorf("user namespace: its maps have no root: %w", errdefs.ErrInvalidArgument)
	}
	return rootfs.MountMapped(c.cfg.Rootfs, user, [2]uint32{uid, gid}, c.srv.host.LowerdirAppend)
}

// userNamespace is a user namespace with the container's maps that no container is in: mounts refer to its maps only.
func (c *container) userNamespace() (int, error) {
	l := c.maps()
	key, err := json.Marshal([][]specs.LinuxIDMapping{l.UIDMappings, l.GIDMappings})
	if err != nil {
		return -1, err
	}
	s := c.srv
	s.userMu.Lock()
	defer s.userMu.Unlock()
	if f := s.users[string(key)]; f != nil {
		return int(f.Fd()), nil
	}
	if len(s.users) >= maxUsers {
		return -1, fmt.Errorf("user namespaces with %d different maps: use fewer: %w", maxUsers, errdefs.ErrResourceExhausted)
	}
	f, err := s.makeUser(l)
	if err != nil {
		return -1, fmt.Errorf("make a user namespace: %w", err)
	}
	if s.users == nil {
		s.users = map[string]*os.File{}
	}
	s.users[string(key)] = f
	return int(f.Fd()), nil
}

// makeUser makes a user namespace by a process that ends at once.
func (s *server) makeUser(l *specs.Linux) (*os.File, error) {
	prog, err := s.pool.Program()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	defer prog.Release()
	var gate [2]int
	if err := unix.Pipe2(gate[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	defer closeFDs(gate[:])
	prog.Enter()
	prog.Gate(zygote.FileFD(3))
	prog.Exit(0)
	deadline := time.Now().Add(setupLimit)
	child, err := s.zygote.Spawn(zygote.Request{Program: prog, Flags: unix.CLONE_NEWUSER, Files: []int{gate[0], gate[0], gate[0], gate[0]}, Cgroup: -1}, deadline)
	if err != nil {
		return nil, err
	}
	s.orphans.add(child.PID)
	defer func() {
		_ = unix.Kill(child.PID, unix.SIGKILL)
		reap(child.PID)
		s.orphans.remove(child.PID)
		child.Close()
	}()
	if err := child.Ready(deadline); err != nil {
		return nil, err
	}
	if err := writeMaps(child.PID, l); err != nil {
		return nil, err
	}
	fd, err := unix.Open("/proc/"+strconv.Itoa(child.PID)+"/ns/user", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "user namespace"), nil
}
