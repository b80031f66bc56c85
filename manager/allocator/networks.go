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
		if s.indexTaken(i) || resting[i] {
			continue
		}
		n.Index, n.Blocks = i, nil
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

// indexTaken reports whether a block of the mesh pool is a node's.
func (s *State) indexTaken(i uint32) bool { return s.indexes[i] != "" || s.blocks[i] != "" }

// RestoreNode takes over a node that has its index, and its further blocks.
func (s *State) RestoreNode(n *api.NodeRecord) error {
	for i, index := range append([]uint32{n.Index}, n.Blocks...) {
		switch {
		case index == 0 || index > MaxNodeIndex:
			return dataLoss("node %s: index %d is not in 1..%d", n.Id, index, MaxNodeIndex)
		case s.indexTaken(index):
			return dataLoss("node %s: index %d is held by node %s", n.Id, index, s.indexes[index]+s.blocks[index])
		case uint64(index+1)<<(32-nodeBits) > uint64(1)<<(32-s.mesh.Bits()):
			return dataLoss("node %s: mesh pool %s has no block %d", n.Id, s.mesh, index)
		case i > 0:
			s.addBlock(s.meshes[n.Id], index)
			continue
		}
		p := newPool(fmt.Sprintf("the mesh block of node %q", n.Hostname), s.nodeBlock4(index), s.nodeBlock6(index))
		p.node = n.Id
		Set(s.j, s.indexes, index, n.Id)
		Set(s.j, s.meshes, n.Id, p)
	}
	return nil
}

// maxBlocks bounds the further blocks of a node: 8,000 containers are more than one is made for.
const maxBlocks = 7

// growNode gives a node whose blocks are full a further one, from the end of the mesh pool where nodes come last. At least half of the pool is
// left to nodes to come.
func (s *State) growNode(p *pool) bool {
	most := min(s.maxIndex(), MaxNodeIndex)
	if len(p.parts) > maxBlocks || 2*uint32(len(s.indexes)+len(s.blocks)) >= most {
		return false
	}
	resting := s.restingIndexes()
	for i := most; i > 0; i-- {
		if !s.indexTaken(i) && !resting[i] {
			s.addBlock(p, i)
			s.onBlock(p.node, i)
			return true
		}
	}
	return false
}

func (s *State) addBlock(p *pool, index uint32) {
	v6 := s.nodeBlock6(index)
	p.append(newPart(s.nodeBlock4(index), v6, v6.Addr()))
	s.j.Add(func() { p.parts = p.parts[:len(p.parts)-1] })
	Set(s.j, s.blocks, index, p.node)
}

func (s *State) nodeBlock4(index uint32) netip.Prefix {
	return netip.PrefixFrom(plus4(s.mesh.Addr(), index<<(32-nodeBits)), nodeBits)
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

// RemoveNode frees the node's blocks; their indexes rest.
func (s *State) RemoveNode(n *api.NodeRecord, now int64) {
	s.forget(meshPrefix + n.Id)
	Unset(s.j, s.meshes, n.Id)
	Unset(s.j, s.indexes, n.Index)
	for _, index := range append([]uint32{n.Index}, n.Blocks...) {
		Unset(s.j, s.blocks, index)
		s.restIdx.push(resting{pool: restIndex, addr: strconv.FormatUint(uint64(index), 10), until: now + int64(IndexRest)})
		s.j.Add(s.restIdx.unpush)
	}
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
