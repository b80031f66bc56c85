package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/volume"

	"skein/agent/dockerapi"
	"skein/agent/volumes"
	"skein/runtime"
)

// volumeMount is a volume of a container.
type volumeMount struct {
	Name      string
	Target    string
	ReadOnly  bool   `json:",omitempty"`
	NoCopy    bool   `json:",omitempty"`
	Anonymous bool   `json:",omitempty"` // made for this container
	Subpath   string `json:",omitempty"`
	labels    map[string]string
}

// checkVolumeMount refuses what the local driver does not know.
func checkVolumeMount(m mount.Mount) error {
	if m.Source != "" {
		if err := volumes.CheckName(m.Source); err != nil {
			return err
		}
	}
	o := m.VolumeOptions
	if o == nil {
		return nil
	}
	if o.Subpath != "" && m.Source == "" {
		return invalid("invalid mount config for type \"volume\": must not set Subpath when using anonymous volumes")
	}
	if o.Subpath != "" && !filepath.IsLocal(o.Subpath) {
		return invalid("invalid mount config for type \"volume\": subpath must be a relative path within the volume")
	}
	if d := o.DriverConfig; d != nil {
		return checkVolumeDriver(d.Name, d.Options)
	}
	return nil
}

func checkVolumeDriver(driver string, opts map[string]string) error {
	if driver != "" && driver != "local" {
		return notFound("error looking up volume plugin %s: plugin \"%s\" not found", driver, driver)
	}
	for k := range opts {
		return notBuilt("option %q of the local volume driver is not supported by this version of skein", k)
	}
	return nil
}

