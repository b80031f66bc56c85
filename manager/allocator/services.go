package allocator

import (
	"maps"
	"net/netip"
	"slices"

	"skein/manager/api"
)

// Port is a protocol and a port number on the nodes.
type Port struct {
	Protocol string
	Number   uint32
}

type nodePort struct {
	node string
	Port
}

// ServiceRequest is what a service's spec asks for.
type ServiceRequest struct {
	ID, Name string
	Networks []string // ids of the cluster's networks it is attached to, each once
	VIP      bool     // a virtual address on each of them
	Ports    []*api.PortConfig
	Avoid    []*api.PortConfig // not to be chosen where the spec leaves it
}

// Publish modes.
const (
	ModeIngress = "ingress"
	ModeHost    = "host"
)

// SetService makes what the service holds agree with the request; oldVIPs and oldPorts are what it held. What stays the same keeps
// its addresses and dynamic ports. On an error the caller rolls back.
func (s *State) SetService(req ServiceRequest, oldVIPs []*api.VIP, oldPorts []*api.PortConfig, now int64) ([]*api.VIP, []*api.PortConfig, error) {
	Set(s.j, s.names, req.ID, req.Name)
	ports, err := s.setPorts(req, oldPorts)
	if err != nil {
		return nil, nil, err
	}
	vips, err := s.setVIPs(req, oldVIPs, now)
	return vips, ports, err
}

// RemoveService frees all that a service holds.
func (s *State) RemoveService(id string, vips []*api.VIP, ports []*api.PortConfig, now int64) {
	s.dropPorts(id, ports)
	for _, v := range vips {
		s.giveText(v.NetworkId, v.Addr4, now)
	}
	Unset(s.j, s.names, id)
}

// RestoreService takes over what a service's record says it holds.
func (s *State) RestoreService(id, name string, vips []*api.VIP, ports []*api.PortConfig) error {
	Set(s.j, s.names, id, name)
	for _, v := range vips {
		p := s.pools[v.NetworkId]
		a, err := netip.ParseAddr(v.Addr4)
		if p == nil || err != nil {
			return dataLoss("service %s: virtual address %q on network %s: no such network or address", id, v.Addr4, v.NetworkId)
		}
		if err := s.hold(p, a); err != nil {
			return err
		}
	}
	for _, p := range ports {
		if err := s.claim(id, p); err != nil {
			return dataLoss("service %s: %v", id, err)
		}
	}
	return nil
}

func (s *State) setVIPs(req ServiceRequest, old []*api.VIP, now int64) ([]*api.VIP, error) {
	var vips []*api.VIP
	keep := map[string]*api.VIP{}
	for _, v := range old {
		if req.VIP && slices.Contains(req.Networks, v.NetworkId) {
			keep[v.NetworkId] = v
		} else {
			s.giveText(v.NetworkId, v.Addr4, now)
		}
	}
	if !req.VIP {
		return nil, nil
	}
	for _, id := range req.Networks {
		if v := keep[id]; v != nil {
			vips = append(vips, v)
			continue
		}
		p := s.pools[id]
		if p == nil {
			return nil, invalid("service %q: network %s does not exist", req.Name, id)
		}
		off, err := s.take(p)
		if err != nil {
			return nil, exhausted("service %q: %v", req.Name, err)
		}
		v := &api.VIP{NetworkId: id, Addr4: p.addr4(off).String()}
		if a := p.addr6(off); a.IsValid() {
			v.Addr6 = a.String()
		}
		vips = append(vips, v)
	}
	return vips, nil
}

func (s *State) giveText(poolName, addr string, now int64) {
	if a, err := netip.ParseAddr(addr); err == nil {
		s.give(s.poolOf(poolName), poolName, a, now)
	}
}

