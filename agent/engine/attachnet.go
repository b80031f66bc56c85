package engine

import (
	"context"
	"net/netip"
	"slices"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
)

// lookWait bounds the question to the managers which network a name means.
const lookWait = 10 * time.Second

// clusterNetwork resolves a reference that no network of this node has as its name or id: a name, id or unique id prefix of a network of the
// cluster. Without one, or outside of a cluster, it is nil.
func (e *Engine) clusterNetwork(ctx context.Context, ref string) (*network.Inspect, error) {
	c := e.attach.cluster
	if c == nil || !c.Member() || e.nets.has(ref) {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookWait)
	defer cancel()
	n, err := c.NodeNetwork(ctx, ref)
	_, own := e.nets.find(ref)
	switch {
	case cerrdefs.IsNotFound(err):
		return nil, nil
	case err != nil && own == nil:
		return nil, nil // by the beginning of its id
	case err != nil:
		return nil, err
	case n.Name != ref && n.ID != ref && !cerrdefs.IsNotFound(own):
		return nil, nil // likewise
	}
	return &n, nil
}

// has reports whether a network of this node has the name or id.
func (n *localNetworks) has(ref string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byID[ref] != nil {
		return true
	}
	for _, l := range n.byID {
		if l.Name == ref {
			return true
		}
	}
	return false
}

// clusterEndpoint checks what a user wishes of a network of the cluster. The name is empty when the reference means a network of this node, or
// none.
func (e *Engine) clusterEndpoint(ref string, s *network.EndpointSettings) (string, *network.EndpointSettings, error) {
	n, err := e.clusterNetwork(context.Background(), ref)
	if n == nil || err != nil {
		return "", nil, err
	}
	settings, err := attachSettings(n, s)
	return n.Name, settings, err
}

// attachSettings checks what a user wishes of a network and keeps it.
func attachSettings(n *network.Inspect, s *network.EndpointSettings) (*network.EndpointSettings, error) {
	switch {
	case n.Ingress || !n.Attachable:
		return nil, errf(errDenied, "Could not attach to network %s: network %s not manually attachable", n.Name, n.Name)
	case len(s.MacAddress) > 0:
		return nil, notBuilt("--mac-address on networks of the cluster is not supported by this version of skein")
	case len(s.Links) > 0:
		return nil, invalid("legacy links are for networks of one node: use --network-alias on network %s", n.Name)
	case len(s.DriverOpts) > 0:
		return nil, notBuilt("driver options of an endpoint on network %s are not supported by this version of skein", n.Name)
	}
	if c := s.IPAMConfig; c != nil {
		if err := checkWished(n, c); err != nil {
			return nil, err
		}
	}
	return &network.EndpointSettings{NetworkID: n.ID, Aliases: s.Aliases, IPAMConfig: s.IPAMConfig, GwPriority: s.GwPriority}, nil
}

// checkWished refuses addresses that the network cannot have; whether one is free is the managers' to say, at the start.
func checkWished(n *network.Inspect, c *network.EndpointIPAMConfig) error {
	if len(c.LinkLocalIPs) > 0 {
		return notBuilt("link-local addresses on networks of the cluster are not supported by this version of skein")
	}
	for _, a := range []netip.Addr{c.IPv4Address, c.IPv6Address} {
		family := func(p network.IPAMConfig) bool { return p.Subnet.Addr().Is4() == a.Is4() }
		if a.IsValid() && slices.ContainsFunc(n.IPAM.Config, family) && !slices.ContainsFunc(n.IPAM.Config, func(p network.IPAMConfig) bool { return p.Subnet.Contains(a) }) {
			return invalid("invalid endpoint settings: no configured subnet or ip-range contain the IP address %s: network %s", a, n.Name)
		}
	}
	return nil
}