// wishedVolumes lists the volumes of a container to be made: named in binds and mounts, anonymous ones, those of other containers, those its
// image declares. Two mounts on one target are refused; one of the container's own takes the place of another's, which is dropped from in.
func wishedVolumes(r record, in *inheritance) ([]volumeMount, error) {
	taken := map[string]bool{}
	claim := func(target string) error {
		target = path.Clean(target)
		if taken[target] {
			return invalid("Duplicate mount point: %s", target)
		}
		taken[target] = true
		return nil
	}
	var out []volumeMount
	add := func(m mount.Mount) error {
		if err := claim(m.Target); err != nil || m.Type != mount.TypeVolume {
			return err
		}
		v := volumeMount{Name: m.Source, Target: m.Target, ReadOnly: m.ReadOnly, Anonymous: m.Source == ""}
		if m.VolumeOptions != nil {
			v.NoCopy, v.labels, v.Subpath = m.VolumeOptions.NoCopy, m.VolumeOptions.Labels, m.VolumeOptions.Subpath
		}
		out = append(out, v)
		return nil
	}
	for _, b := range r.HostConfig.Binds {
		m, err := parseBind(b)
		if err == nil {
			err = add(m)
		}
		if err != nil {
			return nil, err
		}
	}
	for _, m := range r.HostConfig.Mounts {
		if err := add(m); err != nil {
			return nil, err
		}
	}
	for target := range r.HostConfig.Tmpfs {
		if err := claim(target); err != nil {
			return nil, err
		}
	}
	for target := range taken {
		in.drop(target)
	}
	out = append(out, in.volumes...)
	for _, v := range in.volumes {
		taken[path.Clean(v.Target)] = true
	}
	for _, m := range in.binds {
		taken[path.Clean(m.Target)] = true
	}
	for _, target := range sortedKeys(r.Config.Volumes) {
		if taken[path.Clean(target)] {
			continue // a mount of the user's takes the place of an image's volume
		}
		m := mount.Mount{Type: mount.TypeVolume, Target: target}
		if err := checkMount(m); err != nil {
			return nil, err
		}
		if err := add(m); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// registerWithVolumes makes the container's volumes and the container visible, in one step as far as removals of volumes go.
func (e *Engine) registerWithVolumes(c *entry) error {
	e.volumeUse.Lock()
	defer e.volumeUse.Unlock()
	in, err := e.inherit(c.rec.HostConfig)
	if err != nil {
		return err
	}
	list, err := wishedVolumes(c.rec, &in)
	if err != nil {
		return err
	}
	for i := range list {
		v := &list[i]
		if v.Name == "" {
			v.Name = newContainerID()
		}
		made, created, err := e.volumes.Create(v.Name, v.labels, v.Anonymous)
		if err != nil {
			e.dropAnonymousLocked(record{Volumes: list[:i]})
			return err
		}
		if created {
			e.emitVolume(made.Name, events.ActionCreate)
		}
	}
	c.rec.Volumes, c.rec.Inherited = list, in.binds
	if err := e.register(c); err != nil {
		e.dropAnonymousLocked(c.rec)
		return err
	}
	return nil
}

// dropAnonymous removes the volumes that were made for the container only.
func (e *Engine) dropAnonymous(r record) {
	e.volumeUse.Lock()
	defer e.volumeUse.Unlock()
	e.dropAnonymousLocked(r)
}

func (e *Engine) dropAnonymousLocked(r record) {
	for _, v := range r.Volumes {
		if !v.Anonymous || v.Name == "" || len(e.volumeUsers(v.Name)) > 0 {
			continue
		}
		if err := e.volumes.Remove(v.Name); err != nil {
			if !cerrdefs.IsNotFound(err) {
				e.log.Error("remove an anonymous volume", "volume", v.Name, "container", r.Name, "err", err)
			}
			continue
		}
		e.emitVolume(v.Name, events.ActionDestroy)
	}
}

// volumeUsers are the containers that have the volume, running or not.
func (e *Engine) volumeUsers(name string) []record {
	var out []record
	for _, c := range e.all() {
		r := c.snapshot()
		if slices.ContainsFunc(r.Volumes, func(v volumeMount) bool { return v.Name == name }) {
			out = append(out, r)
		}
	}
	return out
}

// populateVolumes copies what the image has at a volume's target into a volume that is empty and that nobody has mounted.
func (e *Engine) populateVolumes(r record, rootfs []runtime.Mount) error {
	if len(r.Volumes) == 0 {
		return nil
	}
	e.volumeUse.Lock()
	defer e.volumeUse.Unlock()
	var root *os.File
	for _, v := range r.Volumes {
		empty, err := e.volumes.Empty(v.Name)
		if err != nil {
			return err
		}
		inUse := slices.ContainsFunc(e.volumeUsers(v.Name), func(o record) bool { return o.ID != r.ID && !o.State.Clean })
		if v.NoCopy || v.Subpath != "" || !empty || inUse {
			continue
		}
		if root == nil {
			if root, err = openImage(rootfs); err != nil {
				return fmt.Errorf("volume %s: open the image: %w", v.Name, err)
			}
			defer root.Close()
		}
		if err := e.populate(v, root); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) populate(v volumeMount, root *os.File) error {
	src, err := openIn(root, v.Target, os.O_RDONLY|openDirectory)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, errNotDirectory) {
		return nil // nothing to copy
	}
	if err != nil {
		return fmt.Errorf("volume %s: open %s of the image: %w", v.Name, v.Target, err)
	}
	defer src.Close()
	return e.volumes.Populate(v.Name, src)
}

func (e *Engine) emitVolume(name string, action events.Action) {
	e.events.publish(events.Message{Type: events.VolumeEventType, Action: action, Actor: events.Actor{ID: name, Attributes: map[string]string{"driver": "local"}}})
}

const anonymousLabel = "com.docker.volume.anonymous"

func (e *Engine) apiVolume(v volumes.Volume) volume.Volume {
	out := volume.Volume{
		Name: v.Name, Driver: "local", Scope: "local", Mountpoint: e.volumes.Path(v.Name), CreatedAt: v.Created.Format(time.RFC3339), Labels: v.Labels,
	}
	if v.Anonymous {
		out.Labels = map[string]string{anonymousLabel: ""}
	}
	return out
}

// VolumeCreate makes a local volume, or finds it.
func (e *Engine) VolumeCreate(_ context.Context, req volume.CreateRequest) (volume.Volume, error) {
	if req.ClusterVolumeSpec != nil {
		return volume.Volume{}, notBuilt("cluster volumes are not supported by this version of skein")
	}
	if err := checkVolumeDriver(req.Driver, req.DriverOpts); err != nil {
		return volume.Volume{}, err
	}
	anonymous := req.Name == ""
	if anonymous {
		req.Name = newContainerID()
	}
	v, created, err := e.volumes.Create(req.Name, req.Labels, anonymous)
	if err != nil {
		return volume.Volume{}, err
	}
	if created {
		e.emitVolume(v.Name, events.ActionCreate)
	}
	return e.apiVolume(v), nil
}

// VolumeInspect describes one volume.
func (e *Engine) VolumeInspect(_ context.Context, name string) (volume.Volume, error) {
	v, err := e.volumes.Get(name)
	if err != nil {
		return volume.Volume{}, notFound("get %s: no such volume", name)
	}
	return e.apiVolume(v), nil
}

// VolumeList lists volumes.
func (e *Engine) VolumeList(_ context.Context, f dockerapi.Filters) ([]volume.Volume, error) {
	out := []volume.Volume{}
	for _, v := range e.volumes.List() {
		ok, err := e.volumeMatches(e.apiVolume(v), f)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, e.apiVolume(v))
		}
	}
	return out, nil
}

