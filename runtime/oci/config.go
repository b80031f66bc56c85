package oci

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/rootfs"
	"skein/runtime/sandbox"
)

// maxConfig bounds a config file.
const maxConfig = 8 << 20

func readConfig(file string) (*specs.Spec, []byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, nil, fmt.Errorf("read config: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, nil, fmt.Errorf("read config %s: %w", file, err)
	}
	if len(b) > maxConfig {
		return nil, nil, fmt.Errorf("config %s is larger than %d MiB: %w", file, maxConfig>>20, errdefs.ErrInvalidArgument)
	}
	var s specs.Spec
	if err := decode(b, &s); err != nil {
		return nil, nil, fmt.Errorf("config %s: %w", file, err)
	}
	return &s, b, nil
}

// complete fills what the specification lets a config leave out and makes paths absolute.
func complete(s *specs.Spec, bundle string) {
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	if s.Process == nil {
		s.Process = &specs.Process{Cwd: "/"}
	}
	if s.Root != nil && s.Root.Path != "" && !filepath.IsAbs(s.Root.Path) {
		s.Root.Path = filepath.Join(bundle, s.Root.Path)
	}
	for i := range s.Mounts {
		m := &s.Mounts[i]
		if isBind(*m) && m.Source != "" && !filepath.IsAbs(m.Source) {
			m.Source = filepath.Join(bundle, m.Source)
		}
	}
	if p := s.Linux.CgroupsPath; p != "" && !filepath.IsAbs(p) {
		s.Linux.CgroupsPath = filepath.Join(cgroupParent, filepath.Join("/", p))
	}
	unlimited(s.Linux.Resources)
}

// cgroupParent holds the groups of containers whose config names no absolute path.
const cgroupParent = "/skein-oci"

func isBind(m specs.Mount) bool {
	if m.Type == "bind" {
		return true
	}
	for _, o := range m.Options {
		if o == "bind" || o == "rbind" {
			return true
		}
	}
	return false
}

func invalid(field, format string, args ...any) error {
	return fmt.Errorf("config: %s: %s: %w", field, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

func refuse(field, why string) error {
	return fmt.Errorf("config: %s: %s: %w", field, why, errdefs.ErrNotImplemented)
}

func checkEnv(field string, list []string) error {
	for i, e := range list {
		if !strings.Contains(e, "=") || strings.HasPrefix(e, "=") || strings.IndexByte(e, 0) >= 0 {
			return invalid(fmt.Sprintf("%s[%d]", field, i), "%q: want NAME=value", e)
		}
	}
	return nil
}

// check refuses a completed config before anything is made.
func check(s *specs.Spec, hadProcess bool) error {
	if v := strings.Split(s.Version, "."); len(v) < 3 || v[0] != "1" {
		return invalid("ociVersion", "%q: want 1.x.y", s.Version)
	}
	if s.Root == nil || s.Root.Path == "" {
		return invalid("root.path", "missing")
	}
	if st, err := os.Stat(s.Root.Path); err != nil {
		return invalid("root.path", "%v", err)
	} else if !st.IsDir() {
		return invalid("root.path", "%s is not a directory", s.Root.Path)
	}
	for _, f := range []func(*specs.Spec) error{checkUnbuilt, checkPaths, checkNamespaces, checkMounts, checkDevices, checkResources, checkHooks} {
		if err := f(s); err != nil {
			return err
		}
	}
	if hadProcess {
		if err := checkProcess(s.Process); err != nil {
			return err
		}
		if err := checkMapped(s); err != nil {
			return err
		}
	}
	if err := sandbox.CheckComplete(s); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	return nil
}

// checkPaths looks at what must be a path inside the container or below the groups' root.
func checkPaths(s *specs.Spec) error {
	for field, list := range map[string][]string{"linux.maskedPaths": s.Linux.MaskedPaths, "linux.readonlyPaths": s.Linux.ReadonlyPaths} {
		for i, p := range list {
			if !filepath.IsAbs(p) || strings.IndexByte(p, 0) >= 0 {
				return invalid(fmt.Sprintf("%s[%d]", field, i), "%q is not absolute", p)
			}
		}
	}
	p := s.Linux.CgroupsPath
	switch {
	case p == "":
	case strings.Contains(p, ".slice:"):
		return refuse("linux.cgroupsPath", fmt.Sprintf("%q is systemd's form: groups are made directly: give a path like /machine/name", p))
	case p == "/" || p == cgroupParent || p != filepath.Clean(p) || strings.ContainsAny(p, "\x00\n"):
		return invalid("linux.cgroupsPath", "%q: want a clean path of a group of the container's own", p)
	}
	for k := range s.Annotations {
		if k == "" {
			return invalid("annotations", "an empty key")
		}
	}
	return nil
}

// checkMapped refuses a user that the container's own user namespace does not have.
func checkMapped(s *specs.Spec) error {
	own := slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace && n.Path == "" })
	if !own {
		return nil
	}
	has := func(list []specs.LinuxIDMapping, id uint32) bool {
		return slices.ContainsFunc(list, func(m specs.LinuxIDMapping) bool {
			return id >= m.ContainerID && uint64(id) < uint64(m.ContainerID)+uint64(m.Size)
		})
	}
	u := s.Process.User
	switch {
	case !has(s.Linux.UIDMappings, 0), !has(s.Linux.GIDMappings, 0):
		return invalid("linux.uidMappings, linux.gidMappings", "the namespace has no root, who sets it up")
	case !has(s.Linux.UIDMappings, u.UID):
		return invalid("process.user.uid", "linux.uidMappings have no %d", u.UID)
	case !has(s.Linux.GIDMappings, u.GID):
		return invalid("process.user.gid", "linux.gidMappings have no %d", u.GID)
	}
	for i, g := range u.AdditionalGids {
		if !has(s.Linux.GIDMappings, g) {
			return invalid(fmt.Sprintf("process.user.additionalGids[%d]", i), "linux.gidMappings have no %d", g)
		}
	}
	return nil
}

