package control

import (
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"
)

const maxMounts = 500

var volumeName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{1,127}$`)

func validateMounts(a at, c *swarm.ContainerSpec) error {
	a = a.field("Mounts")
	if len(c.Mounts) > maxMounts {
		return a.bad(c.Mounts, "at most %d mounts are possible", maxMounts)
	}
	targets := map[string]bool{}
	for i, m := range c.Mounts {
		a := a.index(i)
		if !path.IsAbs(m.Target) || path.Clean(m.Target) == "/" {
			return a.field("Target").bad(m.Target, "ContainerSpec: invalid mount target, must be an absolute path below /")
		}
		if targets[path.Clean(m.Target)] {
			return a.field("Target").bad(m.Target, "ContainerSpec: duplicate mount point: %s", m.Target)
		}
		targets[path.Clean(m.Target)] = true
		if err := validateMount(a, m); err != nil {
			return err
		}
	}
	return nil
}

func validateMount(a at, m mount.Mount) error {
	switch m.Type {
	case mount.TypeBind, mount.TypeVolume, mount.TypeTmpfs:
	case mount.TypeCluster, mount.TypeImage, mount.TypeNamedPipe:
		return a.field("Type").unbuilt(m.Type, "mounts of this type (bind, volume and tmpfs are)")
	default:
		return a.field("Type").bad(m.Type, "invalid mount type: want bind, volume or tmpfs")
	}
	switch m.Consistency {
	case "", mount.ConsistencyFull, mount.ConsistencyCached, mount.ConsistencyDelegated, mount.ConsistencyDefault:
	default:
		return a.field("Consistency").bad(m.Consistency, "want default, consistent, cached or delegated")
	}
	for _, x := range []struct {
		set   bool
		typ   mount.Type
		field string
	}{{m.BindOptions != nil, mount.TypeBind, "BindOptions"}, {m.VolumeOptions != nil, mount.TypeVolume, "VolumeOptions"}, {m.TmpfsOptions != nil, mount.TypeTmpfs, "TmpfsOptions"},
		{m.ImageOptions != nil, mount.TypeImage, "ImageOptions"}, {m.ClusterOptions != nil, mount.TypeCluster, "ClusterOptions"}} {
		if x.set && m.Type != x.typ {
			return a.field(x.field).bad(struct{}{}, "must not be specified for a mount of type %q: it is for the type %q", m.Type, x.typ)
		}
	}
	switch m.Type {
	case mount.TypeBind:
		return validateBind(a, m)
	case mount.TypeVolume:
		return validateVolume(a, m)
	}
	return validateTmpfs(a, m)
}

func validateBind(a at, m mount.Mount) error {
	if m.Source == "" {
		return a.field("Source").missing("invalid bind mount source, source must not be empty")
	}
	if !path.IsAbs(m.Source) && !strings.Contains(m.Source, "{{") {
		return a.field("Source").bad(m.Source, "invalid bind mount source, must be an absolute path")
	}
	o := m.BindOptions
	if o == nil {
		return nil
	}
	a = a.field("BindOptions")
	switch {
	case o.Propagation != "" && !slices.Contains(mount.Propagations, o.Propagation):
		return a.field("Propagation").bad(o.Propagation, "invalid propagation mode: want rprivate, private, rshared, shared, rslave or slave")
	case o.ReadOnlyNonRecursive && !m.ReadOnly:
		return a.field("ReadOnlyNonRecursive").bad(true, "it needs ReadOnly")
	case o.ReadOnlyForceRecursive && !m.ReadOnly:
		return a.field("ReadOnlyForceRecursive").bad(true, "it needs ReadOnly")
	case o.ReadOnlyForceRecursive && (o.ReadOnlyNonRecursive || o.NonRecursive):
		return a.field("ReadOnlyForceRecursive").bad(true, "it excludes ReadOnlyNonRecursive and NonRecursive")
	case o.ReadOnlyForceRecursive && o.Propagation != "" && o.Propagation != mount.PropagationRPrivate:
		return a.field("ReadOnlyForceRecursive").bad(true, "it needs the propagation rprivate, not %s", o.Propagation)
	}
	return nil
}

func validateVolume(a at, m mount.Mount) error {
	if path.IsAbs(m.Source) {
		return a.field("Source").bad(m.Source, "invalid volume mount source, must not be an absolute path: a volume has a name; use the type bind for a path")
	}
	if m.Source != "" && !strings.Contains(m.Source, "{{") && !volumeName.MatchString(m.Source) {
		return a.field("Source").bad(m.Source, "invalid volume name: want 2 to 128 letters, digits, _ . - and a letter or digit first")
	}
	o := m.VolumeOptions
	if o == nil {
		return nil
	}
	a = a.field("VolumeOptions")
	if o.Subpath != "" && m.Source == "" {
		return a.field("Subpath").bad(o.Subpath, "an anonymous volume has no path within: name the volume in Source")
	}
	if o.Subpath != "" && !filepath.IsLocal(o.Subpath) {
		return a.field("Subpath").bad(o.Subpath, "must be a relative path within the volume")
	}
	if d := o.DriverConfig; d != nil {
		if d.Name != "" && d.Name != "local" {
			return a.field("DriverConfig.Name").unbuilt(d.Name, "volume drivers other than local")
		}
		if len(d.Options) > 0 {
			return a.field("DriverConfig.Options").unbuilt(d.Options, "options of the local volume driver")
		}
	}
	return validateLabels(a.field("Labels"), o.Labels)
}

func validateTmpfs(a at, m mount.Mount) error {
	if m.Source != "" {
		return a.field("Source").bad(m.Source, "invalid tmpfs source, source must be empty")
	}
	o := m.TmpfsOptions
	if o == nil {
		return nil
	}
	a = a.field("TmpfsOptions")
	if o.SizeBytes < 0 {
		return a.field("SizeBytes").bad(o.SizeBytes, "must not be negative: want a size in bytes, or 0 for no limit")
	}
	if o.Mode&^0o7777 != 0 {
		return a.field("Mode").bad(uint32(o.Mode), "want 0 to 4095 (07777)")
	}
	for i, kv := range o.Options {
		a := a.field("Options").index(i)
		if len(kv) != 1 && len(kv) != 2 {
			return a.bad(kv, "want a flag, or a name and a value")
		}
		if !tmpfsOption(kv) {
			return a.bad(strings.Join(kv, "="), "invalid tmpfs option: want one of %s, or uid, gid, nr_inodes, nr_blocks with a number", strings.Join(tmpfsFlags(), ", "))
		}
	}
	return nil
}

// tmpfsFlags are the kernel's options of a tmpfs without a value, those that containers may have.
func tmpfsFlags() []string {
	return []string{"ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync", "noatime", "diratime",
		"nodiratime", "relatime", "strictatime", "private", "rprivate", "noswap"}
}

var tmpfsValue = regexp.MustCompile(`^((size|nr_blocks|nr_inodes)=[0-9]+[kKmMgG%]?|mode=[01]?[0-7]{1,4}|[ug]id=[0-9]{1,10}|mpol=[a-z=:0-9-]+)$`)

func tmpfsOption(kv []string) bool {
	if len(kv) == 1 && slices.Contains(tmpfsFlags(), kv[0]) {
		return true
	}
	return tmpfsValue.MatchString(strings.Join(kv, "="))
}
