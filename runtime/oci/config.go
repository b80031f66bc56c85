package oci

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

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
	for _, f := range []func(*specs.Spec) error{checkLSM, checkUnbuilt, checkNamespaces, checkMounts, checkDevices, checkResources, checkHooks} {
		if err := f(s); err != nil {
			return err
		}
	}
	if hadProcess {
		return checkProcess("process", s.Process)
	}
	return nil
}

func checkProcess(field string, p *specs.Process) error {
	switch {
	case len(p.Args) == 0 || p.Args[0] == "":
		return invalid(field+".args", "no command")
	case !filepath.IsAbs(p.Cwd):
		return invalid(field+".cwd", "%q is not absolute", p.Cwd)
	case p.OOMScoreAdj != nil && (*p.OOMScoreAdj < -1000 || *p.OOMScoreAdj > 1000):
		return invalid(field+".oomScoreAdj", "%d: want -1000 to 1000", *p.OOMScoreAdj)
	case p.ApparmorProfile != "" && p.ApparmorProfile != "unconfined":
		return refuse(field+".apparmorProfile", "profile "+p.ApparmorProfile+": AppArmor is not built yet")
	case p.SelinuxLabel != "":
		return refuse(field+".selinuxLabel", "SELinux is not built yet")
	case p.IOPriority != nil, p.Scheduler != nil, p.ExecCPUAffinity != nil:
		return refuse(field, "ioPriority, scheduler and execCPUAffinity are not built yet")
	}
	for i, e := range p.Env {
		if !strings.Contains(e, "=") || strings.HasPrefix(e, "=") || strings.IndexByte(e, 0) >= 0 {
			return invalid(fmt.Sprintf("%s.env[%d]", field, i), "%q: want NAME=value", e)
		}
	}
	if err := sandbox.CheckProcess(p); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	return nil
}

func checkLSM(s *specs.Spec) error {
	if s.Linux.MountLabel != "" {
		return refuse("linux.mountLabel", "SELinux is not built yet")
	}
	return nil
}

func checkUnbuilt(s *specs.Spec) error {
	l := s.Linux
	switch {
	case l.IntelRdt != nil:
		return refuse("linux.intelRdt", "not built yet")
	case len(l.TimeOffsets) > 0:
		return refuse("linux.timeOffsets", "not built yet")
	case l.MemoryPolicy != nil:
		return refuse("linux.memoryPolicy", "not built yet")
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
	if _, _, err := sandbox.Split(s); err != nil {
		return fmt.Errorf("config: %w", err)
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
		}
	}
	return nil
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
		if mapped(s, m) && !isBind(m) {
			return refuse(field, "id-mapped mounts that are not bind mounts are not built yet")
		}
	}
	return nil
}

func checkDevices(s *specs.Spec) error {
	for i, d := range s.Linux.Devices {
		field := fmt.Sprintf("linux.devices[%d]", i)
		switch {
		case !filepath.IsAbs(d.Path):
			return invalid(field+".path", "%q is not absolute", d.Path)
		case d.Type != "c" && d.Type != "u" && d.Type != "b" && d.Type != "p":
			return invalid(field+".type", "%q: want c, b, u or p", d.Type)
		case d.Type != "p" && (d.Major < 0 || d.Minor < 0 || d.Major > 1<<20 || d.Minor > 1<<20):
			return invalid(field, "device number %d:%d", d.Major, d.Minor)
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
		}
	}
	return nil
}

func checkResources(s *specs.Spec) error {
	r := s.Linux.Resources
	if r == nil {
		return nil
	}
	negative := func(field string, v *int64) error {
		if v != nil && *v < -1 {
			return invalid("linux.resources."+field, "%d: want -1 (none) or more", *v)
		}
		return nil
	}
	if m := r.Memory; m != nil {
		for f, v := range map[string]*int64{"memory.limit": m.Limit, "memory.reservation": m.Reservation, "memory.swap": m.Swap, "memory.kernel": m.Kernel} {
			if err := negative(f, v); err != nil {
				return err
			}
		}
		if m.Swappiness != nil && *m.Swappiness > 100 {
			return invalid("linux.resources.memory.swappiness", "%d: want 0 to 100", *m.Swappiness)
		}
	}
	if r.CPU != nil {
		if err := negative("cpu.quota", r.CPU.Quota); err != nil {
			return err
		}
	}
	if r.Pids != nil {
		if err := negative("pids.limit", r.Pids.Limit); err != nil {
			return err
		}
	}
	for i, d := range r.Devices {
		field := fmt.Sprintf("linux.resources.devices[%d]", i)
		if d.Type != "" && !strings.Contains("abc", d.Type) || len(d.Type) > 1 {
			return invalid(field+".type", "%q: want a, b or c", d.Type)
		}
		if strings.Trim(d.Access, "rwm") != "" {
			return invalid(field+".access", "%q: want letters of rwm", d.Access)
		}
	}
	return nil
}
