package allocator

import (
	"net/netip"

	"skein/manager/api"
)

// TaskRequest is what a task needs on its node.
type TaskRequest struct {
	TaskID, ServiceID, NodeID string
	Networks                  []Attach
	HostPorts                 []*api.PortConfig // mode host with a published port
	Gateway                   bool              // an address of the node's mesh block: published ports and the way out
}

// Attach is one network a task is attached to.
type Attach struct {
	NetworkID string
	Aliases   []string
}

// TaskGrant is what a task got; the fields of its record.
type TaskGrant struct {
	Attachments        []*api.Attachment
	Gateway4, Gateway6 netip.Addr
	HostPorts          []*api.PortConfig
}

// PlaceTask allocates all a task needs on its node, or nothing.
func (s *State) PlaceTask(req TaskRequest) (TaskGrant, error) {
	mark := s.j.Mark()
	g, err := s.placeTask(req)
	if err != nil {
		s.j.Rollback(mark)
		return TaskGrant{}, err
	}
	return g, nil
}

func (s *State) placeTask(req TaskRequest) (TaskGrant, error) {
	var g TaskGrant
	for _, c := range req.HostPorts {
		k := nodePort{req.NodeID, Port{c.Protocol, c.Published}}
		if holder, taken := s.hostUsed[k]; taken {
			return g, conflict("host port %d/%s is in use on this node by task %s: place it on another node, or wait until that task ended",
				c.Published, c.Protocol, holder)
		}
		Set(s.j, s.hostUsed, k, req.TaskID)
		g.HostPorts = append(g.HostPorts, c)
	}
	for _, n := range req.Networks {
		p := s.pools[n.NetworkID]
		if p == nil {
			return g, invalid("network %s does not exist any more: update the service", n.NetworkID)
		}
		off, err := s.take(p)
		if err != nil {
			return g, err
		}
		a := &api.Attachment{NetworkId: n.NetworkID, Addr4: netip.PrefixFrom(p.addr4(off), p.v4.Bits()).String(), Aliases: n.Aliases}
		if v6 := p.addr6(off); v6.IsValid() {
			a.Addr6 = netip.PrefixFrom(v6, p.v6.Bits()).String()
		}
		g.Attachments = append(g.Attachments, a)
	}
	if !req.Gateway {
		return g, nil
	}
	p := s.pools[meshPrefix+req.NodeID]
	if p == nil {
		return g, invalid("node %s does not exist any more", req.NodeID)
	}
	off, err := s.take(p)
	if err != nil {
		return g, err
	}
	g.Gateway4, g.Gateway6 = p.addr4(off), p.addr6(off)
	return g, nil
}

// ReleaseTask puts what an ended task held to rest.
func (s *State) ReleaseTask(nodeID string, g TaskGrant, now int64) {
	for _, a := range g.Attachments {
		if p, err := netip.ParsePrefix(a.Addr4); err == nil {
			s.give(a.NetworkId, p.Addr(), now)
		}
	}
	if g.Gateway4.IsValid() {
		s.give(meshPrefix+nodeID, g.Gateway4, now)
	}
	for _, c := range g.HostPorts {
		Unset(s.j, s.hostUsed, nodePort{nodeID, Port{c.Protocol, c.Published}})
	}
}

// RestoreTask takes over what a living task's record says it holds.
func (s *State) RestoreTask(taskID, nodeID string, g TaskGrant) error {
	for _, a := range g.Attachments {
		p := s.pools[a.NetworkId]
		addr, err := netip.ParsePrefix(a.Addr4)
		if err != nil {
			return dataLoss("task %s: address %q on network %s: %v", taskID, a.Addr4, a.NetworkId, err)
		}
		if p == nil {
			continue // a network may go while tasks that are being stopped still hang on it
		}
		if err := s.hold(p, addr.Addr()); err != nil {
			return err
		}
	}
	if g.Gateway4.IsValid() {
		p := s.pools[meshPrefix+nodeID]
		if p == nil {
			return dataLoss("task %s: its node %s does not exist", taskID, nodeID)
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
