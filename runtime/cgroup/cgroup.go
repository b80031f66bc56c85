// Package cgroup makes, limits, freezes, kills and removes control groups on v1, v2 and hybrid hosts behind one type.
//
// A Group is one directory per hierarchy: each v1 controller that is mounted, and the v2 tree. Limits go to whichever hierarchy has
// the controller; killing, freezing and emptiness use the v2 tree wherever there is one, with or without controllers. Only
// directories below the parent that the caller names are touched, by absolute paths below the mount points. Used by
// runtime/supervisor, and by whoever takes a whole node down.
package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Host is this machine's hierarchies.
type Host struct {
	v1          map[string]string // controller → mount point
	v2          string            // mount point, empty without
	controllers map[string]bool   // of the v2 tree
	processes   int64             // limit of a container that has none of its own
}

// nodeLeaf holds the node's own processes: on v2 a group with controllers for its children may not hold processes itself.
const nodeLeaf = "_node"

func v1Controllers() []string {
	return []string{"cpuset", "cpu", "cpuacct", "pids", "devices", "freezer", "blkio", "hugetlb", "rdma", "net_cls", "net_prio", "memory"}
}

// Probe reads what is mounted in this mount namespace.
func Probe() (*Host, error) {
	b, err := read("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroup mounts: %w", err)
	}
	h := &Host{v1: map[string]string{}, controllers: map[string]bool{}, processes: shareOfProcesses()}
	for line := range strings.Lines(string(b)) {
		left, right, ok := strings.Cut(line, " - ")
		if !strings.HasPrefix(right, "cgroup") {
			continue
		}
		fields, fs := strings.Fields(left), strings.Fields(right)
		if !ok || len(fields) < 5 || len(fs) < 3 {
			continue
		}
		switch fs[0] {
		case "cgroup2":
			if h.v2 == "" {
				h.v2 = fields[4]
			}
		case "cgroup":
			for o := range strings.SplitSeq(fs[2], ",") {
				if slices.Contains(v1Controllers(), o) && h.v1[o] == "" {
					h.v1[o] = fields[4]
				}
			}
		}
	}
	if h.v2 == "" && len(h.v1) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted: mount cgroup2 on /sys/fs/cgroup")
	}
	if h.v2 != "" {
		b, err := read(filepath.Join(h.v2, "cgroup.controllers"))
		if err != nil {
			return nil, fmt.Errorf("read cgroup v2 controllers: %w", err)
		}
		for _, c := range strings.Fields(string(b)) {
			h.controllers[c] = true
		}
	}
	return h, nil
}

// Dir is one hierarchy's directory of a group; the controller is empty for v2.
type Dir struct{ Controller, Path string }

// Group is one container's groups.
type Group struct {
	host *Host
	name string
	v1   []Dir
	v2   string
	// foreign: the parent is somebody else's, whose processes stay where they are.
	foreign bool
}

