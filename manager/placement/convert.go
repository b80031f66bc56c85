package placement

import (
	"encoding/json"
	"fmt"
	"net"
	"strings"

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
		State:    stateOf(n),
	}
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
		if len(r.Reservations.GenericResources) > 0 {
			return nil, fmt.Errorf("reservation of generic resources is not supported yet: remove it from the spec")
		}
		req.Reserve = scheduler.Resources{NanoCPUs: r.Reservations.NanoCPUs, MemoryBytes: r.Reservations.MemoryBytes}
		if req.Reserve.NanoCPUs < 0 || req.Reserve.MemoryBytes < 0 {
			return nil, fmt.Errorf("reservation of CPU or memory is negative")
		}
	}
	if err := place(req, spec.TaskTemplate.Placement); err != nil {
		return nil, err
	}
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
