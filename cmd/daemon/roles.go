package daemon

import (
	"context"
	"fmt"
	"slices"
	"time"

	"skein/manager/api"
)

// refusedFor is how long managers must refuse this node before it believes that it was removed: what follows cannot be undone.
const refusedFor = 2 * time.Second

// follow waits for what changes a node's part from outside: another role, or its removal. It ends with the node's part, or after such a
// change: the next part has a follower of its own.
func (m *membership) follow(n *clusterNode) {
	select {
	case <-n.done:
	case <-n.switched:
		m.switchRole(n)
	case err := <-n.expelled:
		m.expel(n, err)
	}
}

// switchRole starts the node's part anew in the role of its new certificate. That is what a restart of the daemon would do, so a crash
// anywhere on the way ends in the same place. Containers and their network go on.
func (m *membership) switchRole(n *clusterNode) {
	m.op.Lock()
	defer m.op.Unlock()
	if m.current() != n {
		return
	}
	began := time.Now()
	m.log.Info("this node gets another role", "from", n.role, "to", n.id.Role())
	s := n.settings
	if known := slices.DeleteFunc(n.managers(), func(a string) bool { return a == s.RPCAddr }); len(known) > 0 {
		s.Seeds = known
	}
	err := m.saveSettings(s)
	n.stop()
	if err == nil {
		err = m.start(n.id, s, nil)
	}
	if err != nil {
		err = fmt.Errorf("become a %s: %w: restart the daemon to try again", n.id.Role(), err)
		m.log.Error("cannot take part in the cluster", "err", err)
		m.set(nil, err, "")
		return
	}
	m.log.Info("this node has another role", "role", n.id.Role(), "after", time.Since(began).Round(time.Millisecond))
}

// expel does what leaving does, for a node that was removed while it was up.
func (m *membership) expel(n *clusterNode, why error) {
	m.op.Lock()
	defer m.op.Unlock()
	if m.current() != n {
		return
	}
	m.log.Warn("this node was removed from its cluster: removing its tasks and what the cluster had here", "err", why)
	ctx, cancel := context.WithTimeout(context.Background(), cleanWait)
	defer cancel()
	note := fmt.Sprintf("this node was removed from cluster %s; join again with \"docker swarm join\"", n.id.ClusterID())
	if err := m.clean(ctx, n, note); err != nil {
		m.log.Error("clean up after the removal", "err", err)
		return
	}
	m.log.Info("this node is in no cluster any more")
}

// noteRecord takes the store's word on this node, from its session.
func (n *clusterNode) noteRecord(rec *api.NodeRecord) {
	n.mu.Lock()
	n.wanted, n.refusedSince = rec.Role, time.Time{}
	n.mu.Unlock()
	if rec.Role != n.id.Role() {
		n.id.RenewSoon()
	}
	n.connected()
}

// noteRefusal takes a manager's word that this node is not part of the cluster.
func (n *clusterNode) noteRefusal(err error) {
	n.mu.Lock()
	if n.refusedSince.IsZero() {
		n.refusedSince = time.Now()
	}
	certain := time.Since(n.refusedSince) >= refusedFor
	n.mu.Unlock()
	if !certain {
		return
	}
	select {
	case n.expelled <- err:
	default:
	}
}

// noteRenewal tells the managers of the new certificate, and looks whether it is of another role.
func (n *clusterNode) noteRenewal() {
	n.agent.TLSChanged()
	if n.id.Role() == n.role {
		return
	}
	select {
	case n.switched <- struct{}{}:
	default:
	}
}

// manages reports whether this node answers as a manager. One that was demoted does not, even before it has a worker's certificate.
func (n *clusterNode) manages() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.manager != nil && n.wanted != api.RoleWorker
}
