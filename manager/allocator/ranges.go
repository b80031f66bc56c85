package allocator

import (
	"fmt"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"skein/manager/api"
)

// maxRanges bounds the ranges of one network. Each one that is added by itself doubles it, so this is never what ends the growth.
const maxRanges = 32

// partOf reads a range of a record that has all it needs. The first one of a network has the router's address.
func partOf(r *api.NetworkRange, first bool) (*part, error) {
	v4, err := netip.ParsePrefix(r.Subnet4)
	if err != nil || !v4.Addr().Is4() || v4.Bits() < 8 || v4.Bits() > 29 {
		return nil, fmt.Errorf("subnet %q is not an IPv4 range of /8 to /29", r.Subnet4)
	}
	var v6 netip.Prefix
	var base6 netip.Addr
	if r.Subnet6 != "" {
		if v6, err = netip.ParsePrefix(r.Subnet6); err != nil || !v6.Addr().Is6() {
			return nil, fmt.Errorf("subnet %q is not an IPv6 range", r.Subnet6)
		}
		base6 = v6.Addr()
	}
	if r.Base6 != "" {
		if base6, err = netip.ParseAddr(r.Base6); err != nil || !v6.IsValid() {
			return nil, fmt.Errorf("address %q is not the base of an IPv6 range", r.Base6)
		}
	}
	p := newPart(v4, v6, base6)
	if r.Range4 != "" {
		if err := p.narrow(r.Range4); err != nil {
			return nil, err
		}
	}
	return p, p.bar(r, first)
}

// narrow has addresses that nobody asked for taken from a range within the subnet.
func (r *part) narrow(text string) error {
	p, err := netip.ParsePrefix(text)
	if err != nil || p != p.Masked() || !p.Addr().Is4() || p.Bits() < r.v4.Bits() || !r.v4.Contains(p.Addr()) {
		return fmt.Errorf("range %q is not within subnet %s", text, r.v4)
	}
	off, _ := offset(r.v4, p.Addr())
	r.first, r.last = max(r.first, off), min(r.last, off+size4(p)-1)
	return nil
}

// bar keeps the gateway's and the reserved addresses.
func (r *part) bar(rec *api.NetworkRange, first bool) error {
	all4, all6 := slices.Sorted(maps.Values(rec.Aux4)), slices.Sorted(maps.Values(rec.Aux6))
	if rec.Gateway4 != "" {
		all4 = append(all4, rec.Gateway4)
	} else if first {
		r.barred[1] = true
	}
	if rec.Gateway6 != "" {
		all6 = append(all6, rec.Gateway6)
	} else if first && r.v6.IsValid() {
		all6 = append(all6, r.v6.Addr().Next().String())
	}
	for _, text := range all4 {
		a, err := netip.ParseAddr(text)
		off, ok := offset(r.v4, a)
		if err != nil || !ok {
			return fmt.Errorf("address %q is not in subnet %s", text, r.v4)
		}
		r.barred[off] = true
	}
	for _, text := range all6 {
		a, err := netip.ParseAddr(text)
		if err != nil || !r.v6.Contains(a) {
			return fmt.Errorf("address %q is not in subnet %s", text, r.v6)
		}
		r.taboo6[a] = true
		if d, ok := distance6(r.base6, a); ok && d < uint64(size4(r.v4)) {
			r.barred[uint32(d)] = true
		}
	}
	return nil
}