func (e *Engine) volumeMatches(v volume.Volume, f dockerapi.Filters) (bool, error) {
	for key, values := range f {
		ok := false
		for _, w := range values {
			switch key {
			case "name":
				ok = ok || strings.Contains(v.Name, w)
			case "driver":
				ok = ok || w == v.Driver
			case "label":
				ok = ok || labelMatches(v.Labels, w)
			case "dangling":
				if !slices.Contains([]string{"true", "false", "1", "0"}, w) {
					return false, invalid("invalid filter 'dangling=%s'", w)
				}
				ok = ok || (w == "true" || w == "1") == (len(e.volumeUsers(v.Name)) == 0)
			default:
				return false, invalid("invalid filter '%s'", key)
			}
		}
		if !ok {
			return false, nil
		}
	}
	return true, nil
}

// VolumeRemove deletes a volume that no container has. force forgives one that is not there.
func (e *Engine) VolumeRemove(_ context.Context, name string, force bool) error {
	e.volumeUse.Lock()
	defer e.volumeUse.Unlock()
	if users := e.volumeUsers(name); len(users) > 0 {
		ids := make([]string, len(users))
		for i, r := range users {
			ids[i] = r.ID
		}
		return conflict("remove %s: volume is in use - [%s]", name, strings.Join(ids, ", "))
	}
	err := e.volumes.Remove(name)
	if cerrdefs.IsNotFound(err) {
		if force {
			return nil
		}
		return notFound("get %s: no such volume", name)
	}
	if err != nil {
		return err
	}
	e.emitVolume(name, events.ActionDestroy)
	return nil
}

// VolumesPrune removes unused anonymous volumes, with the filter all also named ones.
func (e *Engine) VolumesPrune(ctx context.Context, f dockerapi.Filters) (volume.PruneReport, error) {
	all := false
	for key, values := range f {
		switch key {
		case "all":
			all = slices.Contains(values, "true") || slices.Contains(values, "1")
		case "label", "label!":
		default:
			return volume.PruneReport{}, invalid("invalid filter '%s'", key)
		}
	}
	p, err := pruneFilters(f)
	if err != nil {
		return volume.PruneReport{}, err
	}
	rep := volume.PruneReport{VolumesDeleted: []string{}}
	for _, v := range e.volumes.List() {
		if !all && !v.Anonymous || p.keeps(e.apiVolume(v).Labels, time.Time{}) {
			continue
		}
		size := e.volumes.Size(v.Name)
		if err := e.VolumeRemove(ctx, v.Name, true); err != nil {
			if cerrdefs.IsConflict(err) {
				continue
			}
			return rep, err
		}
		rep.VolumesDeleted = append(rep.VolumesDeleted, v.Name)
		rep.SpaceReclaimed += uint64(size)
	}
	return rep, nil
}
