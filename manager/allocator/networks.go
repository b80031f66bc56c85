package allocator

import (
	"fmt"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"

	"skein/manager/api"
)

// AddNode gives a new node its index of at most so much, and with it its block of the mesh pool.
func (s *State) AddNode(n *api.NodeRecord, most uint32) error {
	resting := s.restingIndexes()
	limit := min(s.maxIndex(), most)
	for i := uint32(1); i <= limit; i++ {
		if _, used := s.indexes[i]; used || resting[i] {
			continue
		}
		n.Index = i
		return s.RestoreNode(n)
	}
	if limit < s.maxIndex() {
		return exhausted("add node %q: all %d node indexes that older versions of Skein know are taken, %d of them rest for %s after their node was removed: upgrade all managers first, then a larger cluster is possible",
			n.Hostname, limit, len(resting), IndexRest)
	}
	return exhausted("add node %q: all %d blocks of mesh pool %s are taken, %d of them rest for %s after their node was removed: a larger cluster needs a larger mesh pool at init",
		n.Hostname, limit, s.mesh, len(resting), IndexRest)
}

// maxIndex is the highest index of a node for which the mesh pool has a block. Block 0 stays free; of pools that hold 4,096 or more, the last too.
func (s *State) maxIndex() uint32 {
	blocks := uint32(1) << (nodeBits - s.mesh.Bits())
	if blocks < 1<<12 {
		return blocks - 1
	}
	return blocks - 2
}

// RestoreNode takes over a node that has its index.
func (s *State) RestoreNode(n *api.NodeRecord) error {
	block := uint32(1) << (32 - nodeBits)
	if n.Index == 0 || n.Index > MaxNodeIndex {
		return dataLoss("node %s: index %d is not in 1..%d", n.Id, n.Index, MaxNodeIndex)
	}
	if other, used := s.indexes[n.Index]; used {
		return dataLoss("node %s: index %d is held by node %s", n.Id, n.Index, other)
	}
	if uint64(n.Index+1)*uint64(block) > uint64(1)<<(32-s.mesh.Bits()) {
		return dataLoss("node %s: mesh pool %s has no block %d", n.Id, s.mesh, n.Index)
	}
	v4 := netip.PrefixFrom(plus4(s.mesh.Addr(), n.Index*block), nodeBits)
	p := newPool(fmt.Sprintf("the mesh block of node %q", n.Hostname), v4, s.nodeBlock6(n.Index))
	Set(s.j, s.indexes, n.Index, n.Id)
	Set(s.j, s.meshes, n.Id, p)
	return nil
}

// HasNode reports whether there is such a node.
func (s *State) HasNode(id string) bool { return s.meshes[id] != nil }

// NodeAt is the id of the node with an index, empty if there is none.
func (s *State) NodeAt(index uint32) string { return s.indexes[index] }

// nodeBlock6 is <ula>:0:0:0:<index>:0/112.
func (s *State) nodeBlock6(index uint32) netip.Prefix {
	if !s.ula.IsValid() {
		return netip.Prefix{}
	}
	b := s.ula.Addr().As16()
	b[12], b[13] = byte(index>>8), byte(index)
	return netip.PrefixFrom(netip.AddrFrom16(b), 112)
}

// RemoveNode frees the node's block; its index rests.
func (s *State) RemoveNode(n *api.NodeRecord, now int64) {
	s.forget(meshPrefix + n.Id)
	Unset(s.j, s.meshes, n.Id)
	Unset(s.j, s.indexes, n.Index)
	s.restIdx.push(resting{pool: restIndex, addr: strconv.FormatUint(uint64(n.Index), 10), until: now + int64(IndexRest)})
	s.j.Add(s.restIdx.unpush)
}

// AddNetwork gives a new network its VNI and, where the record names none, its subnets.
func (s *State) AddNetwork(n *api.NetworkRecord) error {
	if err := s.chooseVNI(n); err != nil {
		return err
	}
	if err := s.chooseSubnet4(n); err != nil {
		return err
	}
	if err := s.chooseSubnet6(n); err != nil {
		return err
	}
	return s.RestoreNetwork(n)
}

