package manager

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/ca"
	"skein/manager/consensus"
	"skein/manager/dispatcher"
	"skein/manager/loop"
	"skein/manager/orchestrator"
)

// lead runs a term whenever this manager is elected, until ctx is done.
func (m *Manager) lead(ctx context.Context, node *consensus.Node) {
	stop := func() {}
	defer func() { stop() }()
	for {
		select {
		case <-ctx.Done():
			return
		case leads := <-node.LeaderCh():
			stop()
			stop = func() {}
			if leads {
				stop = m.term(ctx, node)
			}
		}
	}
}

// term starts the leader's parts and returns what stops them and waits for them.
func (m *Manager) term(ctx context.Context, node *consensus.Node) (stop func()) {
	began := time.Now()
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	d := dispatcher.New(dispatcher.Config{
		Store: m.store, NodeID: m.cfg.NodeID, Term: node.Term(), Identify: identify, Log: m.cfg.Logger.With("component", "dispatcher"),
		Dial: func(_ context.Context, addr string) (*grpc.ClientConn, error) { return m.cfg.DialNode(addr) },
	})
	m.front.Set(d)
	part := func(name string, run func() error) {
		wg.Go(func() {
			if err := run(); err != nil && !errors.Is(err, context.Canceled) {
				m.log.Error("a part of the leader ended early", "part", name, "err", err)
			}
		})
	}
	part("dispatcher", func() error { return d.Run(ctx) })
	for _, c := range orchestrator.Controllers() {
		part(c.Name(), func() error { return loop.Run(ctx, m.store, c) })
	}
	part("keys", func() error { return loop.Run(ctx, m.store, ca.NewKeeper()) })
	part("levels", func() error { return m.keepLevel(ctx, node) })
	part("group", func() error { return m.keepGroup(ctx, node) })
	m.setLeading(true)
	m.log.Info("leading", "version", m.store.Version())
	return func() {
		m.setLeading(false)
		m.front.Set(nil)
		cancel()
		wg.Wait()
		m.log.Info("not leading any more", "after", time.Since(began).Round(time.Millisecond))
	}
}

// identify is the node whose certificate a session has.
func identify(ctx context.Context) (string, error) {
	c, ok := authz.CallerFrom(ctx)
	if !ok || c.NodeID == "" {
		return "", errNoCaller()
	}
	return c.NodeID, nil
}

func (m *Manager) setLeading(v bool) {
	m.mu.Lock()
	m.leading = v
	m.mu.Unlock()
	m.fire()
}

// fire tells that leadership may have changed.
func (m *Manager) fire() {
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.changed)
	m.changed = make(chan struct{})
}

// Changed returns a channel that is closed at the next change of Leader's answer.
func (m *Manager) Changed() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

// Leader returns the leader's id and address, empty if none is known, and whether it is this manager, ready to write.
func (m *Manager) Leader() (id, addr string, self bool) {
	m.mu.Lock()
	node, leading := m.raft, m.leading
	m.mu.Unlock()
	switch {
	case node == nil:
		return "", "", false
	case leading:
		return m.cfg.NodeID, m.cfg.RPCAddr, true
	}
	if id = node.LeaderID(); id == "" || id == m.cfg.NodeID { // elected, but earlier terms are not applied yet
		return "", "", false
	}
	return id, node.LeaderAddr(), false
}

// IsLeader reports whether this manager leads and its controllers run.
func (m *Manager) IsLeader() bool {
	_, _, self := m.Leader()
	return self
}

// LeaderAddr is the leader's RPC address, empty if none is known.
func (m *Manager) LeaderAddr() string {
	_, addr, _ := m.Leader()
	return addr
}

// Managers lists the members of the group that have a vote, for agents and for "docker info".
func (m *Manager) Managers() []*api.ManagerPeer {
	node, err := m.node()
	if err != nil {
		return nil
	}
	peers, err := node.Peers()
	if err != nil {
		return nil
	}
	leader, _, _ := m.Leader()
	var out []*api.ManagerPeer
	for _, p := range peers {
		if !p.Voter {
			continue // it has just joined, and lacks the log
		}
		out = append(out, &api.ManagerPeer{NodeId: p.ID, RpcAddr: p.Addr, Leader: p.ID == leader})
	}
	return out
}
