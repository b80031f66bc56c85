package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// OpenPath names the groups at an absolute path of every hierarchy without touching them.
func (h *Host) OpenPath(name string) (*Group, error) {
	if err := checkParent(name); err != nil {
		return nil, fmt.Errorf("cgroupsPath: %w", err)
	}
	g := &Group{host: h, name: name, foreign: true}
	seen := map[string]bool{}
	for _, c := range v1Controllers() {
		if m, ok := h.v1[c]; ok && !seen[m] {
			seen[m] = true
			g.v1 = append(g.v1, Dir{c, filepath.Join(m, name)})
		}
	}
	if h.v2 != "" {
		g.v2 = filepath.Join(h.v2, name)
	}
	return g, nil
}

// Make creates the groups where they are missing and sets their limits. What was made, in the order of making, is for Unmake; groups
// that existed before are not in it.
func (g *Group) Make(r *specs.LinuxResources) (made []string, err error) {
	for _, d := range g.Dirs() {
		for p := d.Path; ; p = filepath.Dir(p) {
			if _, err := os.Stat(p); err == nil || len(p) <= len(strings.TrimSuffix(d.Path, g.name)) {
				break
			}
			made = append(made, p)
		}
	}
	if err := g.make(); err != nil {
		return made, err
	}
	if err := g.Update(r); err != nil {
		return made, err
	}
	if r == nil {
		return made, nil
	}
	return made, g.devices(r.Devices)
}

// SetDevices replaces the list of allowed devices; what is open stays open.
func (g *Group) SetDevices(rules []specs.LinuxDeviceCgroup) error {
	return g.devices(append([]specs.LinuxDeviceCgroup{{Access: "rwm"}}, rules...))
}

// Unmake removes what Make made; a group that others use meanwhile stays, with its parents.
func Unmake(made []string) error {
	var errs []error
	kept := ""
	for i, p := range made {
		if kept != "" && strings.HasPrefix(kept, p+"/") {
			continue
		}
		if i == 0 || !strings.HasPrefix(made[i-1], p+"/") {
			if err := removeDir(p); err != nil {
				errs, kept = append(errs, err), p
			}
			continue
		}
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			kept = p // shared with another container
		}
	}
	return errors.Join(errs...)
}

// Processes are the processes of the group and of the groups below it.
func (g *Group) Processes() ([]int, error) {
	dirs := g.Dirs()
	if len(dirs) == 0 {
		return nil, fmt.Errorf("no cgroup: %w", errdefs.ErrFailedPrecondition)
	}
	var out []int
	err := filepath.WalkDir(dirs[len(dirs)-1].Path, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return ignoreGone(err)
		}
		b, err := os.ReadFile(p)
		for _, f := range bytes.Fields(b) {
			if n, err := strconv.Atoi(string(f)); err == nil && n > 0 {
				out = append(out, n)
			}
		}
		return ignoreGone(err)
	})
	return out, err
}
