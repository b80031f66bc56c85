package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// roots are the directories of parent in every hierarchy.
func (h *Host) roots(parent string) []string {
	var out []string
	seen := map[string]bool{}
	for _, c := range v1Controllers() {
		if m, ok := h.v1[c]; ok && !seen[m] {
			seen[m] = true
			out = append(out, filepath.Join(m, parent))
		}
	}
	if h.v2 != "" {
		out = append(out, filepath.Join(h.v2, parent))
	}
	return out
}

func probeParent(parent string) (*Host, error) {
	if err := checkParent(parent); err != nil {
		return nil, err
	}
	return Probe()
}

// Join puts a process, with all its threads and future children, into the subtree of parent in every hierarchy.
func Join(parent string, pid int) error {
	h, err := probeParent(parent)
	if err != nil {
		return err
	}
	g := &Group{host: h, name: filepath.Join(parent, nodeLeaf)}
	for _, c := range v1Controllers() {
		if m, ok := h.v1[c]; ok {
			g.v1 = append(g.v1, Dir{c, filepath.Join(m, g.name)})
		}
	}
	if h.v2 != "" {
		g.v2 = filepath.Join(h.v2, g.name)
	}
	for _, d := range g.Dirs() {
		if d.Controller == "cpuset" {
			err = mkdirCpuset(h.v1["cpuset"], g.name)
		} else {
			err = os.MkdirAll(d.Path, 0o755)
		}
		if err == nil {
			err = write(d.Path, "cgroup.procs", strconv.Itoa(pid))
		}
		if err != nil {
			return fmt.Errorf("put process %d into cgroup %s: %w", pid, d.Path, err)
		}
	}
	return nil
}

// Weigh gives the subtree of a group its share of the processor against its neighbours, in the unit of v1: 2 to 262144, 1024 unless told.
// It makes the group if need be. A host that has no cpu controller there answers an error.
func Weigh(name string, shares uint64) error {
	h, err := probeParent(name)
	if err != nil {
		return err
	}
	g := &Group{host: h, name: name, foreign: true}
	if mount, ok := h.v1["cpu"]; ok {
		g.v1 = []Dir{{"cpu", filepath.Join(mount, name)}}
	} else {
		g.v2 = filepath.Join(h.v2, name)
	}
	for _, d := range g.Dirs() {
		if err := os.MkdirAll(d.Path, 0o755); err != nil {
			return fmt.Errorf("weigh cgroup %s: %w", name, err)
		}
	}
	if g.v2 != "" {
		h.delegate(filepath.Dir(name), false)
	}
	return g.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}})
}

// KillTree kills every process in the subtree of parent, the caller too if it is there. A subtree that does not exist is fine.
func KillTree(parent string) error {
	h, err := probeParent(parent)
	if err != nil {
		return err
	}
	if h.v2 != "" {
		err = killV2(filepath.Join(h.v2, parent))
	}
	// Processes may be in a v1 group alone, when they were put there by somebody else.
	for _, dir := range h.roots(parent) {
		err = errors.Join(err, killV1(dir))
	}
	return err
}

// RemoveTree removes all groups of the subtree in every hierarchy; its processes must be dead or dying.
func RemoveTree(parent string) error {
	h, err := probeParent(parent)
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range h.roots(parent) {
		errs = append(errs, removeDir(dir))
	}
	return errors.Join(errs...)
}

// RemoveEmpty removes a group that has neither processes nor groups below it, in every hierarchy, and leaves it otherwise.
func RemoveEmpty(parent string) error {
	h, err := probeParent(parent)
	if err != nil {
		return err
	}
	return h.removeEmpty(parent)
}

// RemoveEmptyParent is RemoveEmpty for the group's parent.
func (g *Group) RemoveEmptyParent() error { return g.host.removeEmpty(filepath.Dir(g.name)) }

func (h *Host) removeEmpty(parent string) error {
	var errs []error
	for _, dir := range h.roots(parent) {
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}
