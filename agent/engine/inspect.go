package engine

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	units "github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"

	"skein/agent/dockerapi"
)

// ContainerInspect describes one container.
func (e *Engine) ContainerInspect(ctx context.Context, ref string, size bool) (container.InspectResponse, error) {
	c, err := e.find(ref)
	if err != nil {
		return container.InspectResponse{}, err
	}
	r := c.snapshot()
	dir := e.containerDir(r.ID)
	argv := append(append([]string{}, r.Config.Entrypoint...), r.Config.Cmd...)
	out := container.InspectResponse{
		ID: r.ID, Created: r.Created.Format(time.RFC3339Nano), Path: argv[0], Args: argv[1:], Image: r.Image, Name: "/" + r.Name,
		ResolvConfPath: dir + "/resolv.conf", HostnamePath: dir + "/hostname", HostsPath: dir + "/hosts", LogPath: e.logPath(r),
		RestartCount: r.State.RestartCount, Driver: "overlayfs", Platform: "linux", HostConfig: r.HostConfig, Config: r.Config,
		Mounts: e.mountPoints(r), ExecIDs: e.execs.ids(r.ID),
		State: &container.State{
			Status: r.State.Status, Running: r.State.active() || r.State.Status == container.StateRestarting, Paused: r.State.Status == container.StatePaused,
			Restarting: r.State.Status == container.StateRestarting, OOMKilled: r.State.OOMKilled, Pid: r.State.Pid, ExitCode: r.State.ExitCode,
			Error: r.State.Error, StartedAt: stamp(r.State.StartedAt), FinishedAt: stamp(r.State.FinishedAt), Health: c.healthReport(),
		},
		NetworkSettings: &container.NetworkSettings{SandboxID: r.ID, SandboxKey: e.sandboxKey(r), Ports: portMap(r), Networks: r.Networks},
	}
	if len(r.Links) > 0 {
		hc := *r.HostConfig
		hc.Links = e.linksOf(r)
		out.HostConfig = &hc
	}
	if out.State.Health != nil && !r.State.active() {
		out.State.Health.Status = container.Unhealthy // docker's word for what is not probed any more
	}
	if size {
		rw, all := e.sizes(ctx, r)
		out.SizeRw, out.SizeRootFs = &rw, &all
	}
	return out, nil
}

// sandboxKey is the file of the container's network namespace, for nsenter and the like.
func (e *Engine) sandboxKey(r record) string {
	if r.State.Clean || r.Sandbox.ID == "" || r.HostConfig.NetworkMode.IsHost() {
		return ""
	}
	return e.cfg.Network.SandboxPath(r.Sandbox.ID)
}

func stamp(t time.Time) string { return t.Format(time.RFC3339Nano) }

func (e *Engine) mountPoints(r record) []container.MountPoint {
	out := []container.MountPoint{}
	add := func(m mount.Mount, mode string) {
		mp := container.MountPoint{Type: m.Type, Source: m.Source, Destination: m.Target, Mode: mode, RW: !m.ReadOnly}
		if m.Type == mount.TypeBind {
			mp.Propagation = propagationOf(m)
		}
		out = append(out, mp)
	}
	for _, b := range r.HostConfig.Binds {
		if m, err := parseBind(b); err == nil && m.Type == mount.TypeBind {
			mode := ""
			if f := strings.SplitN(b, ":", 3); len(f) == 3 {
				mode = f[2]
			}
			add(m, mode)
		}
	}
	for _, m := range r.HostConfig.Mounts {
		if m.Type != mount.TypeVolume {
			add(m, "")
		}
	}
	for _, m := range r.Inherited {
		add(m, "")
	}
	for _, v := range r.Volumes {
		out = append(out, container.MountPoint{Type: mount.TypeVolume, Name: v.Name, Source: e.volumes.Path(v.Name), Destination: v.Target, Driver: "local", RW: !v.ReadOnly})
	}
	return out
}

func portMap(r record) network.PortMap {
	out := network.PortMap{}
	for p := range r.Config.ExposedPorts {
		out[p] = nil
	}
	for _, hp := range r.published() {
		if p, ok := network.PortFrom(hp.Target, network.IPProtocol(hp.Protocol)); ok {
			b := network.PortBinding{HostIP: hostIP(hp.HostIP)}
			if hp.Published != 0 { // 0: it is reached at the container's address
				b.HostPort = strconv.Itoa(int(hp.Published))
			}
			out[p] = append(out[p], b)
		}
	}
	return out
}

