package allocator

import (
	"net/netip"

	"skein/manager/api"
)

// TaskRequest is what a task needs on its node.
type TaskRequest struct {
	TaskID    string // needed with host ports only
	NodeID    string
	Networks  []Attach
	HostPorts []*api.PortConfig // mode host with a published port
	Gateway   bool              // an address of the node's mesh block: published ports and the way out
	Generic   []GenericWish     // see ClaimGeneric
	Volumes   []string          // local ones, which the store gives a home
}

// Attach is one network a task is attached to.
type Attach struct {
	NetworkID string
	Aliases   []string
}

// Address is what a task got on one network, with the networks' prefix lengths.
type Address struct {
	NetworkID string
	V4, V6    netip.Prefix // V6 may be invalid
	Aliases   []string
}

// TaskGrant is what a task holds; the fields of its record.
type TaskGrant struct {
	Addresses          []Address
	Gateway4, Gateway6 netip.Addr
	HostPorts          []*api.PortConfig
}

// PlaceTask allocates all a task needs on its node, or nothing. The slices of g, which it fills, are used again.
func (s *State) PlaceTask(req *TaskRequest, g *TaskGrant) error {
	*g = TaskGrant{Addresses: g.Addresses[:0], HostPorts: g.HostPorts[:0]}
	mark := s.j.Mark()
	err := s.placeTask(req, g)
	if err != nil {
		s.j.Rollback(mark)
	}
	return err
}

func (s *State) placeTask(req *TaskRequest, g *TaskGrant) error {
	for _, c := range req.HostPorts {
		k := nodePort{req.NodeID, Port{c.Protocol, c.Published}}
		if holder, taken := s.hostUsed[k]; taken {
			return conflict("host port %d/%s is in use on this node by task %s: place it on another node, or wait until that task ended",
				c.Published, c.Protocol, holder)
		}
		Set(s.j, s.hostUsed, k, req.TaskID)
		g.HostPorts = append(g.HostPorts, c)
	}
	for _, n := range req.Networks {
		p := s.pools[n.NetworkID]
		if p == nil {
			return invalid("network %s does not exist any more: update the service", n.NetworkID)
		}
		off, err := s.take(p)
		if err != nil {
			return err
		}
		g.Addresses = append(g.Addresses, Address{NetworkID: n.NetworkID, V4: p.prefix4(off), V6: p.prefix6(off), Aliases: n.Aliases})
	}
	if !req.Gateway {
		return nil
	}
	p := s.meshes[req.NodeID]
	if p == nil {
		return invalid("node %s does not exist any more", req.NodeID)
	}
	off, err := s.take(p)
	if err != nil {
		return err
	}
	g.Gateway4, g.Gateway6 = p.addr4(off), p.addr6(off)
	return nil
}

// ReleaseTask puts what an ended task held to rest.
func (s *State) ReleaseTask(nodeID string, g *TaskGrant, now int64) {
	for _, a := range g.Addresses {
		if a.V4.IsValid() {
			s.give(s.pools[a.NetworkID], a.NetworkID, a.V4.Addr(), now)
		}
	}
	if g.Gateway4.IsValid() {
		s.give(s.meshes[nodeID], meshPrefix+nodeID, g.Gateway4, now)
	}
	for _, c := range g.HostPorts {
		Unset(s.j, s.hostUsed, nodePort{nodeID, Port{c.Protocol, c.Published}})
	}
}

// RestoreTask takes over what a living task's record says it holds. The task's id is needed with host ports only.
func (s *State) RestoreTask(taskID, nodeID string, g *TaskGrant) error {
	for _, a := range g.Addresses {
		p := s.pools[a.NetworkID]
		if p == nil {
			continue // a network may go while tasks that are being stopped still hang on it
		}
		if err := s.hold(p, a.V4.Addr()); err != nil {
			return err
		}
	}
	if g.Gateway4.IsValid() {
		p := s.meshes[nodeID]
		if p == nil {
			return dataLoss("a task has a gateway address on node %s, which does not exist", nodeID)
		}
		if err := s.hold(p, g.Gateway4); err != nil {
			return err
		}
	}
	for _, c := range g.HostPorts {
		k := nodePort{nodeID, Port{c.Protocol, c.Published}}
		if other, taken := s.hostUsed[k]; taken {
			return dataLoss("task %s: host port %d/%s of node %s is held by task %s", taskID, c.Published, c.Protocol, nodeID, other)
		}
		Set(s.j, s.hostUsed, k, taskID)
	}
	return nil
}
