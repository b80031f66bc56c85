package engine

import (
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime"
)

// IDMaps are the host's user and group numbers that containers have, from their 0 on.
type IDMaps struct {
	UIDs, GIDs []specs.LinuxIDMapping
}

// remapped says whether a container with this configuration runs in a user namespace of its own.
func (e *Engine) remapped(hc *container.HostConfig) bool {
	return e.cfg.UserNS != nil && !hc.UsernsMode.IsHost()
}

// checkUserns refuses what a user namespace excludes, with docker's words.
func (e *Engine) checkUserns(hc *container.HostConfig) error {
	if !e.remapped(hc) {
		return nil
	}
	switch {
	case hc.Privileged:
		return invalid("privileged mode is incompatible with user namespaces.  You must run the container in the host namespace when running privileged mode")
	case hc.NetworkMode.IsHost():
		return invalid("cannot share the host's network namespace when user namespaces are enabled")
	case hc.PidMode.IsHost():
		return invalid("cannot share the host PID namespace when user namespaces are enabled")
	case hc.IpcMode.IsHost():
		return invalid("cannot share the host IPC namespace when user namespaces are enabled: run the container with --userns=host")
	}
	return nil
}

// setUserns gives the container its user namespace, or that of the container whose pid or ipc namespace it joins, and shows it through its
// maps what is this engine's own: volumes and the files of the network. Devices cannot be made there: the host's nodes are bound.
func (e *Engine) setUserns(spec *specs.Spec, hc *container.HostConfig, nodes map[string]string) error {
	if !e.remapped(hc) {
		return nil
	}
	user := specs.LinuxNamespace{Type: specs.UserNamespace}
	for _, mode := range []string{string(hc.PidMode), string(hc.IpcMode)} {
		target, ok := strings.CutPrefix(mode, "container:")
		if !ok {
			continue
		}
		o, err := e.joinable("user", target)
		if err != nil {
			return err
		}
		if !e.remapped(o.HostConfig) {
			return invalid("cannot share namespaces of container %s, which is in the host's user namespace: run this one with --userns=host too", o.ID)
		}
		if p := runtime.ContainerPath + o.ID; user.Path != "" && user.Path != p {
			return invalid("cannot share namespaces of two containers when user namespaces are enabled: each is in its own")
		}
		user.Path = runtime.ContainerPath + o.ID
	}
	if user.Path == "" {
		spec.Linux.UIDMappings, spec.Linux.GIDMappings = e.cfg.UserNS.UIDs, e.cfg.UserNS.GIDs
	}
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, user)
	for i := range spec.Mounts {
		if m := &spec.Mounts[i]; m.Type == "bind" && strings.HasPrefix(m.Source, e.cfg.StateDir+"/") {
			m.Options = append(slices.Clone(m.Options), "idmap")
		}
	}
	for _, d := range spec.Linux.Devices {
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: d.Path, Type: "bind", Source: nodes[d.Path], Options: []string{"bind", "rprivate"}})
	}
	spec.Linux.Devices = nil
	return nil
}

// setNetDefaults lets every user of a container's own network listen on low ports and ping, as docker does.
func setNetDefaults(spec *specs.Spec, hc *container.HostConfig) {
	if hc.NetworkMode.IsHost() || hc.NetworkMode.IsContainer() {
		return
	}
	s := map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}
	for k, v := range spec.Linux.Sysctl {
		delete(s, strings.ReplaceAll(k, "/", "."))
		s[k] = v
	}
	spec.Linux.Sysctl = s
}