func checkProcess(p *specs.Process) error {
	const field = "process"
	switch {
	case len(p.Args) == 0 || p.Args[0] == "":
		return invalid(field+".args", "no command")
	case !filepath.IsAbs(p.Cwd) || strings.IndexByte(p.Cwd, 0) >= 0:
		return invalid(field+".cwd", "%q is not absolute", p.Cwd)
	case strings.IndexByte(strings.Join(p.Args, ""), 0) >= 0:
		return invalid(field+".args", "%q: a zero byte", p.Args)
	case p.OOMScoreAdj != nil && (*p.OOMScoreAdj < -1000 || *p.OOMScoreAdj > 1000):
		return invalid(field+".oomScoreAdj", "%d: want -1000 to 1000", *p.OOMScoreAdj)
	case p.ApparmorProfile != "" && p.ApparmorProfile != "unconfined":
		return refuse(field+".apparmorProfile", "profile "+p.ApparmorProfile+": AppArmor is not built yet")
	case p.SelinuxLabel != "":
		return refuse(field+".selinuxLabel", "SELinux is not built yet")
	}
	if err := checkEnv(field+".env", p.Env); err != nil {
		return err
	}
	if err := sandbox.CheckProcess(p); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	return nil
}

func checkUnbuilt(s *specs.Spec) error {
	l := s.Linux
	switch {
	case l.MountLabel != "":
		return refuse("linux.mountLabel", "SELinux is not built yet")
	case l.IntelRdt != nil:
		return refuse("linux.intelRdt", "not built yet")
	case len(l.NetDevices) > 0:
		return refuse("linux.netDevices", "not built yet")
	case s.VM != nil, s.Windows != nil, s.Solaris != nil, s.ZOS != nil, s.FreeBSD != nil:
		return refuse("vm, windows, solaris, zos, freebsd", "another platform's part")
	case l.Personality != nil && (len(l.Personality.Flags) > 0 || l.Personality.Domain != specs.PerLinux && l.Personality.Domain != specs.PerLinux32):
		return invalid("linux.personality", "want LINUX or LINUX32 without flags")
	}
	if p := l.RootfsPropagation; p != "" {
		if _, _, ok := rootfs.Propagation(p); !ok {
			return invalid("linux.rootfsPropagation", "%q is unknown", p)
		}
	}
	return nil
}

func checkNamespaces(s *specs.Spec) error {
	_, join, err := sandbox.Split(s)
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	for _, n := range join {
		fd, err := openNamespace(n)
		if err != nil {
			return fmt.Errorf("config: linux.namespaces: %w", err)
		}
		unix.Close(fd)
	}
	maps := len(s.Linux.UIDMappings) + len(s.Linux.GIDMappings)
	own := false
	for _, n := range s.Linux.Namespaces {
		own = own || n.Type == specs.UserNamespace && n.Path == ""
	}
	if own && (len(s.Linux.UIDMappings) == 0 || len(s.Linux.GIDMappings) == 0) {
		return invalid("linux.uidMappings, linux.gidMappings", "a user namespace needs both")
	}
	if !own && maps > 0 && !hasUser(s) {
		return invalid("linux.uidMappings", "there is no user namespace to map")
	}
	return checkMaps("linux.uidMappings", s.Linux.UIDMappings, "linux.gidMappings", s.Linux.GIDMappings)
}

func hasUser(s *specs.Spec) bool {
	for _, n := range s.Linux.Namespaces {
		if n.Type == specs.UserNamespace {
			return true
		}
	}
	return false
}

// maxMaps is the kernel's limit of lines in a map.
const maxMaps = 340

