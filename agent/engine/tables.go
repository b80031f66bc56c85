package engine

import (
	"context"
	"fmt"
	"maps"
	"net/netip"

	"skein/agent"
	"skein/manager/api"
	"skein/overlay"
	"skein/overlay/crypt"
	"skein/overlay/dns"
)

// SetTables turns the cluster's tables into the overlay's configuration and applies it (agent.Network).
func (e *Engine) SetTables(ctx context.Context, t agent.Tables) map[string]error {
	e.attach.noteTables(t)
	cfg, bad := OverlayConfig(t)
	applied, err := e.cfg.Network.Set(ctx, cfg)
	if err != nil {
		all := map[string]error{api.MeshTable: err}
		for id := range t.Networks {
			all[id] = err
		}
		return all
	}
	for id, err := range applied {
		if err != nil {
			bad[id] = err
		}
	}
	return bad
}

// OverlayConfig is what the tables ask of the overlay. It is pure. Records that cannot be read are left out, and the table they are of is reported.
func OverlayConfig(t agent.Tables) (overlay.Config, map[string]error) {
	bad := map[string]error{}
	cfg := overlay.Config{DataPort: uint16(t.DataPort)}
	var err error
	if cfg.MeshPool, err = netip.ParsePrefix(t.MeshPool); err != nil {
		bad[api.MeshTable] = fmt.Errorf("mesh pool %q: %w", t.MeshPool, err)
	}
	if t.MeshPool6 != "" {
		if cfg.MeshPool6, err = netip.ParsePrefix(t.MeshPool6); err != nil {
			bad[api.MeshTable] = fmt.Errorf("IPv6 prefix %q of the mesh: %w", t.MeshPool6, err)
		}
	}
	nodes := map[uint32]*api.NodeEndpoint{}
	maps.Copy(nodes, t.Mesh.Nodes)
	for _, tab := range t.Networks { // while nothing is published, the mesh does not list them
		maps.Copy(nodes, tab.Nodes)
	}
	for _, idx := range sortedKeys(nodes) {
		n := nodes[idx]
		a, err := netip.ParseAddr(n.UnderlayAddr)
		if err != nil {
			bad[api.MeshTable] = fmt.Errorf("node %s: address %q: %w", n.NodeId, n.UnderlayAddr, err)
			continue
		}
		for _, text := range n.Addrs {
			if a := addr(text); a.IsValid() {
				cfg.NodeAddrs = append(cfg.NodeAddrs, a)
			}
		}
		node := overlay.Node{Index: n.Index, Hostname: n.Hostname, Underlay: a}
		if n.Index == t.NodeIndex {
			cfg.Self = node
		} else {
			if keys := cryptKeys(n.Keys); len(keys) > 0 {
				if cfg.Keys == nil {
					cfg.Keys = map[uint32][]crypt.Key{}
				}
				cfg.Keys[n.Index] = keys
			}
			cfg.Peers = append(cfg.Peers, node)
		}
	}
	cfg.Mesh = meshConfig(t.Mesh, t.NodeIndex)
	for _, id := range sortedKeys(t.Networks) {
		n, err := networkConfig(t.Networks[id])
		if err != nil {
			bad[id] = err
			continue
		}
		cfg.Networks = append(cfg.Networks, n)
	}
	return cfg, bad
}