// chooseRanges completes the ranges of a new network. Those that it names may be another network's, too, from api.LevelNetworks on: each
// network is a world of its own, and nothing can be on both.
func (s *State) chooseRanges(n *api.NetworkRecord) error {
	if s.level < api.LevelNetworks {
		n.Ranges, n.NoIpv6, n.NoGrowth, n.PathMtu, n.Avoid = nil, false, false, 0, nil
	}
	if len(n.Ranges) > maxRanges {
		return invalid("create network %q: it has %d ranges, %d are possible", n.Name, len(n.Ranges), maxRanges)
	}
	all := n.Ranges
	if len(all) == 0 {
		all = []*api.NetworkRange{{Subnet4: n.Subnet4, Subnet6: n.Subnet6}}
	}
	var done []span
	offsets := uint64(0)
	for i, r := range all {
		if err := s.chooseSubnet4(n, r, done); err != nil {
			return err
		}
		v4 := netip.MustParsePrefix(r.Subnet4)
		if offsets += uint64(size4(v4)); offsets > maxOffsets {
			return invalid("create network %q: its ranges have more than %d addresses", n.Name, maxOffsets)
		}
		if err := s.chooseSubnet6(n, all[:i], r); err != nil {
			return err
		}
		v6, _ := netip.ParsePrefix(r.Subnet6)
		done = append(done, span{v4, v6})
		if err := s.checkPart(n, r, i == 0); err != nil {
			return err
		}
	}
	n.Subnet4, n.Subnet6 = all[0].Subnet4, all[0].Subnet6
	return nil
}

// checkPart refuses what a range's options cannot mean.
func (s *State) checkPart(n *api.NetworkRecord, r *api.NetworkRange, first bool) error {
	p, err := partOf(r, first)
	if err != nil {
		return invalid("create network %q: %v", n.Name, err)
	}
	if off, ok := offset(p.v4, parseAddr(r.Gateway4)); ok && (off == 0 || off == size4(p.v4)-1) {
		return invalid("create network %q: gateway %s is the first or last address of subnet %s, which no host can have", n.Name, r.Gateway4, p.v4)
	}
	if p.first > p.last {
		return invalid("create network %q: range %s of subnet %s has no address for a container", n.Name, r.Range4, p.v4)
	}
	return nil
}

func (s *State) chooseSubnet4(n *api.NetworkRecord, r *api.NetworkRange, own []span) error {
	if r.Subnet4 == "" {
		p, ok := s.freeSubnet(s.bits, own, parseAll(n.Avoid))
		if !ok {
			return exhausted("create network %q: overlay pool %s has no free /%d left (%d networks): remove unused networks, or name a subnet",
				n.Name, s.pooled(), s.bits, len(s.networks))
		}
		r.Subnet4 = p.String()
		return nil
	}
	p, err := netip.ParsePrefix(r.Subnet4)
	switch {
	case err != nil || !p.Addr().Is4():
		return invalid("create network %q: subnet %q is not an IPv4 range such as 192.168.7.0/24", n.Name, r.Subnet4)
	case p != p.Masked():
		return invalid("create network %q: subnet %s has host bits set: did you mean %s?", n.Name, p, p.Masked())
	case p.Bits() < 8 || p.Bits() > 29:
		return invalid("create network %q: subnet %s: the prefix length must be 8..29", n.Name, p)
	case reserved4(p):
		return invalid("create network %q: subnet %s is not usable: loopback, link-local, multicast and 0.0.0.0/8 are reserved", n.Name, p)
	case p.Overlaps(s.mesh):
		return conflict("create network %q: subnet %s overlaps the cluster's mesh pool %s: choose another subnet", n.Name, p, s.mesh)
	}
	for _, o := range own {
		if o.v4.Overlaps(p) {
			return invalid("create network %q: its subnets %s and %s overlap", n.Name, o.v4, p)
		}
	}
	if s.level < api.LevelNetworks {
		if o, v4 := s.overlapping(p); v4.IsValid() {
			return conflict("create network %q: subnet %s overlaps %s of network %q: choose another subnet", n.Name, p, v4, o)
		}
	}
	r.Subnet4 = p.String()
	return nil
}

