// Package manager is one manager of the cluster: it puts the parts of the control plane together.
//
// Each manager holds the store's replica, answers every request (what only the leader can answer is passed on to it), and is ready to lead.
// The leader's parts, controllers and dispatcher, are made anew when a term begins, after everything of earlier terms is applied, and are
// gone before the next one may begin. Nothing here decides what the cluster does; the parts do. It must not touch a kernel or know how
// the node's port works: it gets listeners and dialers. Who uses it: cmd/daemon, on nodes whose role is manager.
package manager

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/ca"
	"skein/manager/consensus"
	"skein/manager/control"
	"skein/manager/dispatcher"
	"skein/manager/forward"
	"skein/manager/keyring"
	"skein/manager/placement"
	"skein/manager/store"
)

// Config of a Manager. All but Join, Disconnect and Logger are required.
type Config struct {
	// NodeID and ClusterID are those of this node's certificate.
	NodeID, ClusterID string
	// StateDir holds the Raft log and snapshots, in its directory "raft".
	StateDir string
	// RPCAddr is host:port at which other nodes reach this node's port, as its node record says.
	RPCAddr string
	// RaftListener yields other managers' Raft streams; its connections have Peer() api.NodeIdentity.
	RaftListener net.Listener
	// DialRaft opens a Raft stream to another manager's port; its connections have Peer(), too.
	DialRaft func(ctx context.Context, addr string) (net.Conn, error)
	// DialManager makes a gRPC connection that trusts managers of this cluster only.
	DialManager func(addr string) (*grpc.ClientConn, error)
	// DialNode makes a gRPC connection that trusts any node of this cluster.
	DialNode func(addr string) (*grpc.ClientConn, error)
	// Join are addresses of managers to ask for membership while this manager's log belongs to no group yet.
	Join []string
	// Known returns further addresses of managers, as heard lately; may be nil.
	Known func() []string
	// Keys encrypts what is on disk, and is locked and unlocked as the cluster says; nil: everything is plain.
	Keys *keyring.Keyring
	// Reserve is the free space in bytes below which no writes are taken; 0: the default.
	Reserve int64
	// Timing of elections; zero: the defaults, which suit managers that have a machine each.
	Timing consensus.Timing
	// Certificate is this node's newest, to be shown to external certificate authorities; may be nil.
	Certificate func() *tls.Certificate
	// Disconnect cuts all accepted connections of a node that was removed or lost its role.
	Disconnect func(nodeID string)
	// Events is told what happens to services, nodes, networks, secrets and configs; may be nil. It must not block.
	Events func(events.Message)
	// Fatal must end the process: going on would break a guarantee.
	Fatal  func(exitCode int, err error)
	Logger *slog.Logger
}

func (c *Config) validate() error {
	if c.NodeID == "" || c.ClusterID == "" || c.StateDir == "" || c.RPCAddr == "" || c.RaftListener == nil || c.DialRaft == nil ||
		c.DialManager == nil || c.DialNode == nil || c.Fatal == nil {
		return errors.New("manager: NodeID, ClusterID, StateDir, RPCAddr, RaftListener, the dialers and Fatal are required")
	}
	if c.Disconnect == nil {
		c.Disconnect = func(string) {}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return nil
}

// Manager is one manager. New makes it, Register offers its services, Run makes it work.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	store   *store.Store
	authz   *authz.Authorizer
	fwd     *forward.Forwarder
	front   *dispatcher.Front
	srv     services
	streams *streams
	ready   chan struct{} // closed when the log is open

	mu      sync.Mutex
	raft    *consensus.Node     // nil before ready and after Run
	seen    *consensus.Observer // likewise
	leading bool                // a term of ours is under way
	changed chan struct{}       // closed and replaced when leadership may have changed
	leaving bool                // Leave was called: do not join again
}

// services are what Register offers.
type services struct {
	ca      *ca.Server
	control *control.Server
	members *membership
}

// New puts a manager together. It opens nothing.
func New(cfg Config) (*Manager, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	m := &Manager{cfg: cfg, log: cfg.Logger.With("component", "manager", "node", cfg.NodeID), store: store.New(nil),
		ready: make(chan struct{}), changed: make(chan struct{})}
	m.streams = newStreams(m)
	m.authz = authz.New(authz.Config{Role: m.role, Logger: cfg.Logger})
	m.fwd = forward.New(forward.Config{Leadership: m, Dial: cfg.DialManager})
	m.front = dispatcher.NewFront(m.LeaderAddr, m.store.CountNodes)
	m.srv.ca = ca.NewServer(m.store, cfg.Logger, nil)
	m.srv.ca.BeforeDemoted(m.awaitOut)
	m.srv.ca.AskWith(ca.NewExternal(cfg.Certificate))
	m.srv.members = &membership{m: m}
	m.srv.control = control.New(control.Config{
		Store: m.store, Managers: group{m}, Observer: m.observer, Authority: m.srv.ca, Logger: cfg.Logger,
		Checks: []func(*swarm.ServiceSpec) error{
			func(s *swarm.ServiceSpec) error { _, err := placement.RequirementsOf(s); return err },
		},
	})
	return m, nil
}

// ServerOptions are the interceptors of the gRPC server that Register is called with.
func (m *Manager) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(m.authz.Unary(), m.fwd.Unary()),
		grpc.ChainStreamInterceptor(m.authz.Stream()),
	}
}

