package control

import (
	"encoding/json"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/sys/capability"
	"github.com/moby/sys/signal"
)

const (
	maxHostname = 64               // the kernel's limit
	maxUser     = 256              // bytes of a user's or group's name
	minInterval = time.Millisecond // of health checks
)

var (
	hostName   = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9_.-]*[a-zA-Z0-9])?$`)
	sysctlName = regexp.MustCompile(`^[a-zA-Z0-9_-]+([./][a-zA-Z0-9_-]+)+$`)
)

func validateContainer(a at, c *swarm.ContainerSpec) error {
	if c.Image == "" {
		return a.field("Image").missing("ContainerSpec: image reference must be provided")
	}
	if _, err := reference.ParseNormalizedNamed(c.Image); err != nil {
		return a.field("Image").bad(c.Image, "ContainerSpec: %q is not a valid repository/tag: %s", clip(c.Image), strings.TrimPrefix(err.Error(), "invalid reference format: "))
	}
	for _, check := range []func(at, *swarm.ContainerSpec) error{
		validateProcess, validatePrivileges, validateConfinement, validateNames, validateHealth, validateMounts, validateTemplates, validateDependencies,
	} {
		if err := check(a, c); err != nil {
			return err
		}
	}
	return validateLabels(a.field("Labels"), c.Labels)
}

// validateProcess checks how the process is started and ended.
func validateProcess(a at, c *swarm.ContainerSpec) error {
	for i, e := range c.Env {
		if e == "" || e[0] == '=' {
			return a.field("Env").index(i).bad(e, "ContainerSpec: invalid environment variable: want NAME=VALUE, or NAME")
		}
	}
	if c.Dir != "" && !path.IsAbs(c.Dir) {
		return a.field("Dir").bad(c.Dir, "ContainerSpec: the working directory is invalid, it needs to be an absolute path")
	}
	if len(c.User) > maxUser || strings.ContainsFunc(c.User, unprintable) || strings.Count(c.User, ":") > 1 {
		return a.field("User").bad(c.User, "want NAME, ID, or USER:GROUP of at most %d printable characters", maxUser)
	}
	for i, g := range c.Groups {
		if g == "" || len(g) > maxUser || strings.ContainsFunc(g, unprintable) || strings.Contains(g, ":") {
			return a.field("Groups").index(i).bad(g, "want a name or number of a group")
		}
	}
	if c.StopSignal != "" && !knownSignal(c.StopSignal) {
		return a.field("StopSignal").bad(c.StopSignal, "invalid signal: want a name such as SIGTERM, or 1 to 64")
	}
	if c.StopGracePeriod != nil && *c.StopGracePeriod < 0 {
		return a.field("StopGracePeriod").bad(*c.StopGracePeriod, "ContainerSpec: stop-grace-period cannot be negative: must be 0 or more")
	}
	if c.OomScoreAdj < -1000 || c.OomScoreAdj > 1000 {
		return a.field("OomScoreAdj").bad(c.OomScoreAdj, "want -1000 to 1000")
	}
	if c.Isolation != "" && c.Isolation != container.IsolationDefault {
		return a.field("Isolation").unbuilt(c.Isolation, "isolation other than the default")
	}
	return nil
}

func knownSignal(s string) bool {
	if n, err := strconv.Atoi(s); err == nil {
		return n >= 1 && n <= 64
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	_, ok := signal.SignalMap[name]
	return ok
}

// validatePrivileges refuses what a task could not get.
func validatePrivileges(a at, c *swarm.ContainerSpec) error {
	p := c.Privileges
	if p == nil {
		return nil
	}
	a = a.field("Privileges")
	if p.CredentialSpec != nil && *p.CredentialSpec != (swarm.CredentialSpec{}) {
		return a.field("CredentialSpec").unbuilt(*p.CredentialSpec, "credential specs (they are Windows')")
	}
	if l := p.SELinuxContext; l != nil && *l != (swarm.SELinuxContext{Disable: l.Disable}) {
		return a.field("SELinuxContext").unbuilt(*l, "SELinux contexts of services, except Disable")
	}
	if s := p.Seccomp; s != nil {
		switch s.Mode {
		case "", swarm.SeccompModeDefault, swarm.SeccompModeUnconfined:
			if len(s.Profile) > 0 {
				return a.field("Seccomp.Profile").bad(s.Profile, "a seccomp profile needs the mode %q, not %q", swarm.SeccompModeCustom, s.Mode)
			}
		case swarm.SeccompModeCustom:
			if !json.Valid(s.Profile) {
				return a.field("Seccomp.Profile").bad(s.Profile, "the seccomp profile is no JSON")
			}
		default:
			return a.field("Seccomp.Mode").bad(s.Mode, "unknown seccomp mode: want default, unconfined or custom")
		}
	}
	if m := p.AppArmor; m != nil && m.Mode != "" && m.Mode != swarm.AppArmorModeDefault && m.Mode != swarm.AppArmorModeDisabled {
		return a.field("AppArmor.Mode").bad(m.Mode, "unknown AppArmor mode: want default or disabled")
	}
	return nil
}

// validateConfinement refuses what no node could carry out. Whether a node has a capability, or lets a limit be that high, is known there.
func validateConfinement(a at, c *swarm.ContainerSpec) error {
	for _, x := range []struct {
		field string
		list  []string
	}{{"CapabilityAdd", c.CapabilityAdd}, {"CapabilityDrop", c.CapabilityDrop}} {
		if i := slices.IndexFunc(x.list, func(name string) bool { return !knownCapability(name) }); i >= 0 {
			return a.field(x.field).index(i).bad(x.list[i], "invalid %s: unknown capability: %q: want a name such as CAP_NET_ADMIN, or ALL", x.field, clip(x.list[i]))
		}
	}
	for i, u := range c.Ulimits {
		a := a.field("Ulimits").index(i)
		switch {
		case u == nil || u.Name == "":
			return a.field("Name").missing("want one of %s", strings.Join(ulimits(), ", "))
		case !slices.Contains(ulimits(), u.Name):
			return a.field("Name").bad(u.Name, "invalid ulimit type: want one of %s", strings.Join(ulimits(), ", "))
		case u.Hard < -1:
			return a.field("Hard").bad(u.Hard, "want 0 or more, or -1 for no limit")
		case u.Soft < -1 || uint64(u.Soft) > uint64(u.Hard):
			return a.field("Soft").bad(u.Soft, "want -1 for no limit or a number, not above the hard limit (%d)", u.Hard)
		}
	}
	for _, name := range sortedKeys(c.Sysctls) {
		a := a.field("Sysctls").key(name)
		if !sysctlName.MatchString(name) {
			return a.bad(c.Sysctls[name], "the name is malformed: want one such as net.core.somaxconn")
		}
		if strings.Contains(c.Sysctls[name], "\n") {
			return a.bad(c.Sysctls[name], "the value is malformed: want one line")
		}
	}
	return nil
}

func ulimits() []string {
	return []string{"core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"}
}

func knownCapability(name string) bool {
	name = strings.TrimPrefix(strings.ToUpper(name), "CAP_")
	return name == "ALL" || slices.ContainsFunc(capability.ListKnown(), func(c capability.Cap) bool { return strings.EqualFold(c.String(), name) })
}

// validateNames checks how the container is called and how it finds others.
func validateNames(a at, c *swarm.ContainerSpec) error {
	if h := c.Hostname; h != "" && !strings.Contains(h, "{{") && (len(h) > maxHostname || !hostName.MatchString(h)) {
		return a.field("Hostname").bad(h, "want at most %d letters, digits, _ . - with a letter or digit at both ends", maxHostname)
	}
	for i, h := range c.Hosts {
		a := a.field("Hosts").index(i)
		f := strings.Fields(h)
		if len(f) < 2 || strings.ContainsFunc(h, func(r rune) bool { return r != ' ' && r != '\t' && unprintable(r) }) {
			return a.bad(h, "invalid host: want an address and names: \"10.1.2.3 name\"")
		}
		if _, err := netip.ParseAddr(strings.Trim(f[0], "[]")); err != nil && f[0] != "host-gateway" {
			return a.bad(h, "invalid host: %s is no IP address, nor host-gateway", shorten(f[0]))
		}
	}
	d := c.DNSConfig
	if d == nil {
		return nil
	}
	a = a.field("DNSConfig")
	for i, n := range d.Nameservers {
		if !n.IsValid() {
			return a.field("Nameservers").index(i).missing("want an IP address")
		}
	}
	for _, x := range []struct {
		field string
		list  []string
	}{{"Search", d.Search}, {"Options", d.Options}} {
		for i, s := range x.list {
			if s == "" || len(s) > maxAlias || strings.ContainsFunc(s, unprintable) {
				return a.field(x.field).index(i).bad(s, "want 1 to %d printable characters without spaces", maxAlias)
			}
		}
	}
	return nil
}

func validateHealth(a at, c *swarm.ContainerSpec) error {
	h := c.Healthcheck
	if h == nil {
		return nil
	}
	a = a.field("Healthcheck")
	if len(h.Test) > 0 {
		switch kind := h.Test[0]; {
		case kind == "NONE" || kind == "": // none, or the image's
		case kind != "CMD" && kind != "CMD-SHELL":
			return a.field("Test").index(0).bad(kind, "want NONE, CMD or CMD-SHELL, the command behind it")
		case len(h.Test) < 2:
			return a.field("Test").bad(h.Test, "%s needs a command behind it", kind)
		}
	}
	for _, d := range []struct {
		field string
		value time.Duration
	}{{"Interval", h.Interval}, {"Timeout", h.Timeout}, {"StartPeriod", h.StartPeriod}, {"StartInterval", h.StartInterval}} {
		if d.value < 0 {
			return a.field(d.field).bad(d.value, "ContainerSpec: %s in HealthConfig cannot be negative: want %s or more, or 0 for the default", d.field, minInterval)
		}
		if d.value != 0 && d.value < minInterval {
			return a.field(d.field).bad(d.value, "ContainerSpec: %s in HealthConfig cannot be less than %s", d.field, minInterval)
		}
	}
	if h.Retries < 0 {
		return a.field("Retries").bad(h.Retries, "ContainerSpec: Retries in HealthConfig cannot be negative: must be 0 or more")
	}
	return nil
}
