package manager

import (
	"context"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/store"
)

func errNoCaller() error {
	return api.Errorf(errdefs.ErrUnauthenticated, "request without a caller")
}

// standing is what the store knows of a node.
type standing struct {
	role    string // empty: no record of it
	removed bool   // on the list of removed nodes
	blank   bool   // the store itself has nothing yet
}

func (m *Manager) standing(nodeID string) (s standing) {
	m.store.View(func(tx store.ReadTx) {
		c := tx.Cluster()
		if c == nil {
			s.blank = true
			return
		}
		if n := tx.Node(nodeID); n != nil {
			s.role = n.Role
			return
		}
		for _, r := range c.Removed {
			s.removed = s.removed || r.NodeId == nodeID
		}
	})
	return s
}

// catchUp is how long a request of a node that this manager has not heard of, or knows as a worker while it says that it is a manager,
// waits for the store to catch up: the node may have joined or been promoted a moment ago, and a manager that was just started knows
// nothing, or what was true when it stopped, before it hears from the leader.
const catchUp = 5 * time.Second

// role is the role the store gives a node, for authz. A node without a record is refused for good where that is certain; a manager that
// may lag waits, and then says that it does not know. A manager's certificate is issued after the store made the node one, so a store
// that says less lags, or the node was demoted since: the wait tells.
func (m *Manager) role(ctx context.Context, id api.NodeIdentity) (string, error) {
	if role, certain, err := m.roleNow(id); certain {
		return role, err
	}
	ctx, cancel := context.WithTimeout(ctx, catchUp)
	defer cancel()
	w := m.store.Watch(store.KindNode, store.KindCluster)
	defer w.Close()
	for {
		changed := m.Changed()
		role, certain, err := m.roleNow(id)
		if certain {
			return role, err
		}
		select {
		case <-w.C():
			w.Take()
		case <-changed:
		case <-ctx.Done():
			return role, err
		}
	}
}

func (m *Manager) roleNow(id api.NodeIdentity) (role string, certain bool, err error) {
	nodeID := id.NodeID
	switch s := m.standing(nodeID); {
	case s.role != "":
		return s.role, s.role == id.Role || id.Role != api.RoleManager || m.IsLeader(), nil
	case s.removed, !s.blank && m.IsLeader():
		return "", true, api.Errorf(errdefs.ErrPermissionDenied, "node %s was removed from the cluster; leave with \"docker swarm leave --force\" and join again", nodeID)
	}
	why := "no leader elected, so it has not caught up yet: more than half of the managers must run and reach each other"
	if m.LeaderAddr() != "" {
		why = "it lags behind the leader"
	}
	return "", false, api.Errorf(errdefs.ErrUnavailable, "node %s is not known to this manager: %s", nodeID, why)
}

// admitRaft decides whether a node may exchange Raft streams with us. Its certificate must say manager, and the store must not say
// otherwise; one that was demoted takes part until the leader has taken it out of the group. Only a manager that hears from a leader can say
// so: one that does not, because it was away, may know an old role of the very leader that would bring it up to date. A manager of which the store says nothing is let in unless it was removed: we may lag behind the entry that added it, and it
// may be the very leader that would send us that entry.
func (m *Manager) admitRaft(id api.NodeIdentity) error {
	leader, _, _ := m.Leader()
	return m.mayStream(id, leader != "" && leader != id.NodeID && !m.isMember(id.NodeID))
}

// mayStream decides. outsider says that this manager hears from a leader, another node, and the node is not in the group.
func (m *Manager) mayStream(id api.NodeIdentity, outsider bool) error {
	denied := func(why string) error {
		return api.Errorf(errdefs.ErrPermissionDenied, "raft stream of node %q: %s", id.NodeID, why)
	}
	switch s := m.standing(id.NodeID); {
	case id.NodeID == "" || id.ClusterID != m.cfg.ClusterID:
		return denied("it has no certificate of this cluster")
	case id.Role != api.RoleManager:
		return denied("its certificate is not a manager's")
	case s.removed:
		return denied("it was removed from the cluster")
	case s.role != "" && s.role != api.RoleManager && outsider:
		return denied("it is a " + s.role)
	}
	return nil
}
