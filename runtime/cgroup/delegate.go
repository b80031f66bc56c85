package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// wanted are the v2 controllers that containers get when the host has them.
func wanted() []string { return []string{"cpuset", "cpu", "io", "memory", "pids", "hugetlb"} }

// words are the fields of a small file, none when it cannot be read.
func words(elem ...string) []string {
	b, err := read(filepath.Join(elem...))
	if err != nil {
		return nil
	}
	return strings.Fields(string(b))
}

// levels are the v2 directories from the root down to parent.
func (h *Host) levels(parent string) []string {
	dirs := []string{h.v2}
	for _, part := range strings.Split(strings.Trim(parent, "/"), "/") {
		dirs = append(dirs, filepath.Join(dirs[len(dirs)-1], part))
	}
	return dirs
}

// delegate passes the v2 controllers on from the root down to the children of parent. What some level does not give is left out and no
// error: only a container that asks for the limit is refused, with the reason as it is then, see missing. Processes in parent itself, a
// service's own ones, are moved to its node leaf when the parent is our own; those of groups above are not ours to move.
func (h *Host) delegate(parent string, own bool) {
	dirs := h.levels(parent)
	last := dirs[len(dirs)-1]
	on := words(last, "cgroup.subtree_control")
	if !slices.ContainsFunc(wanted(), func(c string) bool { return h.controllers[c] && !slices.Contains(on, c) }) {
		return
	}
	for _, dir := range dirs {
		has, on := words(dir, "cgroup.controllers"), words(dir, "cgroup.subtree_control")
		if dir == last && own && dir != h.v2 {
			moveToLeaf(dir)
		}
		// Some controllers can be turned on over processes, but that makes the group the root of a threaded subtree, whose other groups
		// take no processes. Only the real root, which has no type, is exempt.
		if _, err := os.Stat(filepath.Join(dir, "cgroup.type")); err == nil && len(words(dir, "cgroup.procs")) > 0 {
			continue
		}
		for _, c := range wanted() {
			if slices.Contains(has, c) && !slices.Contains(on, c) {
				_ = write(dir, "cgroup.subtree_control", "+"+c)
			}
		}
	}
}

// moveToLeaf moves the processes of a group to its node leaf, again while they fork: a group that passes controllers on may hold none.
// What cannot be moved stays.
func moveToLeaf(dir string) {
	leaf := filepath.Join(dir, nodeLeaf)
	for range removeTries {
		pids := words(dir, "cgroup.procs")
		if len(pids) == 0 || slices.Contains(pids, "0") { // 0 is of another pid namespace
			return
		}
		if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return
		}
		for _, pid := range pids {
			if err := write(leaf, "cgroup.procs", pid); err != nil && !errors.Is(err, unix.ESRCH) {
				return
			}
		}
	}
}

// missing says why a limit cannot be enforced.
func (g *Group) missing(controller, limit string) error {
	if !g.host.controllers[controller] {
		return fmt.Errorf("%s limit: this host has no %s cgroup controller: enable it in the kernel's command line: %w", limit, controller, errdefs.ErrFailedPrecondition)
	}
	why := "the group was made without it"
	for _, dir := range g.host.levels(filepath.Dir(g.name)) {
		if slices.Contains(words(dir, "cgroup.subtree_control"), controller) {
			continue
		}
		why = dir + " does not pass it on"
		if len(words(dir, "cgroup.procs")) > 0 {
			why += " because it holds processes"
		}
		break
	}
	return fmt.Errorf("%s limit: cgroup %s has no %s controller, %s: delegate it to the node (systemd: Delegate=yes) or choose another cgroup parent: %w",
		limit, g.name, controller, why, errdefs.ErrFailedPrecondition)
}