// ContainerList returns docker's summary of containers, newest first.
func (e *Engine) ContainerList(ctx context.Context, o dockerapi.ListOptions) ([]container.Summary, error) {
	match, err := e.listFilter(ctx, o.Filters)
	if err != nil {
		return nil, err
	}
	_, byStatus := o.Filters["status"]
	_, byExit := o.Filters["exited"]
	out := []container.Summary{}
	linkNames := e.linkNames()
	for _, c := range e.all() {
		r := c.snapshot()
		if !o.All && o.Limit <= 0 && !byStatus && !byExit && !r.State.active() && r.State.Status != container.StateRestarting {
			continue
		}
		if !match(r, c) {
			continue
		}
		s := e.summary(ctx, c, r)
		s.Names = append(s.Names, linkNames[r.ID]...)
		if o.Size {
			s.SizeRw, s.SizeRootFs = e.sizes(ctx, r)
		}
		out = append(out, s)
		if o.Limit > 0 && len(out) == o.Limit {
			break
		}
	}
	return out, nil
}

func (e *Engine) summary(ctx context.Context, c *entry, r record) container.Summary {
	argv := append(append([]string{}, r.Config.Entrypoint...), r.Config.Cmd...)
	s := container.Summary{
		ID: r.ID, Names: []string{"/" + r.Name}, Image: r.Config.Image, ImageID: r.Image, Command: quoteArgs(argv), Created: r.Created.Unix(),
		Labels: r.Config.Labels, State: r.State.Status, Status: statusText(r.State, c.healthReport()), Mounts: e.mountPoints(r), Ports: []container.PortSummary{},
		NetworkSettings: &container.NetworkSettingsSummary{Networks: r.Networks},
	}
	s.HostConfig.NetworkMode = string(r.HostConfig.NetworkMode)
	published := map[portKey]bool{}
	for _, hp := range r.published() {
		published[portKey{hp.Protocol, hp.Target}] = true
		s.Ports = append(s.Ports, container.PortSummary{IP: hostIP(hp.HostIP), PrivatePort: hp.Target, PublicPort: hp.Published, Type: hp.Protocol})
	}
	for p := range r.Config.ExposedPorts {
		if !published[portKey{string(p.Proto()), p.Num()}] {
			s.Ports = append(s.Ports, container.PortSummary{PrivatePort: p.Num(), Type: string(p.Proto())})
		}
	}
	return s
}

func quoteArgs(argv []string) string {
	for i, a := range argv {
		if strings.ContainsAny(a, " \t\n'\"") {
			argv[i] = "'" + strings.ReplaceAll(a, "'", "'\\''") + "'"
		}
	}
	return strings.Join(argv, " ")
}

func statusText(s state, h *container.Health) string {
	switch s.Status {
	case container.StateRunning, container.StatePaused:
		t := "Up " + units.HumanDuration(time.Since(s.StartedAt))
		if s.Status == container.StatePaused {
			return t + " (Paused)"
		}
		if h != nil && h.Status != container.NoHealthcheck {
			if h.Status == container.Starting {
				return t + " (health: starting)"
			}
			return t + " (" + string(h.Status) + ")"
		}
		return t
	case container.StateCreated:
		return "Created"
	case container.StateRestarting:
		return fmt.Sprintf("Restarting (%d) %s ago", s.ExitCode, units.HumanDuration(time.Since(s.FinishedAt)))
	}
	return fmt.Sprintf("Exited (%d) %s ago", s.ExitCode, units.HumanDuration(time.Since(s.FinishedAt)))
}

