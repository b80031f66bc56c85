package control

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/dispatcher"
	"skein/manager/store"
)

// What nodes have beside the cluster's networks must not be taken from them: their routes, and ports that others listen on. Nodes tell it over
// their sessions; nothing of it is in the log, so it refuses wishes here and never decides what an entry means.

// facts are what the nodes say, as it is now if fresh. A wish is not refused for what could not be learnt.
func (s *Server) facts(ctx context.Context, fresh bool) []dispatcher.NodeFacts {
	o := s.observer()
	if o == nil {
		return nil
	}
	all, err := o.Facts(ctx, fresh)
	if err != nil {
		s.log.Warn("nodes' routes and ports are not known", "err", err)
	}
	return all
}

// checkRoutes refuses a subnet to which a node has another route, and has ranges that nobody named keep clear of such routes.
func checkRoutes(c *store.Cluster, rec *api.NetworkRecord, facts []dispatcher.NodeFacts) error {
	if rec.Labels[optionOverlap] != "allow" {
		for _, p := range subnetsOf(rec) {
			for _, f := range facts {
				if r, err := overlapping(f, p); err == nil {
					return api.Errorf(errdefs.ErrConflict, "network %s: subnet %s overlaps with the route to %s%s of node %s: choose another subnet, or set the label %s=allow if no container of the network has to reach what is there",
						rec.Name, p, r.Prefix, through(r), f.Hostname, optionOverlap)
				}
			}
		}
	}
	if c.GetFeatureLevel() < api.LevelNetworks {
		return nil
	}
	pools := c.OverlayPools
	if len(pools) == 0 {
		pools = []string{c.OverlayPool}
	}
	for _, text := range pools {
		pool, err := netip.ParsePrefix(text)
		for _, f := range facts {
			for _, r := range f.Routes {
				if p, e := netip.ParsePrefix(r.Prefix); err == nil && e == nil && p.Overlaps(pool) && p.Bits() > pool.Bits() && len(rec.Avoid) < maxAvoid {
					rec.Avoid = append(rec.Avoid, p.String())
				}
			}
		}
	}
	slices.Sort(rec.Avoid)
	rec.Avoid = slices.Compact(rec.Avoid)
	return nil
}

// maxAvoid bounds what a network's record keeps clear of.
const maxAvoid = 1024

// overlapping is the first route of a node that a prefix overlaps.
func overlapping(f dispatcher.NodeFacts, p netip.Prefix) (*api.FactRoute, error) {
	for _, r := range f.Routes {
		if q, err := netip.ParsePrefix(r.Prefix); err == nil && q.Overlaps(p) {
			return r, nil
		}
	}
	return nil, errdefs.ErrNotFound
}

func through(r *api.FactRoute) string {
	if r.Device == "" {
		return ""
	}
	return " (" + r.Device + ")"
}

// meshPorts are the ports that a spec publishes on every node.
func meshPorts(spec *swarm.ServiceSpec) []swarm.PortConfig {
	if spec == nil || spec.EndpointSpec == nil {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(spec.EndpointSpec.Ports), func(p swarm.PortConfig) bool { return p.PublishMode == swarm.PortConfigPublishModeHost })
}

// newPorts are those that the service has not got yet.
func newPorts(spec *swarm.ServiceSpec, old *store.Service) []swarm.PortConfig {
	return slices.DeleteFunc(meshPorts(spec), func(p swarm.PortConfig) bool {
		return old != nil && p.PublishedPort != 0 && slices.ContainsFunc(old.Ports, func(o *api.PortConfig) bool {
			return o.Mode != "host" && o.Published == p.PublishedPort && o.Protocol == protocolOf(p)
		})
	})
}

// portFacts are what nodes say when ports are to be published.
func (s *Server) portFacts(ctx context.Context, ports []swarm.PortConfig) []dispatcher.NodeFacts {
	if len(ports) == 0 {
		return nil
	}
	return s.facts(ctx, true)
}

// addedPorts are those that an update adds; all of them as long as the service is not known here.
func (s *Server) addedPorts(ref string, spec *swarm.ServiceSpec) (out []swarm.PortConfig) {
	s.cfg.Store.View(func(tx store.ReadTx) {
		old, _ := tx.FindService(ref)
		out = newPorts(spec, old)
	})
	return out
}

// settlePorts refuses ports that others have, and tells Apply which ones not to choose. A rollback has no spec here: its ports were the
// service's before.
func settlePorts(tx store.ReadTx, rec *api.ServiceRecord, spec *swarm.ServiceSpec, old *store.Service, facts []dispatcher.NodeFacts) error {
	added := newPorts(spec, old)
	rec.Avoid = avoided(tx.Cluster(), added, facts)
	if len(added) == 0 {
		return nil
	}
	if err := checkTunnelPorts(tx.Cluster(), spec.Name, added); err != nil {
		return err
	}
	return checkPorts(spec.Name, added, facts)
}

// checkTunnelPorts refuses the ports on which nodes exchange the packets of containers, whether any node uses them by now or not.
func checkTunnelPorts(c *store.Cluster, name string, ports []swarm.PortConfig) error {
	for _, p := range ports {
		if n := p.PublishedPort; protocolOf(p) == "udp" && n != 0 && (n == c.GetDataPort() || n == api.CryptPort || n == api.CryptPort+1) {
			return api.Errorf(errdefs.ErrConflict, "service %s: port %d/udp is one on which nodes exchange the packets of their containers: publish another port", name, n)
		}
	}
	return nil
}

func protocolOf(p swarm.PortConfig) string {
	if p.Protocol == "" {
		return "tcp"
	}
	return string(p.Protocol)
}

// checkPorts refuses ports that somebody else has on some node: the mesh would take them from him.
func checkPorts(name string, ports []swarm.PortConfig, facts []dispatcher.NodeFacts) error {
	for _, p := range ports {
		if p.PublishedPort == 0 {
			continue
		}
		for _, f := range facts {
			if u := holder(f, protocolOf(p), p.PublishedPort); u != nil {
				return api.Errorf(errdefs.ErrConflict, "service %s: port %d/%s is already in use on node %s by %s: publish another port, or end that first",
					name, p.PublishedPort, protocolOf(p), f.Hostname, holderText(u))
			}
		}
	}
	return nil
}

func holder(f dispatcher.NodeFacts, protocol string, port uint32) *api.FactPort {
	i := slices.IndexFunc(f.Ports, func(u *api.FactPort) bool { return u.Port == port && u.Protocol == protocol })
	if i < 0 {
		return nil
	}
	return f.Ports[i]
}

func holderText(u *api.FactPort) string {
	if u.Pid == 0 {
		return u.Holder
	}
	return fmt.Sprintf("%s (pid %d)", u.Holder, u.Pid)
}

// The range that ports are chosen from.
const firstChosen, lastChosen = 30000, 32767

// avoided are the ports that are not to be chosen for a spec that leaves the choice.
func avoided(c *store.Cluster, ports []swarm.PortConfig, facts []dispatcher.NodeFacts) []*api.PortConfig {
	if c.GetFeatureLevel() < api.LevelNetworks || !slices.ContainsFunc(ports, func(p swarm.PortConfig) bool { return p.PublishedPort == 0 }) {
		return nil
	}
	seen := map[string]bool{}
	var out []*api.PortConfig
	for _, f := range facts {
		for _, u := range f.Ports {
			if key := fmt.Sprint(u.Protocol, u.Port); u.Port >= firstChosen && u.Port <= lastChosen && !seen[key] {
				seen[key] = true
				out = append(out, &api.PortConfig{Protocol: u.Protocol, Published: u.Port})
			}
		}
	}
	return out
}