func meshConfig(t agent.Table, self uint32) overlay.Mesh {
	m := overlay.Mesh{MTU: linkMTU(t.Network.EffectiveMTU())}
	backends, soon := map[string][]overlay.Backend{}, map[string][]overlay.Backend{}
	for _, id := range sortedKeys(t.Endpoints) {
		ep := t.Endpoints[id]
		b := overlay.Backend{EndpointID: ep.TaskId, Node: ep.NodeIndex, Addr4: addr(ep.Addr4), Addr6: addr(ep.Addr6)}
		switch overlay.EndpointState(ep.State) {
		case overlay.Ready:
			backends[ep.ServiceId] = append(backends[ep.ServiceId], b)
		case overlay.Starting:
			if ep.NodeIndex == self {
				soon[ep.ServiceId] = append(soon[ep.ServiceId], b)
			}
		case overlay.Draining:
			m.Leaving = append(m.Leaving, b)
		case overlay.Lost:
			m.Lost = append(m.Lost, b)
		}
		if ep.NodeIndex != self || ep.State != string(overlay.Ready) {
			continue
		}
		for _, p := range ep.HostPorts {
			m.Ports = append(m.Ports, overlay.PublishedPort{
				ServiceID: ep.ServiceId, Protocol: p.Protocol, Published: uint16(p.Published), Target: uint16(p.Target), Local: true, Backends: []overlay.Backend{b},
			})
		}
	}
	for id, list := range backends { // its ports were taken back, the task runs still
		if len(t.Services[id].GetPorts()) == 0 {
			m.Leaving = append(m.Leaving, list...)
		}
	}
	for _, id := range sortedKeys(t.Services) {
		for _, p := range t.Services[id].Ports {
			if p.Mode == "host" || p.Published == 0 {
				continue
			}
			m.Ports = append(m.Ports, overlay.PublishedPort{
				ServiceID: id, Protocol: p.Protocol, Published: uint16(p.Published), Target: uint16(p.Target), Backends: backends[id], Soon: soon[id],
			})
		}
	}
	return m
}

func networkConfig(t agent.Table) (overlay.Network, error) {
	rec := t.Network
	if rec == nil {
		return overlay.Network{}, fmt.Errorf("the table carries no network record")
	}
	n := overlay.Network{ID: rec.Id, Name: rec.Name, VNI: rec.Vni, MTU: linkMTU(rec.EffectiveMTU()), Internal: rec.Internal, Encrypted: rec.Encrypted}
	var err error
	if n.Subnet4, err = netip.ParsePrefix(rec.Subnet4); err != nil {
		return n, fmt.Errorf("network %s: subnet %q: %w", rec.Name, rec.Subnet4, err)
	}
	if rec.Subnet6 != "" {
		if n.Subnet6, err = netip.ParsePrefix(rec.Subnet6); err != nil {
			return n, fmt.Errorf("network %s: subnet %q: %w", rec.Name, rec.Subnet6, err)
		}
	}
	if err := networkRanges(rec, &n); err != nil {
		return n, fmt.Errorf("network %s: %w", rec.Name, err)
	}
	for _, id := range sortedKeys(t.Services) {
		s := t.Services[id]
		n.Services = append(n.Services, overlay.Service{
			ID: id, Names: append([]string{s.Name}, s.Aliases...), VIP4: addr(s.Vip4), VIP6: addr(s.Vip6), DNSRR: s.Dnsrr,
			Ports: namedPorts(s.Ports),
		})
	}
	for _, id := range sortedKeys(t.Endpoints) {
		ep := t.Endpoints[id]
		n.Endpoints = append(n.Endpoints, overlay.Endpoint{
			ID: id, ServiceID: ep.ServiceId, Node: ep.NodeIndex, Addr4: addr(ep.Addr4), Addr6: addr(ep.Addr6), State: overlay.EndpointState(ep.State), Names: ep.Names,
		})
	}
	return n, nil
}

// addr reads a plain address; what is none is the zero Addr, which the overlay takes as "has none".
func addr(s string) netip.Addr {
	a, _ := netip.ParseAddr(s)
	return a
}

// namedPorts are those that can be asked for by name.
func namedPorts(ports []*api.PortConfig) []dns.Port {
	var out []dns.Port
	for _, p := range ports {
		if p.Name != "" {
			out = append(out, dns.Port{Name: p.Name, Protocol: p.Protocol, Number: uint16(p.Target)})
		}
	}
	return out
}
