package manager

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/consensus"
	"skein/manager/store"
)

// Bounds of making the group follow the roles in the store.
const (
	groupStep     = 10 * time.Second // one change of the group
	groupRetry    = 250 * time.Millisecond
	groupRetryMax = 4 * time.Second
	outWait       = 5 * time.Second // for a demoted manager to be out of the group
	handOverWait  = 2 * time.Second
)

// keepGroup makes the Raft group agree with the store while this manager leads: members whose record says worker, or that were removed, are
// taken out; if that is this manager itself, it hands the leadership over and the next leader goes on. It looks at the whole state each
// time, so whatever a crash interrupted is finished by whoever leads next.
func (m *Manager) keepGroup(ctx context.Context, node *consensus.Node) error {
	w := m.store.Watch(store.KindNode)
	defer w.Close()
	pause := groupRetry
	for {
		var retry <-chan time.Time
		changed := m.Changed()
		if err := m.settleGroup(ctx, node); err != nil && ctx.Err() == nil {
			m.log.Warn("make the raft group follow the roles", "err", err, "retry_in", pause)
			retry = time.After(pause)
			pause = min(2*pause, groupRetryMax)
		} else {
			pause = groupRetry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-w.C():
			w.Take()
		case <-changed:
		case <-retry:
		}
	}
}

// settleGroup is one look at the group: who has no business there goes, and who has no vote yet gets one.
func (m *Manager) settleGroup(ctx context.Context, node *consensus.Node) error {
	peers, err := node.Peers()
	if err != nil {
		return err
	}
	out := slices.DeleteFunc(slices.Clone(peers), func(p consensus.Peer) bool { return !m.unwanted(p.ID) })
	if len(out) == 0 {
		return m.giveVotes(ctx, node, peers)
	}
	if len(out) == len(peers) {
		return api.Errorf(errdefs.ErrFailedPrecondition, "no member of the raft group has the role of a manager: promote one with \"docker node promote\"")
	}
	ctx, cancel := context.WithTimeout(ctx, groupStep)
	defer cancel()
	for _, p := range out {
		if p.ID == m.cfg.NodeID {
			continue // last: it takes the leadership away
		}
		if err := node.RemoveServer(ctx, p.ID); err != nil {
			return err
		}
		m.log.Info("manager taken out of the raft group", "peer", p.ID)
		m.fire()
	}
	if slices.ContainsFunc(out, func(p consensus.Peer) bool { return p.ID == m.cfg.NodeID }) {
		m.log.Info("this manager is a worker now: handing the leadership over")
		return node.TransferLeadership(ctx)
	}
	return nil
}

// giveVotes makes voters of members whose joining was interrupted before they had the log.
func (m *Manager) giveVotes(ctx context.Context, node *consensus.Node, peers []consensus.Peer) error {
	ctx, cancel := context.WithTimeout(ctx, groupStep)
	defer cancel()
	for _, p := range peers {
		if p.Voter {
			continue
		}
		if err := node.AddVoter(ctx, p.ID, p.Addr); err != nil {
			return err
		}
		m.log.Info("manager has the log and votes now", "peer", p.ID)
		m.fire()
	}
	return nil
}

// unwanted reports whether a member of the group has no business there any more.
func (m *Manager) unwanted(nodeID string) bool {
	s := m.standing(nodeID)
	return s.removed || s.role == api.RoleWorker
}

// isMember reports whether the group, as far as this manager knows, has the node.
func (m *Manager) isMember(nodeID string) bool {
	node, err := m.node()
	if err != nil {
		return false
	}
	peers, err := node.Peers()
	return err == nil && slices.ContainsFunc(peers, func(p consensus.Peer) bool { return p.ID == nodeID })
}

// isVoter reports whether the group, as far as this manager knows, has the node with a vote.
func (m *Manager) isVoter(nodeID string) bool {
	node, err := m.node()
	if err != nil {
		return false
	}
	peers, err := node.Peers()
	return err == nil && slices.ContainsFunc(peers, func(p consensus.Peer) bool { return p.ID == nodeID && p.Voter })
}

// awaitOut returns when a demoted manager is out of the group: only then may it get a worker's certificate, with which it could not take
// part any more. Leader only.
func (m *Manager) awaitOut(ctx context.Context, nodeID string) error {
	ctx, cancel := context.WithTimeout(ctx, outWait)
	defer cancel()
	for {
		changed := m.Changed()
		switch {
		case !m.IsLeader():
			return api.NotDone(api.Errorf(errdefs.ErrUnavailable, "renew certificate: this manager is not the leader; try again"))
		case !m.isMember(nodeID):
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return api.Errorf(errdefs.ErrUnavailable, "renew certificate: node %s is still a member of the raft group; try again", nodeID)
		}
	}
}

// belong keeps this manager a member of the group as long as the store gives it the role: a new one joins, and one that was taken out,
// demoted and promoted again before it noticed, comes back. A manager that is out does not hear of it: it asks when it knows no leader for
// long.
func (m *Manager) belong(ctx context.Context) {
	const look, leaderless = 2 * time.Second, 6 * time.Second
	tick := time.NewTicker(look)
	defer tick.Stop()
	led := time.Now()
	for {
		changed := m.Changed()
		if m.LeaderAddr() != "" {
			led = time.Now()
		}
		out := !m.isVoter(m.cfg.NodeID) && !m.unwanted(m.cfg.NodeID)
		// Out of the group, the store is old: it may still say what was changed since. The leader knows.
		if (out || time.Since(led) > leaderless) && !m.isLeaving() && len(m.others()) > 0 {
			m.join(ctx)
			led = time.Now()
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}

// others are the addresses of managers to ask for membership.
func (m *Manager) others() []string {
	list := slices.Clone(m.cfg.Join)
	if m.cfg.Known != nil {
		list = append(list, m.cfg.Known()...)
	}
	for _, p := range m.Managers() {
		list = append(list, p.RpcAddr)
	}
	var out []string
	for _, a := range list {
		if a != m.cfg.RPCAddr && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

func (m *Manager) isLeaving() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.leaving
}

// HandOver gives the leadership to another manager, if this one has it and there is another: the group then does not have to find out by
// itself that this one stops. It is quick, or gives up.
func (m *Manager) HandOver(ctx context.Context) {
	node, err := m.node()
	if err != nil || !node.IsLeader() {
		return
	}
	if peers, err := node.Peers(); err != nil || len(peers) < 2 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, handOverWait)
	defer cancel()
	if err := node.TransferLeadership(ctx); err != nil {
		m.log.Info("the leadership was not handed over", "err", err)
	}
}