func checkMaps(uidField string, uids []specs.LinuxIDMapping, gidField string, gids []specs.LinuxIDMapping) error {
	for field, list := range map[string][]specs.LinuxIDMapping{uidField: uids, gidField: gids} {
		if len(list) > maxMaps {
			return invalid(field, "%d lines, at most %d", len(list), maxMaps)
		}
		for i, m := range list {
			if m.Size == 0 || uint64(m.ContainerID)+uint64(m.Size) > 1<<32-1 || uint64(m.HostID)+uint64(m.Size) > 1<<32-1 {
				return invalid(fmt.Sprintf("%s[%d]", field, i), "size %d does not fit", m.Size)
			}
			for j, o := range list[:i] {
				if overlap(m.ContainerID, o.ContainerID, m.Size, o.Size) || overlap(m.HostID, o.HostID, m.Size, o.Size) {
					return invalid(fmt.Sprintf("%s[%d]", field, i), "overlaps with line %d", j)
				}
			}
		}
	}
	return nil
}

func overlap(a, b, sizeA, sizeB uint32) bool {
	return uint64(a) < uint64(b)+uint64(sizeB) && uint64(b) < uint64(a)+uint64(sizeA)
}

func checkMounts(s *specs.Spec) error {
	for i, m := range s.Mounts {
		field := fmt.Sprintf("mounts[%d]", i)
		switch {
		case !filepath.IsAbs(m.Destination):
			return invalid(field+".destination", "%q is not absolute", m.Destination)
		case !isBind(m) && m.Type == "":
			return invalid(field+".type", "neither a type nor the option bind")
		case isBind(m) && m.Source == "":
			return invalid(field+".source", "a bind mount needs one")
		}
		if isBind(m) {
			if _, err := os.Stat(m.Source); err != nil {
				return invalid(field+".source", "%v", err)
			}
		}
		if err := checkMaps(field+".uidMappings", m.UIDMappings, field+".gidMappings", m.GIDMappings); err != nil {
			return err
		}
		if mapped(s, m) {
			if err := checkIDMap(field, s, m); err != nil {
				return err
			}
		}
		if err := rootfs.CheckMount(m); err != nil {
			return fmt.Errorf("config: %s.%w", field, err)
		}
	}
	return nil
}

func checkIDMap(field string, s *specs.Spec, m specs.Mount) error {
	if !isBind(m) {
		return refuse(field, "id-mapped mounts that are not bind mounts are not built yet")
	}
	uids, gids := mapsOf(s, m)
	if len(uids) == 0 || len(gids) == 0 {
		return invalid(field+".uidMappings, "+field+".gidMappings", "an id-mapped mount needs both, its own or those of the user namespace")
	}
	return nil
}

func checkDevices(s *specs.Spec) error {
	for i, d := range s.Linux.Devices {
		field := fmt.Sprintf("linux.devices[%d]", i)
		switch {
		case !filepath.IsAbs(d.Path) || filepath.Clean(d.Path) == "/" || filepath.Clean(d.Path) == "/dev" || strings.IndexByte(d.Path, 0) >= 0:
			return invalid(field+".path", "%q: want the absolute path of a node", d.Path)
		case d.FileMode != nil && *d.FileMode&^0o177777 != 0: // engines pass the file type too
			return invalid(field+".fileMode", "%#o: want permissions", uint32(*d.FileMode))
		case d.Type != "c" && d.Type != "u" && d.Type != "b" && d.Type != "p":
			return invalid(field+".type", "%q: want c, b, u or p", d.Type)
		case d.Type != "p" && (d.Major < 0 || d.Minor < 0 || d.Major > 1<<20 || d.Minor > 1<<20):
			return invalid(field+".major, minor", "device number %d:%d", d.Major, d.Minor)
		}
		if _, err := os.Stat(d.Path); err != nil && d.Type != "p" && hasUser(s) {
			return invalid(field+".path", "in a user namespace the host's node is used: %v", err)
		}
	}
	return nil
}

func checkHooks(s *specs.Spec) error {
	if s.Hooks == nil {
		return nil
	}
	h := s.Hooks
	for name, list := range map[string][]specs.Hook{"prestart": h.Prestart, "createRuntime": h.CreateRuntime, "createContainer": h.CreateContainer,
		"startContainer": h.StartContainer, "poststart": h.Poststart, "poststop": h.Poststop} {
		for i, k := range list {
			field := fmt.Sprintf("hooks.%s[%d]", name, i)
			if !filepath.IsAbs(k.Path) {
				return invalid(field+".path", "%q is not absolute", k.Path)
			}
			if k.Timeout != nil && *k.Timeout <= 0 {
				return invalid(field+".timeout", "%d: want more than 0 seconds", *k.Timeout)
			}
			if err := checkEnv(field+".env", k.Env); err != nil {
				return err
			}
		}
	}
	return nil
}
