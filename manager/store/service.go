package store

import (
	"encoding/json"
	"slices"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/allocator"
	"skein/manager/api"
)

// Networks every node has by itself: a service may name them, the allocator has nothing to do for them.
const (
	NetworkHost   = "host"
	NetworkNone   = "none"
	NetworkBridge = "bridge"
)

// nodeNetwork reports whether a network target is one of the node's own networks.
func nodeNetwork(target string) bool {
	return target == NetworkHost || target == NetworkNone || target == NetworkBridge
}

// networkTargets lists the ids of the cluster networks a spec is attached to, each once.
func networkTargets(spec *swarm.ServiceSpec) []string {
	if spec == nil {
		return nil
	}
	var out []string
	for _, n := range spec.TaskTemplate.Networks {
		if !nodeNetwork(n.Target) && !slices.Contains(out, n.Target) {
			out = append(out, n.Target)
		}
	}
	return out
}

func decodeSpec(b []byte) (*swarm.ServiceSpec, error) {
	var spec swarm.ServiceSpec
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, err
	}
	return &spec, nil
}

// newService decodes a record; revisions that old has decoded already are taken from there.
func newService(rec *api.ServiceRecord, old *Service) (*Service, error) {
	v := &Service{ServiceRecord: rec, Revs: make(map[uint64]*swarm.ServiceSpec, len(rec.Revisions))}
	for _, r := range rec.Revisions {
		if old != nil && old.Revs[r.Number] != nil {
			v.Revs[r.Number] = old.Revs[r.Number]
			continue
		}
		spec, err := decodeSpec(r.SpecJson)
		if err != nil {
			return nil, api.Errorf(errInvalid, "service %s: revision %d: spec is not valid JSON of a service spec: %v", rec.Id, r.Number, err)
		}
		v.Revs[r.Number] = spec
	}
	v.Spec = v.Revs[rec.Revision]
	v.Previous = v.Revs[rec.Previous]
	if v.Spec == nil {
		return nil, api.Errorf(errDataLoss, "service %s: revision %d is missing", rec.Id, rec.Revision)
	}
	return v, nil
}

// withRevisions returns a copy that holds only the revisions keep agrees to.
func (v *Service) withRevisions(keep func(uint64) bool) *Service {
	rec := proto.Clone(v.ServiceRecord).(*api.ServiceRecord)
	rec.Revisions = slices.DeleteFunc(rec.Revisions, func(r *api.Revision) bool { return !keep(r.Number) })
	out := &Service{ServiceRecord: rec, Spec: v.Spec, Previous: v.Previous, Revs: make(map[uint64]*swarm.ServiceSpec, len(rec.Revisions))}
	for _, r := range rec.Revisions {
		out.Revs[r.Number] = v.Revs[r.Number]
	}
	return out
}

// NextGeneration is the generation for a new task of a slot: above the newest, and a number no task that was deleted can have had, so
// that ids of tasks are never used twice.
func NextGeneration(tx ReadTx, serviceID string, slot uint64, nodeID string) uint32 {
	g := max(1, uint32(tx.Version()))
	if t, ok := tx.NewestTask(serviceID, slot, nodeID); ok {
		g = max(g, t.Generation()+1)
	}
	return g
}

// serviceRequest is what a spec asks of the allocator.
func serviceRequest(rec *api.ServiceRecord, spec *swarm.ServiceSpec) allocator.ServiceRequest {
	req := allocator.ServiceRequest{ID: rec.Id, Name: rec.Name, Networks: networkTargets(spec), VIP: true, Avoid: rec.Avoid}
	if spec.EndpointSpec != nil {
		req.VIP = spec.EndpointSpec.Mode != swarm.ResolutionModeDNSRR
		for _, p := range spec.EndpointSpec.Ports {
			req.Ports = append(req.Ports, portOf(p))
		}
	}
	return req
}

func portOf(p swarm.PortConfig) *api.PortConfig {
	return &api.PortConfig{Protocol: string(p.Protocol), Target: p.TargetPort, Published: p.PublishedPort, Mode: string(p.PublishMode), Name: p.Name}
}

// taskRequest is what a task of this spec needs on any node. internal tells of each network whether it has no way out.
func taskRequest(spec *swarm.ServiceSpec, internal func(network string) bool) *allocator.TaskRequest {
	req := &allocator.TaskRequest{Generic: genericWishes(spec), Volumes: homeVolumes(spec)}
	published := false
	if spec.EndpointSpec != nil {
		for _, p := range spec.EndpointSpec.Ports {
			published = true
			c := portOf(p)
			if c.Mode != allocator.ModeHost || c.Published == 0 {
				continue
			}
			if c.Protocol == "" {
				c.Protocol = "tcp"
			}
			req.HostPorts = append(req.HostPorts, c)
		}
	}
	wayOut, own := len(spec.TaskTemplate.Networks) == 0, false
	for _, n := range spec.TaskTemplate.Networks {
		if nodeNetwork(n.Target) {
			own = own || n.Target != NetworkBridge
			wayOut = wayOut || n.Target == NetworkBridge
			continue
		}
		if slices.ContainsFunc(req.Networks, func(a allocator.Attach) bool { return a.NetworkID == n.Target }) {
			continue
		}
		req.Networks = append(req.Networks, allocator.Attach{NetworkID: n.Target, Aliases: n.Aliases})
		wayOut = wayOut || !internal(n.Target)
	}
	req.Gateway = !own && (published || wayOut)
	return req
}