// RestoreNetwork takes over a network that has all it needs.
func (s *State) RestoreNetwork(n *api.NetworkRecord) error {
	v4, err := netip.ParsePrefix(n.Subnet4)
	if err != nil || !v4.Addr().Is4() || v4.Bits() < 8 || v4.Bits() > 29 {
		return dataLoss("network %s: subnet %q is not an IPv4 range of /8 to /29", n.Id, n.Subnet4)
	}
	var v6 netip.Prefix
	if n.Subnet6 != "" {
		if v6, err = netip.ParsePrefix(n.Subnet6); err != nil || !v6.Addr().Is6() {
			return dataLoss("network %s: subnet %q is not an IPv6 range", n.Id, n.Subnet6)
		}
	}
	if other, used := s.vnis[n.Vni]; used {
		return dataLoss("network %s: VNI %d is held by network %s", n.Id, n.Vni, other)
	}
	Set(s.j, s.vnis, n.Vni, n.Id)
	Set(s.j, s.networks, n.Id, network{name: n.Name, v4: v4, v6: v6})
	Set(s.j, s.pools, n.Id, newPool(fmt.Sprintf("network %q", n.Name), v4, v6))
	return nil
}

// RemoveNetwork frees all of a network. Its subnet rests before it is handed out unasked.
func (s *State) RemoveNetwork(n *api.NetworkRecord, now int64) {
	s.forget(n.Id)
	nw := s.networks[n.Id]
	Unset(s.j, s.vnis, n.Vni)
	Unset(s.j, s.networks, n.Id)
	Unset(s.j, s.pools, n.Id)
	if !nw.v4.IsValid() {
		return
	}
	Set(s.j, s.restNets, nw.v4, s.restNets[nw.v4]+1)
	s.rest.push(resting{pool: restSubnet, addr: nw.v4.String(), until: now + int64(AddressRest)})
	s.j.Add(s.rest.unpush)
}

// Held is the number of addresses that services and tasks have of a network.
func (s *State) Held(id string) int {
	if p := s.pools[id]; p != nil {
		return p.held()
	}
	return 0
}

func (s *State) chooseVNI(n *api.NetworkRecord) error {
	if n.Vni != 0 {
		if other, used := s.vnis[n.Vni]; used {
			return conflict("create network %q: VNI %d is used by network %q: choose another or none", n.Name, n.Vni, s.networks[other].name)
		}
		if n.Vni < firstVNI || n.Vni > maxVNI {
			return invalid("create network %q: VNI %d is not in %d..%d", n.Name, n.Vni, firstVNI, maxVNI)
		}
		return nil
	}
	v := s.nextVNI
	for range len(s.vnis) + 1 {
		if _, used := s.vnis[v]; !used {
			break
		}
		v = followingVNI(v)
	}
	old := s.nextVNI
	s.j.Add(func() { s.nextVNI = old })
	n.Vni, s.nextVNI = v, followingVNI(v)
	return nil
}

func followingVNI(v uint32) uint32 {
	if v >= maxVNI {
		return firstVNI
	}
	return v + 1
}

func (s *State) chooseSubnet4(n *api.NetworkRecord) error {
	if n.Subnet4 == "" {
		p, ok := s.freeSubnet()
		if !ok {
			return exhausted("create network %q: overlay pool %s has no free /%d left (%d networks): remove unused networks, or name a subnet",
				n.Name, s.overlay, s.bits, len(s.networks))
		}
		n.Subnet4 = p.String()
		return nil
	}
	p, err := netip.ParsePrefix(n.Subnet4)
	switch {
	case err != nil || !p.Addr().Is4():
		return invalid("create network %q: subnet %q is not an IPv4 range such as 192.168.7.0/24", n.Name, n.Subnet4)
	case p != p.Masked():
		return invalid("create network %q: subnet %s has host bits set: did you mean %s?", n.Name, p, p.Masked())
	case p.Bits() < 8 || p.Bits() > 29:
		return invalid("create network %q: subnet %s: the prefix length must be 8..29", n.Name, p)
	case reserved4(p):
		return invalid("create network %q: subnet %s is not usable: loopback, link-local, multicast and 0.0.0.0/8 are reserved", n.Name, p)
	case p.Overlaps(s.mesh):
		return conflict("create network %q: subnet %s overlaps the cluster's mesh pool %s: choose another subnet", n.Name, p, s.mesh)
	}
	for _, id := range slices.Sorted(maps.Keys(s.networks)) {
		if o := s.networks[id]; o.v4.Overlaps(p) {
			return conflict("create network %q: subnet %s overlaps %s of network %q: choose another subnet", n.Name, p, o.v4, o.name)
		}
	}
	n.Subnet4 = p.String()
	return nil
}

