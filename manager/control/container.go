package control

import (
	"encoding/json"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/sys/capability"
)

const (
	maxMounts   = 500
	minInterval = time.Millisecond // of health checks
)

func validateContainer(c *swarm.ContainerSpec) error {
	if c.Image == "" {
		return invalid("ContainerSpec: image reference must be provided")
	}
	if _, err := reference.ParseNormalizedNamed(c.Image); err != nil {
		return invalid("ContainerSpec: %q is not a valid repository/tag: %s", c.Image, strings.TrimPrefix(err.Error(), "invalid reference format: "))
	}
	if err := refuseUnbuilt(c); err != nil {
		return err
	}
	for _, e := range c.Env {
		if e == "" || e[0] == '=' || strings.ContainsRune(e, 0) {
			return invalid("ContainerSpec: invalid environment variable: %.80q", e)
		}
	}
	if c.Dir != "" && !path.IsAbs(c.Dir) {
		return invalid("ContainerSpec: the working directory %q is invalid, it needs to be an absolute path", c.Dir)
	}
	if c.StopGracePeriod != nil && *c.StopGracePeriod < 0 {
		return invalid("ContainerSpec: stop-grace-period cannot be negative")
	}
	if c.OomScoreAdj < -1000 || c.OomScoreAdj > 1000 {
		return invalid("ContainerSpec: invalid oom-score-adj %d: want -1000 to 1000", c.OomScoreAdj)
	}
	if err := validateConfinement(c); err != nil {
		return err
	}
	if err := validateHealth(c.Healthcheck); err != nil {
		return err
	}
	if err := validateMounts(c.Mounts); err != nil {
		return err
	}
	if err := validateTemplates(c); err != nil {
		return err
	}
	return validateDependencies(c)
}

// refuseUnbuilt names what a task could not get.
func refuseUnbuilt(c *swarm.ContainerSpec) error {
	switch p := c.Privileges; {
	case c.Isolation != "" && c.Isolation != container.IsolationDefault:
		return notBuilt("isolation %q", c.Isolation)
	case p == nil:
	case p.CredentialSpec != nil && *p.CredentialSpec != (swarm.CredentialSpec{}):
		return notBuilt("credential specs")
	case p.SELinuxContext != nil && *p.SELinuxContext != (swarm.SELinuxContext{Disable: p.SELinuxContext.Disable}):
		return notBuilt("SELinux contexts of services")
	}
	return nil
}

// validateConfinement refuses what no node could carry out. Whether a node has a capability, or lets a limit be that high, is known there.
func validateConfinement(c *swarm.ContainerSpec) error {
	for _, x := range []struct {
		field string
		list  []string
	}{{"CapabilityAdd", c.CapabilityAdd}, {"CapabilityDrop", c.CapabilityDrop}} {
		for _, name := range x.list {
			if !knownCapability(name) {
				return invalid("ContainerSpec: invalid %s: unknown capability: %q", x.field, name)
			}
		}
	}
	for _, u := range c.Ulimits {
		switch {
		case u == nil || u.Name == "":
			return invalid("ContainerSpec: a ulimit has no name")
		case u.Soft < -1 || u.Hard < -1 || uint64(u.Soft) > uint64(u.Hard):
			return invalid("ContainerSpec: ulimit %s: soft limit %d and hard limit %d: want -1 for none or a number, the soft one not above", u.Name, u.Soft, u.Hard)
		}
	}
	for name, value := range c.Sysctls {
		if name == "" || strings.Contains(name, "..") || strings.ContainsAny(name+value, "\n\x00") {
			return invalid("ContainerSpec: sysctl %q=%q is malformed", name, value)
		}
	}
	for _, h := range c.Hosts {
		if f := strings.Fields(h); len(f) < 2 || strings.Contains(h, "\n") {
			return invalid("ContainerSpec: invalid host %q: want an address and names", h)
		}
	}
	p := c.Privileges
	if p == nil {
		return nil
	}
	if s := p.Seccomp; s != nil {
		switch s.Mode {
		case "", swarm.SeccompModeDefault, swarm.SeccompModeUnconfined:
			if len(s.Profile) > 0 {
				return invalid("ContainerSpec: a seccomp profile needs the mode %q, not %q", swarm.SeccompModeCustom, s.Mode)
			}
		case swarm.SeccompModeCustom:
			if !json.Valid(s.Profile) {
				return invalid("ContainerSpec: the seccomp profile is no JSON")
			}
		default:
			return invalid("ContainerSpec: unknown seccomp mode %q", s.Mode)
		}
	}
	if a := p.AppArmor; a != nil && a.Mode != "" && a.Mode != swarm.AppArmorModeDefault && a.Mode != swarm.AppArmorModeDisabled {
		return invalid("ContainerSpec: unknown AppArmor mode %q", a.Mode)
	}
	return nil
}

