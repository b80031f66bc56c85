package engine

import (
	"bufio"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// checkMounts refuses mounts that no state of the host could make right.
func checkMounts(hc *container.HostConfig) error {
	if len(hc.StorageOpt) > 0 {
		return invalid("invalid --storage-opt %v: the overlay root filesystem has no quota: limit what a container writes by a tmpfs with a size",
			slices.Sorted(maps.Keys(hc.StorageOpt)))
	}
	for _, b := range hc.Binds {
		if _, err := parseBind(b); err != nil {
			return err
		}
	}
	for _, m := range hc.Mounts {
		if err := checkMount(m); err != nil {
			return err
		}
	}
	for target, opts := range hc.Tmpfs {
		if !path.IsAbs(target) {
			return invalid("invalid mount path: '%s' mount path must be absolute", target)
		}
		if path.Clean(target) == "/" {
			return invalid("invalid specification: destination can't be '/'")
		}
		if err := checkTmpfsOptions(splitOptions(opts)); err != nil {
			return err
		}
	}
	return nil
}

// checkSources refuses binds whose source is not there and shall not be made.
func checkSources(hc *container.HostConfig) error {
	for _, m := range hc.Mounts {
		if m.Type != mount.TypeBind || m.BindOptions != nil && m.BindOptions.CreateMountpoint {
			continue
		}
		if _, err := os.Stat(m.Source); err != nil {
			return missingSource(m.Source)
		}
	}
	return nil
}

func missingSource(source string) error {
	return invalid("invalid mount config for type \"bind\": bind source path does not exist: %s", source)
}

func checkMount(m mount.Mount) error {
	bad := func(format string, args ...any) error {
		return invalid("invalid mount config for type %q: %s", m.Type, fmt.Sprintf(format, args...))
	}
	if m.Target == "" {
		return bad("field Target must not be empty")
	}
	if !path.IsAbs(m.Target) {
		return bad("invalid mount path: '%s' mount path must be absolute", m.Target)
	}
	if path.Clean(m.Target) == "/" {
		return bad("invalid specification: destination can't be '/'")
	}
	for _, x := range []struct {
		set  bool
		typ  mount.Type
		name string
	}{{m.BindOptions != nil, mount.TypeBind, "BindOptions"}, {m.VolumeOptions != nil, mount.TypeVolume, "VolumeOptions"},
		{m.TmpfsOptions != nil, mount.TypeTmpfs, "TmpfsOptions"}, {m.ImageOptions != nil, mount.TypeImage, "ImageOptions"}} {
		if x.set && m.Type != x.typ {
			return bad("field %s must not be specified", x.name)
		}
	}
	switch m.Type {
	case mount.TypeBind:
		return checkBind(m, bad)
	case mount.TypeTmpfs:
		if m.Source != "" {
			return bad("field Source must not be specified")
		}
		_, err := tmpfsMount(m)
		return err
	case mount.TypeVolume:
		return checkVolumeMount(m)
	}
	return notBuilt("mounts of type %q are not supported by this version of skein: use volume, bind or tmpfs", m.Type)
}

func checkBind(m mount.Mount, bad func(format string, args ...any) error) error {
	if m.Source == "" {
		return bad("field Source must not be empty")
	}
	if !path.IsAbs(m.Source) {
		return bad("invalid mount path: '%s' mount path must be absolute", m.Source)
	}
	o := m.BindOptions
	if o == nil {
		return nil
	}
	switch {
	case o.Propagation != "" && !slices.Contains(mount.Propagations, o.Propagation):
		return bad("invalid propagation mode: %s", o.Propagation)
	case o.ReadOnlyNonRecursive && !m.ReadOnly:
		return bad("mount options conflict: ReadOnlyNonRecursive needs ReadOnly")
	case o.ReadOnlyForceRecursive && !m.ReadOnly:
		return bad("mount options conflict: ReadOnlyForceRecursive needs ReadOnly")
	case o.ReadOnlyForceRecursive && (o.ReadOnlyNonRecursive || o.NonRecursive):
		return bad("mount options conflict: ReadOnlyForceRecursive and a mount that is not recursive")
	case o.ReadOnlyForceRecursive && o.Propagation != "" && o.Propagation != mount.PropagationRPrivate:
		return bad("mount options conflict: ReadOnlyForceRecursive needs the propagation rprivate, not %s", o.Propagation)
	}
	return nil
}

// parseBind reads SRC:DST[:OPTIONS].
func parseBind(s string) (mount.Mount, error) {
	parts := strings.Split(s, ":")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" {
		return mount.Mount{}, invalid("invalid volume specification: '%s'", s)
	}
	m := mount.Mount{Type: mount.TypeBind, Source: parts[0], Target: parts[1], BindOptions: &mount.BindOptions{CreateMountpoint: true}}
	if !path.IsAbs(parts[0]) {
		m.Type, m.BindOptions, m.VolumeOptions = mount.TypeVolume, nil, &mount.VolumeOptions{}
	}
	if len(parts) == 3 {
		if err := bindMode(&m, s, parts[2]); err != nil {
			return mount.Mount{}, err
		}
	}
	return m, checkMount(m)
}