// Register offers the manager's services. They are unavailable until Run has opened the log.
func (m *Manager) Register(s grpc.ServiceRegistrar) {
	api.RegisterCAServer(s, m.srv.ca)
	api.RegisterControlServer(s, m.srv.control)
	api.RegisterMembershipServer(s, m.srv.members)
	api.RegisterDispatcherServer(s, m.front)
}

// Run opens the log, takes part in the group, joins it first if need be, and leads when it is elected, until ctx is done.
func (m *Manager) Run(ctx context.Context) error {
	node, err := m.open()
	if err != nil {
		return fmt.Errorf("run manager: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() {
		cancel()
		wg.Wait()
		m.mu.Lock()
		seen := m.seen
		m.raft, m.seen = nil, nil
		m.mu.Unlock()
		seen.Close()
		if err := node.Close(); err != nil {
			m.log.Warn("close raft log", "err", err)
		}
		_ = m.fwd.Close()
	}()
	wg.Go(func() { m.belong(ctx) })
	wg.Go(func() { m.guard(ctx) })
	wg.Go(func() { m.keepLocked(ctx) })
	wg.Go(func() { m.proclaim(ctx) })
	m.lead(ctx, node)
	return nil
}

func (m *Manager) open() (*consensus.Node, error) {
	if err := consensus.CheckLog(filepath.Join(m.cfg.StateDir, "raft")); err != nil {
		return nil, err
	}
	conf := consensus.Config{
		NodeID: m.cfg.NodeID, Dir: filepath.Join(m.cfg.StateDir, "raft"), Stream: m.streams, Advertise: m.cfg.RPCAddr,
		Logger: m.cfg.Logger, Store: m.store, Fatal: m.cfg.Fatal, Reserve: m.cfg.Reserve, Timing: m.cfg.Timing,
	}
	if m.cfg.Keys != nil {
		conf.Cipher = m.cfg.Keys
	}
	node, err := consensus.Open(conf)
	if err != nil {
		return nil, err
	}
	seen := node.Observe(m.fire)
	m.mu.Lock()
	m.raft, m.seen = node, seen
	m.mu.Unlock()
	close(m.ready)
	m.fire()
	return node, nil
}

// keepLocked locks this manager's data keys with the cluster's unlock key, or leaves them plain without one.
func (m *Manager) keepLocked(ctx context.Context) {
	if m.cfg.Keys == nil {
		return
	}
	w := m.store.Watch(store.KindCluster)
	defer w.Close()
	tick := time.NewTicker(lockRetry)
	defer tick.Stop()
	for {
		var key []byte
		known := false
		m.store.View(func(tx store.ReadTx) {
			if c := tx.Cluster(); c != nil {
				key, known = c.UnlockKey, true
			}
		})
		if known {
			if err := m.cfg.Keys.Lock(key); err != nil {
				m.log.Error("cannot change how the keys of this manager's data are locked; trying again", "retry_in", lockRetry, "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-w.C():
			w.Take()
		case <-tick.C: // after a failure
		}
	}
}

// guard cuts off nodes that were removed or demoted, on every manager.
func (m *Manager) guard(ctx context.Context) {
	w := m.store.Watch(store.KindNode)
	defer w.Close()
	demoted := map[string]bool{} // seen as managers, then as workers that are still in the group
	was := map[string]string{}
	tick := time.NewTicker(guardStep)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.C():
		case <-tick.C: // leaving the group is no event of the store
		}
		keys, _ := w.Take()
		for _, k := range keys {
			role := m.standing(k.ID).role
			if was[k.ID] == api.RoleManager && role == api.RoleWorker {
				demoted[k.ID] = true
			}
			was[k.ID] = role
			if m.gone(k.ID) {
				delete(was, k.ID)
				delete(demoted, k.ID)
				m.log.Info("node is out of the cluster, cutting its connections", "peer", k.ID)
				m.cfg.Disconnect(k.ID)
			}
		}
		for id := range demoted {
			if !m.isMember(id) {
				delete(demoted, id)
				m.streams.cut(id) // its requests are checked one by one
			}
		}
	}
}

func (m *Manager) gone(id string) (gone bool) {
	m.store.View(func(tx store.ReadTx) { gone = tx.Node(id) == nil })
	return gone
}

// node is the Raft node while it is open.
func (m *Manager) node() (*consensus.Node, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.raft == nil {
		return nil, api.Errorf(errdefs.ErrUnavailable, "this manager is starting or stopping; try again")
	}
	return m.raft, nil
}

// Ready is closed when the log is open: requests are answered from then on.
func (m *Manager) Ready() <-chan struct{} { return m.ready }

// Store is this manager's replica, to be read only.
func (m *Manager) Store() *store.Store { return m.store }

// Hint passes a suspicion of memberlist on to the dispatcher, if this manager leads.
func (m *Manager) Hint(nodeID string) { m.front.Hint(nodeID) }

func (m *Manager) observer() control.Observer {
	if d := m.front.Current(); d != nil {
		return d
	}
	return nil
}

// joinRetry is the pause between attempts to become a member, doubled up to joinRetryMax.
const (
	joinRetry    = 250 * time.Millisecond
	joinRetryMax = 4 * time.Second
	joinTimeout  = 15 * time.Second
	guardStep    = time.Second
	lockRetry    = 5 * time.Second
)