// overlapping finds the network, and its range, that a prefix overlaps.
func (s *State) overlapping(p netip.Prefix) (name string, of netip.Prefix) {
	for _, id := range slices.Sorted(maps.Keys(s.networks)) {
		for _, r := range s.networks[id].ranges {
			if r.v4.Overlaps(p) {
				return s.networks[id].name, r.v4
			}
			if r.v6.IsValid() && r.v6.Overlaps(p) {
				return s.networks[id].name, r.v6
			}
		}
	}
	return "", netip.Prefix{}
}

// Apart refuses networks with addresses in common to something that wants to be on all of them.
func (s *State) Apart(ids []string) error {
	for i, a := range ids {
		for _, b := range ids[:i] {
			x, y := s.networks[b], s.networks[a]
			if a == b {
				continue
			}
			for _, r := range x.ranges {
				for _, q := range y.ranges {
					if r.v4.Overlaps(q.v4) || r.v6.IsValid() && q.v6.IsValid() && r.v6.Overlaps(q.v6) {
						return invalid("networks %s (%s) and %s (%s) have addresses in common: nothing can be on both", x.name, r, y.name, q)
					}
				}
			}
		}
	}
	return nil
}

// String lists the prefixes.
func (r span) String() string {
	if r.v6.IsValid() {
		return r.v4.String() + ", " + r.v6.String()
	}
	return r.v4.String()
}

func parseAddr(text string) netip.Addr {
	a, _ := netip.ParseAddr(text)
	return a
}

func parseAll(texts []string) []netip.Prefix {
	var out []netip.Prefix
	for _, t := range texts {
		if p, err := netip.ParsePrefix(t); err == nil {
			out = append(out, p)
		}
	}
	return out
}

func reserved4(p netip.Prefix) bool {
	a := p.Addr()
	return a.As4()[0] == 0 || a.IsLoopback() || a.IsLinkLocalUnicast() || a.As4()[0] >= 224
}

func (s *State) pooled() string {
	all := make([]string, len(s.overlay))
	for i, p := range s.overlay {
		all[i] = p.String()
	}
	return strings.Join(all, ", ")
}

