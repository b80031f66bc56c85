package engine

import (
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime/sandbox"
)

// securityOptions are the --security-opt of a container, read.
type securityOptions struct {
	noNewPrivileges bool
	writableCgroups bool
	seccomp         string // empty: the default; "unconfined"; or a profile
}

// parseSecurityOpts reads --security-opt. What this node cannot do is refused by name.
func parseSecurityOpts(list []string) (securityOptions, error) {
	var out securityOptions
	for _, o := range list {
		switch o {
		case "no-new-privileges":
			out.noNewPrivileges = true
			continue
		case "writable-cgroups":
			out.writableCgroups = true
			continue
		case "disable":
			continue // labels, of which there are none here
		}
		key, value, ok := strings.Cut(o, "=")
		if !ok {
			key, value, ok = strings.Cut(o, ":")
		}
		if !ok {
			return out, invalid("invalid --security-opt 1: %q", o)
		}
		if err := out.set(key, value, o); err != nil {
			return out, err
		}
	}
	return out, nil
}

func (s *securityOptions) set(key, value, whole string) error {
	var err error
	switch key {
	case "label":
		if value != "disable" {
			return invalid("invalid --security-opt: %q: this node's engine sets no SELinux labels: leave the option away or say label=disable", whole)
		}
	case "apparmor":
		if value != "unconfined" && value != "" {
			return invalid("invalid --security-opt: %q: this node's engine loads no AppArmor profiles: leave the option away or say apparmor=unconfined", whole)
		}
	case "seccomp":
		s.seccomp = value
	case "no-new-privileges":
		if s.noNewPrivileges, err = strconv.ParseBool(value); err != nil {
			return invalid("invalid --security-opt 2: %q", whole)
		}
	case "writable-cgroups":
		if s.writableCgroups, err = strconv.ParseBool(value); err != nil {
			return invalid("invalid --security-opt 2: %q", whole)
		}
	default:
		return invalid("invalid --security-opt 2: %q", whole)
	}
	return nil
}

// checkSecurity refuses capabilities and security options that a start would stumble over, and fills the paths to mask and protect in.
func checkSecurity(hc *container.HostConfig) error {
	so, err := parseSecurityOpts(hc.SecurityOpt)
	if err != nil {
		return err
	}
	if so.writableCgroups && cgroupVersion() == "1" {
		return invalid("invalid --security-opt: writable-cgroups needs a host with cgroup v2 only: a writable v1 hierarchy reaches the whole host")
	}
	caps, err := capabilities(hc)
	if err != nil {
		return err
	}
	filter, err := seccompFilter(so.seccomp, hc.Privileged, caps)
	if err != nil {
		return err
	}
	if _, err := sandbox.CompileSeccomp(filter); err != nil {
		return invalid("invalid --security-opt: seccomp: %v", err)
	}
	switch {
	case hc.Privileged:
		hc.MaskedPaths, hc.ReadonlyPaths = nil, nil
	default:
		if hc.MaskedPaths == nil {
			hc.MaskedPaths = sandbox.DefaultMaskedPaths()
		}
		if hc.ReadonlyPaths == nil {
			hc.ReadonlyPaths = sandbox.DefaultReadonlyPaths()
		}
	}
	return nil
}

// capabilities are what the container's root may do, by docker's rules: additions win over removals, but for "add all, drop some".
func capabilities(hc *container.HostConfig) ([]string, error) {
	held := sandbox.AllCaps()
	add, err := normCaps("CapAdd", hc.CapAdd, held)
	if err != nil {
		return nil, err
	}
	drop, err := normCaps("CapDrop", hc.CapDrop, nil)
	if err != nil {
		return nil, err
	}
	var want func(c string) bool
	switch {
	case hc.Privileged:
		return held, nil
	case slices.Contains(add, "ALL"):
		want = func(c string) bool { return !slices.Contains(drop, c) }
	case slices.Contains(drop, "ALL"):
		want = func(c string) bool { return slices.Contains(add, c) }
	default:
		base := sandbox.DefaultCaps()
		want = func(c string) bool {
			return slices.Contains(add, c) || slices.Contains(base, c) && !slices.Contains(drop, c)
		}
	}
	return slices.DeleteFunc(held, func(c string) bool { return !want(c) }), nil
}

// normCaps writes names as the kernel does; unknown ones, and where held is given those that this node's daemon has not, are errors.
func normCaps(field string, list, held []string) ([]string, error) {
	known := sandbox.KnownCaps()
	out := make([]string, 0, len(list))
	for _, c := range list {
		c = strings.ToUpper(c)
		if c != "ALL" && !strings.HasPrefix(c, "CAP_") {
			c = "CAP_" + c
		}
		switch {
		case c == "ALL":
		case !slices.Contains(known, c):
			return nil, invalid("invalid %s: unknown capability: %q", field, c)
		case held != nil && !slices.Contains(held, c):
			return nil, invalid("invalid %s: capability not supported by your kernel or not available in the current environment: %q: "+
				"start the daemon with it in its bounding set", field, c)
		}
		out = append(out, c)
	}
	return out, nil
}

// seccompFilter is the filter of a container with these capabilities, nil for none.
func seccompFilter(profile string, privileged bool, caps []string) (*specs.LinuxSeccomp, error) {
	switch {
	case profile == "unconfined", privileged && (profile == "" || profile == "builtin"):
		return nil, nil
	case profile == "" || profile == "builtin":
		return sandbox.DefaultSeccomp(caps), nil
	}
	rs := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}}}
	f, err := seccomp.LoadProfile(profile, rs)
	if err != nil {
		return nil, invalid("invalid --security-opt: seccomp: %v", err)
	}
	return f, nil
}

// setSecurity sets capabilities, filter, masked and read-only paths.
func setSecurity(spec *specs.Spec, hc *container.HostConfig) error {
	p := spec.Process
	caps, err := capabilities(hc)
	if err != nil {
		return err
	}
	p.Capabilities = &specs.LinuxCapabilities{Bounding: caps}
	if p.User.UID == 0 {
		p.Capabilities.Permitted, p.Capabilities.Effective = caps, caps
	}
	so, err := parseSecurityOpts(hc.SecurityOpt)
	if err != nil {
		return err
	}
	p.NoNewPrivileges = so.noNewPrivileges
	if spec.Linux.Seccomp, err = seccompFilter(so.seccomp, hc.Privileged, caps); err != nil {
		return err
	}
	if hc.MaskedPaths != nil {
		spec.Linux.MaskedPaths = hc.MaskedPaths
	}
	if hc.ReadonlyPaths != nil {
		spec.Linux.ReadonlyPaths = hc.ReadonlyPaths
	}
	if hc.Privileged {
		spec.Linux.MaskedPaths, spec.Linux.ReadonlyPaths = nil, nil
	}
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		if hc.Privileged && (m.Type == "sysfs" || m.Type == "cgroup") || so.writableCgroups && m.Type == "cgroup" {
			m.Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" })
		}
	}
	return nil
}