// bindMode reads the third part of a bind. One option of a kind is taken.
func bindMode(m *mount.Mount, whole, mode string) error {
	seen := map[string]bool{}
	for _, o := range strings.Split(mode, ",") {
		kind := ""
		switch o {
		case "ro", "rw":
			kind, m.ReadOnly = "access", o == "ro"
		case "z", "Z":
			kind = "label" // there are none here
		case "nocopy":
			kind = "copy"
			if m.VolumeOptions == nil {
				return invalid("invalid mount config for type \"bind\": field VolumeOptions must not be specified")
			}
			m.VolumeOptions.NoCopy = true
		case "consistent", "cached", "delegated", "default":
			kind = "consistency" // a bind on Linux is consistent
		case "private", "rprivate", "shared", "rshared", "slave", "rslave":
			kind = "propagation"
			if m.BindOptions == nil {
				return invalid("invalid volume specification: '%s': a volume has no propagation", whole)
			}
			m.BindOptions.Propagation = mount.Propagation(o)
		}
		if kind == "" || seen[kind] {
			return invalid("invalid mode: %s", mode)
		}
		seen[kind] = true
	}
	return nil
}

// addMounts appends the engine's files, binds and tmpfs, shallow targets first.
func (e *Engine) addMounts(spec *specs.Spec, r record) error {
	dir := e.networkFilesDir(r)
	for _, f := range []string{"hosts", "hostname", "resolv.conf"} {
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/etc/" + f, Type: "bind", Source: filepath.Join(dir, f), Options: []string{"bind", "rprivate"}})
	}
	user := fileMounts(r)
	add := func(m mount.Mount) error {
		var sm specs.Mount
		var err error
		switch m.Type {
		case mount.TypeBind:
			sm, err = bindMount(m)
		case mount.TypeTmpfs:
			sm, err = tmpfsMount(m)
		default:
			return nil // a volume
		}
		user = append(user, sm)
		return err
	}
	for _, b := range r.HostConfig.Binds {
		m, err := parseBind(b)
		if err == nil {
			err = add(m)
		}
		if err != nil {
			return err
		}
	}
	for _, v := range r.Volumes {
		opts := []string{"rbind", "rprivate"}
		if v.ReadOnly {
			opts = append(opts, "rro")
		}
		user = append(user, specs.Mount{Destination: v.Target, Type: "bind", Source: e.volumes.Path(v.Name), Options: opts})
	}
	for _, m := range slices.Concat(r.HostConfig.Mounts, r.Inherited) {
		if err := add(m); err != nil {
			return err
		}
	}
	for target, opts := range r.HostConfig.Tmpfs {
		user = append(user, specs.Mount{Destination: target, Type: "tmpfs", Source: "tmpfs", Options: append(tmpfsDefaults(), splitOptions(opts)...)})
	}
	sortByDepth(user)
	for i := range spec.Mounts {
		if m := &spec.Mounts[i]; m.Destination == "/dev/shm" && m.Type == "tmpfs" && r.HostConfig.ShmSize > 0 {
			m.Options = []string{"nosuid", "noexec", "nodev", "mode=1777", fmt.Sprintf("size=%d", r.HostConfig.ShmSize)}
		}
	}
	spec.Mounts = append(spec.Mounts, user...)
	return nil
}

// subpaths are the volumes of which only a part is mounted.
func subpaths(list []volumeMount) map[string]string {
	var out map[string]string
	for _, v := range list {
		if v.Subpath != "" {
			if out == nil {
				out = map[string]string{}
			}
			out[v.Target] = v.Subpath
		}
	}
	return out
}

func propagationOf(m mount.Mount) mount.Propagation {
	if m.BindOptions != nil && m.BindOptions.Propagation != "" {
		return m.BindOptions.Propagation
	}
	return mount.PropagationRPrivate
}

// bindMount makes the source where it is wished and missing. A read-only bind is so with everything below, unless told otherwise.
func bindMount(m mount.Mount) (specs.Mount, error) {
	o := m.BindOptions
	if o == nil {
		o = &mount.BindOptions{}
	}
	if _, err := os.Stat(m.Source); err != nil {
		if !errors.Is(err, os.ErrNotExist) || !o.CreateMountpoint {
			return specs.Mount{}, missingSource(m.Source)
		}
		if err := os.MkdirAll(m.Source, 0o755); err != nil {
			return specs.Mount{}, fmt.Errorf("error while creating mount source path '%s': %w", m.Source, err)
		}
	}
	opts := []string{"rbind"}
	if o.NonRecursive {
		opts[0] = "bind"
	}
	switch {
	case !m.ReadOnly:
	case o.NonRecursive || o.ReadOnlyNonRecursive:
		opts = append(opts, "ro")
	default:
		opts = append(opts, "rro")
	}
	p := propagationOf(m)
	if err := checkPeers(m.Source, p); err != nil {
		return specs.Mount{}, err
	}
	return specs.Mount{Destination: m.Target, Type: "bind", Source: m.Source, Options: append(opts, string(p))}, nil
}