// setPorts claims the published ports: named ones first, then dynamic ones.
func (s *State) setPorts(req ServiceRequest, old []*api.PortConfig) ([]*api.PortConfig, error) {
	s.dropPorts(req.ID, old)
	out := make([]*api.PortConfig, len(req.Ports))
	for i, p := range req.Ports {
		c := &api.PortConfig{Protocol: p.Protocol, Target: p.Target, Published: p.Published, Mode: p.Mode, Name: p.Name}
		if c.Protocol == "" {
			c.Protocol = "tcp"
		}
		if c.Mode == "" {
			c.Mode = ModeIngress
		}
		if err := checkPort(req.Name, c); err != nil {
			return nil, err
		}
		out[i] = c
		if c.Published == 0 {
			continue
		}
		if err := s.claim(req.ID, c); err != nil {
			return nil, err
		}
	}
	for _, c := range out {
		if c.Published != 0 || c.Mode != ModeIngress {
			continue // a host port of 0 is the node's choice
		}
		if err := s.claimDynamic(req, c, old); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func checkPort(service string, c *api.PortConfig) error {
	switch {
	case c.Protocol != "tcp" && c.Protocol != "udp" && c.Protocol != "sctp":
		return invalid("service %q: port %d: protocol %q is not tcp, udp or sctp", service, c.Target, c.Protocol)
	case c.Mode != ModeIngress && c.Mode != ModeHost:
		return invalid("service %q: port %d: publish mode %q is not ingress or host", service, c.Target, c.Mode)
	case c.Target == 0 || c.Target > 65535:
		return invalid("service %q: target port %d is not in 1..65535", service, c.Target)
	case c.Published > 65535:
		return invalid("service %q: published port %d is not in 1..65535", service, c.Published)
	}
	return nil
}

func (s *State) claim(id string, c *api.PortConfig) error {
	k := Port{c.Protocol, c.Published}
	if holder, taken := s.ingress[k]; taken {
		return s.portTaken(id, c, holder, ModeIngress)
	}
	if c.Mode == ModeHost {
		if c.Published == 0 {
			return nil
		}
		users := maps.Clone(s.hostWish[k])
		if users == nil {
			users = map[string]bool{}
		}
		if users[id] {
			return invalid("service %q: port %d/%s is published twice", s.names[id], c.Published, c.Protocol)
		}
		users[id] = true
		Set(s.j, s.hostWish, k, users)
		return nil
	}
	if users := slices.Sorted(maps.Keys(s.hostWish[k])); len(users) > 0 {
		return s.portTaken(id, c, users[0], ModeHost)
	}
	Set(s.j, s.ingress, k, id)
	return nil
}

func (s *State) portTaken(id string, c *api.PortConfig, holder, mode string) error {
	if holder == id {
		return invalid("service %q: port %d/%s is published twice", s.names[id], c.Published, c.Protocol)
	}
	return conflict("service %q: port %d/%s is already in use by service %q (%s mode): publish another port, or remove it from that service first",
		s.names[id], c.Published, c.Protocol, s.names[holder], mode)
}

func (s *State) claimDynamic(req ServiceRequest, c *api.PortConfig, old []*api.PortConfig) error {
	free := func(n uint32) bool {
		k := Port{c.Protocol, n}
		_, taken := s.ingress[k]
		return !taken && len(s.hostWish[k]) == 0 &&
			!slices.ContainsFunc(req.Avoid, func(a *api.PortConfig) bool { return a.Protocol == c.Protocol && a.Published == n })
	}
	for _, o := range old {
		if o.Protocol == c.Protocol && o.Target == c.Target && o.Mode == c.Mode && o.Name == c.Name &&
			o.Published >= dynamicFirst && o.Published <= dynamicLast && free(o.Published) {
			c.Published = o.Published
			return s.claim(req.ID, c)
		}
	}
	for n := uint32(dynamicFirst); n <= dynamicLast; n++ {
		if free(n) {
			c.Published = n
			return s.claim(req.ID, c)
		}
	}
	return exhausted("service %q: all dynamic ports %d..%d/%s are taken: publish target port %d on a port of your choice",
		req.Name, dynamicFirst, dynamicLast, c.Protocol, c.Target)
}

func (s *State) dropPorts(id string, ports []*api.PortConfig) {
	for _, p := range ports {
		k := Port{p.Protocol, p.Published}
		if p.Mode != ModeHost {
			if s.ingress[k] == id {
				Unset(s.j, s.ingress, k)
			}
			continue
		}
		if !s.hostWish[k][id] {
			continue
		}
		users := maps.Clone(s.hostWish[k])
		delete(users, id)
		if len(users) == 0 {
			Unset(s.j, s.hostWish, k)
		} else {
			Set(s.j, s.hostWish, k, users)
		}
	}
}