// freeSubnet finds the lowest block of the overlay pools that overlaps neither a network nor a subnet at rest, nor one of the given.
func (s *State) freeSubnet(bits int, own []span, avoid []netip.Prefix) (netip.Prefix, bool) {
	taken := make([]netip.Prefix, 0, len(s.networks)+len(s.restNets)+len(avoid))
	for _, n := range s.networks {
		for _, r := range n.ranges {
			taken = append(taken, r.v4)
		}
	}
	for _, r := range own {
		taken = append(taken, r.v4)
	}
	for p := range s.restNets {
		taken = append(taken, p)
	}
	taken = append(taken, avoid...)
	slices.SortFunc(taken, netip.Prefix.Compare)
	for _, pool := range s.overlay {
		if p, ok := freeBlock(pool, bits, taken); ok {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// freeBlock finds the lowest block of a pool that overlaps none of the sorted prefixes.
func freeBlock(pool netip.Prefix, bits int, taken []netip.Prefix) (netip.Prefix, bool) {
	if bits < pool.Bits() {
		return netip.Prefix{}, false
	}
	end := uint64(1) << (32 - pool.Bits())
	step := uint64(1) << (32 - bits)
	next := uint64(0)
	for _, t := range taken {
		if !t.Overlaps(pool) {
			continue
		}
		if t.Bits() <= pool.Bits() {
			return netip.Prefix{}, false
		}
		from, _ := offset(pool, t.Masked().Addr())
		if next+step <= uint64(from) {
			break
		}
		to := uint64(from) + uint64(1)<<(32-t.Bits())
		next = max(next, (to+step-1)/step*step)
	}
	if next+step > end {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(plus4(pool.Addr(), uint32(next)), bits), true
}

// chooseSubnet6 completes the IPv6 side of a range. One that names none goes on in the IPv6 subnet of the range before it.
func (s *State) chooseSubnet6(n *api.NetworkRecord, before []*api.NetworkRange, r *api.NetworkRange) error {
	v4 := netip.MustParsePrefix(r.Subnet4)
	switch {
	case n.NoIpv6 && r.Subnet6 == "":
		return nil
	case r.Subnet6 == "" && len(before) > 0:
		if s.continue6(before[len(before)-1], r, v4) {
			return nil
		}
		fallthrough
	case r.Subnet6 == "":
		return s.freeSubnet6(n, r, before)
	}
	p, err := netip.ParsePrefix(r.Subnet6)
	v4bits := bits.Len32(size4(v4) - 1)
	switch {
	case err != nil || !p.Addr().Is6() || p.Addr().Is4In6() || p != p.Masked():
		return invalid("create network %q: subnet %q is not an IPv6 range such as fd00:1234::/64", n.Name, r.Subnet6)
	case p.Addr().IsLoopback() || p.Addr().IsLinkLocalUnicast() || p.Addr().IsMulticast():
		return invalid("create network %q: subnet %s is not usable: loopback, link-local and multicast are reserved", n.Name, p)
	case p.Bits() < 32 || 128-p.Bits() < v4bits:
		return invalid("create network %q: subnet %s: the prefix length must be 32..%d to hold as many addresses as %s",
			n.Name, p, 128-v4bits, r.Subnet4)
	case s.ula.IsValid() && p.Overlaps(s.nodeBlocks6()):
		return conflict("create network %q: subnet %s overlaps the nodes' blocks %s", n.Name, p, s.nodeBlocks6())
	}
	for _, o := range before {
		if q, err := netip.ParsePrefix(o.Subnet6); err == nil && q.Overlaps(p) {
			return invalid("create network %q: its subnets %s and %s overlap", n.Name, q, p)
		}
	}
	if s.level < api.LevelNetworks {
		if o, v6 := s.overlapping(p); v6.IsValid() {
			return conflict("create network %q: subnet %s overlaps %s of network %q: choose another subnet", n.Name, p, v6, o)
		}
	}
	r.Subnet6 = p.String()
	return s.chooseBase6(n, r, v4, p)
}

// chooseBase6 has the addresses begin at the range that was asked for.
func (s *State) chooseBase6(n *api.NetworkRecord, r *api.NetworkRange, v4, v6 netip.Prefix) error {
	if s.level < api.LevelNetworks {
		return nil
	}
	r.Base6 = v6.Addr().String()
	if r.Range6 == "" {
		return nil
	}
	p, err := netip.ParsePrefix(r.Range6)
	if err != nil || p != p.Masked() || !p.Addr().Is6() || p.Bits() < v6.Bits() || !v6.Contains(p.Addr()) {
		return invalid("create network %q: range %q is not within subnet %s", n.Name, r.Range6, v6)
	}
	narrowed := v4
	if r.Range4 != "" {
		if q, err := netip.ParsePrefix(r.Range4); err == nil && q.Bits() >= v4.Bits() {
			narrowed = q
		}
	}
	if 128-p.Bits() < 32-narrowed.Bits() {
		return invalid("create network %q: range %s has fewer addresses than %s: they are given out in pairs", n.Name, p, narrowed)
	}
	from, _ := offset(v4, narrowed.Addr())
	r.Base6 = plus6(p.Addr(), -int64(from)).String()
	return nil
}

// continue6 places a range's IPv6 addresses behind those of the range before it, if its subnet has room.
func (s *State) continue6(last, r *api.NetworkRange, v4 netip.Prefix) bool {
	p, err := partOf(last, false)
	if err != nil || !p.v6.IsValid() || last.Range6 != "" {
		return false
	}
	base := plus6(p.base6, int64(size4(p.v4)))
	if !p.v6.Contains(base) || !p.v6.Contains(plus6(base, int64(size4(v4))-1)) {
		return false
	}
	r.Subnet6, r.Base6 = last.Subnet6, base.String()
	return true
}

// freeSubnet6 gives a range a /64 of the cluster's own.
func (s *State) freeSubnet6(n *api.NetworkRecord, r *api.NetworkRange, before []*api.NetworkRange) error {
	if !s.ula.IsValid() {
		return nil
	}
	used := map[netip.Prefix]bool{}
	for _, o := range s.networks {
		for _, r := range o.ranges {
			used[r.v6] = true
		}
	}
	for _, o := range before {
		if p, err := netip.ParsePrefix(o.Subnet6); err == nil {
			used[p] = true
		}
	}
	for id := uint32(1); id < 1<<16; id++ { // 0 is the nodes' blocks
		b := s.ula.Addr().As16()
		b[6], b[7] = byte(id>>8), byte(id)
		if p := netip.PrefixFrom(netip.AddrFrom16(b), 64); !used[p] {
			r.Subnet6 = p.String()
			if len(n.Ranges) > 0 || len(before) > 0 {
				r.Base6 = p.Addr().String()
			}
			return nil
		}
	}
	return exhausted("create network %q: all 65,535 subnets of %s are taken", n.Name, s.ula)
}

func (s *State) nodeBlocks6() netip.Prefix { return netip.PrefixFrom(s.ula.Addr(), 64) }

// grow gives a network that is full a further range: as large as what it has, unless that is more than an eighth of a pool or more than is left.
func (s *State) grow(p *pool) error {
	full := func(why string) error {
		return exhausted("%s is full: all %d addresses of %s are taken or rest for %s after their release: %s", p.title, p.capacity(), p.prefixes(), AddressRest, why)
	}
	if p.node != "" && s.level >= api.LevelNetworks {
		if !s.growNode(p) {
			return full("wait, run fewer tasks on the node, or use a larger mesh pool at init")
		}
		return nil
	}
	if p.network == "" || s.level < api.LevelNetworks {
		return full("wait, run fewer tasks, or use a network with a larger subnet")
	}
	if !p.grows {
		return full("wait, run fewer tasks, or use a network that may grow or has a larger subnet")
	}
	if len(p.parts) >= maxRanges {
		return full(fmt.Sprintf("it has %d ranges already, no more are possible", maxRanges))
	}
	var v4 netip.Prefix
	ok := false
	for length := min(s.bits, max(s.overlay[0].Bits()+3, 32-bits.Len32(p.size()-1))); length <= s.bits && !ok; length++ {
		v4, ok = s.freeSubnet(length, nil, p.avoid)
	}
	if !ok || uint64(p.size())+uint64(size4(v4)) > maxOffsets {
		return full(fmt.Sprintf("the overlay pool %s has no free /%d left for a further range: remove unused networks, or run fewer tasks", s.pooled(), s.bits))
	}
	r := &api.NetworkRange{Subnet4: v4.String(), Grown: true}
	if err := s.grow6(p, r, v4); err != nil {
		return err
	}
	next, err := partOf(r, false)
	if err != nil {
		return err
	}
	p.append(next)
	s.j.Add(func() { p.parts = p.parts[:len(p.parts)-1] })
	nw := s.networks[p.network]
	nw.ranges = append(slices.Clone(nw.ranges), span{next.v4, next.v6})
	Set(s.j, s.networks, p.network, nw)
	s.onGrow(p.network, r)
	return nil
}

// grow6 gives a further range IPv6 addresses, if the network has some.
func (s *State) grow6(p *pool, r *api.NetworkRange, v4 netip.Prefix) error {
	last := p.parts[len(p.parts)-1]
	if !last.v6.IsValid() {
		return nil
	}
	before := &api.NetworkRange{Subnet4: last.v4.String(), Subnet6: last.v6.String(), Base6: last.base6.String()}
	if s.continue6(before, r, v4) {
		return nil
	}
	return s.freeSubnet6(&api.NetworkRecord{Name: s.networks[p.network].name}, r, []*api.NetworkRange{before})
}
