package allocator

import (
	"net/netip"
	"slices"

	"skein/manager/api"
)

// Addresses of containers that are no tasks. Unlike a task's they may be asked for, change one by one, and be IPv6 addresses that belong to no
// IPv4 address; those are kept apart, in fixed6.

// fixedKey is an IPv6 address of a network that no offset of its IPv4 range stands for.
type fixedKey struct {
	network string
	addr    netip.Addr
}

// SetAttachment allocates what a wish asks for and its record (nil: none yet) does not hold, and puts to rest what the record holds beyond
// it; with gateway, that is an address of the node's block, too. On an error the caller rolls back.
func (s *State) SetAttachment(old *api.AttachmentRecord, w *api.AttachmentWish, gateway bool, now int64) (*api.AttachmentRecord, error) {
	rec := &api.AttachmentRecord{Id: w.Id, NodeId: w.NodeId, Name: w.Name, Active: w.Active}
	kept := map[string]*api.AttachedNetwork{}
	for _, n := range old.GetNetworks() {
		i := slices.IndexFunc(w.Networks, func(x *api.AttachedNetwork) bool { return x.NetworkId == n.NetworkId })
		if i >= 0 && Keeps(n, w.Networks[i]) {
			kept[n.NetworkId] = n
		} else {
			s.giveAttached(w.Id, n, now)
		}
	}
	for _, n := range w.Networks {
		k := kept[n.NetworkId]
		if k == nil {
			var err error
			if k, err = s.takeAttached(w.Id, n); err != nil {
				return nil, err
			}
		}
		rec.Networks = append(rec.Networks, &api.AttachedNetwork{NetworkId: n.NetworkId, Addr4: k.Addr4, Addr6: k.Addr6, Fixed4: k.Fixed4, Fixed6: k.Fixed6, Names: n.Names})
	}
	switch {
	case gateway && old.GetGateway4() != "":
		rec.Gateway4, rec.Gateway6 = old.Gateway4, old.Gateway6
	case gateway:
		p := s.meshes[w.NodeId]
		if p == nil {
			return nil, invalid("node %s does not exist any more", w.NodeId)
		}
		off, err := s.take(p)
		if err != nil {
			return nil, err
		}
		rec.Gateway4 = p.addr4(off).String()
		if a := p.addr6(off); a.IsValid() {
			rec.Gateway6 = a.String()
		}
	case old.GetGateway4() != "":
		s.giveText(meshPrefix+w.NodeId, old.Gateway4, now)
	}
	return rec, nil
}

// Keeps reports whether what a container holds of a network is what it wishes now.
func Keeps(held, wish *api.AttachedNetwork) bool {
	same := func(prefix string, fixed bool, want string) bool {
		if want == "" {
			return !fixed
		}
		p, err := netip.ParsePrefix(prefix)
		a, e := netip.ParseAddr(want)
		return err == nil && e == nil && p.Addr() == a && fixed
	}
	return same(held.Addr4, held.Fixed4, wish.Addr4) && same(held.Addr6, held.Fixed6, wish.Addr6)
}

// RemoveAttachment puts all that a container holds to rest.
func (s *State) RemoveAttachment(rec *api.AttachmentRecord, now int64) {
	for _, n := range rec.Networks {
		s.giveAttached(rec.Id, n, now)
	}
	s.giveText(meshPrefix+rec.NodeId, rec.Gateway4, now)
}

// LeaveNetwork puts to rest what a container holds of one network.
func (s *State) LeaveNetwork(id string, n *api.AttachedNetwork, now int64) {
	s.giveAttached(id, n, now)
}

// RestoreAttachment takes over what a record says its container holds.
func (s *State) RestoreAttachment(rec *api.AttachmentRecord) error {
	for _, n := range rec.Networks {
		p := s.pools[n.NetworkId]
		a, err := netip.ParsePrefix(n.Addr4)
		if p == nil || err != nil {
			return dataLoss("container %s: address %q on network %s: no such network or address", rec.Id, n.Addr4, n.NetworkId)
		}
		if err := s.hold(p, a.Addr()); err != nil {
			return err
		}
		if !n.Fixed6 {
			continue
		}
		six, err := netip.ParsePrefix(n.Addr6)
		if err != nil {
			return dataLoss("container %s: address %q on network %s is none", rec.Id, n.Addr6, n.NetworkId)
		}
		switch off, ok := p.offset6(six.Addr()); {
		case !ok:
			Set(s.j, s.fixed6, fixedKey{n.NetworkId, six.Addr()}, rec.Id)
		case p.addr4(off) != a.Addr():
			if err := s.hold(p, p.addr4(off)); err != nil {
				return err
			}
		}
	}
	if rec.Gateway4 == "" {
		return nil
	}
	p, a := s.meshes[rec.NodeId], netip.Addr{}
	if p != nil {
		a, _ = netip.ParseAddr(rec.Gateway4)
	}
	if !a.IsValid() {
		return dataLoss("container %s has gateway address %q on node %s: no such node or address", rec.Id, rec.Gateway4, rec.NodeId)
	}
	return s.hold(p, a)
}