func knownCapability(name string) bool {
	name = strings.TrimPrefix(strings.ToUpper(name), "CAP_")
	return name == "ALL" || slices.ContainsFunc(capability.ListKnown(), func(c capability.Cap) bool { return strings.EqualFold(c.String(), name) })
}

func validateHealth(h *container.HealthConfig) error {
	if h == nil {
		return nil
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"Interval", h.Interval}, {"Timeout", h.Timeout}, {"StartPeriod", h.StartPeriod}, {"StartInterval", h.StartInterval}} {
		if d.value < 0 {
			return invalid("ContainerSpec: %s in HealthConfig cannot be negative", d.name)
		}
		if d.value != 0 && d.value < minInterval {
			return invalid("ContainerSpec: %s in HealthConfig cannot be less than %s", d.name, minInterval)
		}
	}
	if h.Retries < 0 {
		return invalid("ContainerSpec: Retries in HealthConfig cannot be negative")
	}
	return nil
}

func validateMounts(mounts []mount.Mount) error {
	if len(mounts) > maxMounts {
		return invalid("ContainerSpec: more than %d mounts", maxMounts)
	}
	targets := map[string]bool{}
	for _, m := range mounts {
		if !path.IsAbs(m.Target) || path.Clean(m.Target) == "/" {
			return invalid("ContainerSpec: invalid mount target %q, must be an absolute path below /", m.Target)
		}
		if t := path.Clean(m.Target); targets[t] {
			return invalid("ContainerSpec: duplicate mount point: %s", m.Target)
		}
		targets[path.Clean(m.Target)] = true
		if err := validateMount(m); err != nil {
			return err
		}
	}
	return nil
}

func validateMount(m mount.Mount) error {
	switch m.Type {
	case mount.TypeBind:
		if m.Source == "" {
			return invalid("invalid bind mount source of %s, source must not be empty", m.Target)
		}
		if !path.IsAbs(m.Source) {
			return invalid("invalid bind mount source %q of %s, must be an absolute path", m.Source, m.Target)
		}
	case mount.TypeVolume:
		if d := m.VolumeOptions; d != nil && d.DriverConfig != nil && d.DriverConfig.Name != "" && d.DriverConfig.Name != "local" {
			return notBuilt("mount %s: volume driver %q (local is built)", m.Target, d.DriverConfig.Name)
		}
		if path.IsAbs(m.Source) {
			return invalid("invalid volume mount source %q of %s, must not be an absolute path: a volume has a name", m.Source, m.Target)
		}
	case mount.TypeTmpfs:
		if m.Source != "" {
			return invalid("invalid tmpfs source %q of %s, source must be empty", m.Source, m.Target)
		}
		if o := m.TmpfsOptions; o != nil && o.SizeBytes < 0 {
			return invalid("invalid tmpfs size %d of %s, must not be negative", o.SizeBytes, m.Target)
		}
	case mount.TypeCluster, mount.TypeImage, mount.TypeNamedPipe:
		return notBuilt("mount %s of type %q (bind, volume and tmpfs are built)", m.Target, m.Type)
	default:
		return invalid("invalid mount type %q of %s: want bind, volume or tmpfs", m.Type, m.Target)
	}
	return nil
}
