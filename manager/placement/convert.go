package placement

import (
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/store"
	"skein/scheduler"
)

// NodeOf is what the scheduler must know of a node. A description that cannot be read counts as none: such a node has no resources to
// reserve.
func NodeOf(n *store.Node) scheduler.Node {
	var d swarm.NodeDescription
	_ = json.Unmarshal(n.DescriptionJson, &d)
	addr := n.UnderlayAddr
	if host, _, err := net.SplitHostPort(addr); err == nil {
		addr = host
	}
	return scheduler.Node{
		ID: n.Id, Hostname: n.Hostname, Role: n.Role, Addr: addr, Labels: n.Labels, EngineLabels: d.Engine.Labels,
		Platform: scheduler.Platform{OS: d.Platform.OS, Arch: d.Platform.Architecture},
		Total:    scheduler.Resources{NanoCPUs: d.Resources.NanoCPUs, MemoryBytes: d.Resources.MemoryBytes},
		Generic:  genericOf(d.Resources.GenericResources),
		Plugins:  append(pluginsOf(d.Engine.Plugins), encryption(n)),
		State:    stateOf(n),
	}
}

// genericOf counts what a node offers of each kind; which of them a task gets is decided when its placement is applied.
func genericOf(offer []swarm.GenericResource) []scheduler.Count {
	var out []scheduler.Count
	add := func(kind string, n int64) {
		for i := range out {
			if out[i].Kind == kind {
				out[i].N += n
				return
			}
		}
		out = append(out, scheduler.Count{Kind: kind, N: n})
	}
	for _, g := range offer {
		switch {
		case g.NamedResourceSpec != nil:
			add(g.NamedResourceSpec.Kind, 1)
		case g.DiscreteResourceSpec != nil:
			add(g.DiscreteResourceSpec.Kind, g.DiscreteResourceSpec.Value)
		}
	}
	return out
}

func pluginsOf(plugins []swarm.PluginDescription) []scheduler.Plugin {
	var out []scheduler.Plugin
	for _, p := range plugins {
		out = append(out, scheduler.Plugin{Type: p.Type, Name: p.Name})
	}
	return out
}

func stateOf(n *store.Node) scheduler.State {
	switch state := n.GetStatus().GetState(); {
	case state == string(swarm.NodeStateDown) || state == string(swarm.NodeStateDisconnected):
		return scheduler.Down
	case n.Availability == string(swarm.NodeAvailabilityDrain):
		return scheduler.Drained
	case n.Availability == string(swarm.NodeAvailabilityPause):
		return scheduler.Paused
	case state == string(swarm.NodeStateReady):
		return scheduler.Ready
	}
	return scheduler.Unknown
}

// RequirementsOf is what tasks of a service's revision ask of a node. The error names the part of the spec that cannot be honoured;
// control refuses such a spec with it.
func RequirementsOf(spec *swarm.ServiceSpec) (*scheduler.Requirements, error) {
	req := &scheduler.Requirements{}
	if r := spec.TaskTemplate.Resources; r != nil && r.Reservations != nil {
		for i, g := range r.Reservations.GenericResources {
			d := g.DiscreteResourceSpec
			if d == nil || d.Kind == "" || d.Value < 1 {
				return nil, fmt.Errorf("reservation of generic resource %d: want a kind and a number of 1 or more; the node chooses which ones", i)
			}
			if slices.ContainsFunc(req.Generic, func(c scheduler.Count) bool { return c.Kind == d.Kind }) {
				return nil, fmt.Errorf("generic resource %s is reserved twice", d.Kind)
			}
			req.Generic = append(req.Generic, scheduler.Count{Kind: d.Kind, N: d.Value})
		}
		req.Reserve = scheduler.Resources{NanoCPUs: r.Reservations.NanoCPUs, MemoryBytes: r.Reservations.MemoryBytes}
		if req.Reserve.NanoCPUs < 0 || req.Reserve.MemoryBytes < 0 {
			return nil, fmt.Errorf("reservation of CPU or memory is negative")
		}
	}
	if err := place(req, spec.TaskTemplate.Placement); err != nil {
		return nil, err
	}
	req.Plugins = driversOf(&spec.TaskTemplate)
	if spec.EndpointSpec != nil {
		for _, p := range spec.EndpointSpec.Ports {
			if p.PublishMode == swarm.PortConfigPublishModeHost && p.PublishedPort != 0 {
				proto := strings.ToLower(string(p.Protocol))
				if proto == "" {
					proto = "tcp"
				}
				req.Ports = append(req.Ports, scheduler.Port{Protocol: proto, Number: uint16(p.PublishedPort)})
			}
		}
	}
	return req, nil
}

// driversOf are the volume and log drivers that tasks need on their node, each once. What every node has is left out.
func driversOf(t *swarm.TaskSpec) []scheduler.Plugin {
	var out []scheduler.Plugin
	add := func(kind, name string) {
		if p := (scheduler.Plugin{Type: kind, Name: name}); !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	if d := t.LogDriver; d != nil && d.Name != "" && d.Name != "none" {
		add("Log", d.Name)
	}
	if t.ContainerSpec == nil {
		return out
	}
	for _, m := range t.ContainerSpec.Mounts {
		if o := m.VolumeOptions; m.Type == mount.TypeVolume && o != nil && o.DriverConfig != nil && o.DriverConfig.Name != "" && o.DriverConfig.Name != "local" {
			add("Volume", o.DriverConfig.Name)
		}
	}
	return out
}

func place(req *scheduler.Requirements, p *swarm.Placement) error {
	if p == nil {
		return nil
	}
	var err error
	if req.Constraints, err = scheduler.ParseConstraints(p.Constraints); err != nil {
		return err
	}
	for _, pf := range p.Platforms {
		req.Platforms = append(req.Platforms, scheduler.Platform{OS: pf.OS, Arch: pf.Architecture})
	}
	for _, pref := range p.Preferences {
		if pref.Spread == nil {
			return fmt.Errorf("placement preference without a strategy: only spread is known")
		}
		label, err := scheduler.ParseSpread(pref.Spread.SpreadDescriptor)
		if err != nil {
			return err
		}
		req.Spread = append(req.Spread, label)
	}
	req.MaxPerNode = int(min(p.MaxReplicas, 1<<30))
	return nil
}