// checkParent keeps callers from naming a hierarchy's root or leaving it.
func checkParent(parent string) error {
	if parent == "/" || parent != filepath.Clean(parent) || !filepath.IsAbs(parent) {
		return fmt.Errorf("cgroup parent %q: want an absolute path below the root, like /skein/node: %w", parent, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Open names the groups of a container below parent without touching them.
func (h *Host) Open(parent, id string) (*Group, error) {
	if err := checkParent(parent); err != nil {
		return nil, err
	}
	if id == "" || id == "." || id == ".." || id == nodeLeaf || strings.Contains(id, "/") {
		return nil, fmt.Errorf("cgroup name %q: %w", id, errdefs.ErrInvalidArgument)
	}
	g := &Group{host: h, name: filepath.Join(parent, id)}
	seen := map[string]bool{}
	for _, c := range v1Controllers() {
		// Controllers mounted together, like cpu,cpuacct, share a directory.
		if m, ok := h.v1[c]; ok && !seen[m] {
			seen[m] = true
			g.v1 = append(g.v1, Dir{c, filepath.Join(m, g.name)})
		}
	}
	if h.v2 != "" {
		g.v2 = filepath.Join(h.v2, g.name)
	}
	return g, nil
}

// Create makes the groups and sets their limits; a failure removes what was made. Resources without a word about processes give the group
// a share of what the host has, where the controller is: no fork bomb takes all. A limit of -1 is none.
func (h *Host) Create(parent, id string, r *specs.LinuxResources) (*Group, error) {
	g, err := h.Open(parent, id)
	if err != nil {
		return nil, err
	}
	if err := g.make(); err == nil {
		err = g.Update(r)
		if err == nil && (r == nil || r.Pids == nil) {
			err = g.defaultPids()
		}
		if err == nil && r != nil {
			err = g.devices(r.Devices)
		}
		if err == nil {
			return g, nil
		}
		return nil, errors.Join(err, g.Remove())
	} else {
		return nil, errors.Join(err, g.Remove())
	}
}

func (g *Group) make() error {
	for _, d := range g.v1 {
		mount := strings.TrimSuffix(d.Path, g.name)
		if d.Controller == "cpuset" {
			if err := mkdirCpuset(mount, g.name); err != nil {
				return err
			}
		} else if err := mkdir(d.Path); err != nil {
			return err
		}
	}
	if g.v2 == "" {
		return nil
	}
	if err := mkdir(g.v2); err != nil {
		return err
	}
	g.host.delegate(filepath.Dir(g.name), !g.foreign)
	return nil
}

// mkdir makes a directory whose parents nearly always exist.
func mkdir(dir string) error {
	err := unix.Mkdir(dir, 0o755)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		err = os.MkdirAll(dir, 0o755)
	} else {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	return nil
}

// mkdirCpuset makes each level usable: an empty cpuset takes no process. Where only the last one is missing, the others were made here too.
func mkdirCpuset(mount, name string) error {
	dir := filepath.Join(mount, name)
	if err := unix.Mkdir(dir, 0o755); err == nil {
		if copied, err := inheritCpuset(filepath.Dir(dir), dir); copied || err != nil {
			return err
		}
	}
	return mkdirCpusets(mount, name)
}

// inheritCpuset gives a new cpuset what its parent has; false when that is nothing.
func inheritCpuset(parent, dir string) (bool, error) {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		v, err := read(filepath.Join(parent, f))
		if err == nil && len(strings.TrimSpace(string(v))) == 0 {
			return false, nil
		}
		if err == nil {
			err = write(dir, f, string(v))
		}
		if err != nil {
			return false, fmt.Errorf("make cgroup: copy %s: %w", f, err)
		}
	}
	return true, nil
}

func mkdirCpusets(mount, name string) error {
	dir := mount
	for _, part := range strings.Split(strings.Trim(name, "/"), "/") {
		parent := dir
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make cgroup: %w", err)
		}
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			have, err := read(filepath.Join(dir, f))
			if err != nil {
				return fmt.Errorf("make cgroup: %w", err)
			}
			if strings.TrimSpace(string(have)) != "" {
				continue
			}
			v, err := read(filepath.Join(parent, f))
			if err == nil {
				err = write(dir, f, string(v))
			}
			if err != nil {
				return fmt.Errorf("make cgroup: copy %s: %w", f, err)
			}
		}
	}
	return nil
}

func write(dir, file, value string) error {
	// Plain calls: package os would make a poller of its own for each of these files.
	fd, err := unix.Open(filepath.Join(dir, file), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: filepath.Join(dir, file), Err: err}
	}
	defer unix.Close(fd)
	for {
		_, err := unix.Write(fd, []byte(value))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("set %s to %q: %w", file, value, err)
		}
		return nil
	}
}

// read is a small file, by plain calls for the same reason.
func read(file string) ([]byte, error) {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: file, Err: err}
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 1024)
	for {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, &os.PathError{Op: "read", Path: file, Err: err}
		case n == 0:
			return b, nil
		default:
			b = slices.Grow(b[:len(b)+n], 512)
		}
	}
}

// Dirs are the group's directories, v2 last.
func (g *Group) Dirs() []Dir {
	out := slices.Clone(g.v1)
	if g.v2 != "" {
		out = append(out, Dir{"", g.v2})
	}
	return out
}

// OpenTasks opens what a new process needs to be in the group: the v1 tasks files, to which a single-threaded process writes "0" (writes
// to cgroup.procs take a lock whose first use after a rest waits for a grace period), and the v2 directory to be born in, or -1.
func (g *Group) OpenTasks() (tasks []int, dir int, err error) {
	for _, d := range g.v1 {
		fd, err := unix.Open(filepath.Join(d.Path, "tasks"), unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			closeAll(tasks)
			return nil, -1, fmt.Errorf("open cgroup %s: %w", d.Path, err)
		}
		tasks = append(tasks, fd)
	}
	if g.v2 == "" {
		return tasks, -1, nil
	}
	dir, err = unix.Open(g.v2, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		closeAll(tasks)
		return nil, -1, fmt.Errorf("open cgroup %s: %w", g.v2, err)
	}
	return tasks, dir, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// dir is the directory that has the controller: v1 first, since a controller is in one hierarchy only.
func (g *Group) dir(controller string) (path string, v1, ok bool) {
	if m, has := g.host.v1[controller]; has {
		return filepath.Join(m, g.name), true, true
	}
	return g.v2, false, g.host.controllers[controller] && slices.Contains(words(g.v2, "cgroup.controllers"), controller)
}