// checkPeers refuses a propagation that the mount below the source cannot give.
func checkPeers(source string, p mount.Propagation) error {
	if p == mount.PropagationPrivate || p == mount.PropagationRPrivate {
		return nil
	}
	at, optional, err := mountOf(source)
	if err != nil {
		return fmt.Errorf("find the mount of %s: %w", source, err)
	}
	shared, slave := strings.Contains(optional, "shared:"), strings.Contains(optional, "master:")
	switch {
	case (p == mount.PropagationShared || p == mount.PropagationRShared) && !shared:
		return invalid("path %s is mounted on %s but it is not a shared mount", source, at)
	case !shared && !slave:
		return invalid("path %s is mounted on %s but it is not a shared or slave mount", source, at)
	}
	return nil
}

// mountOf is the mount point that a path is on, and its propagation as the kernel's optional fields.
func mountOf(source string) (at, optional string, err error) {
	if source, err = filepath.EvalSymlinks(source); err != nil {
		return "", "", err
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		fields := strings.Fields(sc.Text())
		end := slices.Index(fields, "-")
		if end < 6 {
			continue
		}
		point := unescapeMount(fields[4])
		// The deepest counts, and of several on one point the last.
		if (point == source || point == "/" || strings.HasPrefix(source, point+"/")) && len(point) >= len(at) {
			at, optional = point, strings.Join(fields[6:end], " ")
		}
	}
	return at, optional, nil
}

// unescapeMount undoes the kernel's octal escapes.
func unescapeMount(s string) string {
	return regexp.MustCompile(`\\[0-7]{3}`).ReplaceAllStringFunc(s, func(o string) string {
		n, _ := strconv.ParseUint(o[1:], 8, 8)
		return string([]byte{byte(n)})
	})
}

// tmpfsDefaults hold unless an option says otherwise.
func tmpfsDefaults() []string { return []string{"nosuid", "nodev", "noexec"} }

func splitOptions(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

// tmpfsFlags are the options without a value.
func tmpfsFlags() []string {
	return []string{"ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync", "noatime", "diratime",
		"nodiratime", "relatime", "strictatime", "private", "rprivate", "noswap"}
}

var (
	tmpfsSize = regexp.MustCompile(`^[0-9]+[kKmMgG%]?$`)
	tmpfsMode = regexp.MustCompile(`^[01]?[0-7]{1,4}$`)
	tmpfsID   = regexp.MustCompile(`^[0-9]{1,10}$`)
	tmpfsMpol = regexp.MustCompile(`^[a-z=:0-9-]+$`)
)

// tmpfsValue is what the value of an option looks like, nil when there is no such option.
func tmpfsValue(key string) *regexp.Regexp {
	switch key {
	case "size", "nr_blocks", "nr_inodes":
		return tmpfsSize
	case "mode":
		return tmpfsMode
	case "uid", "gid":
		return tmpfsID
	case "mpol":
		return tmpfsMpol
	}
	return nil
}

// checkTmpfsOptions knows the kernel's options of a tmpfs.
func checkTmpfsOptions(list []string) error {
	for _, o := range list {
		key, value, hasValue := strings.Cut(o, "=")
		if hasValue {
			if re := tmpfsValue(key); re == nil || !re.MatchString(value) {
				return invalid("invalid tmpfs option [%q]", o)
			}
			continue
		}
		if !slices.Contains(tmpfsFlags(), o) {
			return invalid("invalid tmpfs option [%q]", o)
		}
	}
	return nil
}

func tmpfsMount(m mount.Mount) (specs.Mount, error) {
	opts := tmpfsDefaults()
	if o := m.TmpfsOptions; o != nil {
		switch {
		case o.SizeBytes < 0:
			return specs.Mount{}, invalid("invalid mount config for type \"tmpfs\": size %d is negative", o.SizeBytes)
		case o.SizeBytes > 0:
			opts = append(opts, fmt.Sprintf("size=%d", o.SizeBytes))
		}
		if o.Mode&^0o7777 != 0 {
			return specs.Mount{}, invalid("invalid mount config for type \"tmpfs\": mode %o", uint32(o.Mode))
		}
		if o.Mode != 0 {
			opts = append(opts, fmt.Sprintf("mode=%o", o.Mode))
		}
		for _, kv := range o.Options {
			if len(kv) != 1 && len(kv) != 2 {
				return specs.Mount{}, invalid("invalid mount config for type \"tmpfs\": option %q: want a flag, or a name and a value", kv)
			}
			if err := checkTmpfsOptions([]string{strings.Join(kv, "=")}); err != nil {
				return specs.Mount{}, err
			}
			opts = append(opts, strings.Join(kv, "="))
		}
	}
	if m.ReadOnly {
		opts = append(opts, "ro")
	}
	return specs.Mount{Destination: m.Target, Type: "tmpfs", Source: "tmpfs", Options: opts}, nil
}