func reserved4(p netip.Prefix) bool {
	a := p.Addr()
	return a.As4()[0] == 0 || a.IsLoopback() || a.IsLinkLocalUnicast() || a.As4()[0] >= 224
}

// freeSubnet finds the lowest block of the overlay pool that overlaps neither a network nor a subnet at rest.
func (s *State) freeSubnet() (netip.Prefix, bool) {
	taken := make([]netip.Prefix, 0, len(s.networks)+len(s.restNets))
	for _, n := range s.networks {
		taken = append(taken, n.v4)
	}
	for p := range s.restNets {
		taken = append(taken, p)
	}
	slices.SortFunc(taken, netip.Prefix.Compare)
	end := uint64(1) << (32 - s.overlay.Bits())
	step := uint64(1) << (32 - s.bits)
	next := uint64(0)
	for _, t := range taken {
		if !t.Overlaps(s.overlay) {
			continue
		}
		if t.Bits() <= s.overlay.Bits() {
			return netip.Prefix{}, false
		}
		from, _ := offset(s.overlay, t.Addr())
		if next+step <= uint64(from) {
			break
		}
		to := uint64(from) + uint64(1)<<(32-t.Bits())
		next = max(next, (to+step-1)/step*step)
	}
	if next+step > end {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(plus4(s.overlay.Addr(), uint32(next)), s.bits), true
}

func (s *State) chooseSubnet6(n *api.NetworkRecord) error {
	if n.Subnet6 == "" {
		if !s.ula.IsValid() {
			return nil
		}
		used := map[netip.Prefix]bool{}
		for _, o := range s.networks {
			used[o.v6] = true
		}
		for id := uint32(1); id < 1<<16; id++ { // 0 is the nodes' blocks
			b := s.ula.Addr().As16()
			b[6], b[7] = byte(id>>8), byte(id)
			if p := netip.PrefixFrom(netip.AddrFrom16(b), 64); !used[p] {
				n.Subnet6 = p.String()
				return nil
			}
		}
		return exhausted("create network %q: all 65,535 subnets of %s are taken", n.Name, s.ula)
	}
	p, err := netip.ParsePrefix(n.Subnet6)
	v4bits := bits.Len32(1<<(32-netip.MustParsePrefix(n.Subnet4).Bits()) - 1)
	switch {
	case err != nil || !p.Addr().Is6() || p.Addr().Is4In6() || p != p.Masked():
		return invalid("create network %q: subnet %q is not an IPv6 range such as fd00:1234::/64", n.Name, n.Subnet6)
	case p.Addr().IsLoopback() || p.Addr().IsLinkLocalUnicast() || p.Addr().IsMulticast():
		return invalid("create network %q: subnet %s is not usable: loopback, link-local and multicast are reserved", n.Name, p)
	case p.Bits() < 32 || 128-p.Bits() < v4bits:
		return invalid("create network %q: subnet %s: the prefix length must be 32..%d to hold as many addresses as %s",
			n.Name, p, 128-v4bits, n.Subnet4)
	case s.ula.IsValid() && p.Overlaps(s.nodeBlocks6()):
		return conflict("create network %q: subnet %s overlaps the nodes' blocks %s", n.Name, p, s.nodeBlocks6())
	}
	for _, id := range slices.Sorted(maps.Keys(s.networks)) {
		if o := s.networks[id]; o.v6.IsValid() && o.v6.Overlaps(p) {
			return conflict("create network %q: subnet %s overlaps %s of network %q: choose another subnet", n.Name, p, o.v6, o.name)
		}
	}
	n.Subnet6 = p.String()
	return nil
}

func (s *State) nodeBlocks6() netip.Prefix { return netip.PrefixFrom(s.ula.Addr(), 64) }