// listFilter compiles docker's container filters; an unknown key is an error.
func (e *Engine) listFilter(ctx context.Context, f dockerapi.Filters) (func(record, *entry) bool, error) {
	var preds []func(record, *entry) bool
	anyOf := func(values []string, f func(record, *entry, string) bool) {
		preds = append(preds, func(r record, c *entry) bool {
			for _, v := range values {
				if f(r, c, v) {
					return true
				}
			}
			return false
		})
	}
	for key, values := range f {
		switch key {
		case "id":
			anyOf(values, func(r record, _ *entry, v string) bool { return hasPrefix(r.ID, v) })
		case "name":
			for _, v := range values {
				if _, err := regexp.Compile(v); err != nil {
					return nil, invalid("invalid filter 'name=%s': %v", v, err)
				}
			}
			anyOf(values, func(r record, _ *entry, v string) bool {
				re := regexp.MustCompile(v)
				return re.MatchString(r.Name) || re.MatchString("/"+r.Name)
			})
		case "label":
			preds = append(preds, func(r record, _ *entry) bool {
				for _, v := range values {
					if !labelMatches(r.Config.Labels, v) {
						return false
					}
				}
				return true
			})
		case "status":
			for _, v := range values {
				if err := container.ValidateContainerState(container.ContainerState(v)); err != nil {
					return nil, invalid("invalid filter 'status=%s'", v)
				}
			}
			anyOf(values, func(r record, _ *entry, v string) bool { return string(r.State.Status) == v })
		case "exited":
			for _, v := range values {
				if _, err := strconv.Atoi(v); err != nil {
					return nil, invalid("invalid filter 'exited=%s'", v)
				}
			}
			anyOf(values, func(r record, _ *entry, v string) bool {
				return r.State.Status == container.StateExited && strconv.Itoa(r.State.ExitCode) == v
			})
		case "ancestor":
			var ids []string
			for _, v := range values {
				if img, err := e.cfg.Images.Get(ctx, v); err == nil {
					ids = append(ids, img.ID.String())
				}
			}
			preds = append(preds, func(r record, _ *entry) bool { return contains(ids, r.Image) || contains(values, r.Config.Image) })
		case "network":
			anyOf(values, func(r record, _ *entry, v string) bool {
				for n, s := range r.Networks {
					if n == v || hasPrefix(s.NetworkID, v) {
						return true
					}
				}
				return false
			})
		case "health":
			for _, v := range values {
				if err := container.ValidateHealthStatus(container.HealthStatus(v)); err != nil {
					return nil, invalid("invalid filter 'health=%s'", v)
				}
			}
			anyOf(values, func(_ record, c *entry, v string) bool {
				h := c.healthReport()
				return h == nil && v == "none" || h != nil && string(h.Status) == v
			})
		case "before", "since":
			p, err := e.ageFilter(key, values)
			if err != nil {
				return nil, err
			}
			preds = append(preds, p)
		case "publish", "expose", "volume", "is-task":
			p, err := e.simpleFilter(key, values)
			if err != nil {
				return nil, err
			}
			preds = append(preds, p)
		default:
			return nil, invalid("invalid filter '%s'", key)
		}
	}
	return func(r record, c *entry) bool {
		for _, p := range preds {
			if !p(r, c) {
				return false
			}
		}
		return true
	}, nil
}

func (e *Engine) ageFilter(key string, values []string) (func(record, *entry) bool, error) {
	if len(values) != 1 {
		return nil, invalid("invalid filter '%s': want one container", key)
	}
	c, err := e.find(values[0])
	if err != nil {
		return nil, err
	}
	at := c.snapshot().Created
	return func(r record, _ *entry) bool {
		if key == "before" {
			return r.Created.Before(at)
		}
		return r.Created.After(at)
	}, nil
}

func (e *Engine) simpleFilter(key string, values []string) (func(record, *entry) bool, error) {
	switch key {
	case "is-task":
		want, err := strconv.ParseBool(strings.Join(values, ""))
		if err != nil {
			return nil, invalid("invalid filter 'is-task=%s'", strings.Join(values, ","))
		}
		return func(r record, _ *entry) bool { return (r.Task != "") == want }, nil
	case "volume":
		return func(r record, _ *entry) bool {
			for _, m := range e.mountPoints(r) {
				if contains(values, m.Source) || contains(values, m.Destination) || contains(values, m.Name) {
					return true
				}
			}
			return false
		}, nil
	}
	return portFilter(key, values)
}

// portFilter matches published or exposed ports: FROM[-TO][/PROTOCOL].
func portFilter(key string, values []string) (func(record, *entry) bool, error) {
	var want []network.PortRange
	for _, v := range values {
		r, err := network.ParsePortRange(v)
		if err != nil {
			return nil, invalid("invalid filter '%s=%s': %v", key, v, err)
		}
		want = append(want, r)
	}
	in := func(number uint16, proto network.IPProtocol) bool {
		return slices.ContainsFunc(want, func(r network.PortRange) bool {
			return r.Proto() == proto && r.Start() <= number && number <= r.End()
		})
	}
	return func(r record, _ *entry) bool {
		for p, bs := range portMap(r) {
			if key == "expose" && in(p.Num(), p.Proto()) {
				return true
			}
			for _, b := range bs {
				if n, err := strconv.ParseUint(b.HostPort, 10, 16); err == nil && key == "publish" && in(uint16(n), p.Proto()) {
					return true
				}
			}
		}
		return false
	}, nil
}
