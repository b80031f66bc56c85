package allocator

import (
	"fmt"
	"net/netip"
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
	if err := s.chooseRanges(n); err != nil {
		return err
	}
	return s.RestoreNetwork(n)
}

// RestoreNetwork takes over a network that has all it needs.
func (s *State) RestoreNetwork(n *api.NetworkRecord) error {
	if other, used := s.vnis[n.Vni]; used {
		return dataLoss("network %s: VNI %d is held by network %s", n.Id, n.Vni, other)
	}
	p := &pool{title: fmt.Sprintf("network %q", n.Name), network: n.Id, grows: s.level >= api.LevelNetworks && !n.NoGrowth}
	nw := network{name: n.Name}
	for i, r := range rangesOf(n) {
		part, err := partOf(r, i == 0)
		if err != nil {
			return dataLoss("network %s: %v", n.Id, err)
		}
		p.append(part)
		nw.ranges = append(nw.ranges, span{part.v4, part.v6})
	}
	for _, text := range n.Avoid {
		if a, err := netip.ParsePrefix(text); err == nil {
			p.avoid = append(p.avoid, a)
		}
	}
	Set(s.j, s.vnis, n.Vni, n.Id)
	Set(s.j, s.networks, n.Id, nw)
	Set(s.j, s.pools, n.Id, p)
	return nil
}

// RemoveNetwork frees all of a network. Its subnets rest before they are handed out unasked.
func (s *State) RemoveNetwork(n *api.NetworkRecord, now int64) {
	s.forget(n.Id)
	nw := s.networks[n.Id]
	Unset(s.j, s.vnis, n.Vni)
	Unset(s.j, s.networks, n.Id)
	Unset(s.j, s.pools, n.Id)
	for _, r := range nw.ranges {
		Set(s.j, s.restNets, r.v4, s.restNets[r.v4]+1)
		s.rest.push(resting{pool: restSubnet, addr: r.v4.String(), until: now + int64(AddressRest)})
		s.j.Add(s.rest.unpush)
	}
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
