package engine

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime"
	"skein/runtime/sandbox"
)

// defaultShmSize is docker's.
const defaultShmSize = 64 << 20

// checkNamespaces refuses modes that do not exist and parameters of namespaces that are not the container's own, and fills the defaults in.
func checkNamespaces(hc *container.HostConfig) error {
	switch {
	case !hc.PidMode.Valid():
		return invalid("invalid PID mode: %s", hc.PidMode)
	case !hc.UTSMode.Valid():
		return invalid("invalid UTS mode: %s", hc.UTSMode)
	case !hc.IpcMode.Valid():
		return invalid("invalid IPC mode: %s", hc.IpcMode)
	case !hc.CgroupnsMode.Valid():
		return invalid("invalid cgroup namespace mode: %s", hc.CgroupnsMode)
	case !hc.UsernsMode.Valid():
		return invalid("invalid user namespace mode: %s", hc.UsernsMode)
	case hc.Cgroup != "":
		return notBuilt("cgroup %q: joining another container's group is not supported by this version of skein: use --cgroup-parent", hc.Cgroup)
	case hc.ShmSize < 0:
		return invalid("SHM size can not be less than 0")
	}
	if hc.IpcMode == "" {
		hc.IpcMode = container.IPCModePrivate
	}
	if hc.CgroupnsMode == "" {
		hc.CgroupnsMode = container.CgroupnsModePrivate
	}
	if hc.ShmSize == 0 {
		hc.ShmSize = defaultShmSize
	}
	return checkSysctls(hc)
}

// checkSysctls refuses kernel parameters of a namespace that is the host's or another container's.
func checkSysctls(hc *container.HostConfig) error {
	spec := &specs.Spec{Linux: &specs.Linux{Sysctl: hc.Sysctls}}
	own := func(t specs.LinuxNamespaceType, yes bool) {
		if yes {
			spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: t})
		}
	}
	own(specs.NetworkNamespace, !hc.NetworkMode.IsHost() && !hc.NetworkMode.IsContainer())
	own(specs.IPCNamespace, !hc.IpcMode.IsHost() && !hc.IpcMode.IsContainer())
	own(specs.UTSNamespace, !hc.UTSMode.IsHost())
	if err := sandbox.CheckSysctls(spec); err != nil {
		return invalid("%v", err)
	}
	return nil
}

// checkJoins finds the containers whose namespaces a new one shall share.
func (e *Engine) checkJoins(hc *container.HostConfig) error {
	for _, mode := range []string{string(hc.PidMode), string(hc.IpcMode)} {
		if target, ok := strings.CutPrefix(mode, "container:"); ok {
			if _, err := e.findJoined(target); err != nil {
				return err
			}
		}
	}
	return nil
}

// findJoined finds a container that a new one's mode names. That it is not there is no "not found": clients take that for the image's.
func (e *Engine) findJoined(target string) (*entry, error) {
	c, err := e.find(target)
	if cerrdefs.IsNotFound(err) {
		return nil, invalid("%v", err)
	}
	return c, err
}

// joinable is the running container that a mode names.
func (e *Engine) joinable(kind, target string) (record, error) {
	c, err := e.find(target)
	if err != nil {
		return record{}, err
	}
	r := c.snapshot()
	switch {
	case r.State.Status == container.StateRestarting:
		return r, conflict("failed to join %s namespace: Container %s is restarting, wait until the container is running", kind, r.ID)
	case !r.State.active():
		return r, conflict("failed to join %s namespace: container %s is not running", kind, r.ID)
	}
	return r, nil
}

// setNamespaces gives the spec the namespaces that the modes say, and the mounts that go with them.
func (e *Engine) setNamespaces(spec *specs.Spec, hc *container.HostConfig) error {
	l := spec.Linux
	drop := func(t specs.LinuxNamespaceType) {
		l.Namespaces = slices.DeleteFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t })
	}
	join := func(t specs.LinuxNamespaceType, id string) {
		for i := range l.Namespaces {
			if l.Namespaces[i].Type == t {
				l.Namespaces[i].Path = runtime.ContainerPath + id
			}
		}
	}
	if hc.UTSMode.IsHost() {
		drop(specs.UTSNamespace)
		spec.Hostname, spec.Domainname = "", ""
	}
	if target, ok := strings.CutPrefix(string(hc.PidMode), "container:"); ok {
		o, err := e.joinable("PID", target)
		if err != nil {
			return err
		}
		join(specs.PIDNamespace, o.ID)
	} else if hc.PidMode.IsHost() {
		drop(specs.PIDNamespace)
	}
	if hc.CgroupnsMode.IsHost() {
		drop(specs.CgroupNamespace)
		showAllGroups(spec)
	}
	target, ok := strings.CutPrefix(string(hc.IpcMode), "container:")
	switch {
	case ok:
		o, err := e.joinable("IPC", target)
		if err != nil {
			return err
		}
		if !o.HostConfig.IpcMode.IsShareable() {
			return invalid("failed to join IPC namespace: container %s: non-shareable IPC (hint: use IpcMode:shareable for the donor container)", o.ID)
		}
		join(specs.IPCNamespace, o.ID)
		setShm(spec, &specs.Mount{Destination: "/dev/shm", Type: "bind", Source: runtime.ContainerPath + o.ID, Options: []string{"bind", "rprivate"}})
	case hc.IpcMode.IsHost():
		drop(specs.IPCNamespace)
		setShm(spec, &specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"rbind", "rprivate"}})
	case hc.IpcMode.IsNone():
		setShm(spec, nil)
	}
	return nil
}

// setShm replaces the mount on /dev/shm.
func setShm(spec *specs.Spec, m *specs.Mount) {
	i := slices.IndexFunc(spec.Mounts, func(o specs.Mount) bool { return o.Destination == "/dev/shm" })
	switch {
	case i < 0:
	case m == nil:
		spec.Mounts = slices.Delete(spec.Mounts, i, i+1)
	default:
		spec.Mounts[i] = *m
	}
}

// showAllGroups shows the host's whole version 2 tree to a container that shares the host's cgroup namespace; of version 1 it sees its own groups.
func showAllGroups(spec *specs.Spec) {
	if cgroupVersion() == "1" {
		return
	}
	for i := range spec.Mounts {
		if m := &spec.Mounts[i]; m.Type == "cgroup" {
			*m = specs.Mount{Destination: filepath.Clean(m.Destination), Type: "bind", Source: cgroupRoot, Options: append([]string{"rbind", "rprivate"}, m.Options...)}
		}
	}
}

// checkExtraHosts refuses lines for the hosts file that are none: "name:address", an IPv6 address with or without brackets.
func checkExtraHosts(list []string) error {
	for _, h := range list {
		name, addr, ok := strings.Cut(h, ":")
		if !ok || name == "" || strings.ContainsAny(h, " \t\n\x00") {
			return invalid("bad format for add-host: %q", h)
		}
		if _, err := netip.ParseAddr(unbracket(addr)); err != nil && addr != "host-gateway" {
			return invalid("invalid IP address in add-host: %q", addr)
		}
	}
	return nil
}

func unbracket(addr string) string {
	if in, ok := strings.CutPrefix(addr, "["); ok && strings.HasSuffix(in, "]") {
		return strings.TrimSuffix(in, "]")
	}
	return addr
}
