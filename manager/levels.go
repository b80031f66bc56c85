package manager

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/consensus"
	"skein/manager/store"
)

// keepLevel raises the cluster's feature level, while this manager leads, to the highest that every manager knows. It never goes down: a
// manager of an older version stops at the first entry above its level, and is refused when it joins.
func (m *Manager) keepLevel(ctx context.Context, node *consensus.Node) error {
	w := m.store.Watch(store.KindNode, store.KindCluster)
	defer w.Close()
	pause := groupRetry
	for {
		changed := m.Changed() // of the group, too
		var retry <-chan time.Time
		if err := m.raiseLevel(ctx, node); err != nil && ctx.Err() == nil && !errdefs.IsConflict(err) {
			m.log.Warn("raise the cluster's feature level", "err", err, "retry_in", pause)
			retry = time.After(pause)
			pause = min(2*pause, groupRetryMax)
		} else {
			pause = groupRetry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-w.C():
			w.Take()
		case <-retry:
		}
	}
}

func (m *Manager) raiseLevel(ctx context.Context, node *consensus.Node) error {
	peers, err := node.Peers()
	if err != nil {
		return err
	}
	var from, to uint32
	_, err = m.store.Update(ctx, func(tx store.WriteTx) error {
		c := tx.Cluster()
		if c == nil {
			return nil
		}
		if from, to = c.FeatureLevel, knownToAll(tx, peers, m.store.Highest()); to <= from {
			return nil
		}
		next := proto.Clone(c).(*api.ClusterRecord)
		next.FeatureLevel = to
		tx.Add(&api.Change{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "cluster", Id: c.Id, Version: c.Meta.GetVersion()}}})
		tx.Add(&api.Change{Kind: &api.Change_PutCluster{PutCluster: next}})
		return nil
	})
	if err == nil && to > from {
		m.log.Info("all managers know a higher feature level: the cluster uses it from now on", "level", to, "was", from)
	}
	return err
}

// knownToAll is the highest level that every manager knows: the members of the group, and the nodes that are about to become one. A node
// that has not said what it knows, knows the first.
func knownToAll(tx store.ReadTx, peers []consensus.Peer, own uint32) uint32 {
	level := own
	for _, n := range tx.Nodes() {
		if n.Role == api.RoleManager {
			level = min(level, max(1, n.FeatureLevel))
		}
	}
	for _, p := range peers {
		if n := tx.Node(p.ID); n != nil {
			level = min(level, max(1, n.FeatureLevel))
		}
	}
	return level
}
