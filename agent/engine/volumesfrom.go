package engine

import (
	"path"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
)

// inheritance is what --volumes-from brings: the binds and volumes of other containers.
type inheritance struct {
	binds   []mount.Mount
	volumes []volumeMount
}

// parseVolumesFrom reads CONTAINER[:MODE].
func parseVolumesFrom(s string) (ref string, readOnly bool, err error) {
	ref, mode, hasMode := strings.Cut(s, ":")
	if ref == "" || hasMode && mode == "" {
		return "", false, invalid("invalid volumes-from specification: '%s'", s)
	}
	for _, m := range strings.Split(mode, ",") {
		switch m {
		case "ro":
			readOnly = true
		case "", "rw", "z", "Z": // labels there are none
		default:
			return "", false, invalid("invalid mode for volumes-from: %s", mode)
		}
	}
	return ref, readOnly, nil
}

// inherit collects the mounts of the containers named; of two for one target the later counts.
func (e *Engine) inherit(hc *container.HostConfig) (inheritance, error) {
	var in inheritance
	for _, s := range hc.VolumesFrom {
		ref, readOnly, err := parseVolumesFrom(s)
		if err != nil {
			return in, err
		}
		c, err := e.find(ref)
		if err != nil {
			return in, err
		}
		r := c.snapshot()
		binds, err := bindsOf(r)
		if err != nil {
			return in, err
		}
		for _, m := range binds {
			m.ReadOnly = m.ReadOnly || readOnly
			in.drop(m.Target)
			in.binds = append(in.binds, m)
		}
		for _, v := range r.Volumes {
			v.ReadOnly = v.ReadOnly || readOnly
			in.drop(v.Target)
			in.volumes = append(in.volumes, v)
		}
	}
	return in, nil
}

// drop forgets what is mounted on target.
func (in *inheritance) drop(target string) {
	in.binds = slices.DeleteFunc(in.binds, func(m mount.Mount) bool { return path.Clean(m.Target) == path.Clean(target) })
	in.volumes = slices.DeleteFunc(in.volumes, func(v volumeMount) bool { return path.Clean(v.Target) == path.Clean(target) })
}

// bindsOf lists a container's binds, inherited ones too.
func bindsOf(r record) ([]mount.Mount, error) {
	var out []mount.Mount
	for _, b := range r.HostConfig.Binds {
		m, err := parseBind(b)
		if err != nil {
			return nil, err
		}
		if m.Type == mount.TypeBind {
			out = append(out, m)
		}
	}
	for _, m := range r.HostConfig.Mounts {
		if m.Type == mount.TypeBind {
			out = append(out, m)
		}
	}
	return append(out, r.Inherited...), nil
}
