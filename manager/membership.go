package manager

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// membership implements api.MembershipServer, on the leader. authz has checked that a manager asks for itself.
type membership struct {
	api.UnimplementedMembershipServer
	m *Manager
}

// Join takes a manager into the group, or notes its new address. It is asked again until it answers.
func (s *membership) Join(ctx context.Context, r *api.MemberRequest) (*api.MemberReply, error) {
	node, err := s.m.node()
	if err != nil {
		return nil, err
	}
	if err := s.noteAddress(ctx, r); err != nil {
		return nil, err
	}
	if err := node.AddVoter(ctx, r.NodeId, r.RaftAddr); err != nil {
		s.m.fire() // it may be a member without a vote by now: keepGroup goes on
		return nil, err
	}
	s.m.log.Info("manager joined the raft group", "peer", r.NodeId, "addr", r.RaftAddr)
	return &api.MemberReply{Managers: s.m.Managers()}, nil
}

// noteAddress makes the node record agree with the address that the group will use.
func (s *membership) noteAddress(ctx context.Context, r *api.MemberRequest) error {
	_, err := s.m.store.Update(ctx, func(tx store.WriteTx) error {
		n := tx.Node(r.NodeId)
		switch {
		case n == nil:
			return api.Errorf(errdefs.ErrPermissionDenied, "join the raft group: node %s is not part of the cluster", r.NodeId)
		case n.Role != api.RoleManager:
			return api.Errorf(errdefs.ErrPermissionDenied, "join the raft group: node %s is a %s", n.Hostname, n.Role)
		case max(1, r.FeatureLevel) < tx.Cluster().GetFeatureLevel():
			return api.Errorf(errdefs.ErrFailedPrecondition, "join the raft group: the version of skein on node %s knows feature level %d, the cluster uses level %d: "+
				"install the version of the other managers on that node", n.Hostname, max(1, r.FeatureLevel), tx.Cluster().GetFeatureLevel())
		case n.RpcAddr == r.RaftAddr && n.FeatureLevel == r.FeatureLevel:
			return nil
		}
		moved := proto.Clone(n).(*api.NodeRecord)
		moved.RpcAddr, moved.FeatureLevel = r.RaftAddr, r.FeatureLevel
		tx.Add(&api.Change{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "node", Id: n.Id, Version: n.Meta.GetVersion()}}})
		tx.Add(&api.Change{Kind: &api.Change_PutNode{PutNode: moved}})
		return nil
	})
	return err
}

// Leave takes a manager out of the group.
func (s *membership) Leave(ctx context.Context, r *api.MemberRequest) (*api.Empty, error) {
	node, err := s.m.node()
	if err != nil {
		return nil, err
	}
	if err := node.RemoveServer(ctx, r.NodeId); err != nil {
		return nil, err
	}
	s.m.log.Info("manager left the raft group", "peer", r.NodeId)
	return &api.Empty{}, nil
}

// Leave takes this manager out of the group, through the leader: it is about to leave the cluster. The last manager cannot.
func (m *Manager) Leave(ctx context.Context) error {
	m.mu.Lock()
	m.leaving = true
	m.mu.Unlock()
	m.HandOver(ctx) // so that nobody waits for an election
	_, err := api.NewMembershipClient(m.local()).Leave(ctx, &api.MemberRequest{NodeId: m.cfg.NodeID})
	if err != nil {
		return fmt.Errorf("leave the raft group: %w", err)
	}
	return nil
}

// join asks the other managers for membership until one agrees, or this manager is in the group anyway.
func (m *Manager) join(ctx context.Context) {
	pause := joinRetry
	for !m.isLeaving() && !(m.isVoter(m.cfg.NodeID) && m.LeaderAddr() != "") {
		for _, addr := range m.others() {
			err := m.askToJoin(ctx, addr)
			if err == nil {
				m.log.Info("member of the raft group", "through", addr)
				return
			}
			if ctx.Err() != nil {
				return
			}
			m.log.Warn("ask for membership in the raft group", "manager", addr, "err", err, "retry_in", pause)
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		pause = min(2*pause, joinRetryMax)
	}
}

func (m *Manager) askToJoin(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	conn, err := m.cfg.DialManager(addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = api.NewMembershipClient(conn).Join(ctx, &api.MemberRequest{NodeId: m.cfg.NodeID, RaftAddr: m.cfg.RPCAddr, FeatureLevel: api.FeatureLevel})
	return api.FromGRPC(err)
}

// group is what control knows of the managers.
type group struct{ m *Manager }

// Linearize makes local reads see everything acknowledged.
func (g group) Linearize(ctx context.Context) error {
	node, err := g.m.node()
	if err != nil {
		return err
	}
	return node.Linearizable(ctx)
}

// ManagerStatus tells what a leader knows of a member that has a vote.
func (g group) ManagerStatus(nodeID string) (member, leader, reachable bool) {
	g.m.mu.Lock()
	node, seen := g.m.raft, g.m.seen
	g.m.mu.Unlock()
	if node == nil {
		return false, false, false
	}
	peers, err := node.Peers()
	if err != nil {
		return false, false, false
	}
	for _, p := range peers {
		if p.ID == nodeID && p.Voter {
			leader = node.LeaderID() == nodeID
			return true, leader, leader || nodeID == g.m.cfg.NodeID || seen.Reachable(nodeID)
		}
	}
	return false, false, false
}

// RemoveManager takes a member out of the group.
func (g group) RemoveManager(ctx context.Context, nodeID string) error {
	node, err := g.m.node()
	if err != nil {
		return err
	}
	return node.RemoveServer(ctx, nodeID)
}