// takeAttached allocates one network's addresses. Asked for, an address that rests is given: who names it knows that it was in use.
func (s *State) takeAttached(id string, n *api.AttachedNetwork) (*api.AttachedNetwork, error) {
	p := s.pools[n.NetworkId]
	if p == nil {
		return nil, invalid("network %s does not exist any more", n.NetworkId)
	}
	out := &api.AttachedNetwork{NetworkId: n.NetworkId, Fixed4: n.Addr4 != "", Fixed6: n.Addr6 != ""}
	want6, err := s.wished6(p, n)
	if err != nil {
		return nil, err
	}
	off, err := s.offsetFor(p, n, want6)
	if err != nil {
		return nil, err
	}
	out.Addr4 = p.prefix4(off).String()
	six := p.prefix6(off)
	if want6.IsValid() && want6 != six.Addr() {
		if other, ok := p.offset6(want6); ok {
			if err := s.takeAt(p, n.NetworkId, p.addr4(other), want6); err != nil {
				return nil, err
			}
		} else {
			Set(s.j, s.fixed6, fixedKey{n.NetworkId, want6}, id)
		}
		six = netip.PrefixFrom(want6, p.subnet6(want6).Bits())
	}
	if six.IsValid() {
		out.Addr6 = six.String()
	}
	return out, nil
}

// wished6 is the IPv6 address that was asked for, if it can be had.
func (s *State) wished6(p *pool, n *api.AttachedNetwork) (netip.Addr, error) {
	if n.Addr6 == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(n.Addr6)
	switch {
	case err != nil || !a.Is6():
		return a, invalid("address %q on %s is not an IPv6 address", n.Addr6, p.title)
	case p.prefixes6() == "":
		return a, invalid("address %s on %s: the network has no IPv6 addresses", a, p.title)
	case !p.subnet6(a).IsValid():
		return a, invalid("invalid address %s: it does not belong to subnet %s of %s", a, p.prefixes6(), p.title)
	case p.reserved6(a):
		return a, invalid("invalid address %s: it belongs to %s itself", a, p.title)
	}
	if _, held := s.fixed6[fixedKey{n.NetworkId, a}]; held {
		return a, conflict("address %s of %s is already in use", a, p.title)
	}
	return a, nil
}

// offsetFor takes the offset of the IPv4 address that was asked for, else that of the IPv6 address, else the lowest that is free.
func (s *State) offsetFor(p *pool, n *api.AttachedNetwork, want6 netip.Addr) (uint32, error) {
	if n.Addr4 != "" {
		a, err := netip.ParseAddr(n.Addr4)
		if err != nil || !a.Is4() {
			return 0, invalid("address %q on %s is not an IPv4 address", n.Addr4, p.title)
		}
		off, ok := p.offset4(a)
		switch {
		case !ok:
			return 0, invalid("invalid address %s: it does not belong to subnet %s of %s", a, p.prefixes(), p.title)
		case !p.usable(off):
			return 0, invalid("invalid address %s: it belongs to %s itself", a, p.title)
		}
		return off, s.takeAt(p, n.NetworkId, a, a)
	}
	if want6.IsValid() {
		if off, ok := p.offset6(want6); ok {
			return off, s.takeAt(p, n.NetworkId, p.addr4(off), want6)
		}
	}
	return s.take(p)
}

// takeAt takes a certain address, also one that rests. shown is what the user calls it.
func (s *State) takeAt(p *pool, poolName string, addr, shown netip.Addr) error {
	off, ok := p.offset4(addr)
	if !ok {
		return invalid("address %s is not of %s", shown, p.title)
	}
	if !p.has(off) {
		p.set(off)
		s.j.addTaken(p, off)
		return nil
	}
	text := addr.String()
	items := s.rest.items()
	i := slices.IndexFunc(items, func(r resting) bool { return r.pool == poolName && r.addr == text })
	if i < 0 {
		return conflict("address %s of %s is already in use", shown, p.title)
	}
	all, head := s.rest.all, s.rest.head
	s.rest.all, s.rest.head = slices.Concat(items[:i], items[i+1:]), 0
	p.resting--
	s.j.Add(func() {
		s.rest.all, s.rest.head = all, head
		p.resting++
	})
	return nil
}

// giveAttached puts the addresses of one network to rest.
func (s *State) giveAttached(id string, n *api.AttachedNetwork, now int64) {
	p := s.pools[n.NetworkId]
	a, err := netip.ParsePrefix(n.Addr4)
	if p == nil || err != nil {
		return // the network is gone and all its addresses with it
	}
	s.give(p, n.NetworkId, a.Addr(), now)
	six, err := netip.ParsePrefix(n.Addr6)
	if !n.Fixed6 || err != nil {
		return
	}
	switch off, ok := p.offset6(six.Addr()); {
	case ok && p.addr4(off) != a.Addr():
		s.give(p, n.NetworkId, p.addr4(off), now)
	case !ok && s.fixed6[fixedKey{n.NetworkId, six.Addr()}] == id:
		Unset(s.j, s.fixed6, fixedKey{n.NetworkId, six.Addr()})
	}
}

// Published counts the ports that services publish through the mesh.
func (s *State) Published() int { return len(s.ingress) }
