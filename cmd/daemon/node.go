package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"skein/agent"
	"skein/agent/identity"
	"skein/agent/liveness"
	"skein/agent/transport"
	"skein/manager"
	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/store"
)

const (
	managerReady = 30 * time.Second // to open and replay the log
	joinWait     = 30 * time.Second // until the cluster takes the new node
	goodbyeWait  = 3 * time.Second  // for the leader to hear that the node goes
	leaveWait    = 10 * time.Second // for the group to let a manager go
	silentFor    = 8 * time.Second  // without a session: an election is over by then
)

// clusterNode is this node's part in a cluster while it lasts: the port to other nodes, the agent, and a manager if the role says so.
type clusterNode struct {
	id       *identity.Identity
	role     string // that this part was started in; the certificate's may be newer
	settings settings
	log      *slog.Logger
	mux      *transport.Mux
	server   *grpc.Server
	agent    *agent.Agent
	manager  *manager.Manager // nil on workers
	control  api.ControlClient

	cancel    context.CancelFunc
	group     *errgroup.Group
	session   chan struct{}         // closed at the first session with a manager
	connected func()                // closes it
	failed    chan error            // why the manager ended, if it did by itself
	done      chan struct{}         // closed by stop
	switched  chan struct{}         // capacity 1: the certificate is of another role now
	creds     chan *api.Credentials // capacity 1: the newest that the managers said
	expelled  chan error            // capacity 1: the cluster removed this node

	cryptChanged <-chan struct{} // the node's keys of encrypted networks are others

	mu           sync.Mutex
	conns        map[string]*grpc.ClientConn // to agents, by address; nil after stop
	wanted       string                      // role in the store, empty before the first session
	refusedSince time.Time                   // since when managers refuse this node; zero: they do not
}

// startNode opens the port and runs the parts. With found it makes a new cluster.
func startNode(m *membership, id *identity.Identity, s settings, found *founding) (*clusterNode, error) {
	mux, err := transport.Listen(transport.Config{Addr: s.Listen, Server: id.ServerTLS(), Client: id.ClientTLS(""), Logger: m.log.With("component", "transport")})
	if err != nil {
		return nil, err
	}
	packets, err := net.ListenPacket("udp", s.Listen)
	if err != nil {
		mux.Close()
		return nil, fmt.Errorf("open the gossip port: %w", err)
	}
	n := &clusterNode{
		id: id, role: id.Role(), settings: s, log: m.log, mux: mux, session: make(chan struct{}), failed: make(chan error, 1), done: make(chan struct{}),
		switched: make(chan struct{}, 1), creds: make(chan *api.Credentials, 1), expelled: make(chan error, 1), conns: map[string]*grpc.ClientConn{},
	}
	n.cryptChanged = m.eng.CryptKeysChanged()
	n.connected = sync.OnceFunc(func() { close(n.session) })
	if err := n.build(m); err != nil {
		mux.Close()
		packets.Close()
		return nil, err
	}
	live, err := n.liveness(packets)
	if err != nil {
		mux.Close()
		packets.Close()
		return nil, err
	}
	n.run(live)
	if err := n.awaitManager(found); err != nil {
		n.stop()
		return nil, err
	}
	return n, nil
}

// build puts manager, server and agent together; nothing runs yet.
func (n *clusterNode) build(m *membership) error {
	opts := transport.ServerOptions()
	if n.role == api.RoleManager {
		var err error
		if n.manager, err = manager.New(n.managerConfig(m)); err != nil {
			return err
		}
		n.control = n.manager.Control()
		opts = append(opts, n.manager.ServerOptions()...)
	} else {
		az := authz.New(authz.Config{Role: n.roleOf, Logger: n.log})
		opts = append(opts, grpc.ChainUnaryInterceptor(az.Unary()), grpc.ChainStreamInterceptor(az.Stream()))
	}
	n.server = grpc.NewServer(opts...)
	if n.manager != nil {
		n.manager.Register(n.server)
	}
	api.RegisterAgentServer(n.server, agent.NewServer(logSource{m.eng}, netChecker{m.network}))
	var err error
	n.agent, err = agent.New(agent.Config{
		NodeID: n.id.NodeID(), Hostname: m.cfg.Hostname, UnderlayAddr: n.settings.Underlay, RPCAddr: n.settings.RPCAddr,
		StateDir: filepath.Join(m.clusterDir(), "agent"), Seeds: n.seeds(), Executor: m.eng, Network: m.eng,
		Dial:   func(_ context.Context, addr string) (*grpc.ClientConn, error) { return n.dialManager(addr) },
		OnNode: func(r *api.NodeRecord) { n.noteRecord(r); m.eng.SyncAttachments() }, OnRefused: n.noteRefusal, OnCredentials: n.noteCredentials, TLS: n.id.TLS,
		Addrs: m.addresses, Crypt: m.eng.CryptKeys, Facts: m.eng.NodeFacts,
		Log: n.log.With("component", "agent"),
	})
	return err
}

// roleOf is a worker's knowledge of roles, for authz: managers are those of the list that the leader keeps this node up to date with. The
// certificate alone would be good for months after a demotion.
func (n *clusterNode) roleOf(_ context.Context, id api.NodeIdentity) (string, error) {
	list := n.agent.Managers()
	if len(list) == 0 {
		return "", api.Errorf(errdefs.ErrUnavailable, "this node has not heard yet who the managers are; try again")
	}
	if slices.ContainsFunc(list, func(p *api.ManagerPeer) bool { return p.NodeId == id.NodeID }) {
		return api.RoleManager, nil
	}
	return api.RoleWorker, nil
}

func (n *clusterNode) seeds() []string {
	if n.manager != nil {
		return append([]string{n.settings.RPCAddr}, n.settings.Seeds...)
	}
	return n.settings.Seeds
}

func (n *clusterNode) managerConfig(m *membership) manager.Config {
	return manager.Config{
		NodeID: n.id.NodeID(), ClusterID: n.id.ClusterID(), StateDir: m.clusterDir(), RPCAddr: n.settings.RPCAddr,
		RaftListener: n.mux.Raft(),
		DialRaft:     func(ctx context.Context, addr string) (net.Conn, error) { return n.mux.Dial(ctx, addr, api.ALPNRaft) },
		DialManager:  n.dialManager, DialNode: n.dialNode, Join: n.settings.Seeds, Known: n.managers, Disconnect: n.mux.Disconnect,
		Reserve: m.cfg.reserve, Keys: m.keys, Certificate: n.id.Certificate,
		Events: m.eng.ClusterEvent,
		Fatal: func(code int, err error) {
			n.log.Error("this node's manager cannot go on", "err", err)
			os.Exit(code)
		},
		Logger: n.log.With("component", "manager"),
	}
}

func (n *clusterNode) dialManager(addr string) (*grpc.ClientConn, error) {
	return transport.DialGRPC(n.reach(addr), n.id.ClientTLS(api.RoleManager))
}

func (n *clusterNode) dialNode(addr string) (*grpc.ClientConn, error) {
	return n.mux.DialGRPC(n.reach(addr))
}

// reach is where to dial an address: this node's own port is reached from inside, since the advertised address may be a translated one.
func (n *clusterNode) reach(addr string) string {
	if addr != n.settings.RPCAddr {
		return addr
	}
	return localAddress(n.settings.Listen)
}

func (n *clusterNode) liveness(packets net.PacketConn) (*liveness.Liveness, error) {
	self, err := netip.ParseAddrPort(n.settings.RPCAddr)
	if err != nil {
		return nil, fmt.Errorf("advertised address %q: %w", n.settings.RPCAddr, err)
	}
	return liveness.New(liveness.Config{
		NodeID: n.id.NodeID(), Advertise: self, Packets: packets, Streams: n.mux.Gossip(), Keys: n.id.GossipKeys(),
		Dial:  func(ctx context.Context, addr string) (net.Conn, error) { return n.mux.Dial(ctx, addr, api.ALPNGossip) },
		Peers: n.managers,
		OnDead: func(nodeID string) {
			if n.manager != nil {
				n.manager.Hint(nodeID)
			}
		},
		Log: n.log.With("component", "liveness"),
	})
}

// managers are the addresses of all managers known, the newest list first.
func (n *clusterNode) managers() []string {
	var out []string
	for _, p := range n.agent.Managers() {
		out = append(out, p.RpcAddr)
	}
	for _, s := range n.settings.Seeds {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// run starts the parts; stop ends them.
func (n *clusterNode) run(live *liveness.Liveness) {
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel, n.group = cancel, &errgroup.Group{}
	part := func(name string, f func(context.Context) error) {
		n.group.Go(func() error {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				n.log.Error("a part of this node ended", "part", name, "err", err)
			}
			return nil
		})
	}
	part("transport", n.mux.Run)
	part("gossip", live.Run)
	part("agent", n.agent.Run)
	part("keys of encrypted networks", func(ctx context.Context) error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-n.cryptChanged:
				n.agent.CryptChanged()
			}
		}
	})
	part("credentials", func(ctx context.Context) error { return n.keepCredentials(ctx, live) })
	part("certificate renewal", func(ctx context.Context) error {
		return n.id.Run(ctx, identity.Renewal{Dial: n.dialAnyManager, Renewed: n.noteRenewal, Logger: n.log.With("component", "identity")})
	})
	part("rpc server", func(ctx context.Context) error {
		defer context.AfterFunc(ctx, n.server.Stop)()
		return n.server.Serve(n.mux.GRPC())
	})
	if n.manager != nil {
		part("manager", func(ctx context.Context) error {
			err := n.manager.Run(ctx)
			if ctx.Err() == nil {
				n.failed <- err
			}
			return err
		})
	}
}

// dialAnyManager prefers the manager of the session: it answers, and has heard of this node's newest role.
func (n *clusterNode) dialAnyManager(context.Context) (*grpc.ClientConn, error) {
	if st := n.agent.Status(); st.Connected && st.Leader != n.settings.RPCAddr {
		return n.dialManager(st.Leader)
	}
	list := n.managers()
	if others := slices.DeleteFunc(slices.Clone(list), func(a string) bool { return a == n.settings.RPCAddr }); len(others) > 0 {
		list = others // this node's own manager may be the one that is going
	}
	if len(list) == 0 {
		return nil, api.Errorf(errdefs.ErrUnavailable, "no manager of the cluster is known")
	}
	return n.dialManager(list[time.Now().UnixNano()%int64(len(list))])
}

// awaitManager returns when the manager answers requests, and has made the new cluster if there is one to make.
func (n *clusterNode) awaitManager(found *founding) error {
	if n.manager == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), managerReady)
	defer cancel()
	select {
	case <-n.manager.Ready():
	case err := <-n.failed:
		return fmt.Errorf("start this node's manager: %w: restore the file; or, while other managers live, remove this node there (docker node rm --force), leave here with \"docker swarm leave --force\" and join again", err)
	case <-ctx.Done():
		return fmt.Errorf("start this node's manager: its log was not open within %v", managerReady)
	}
	if found == nil {
		return nil
	}
	if err := n.manager.InitCluster(ctx, found.spec); err != nil {
		return err
	}
	return n.joined(ctx)
}

// joined waits until the cluster has taken the node.
func (n *clusterNode) joined(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, joinWait)
	defer cancel()
	for n.manager != nil {
		changed := n.manager.Changed()
		if id, _, _ := n.manager.Leader(); id != "" {
			break
		}
		select {
		case <-changed:
		case err := <-n.failed:
			return fmt.Errorf("join the managers: %w", err)
		case <-ctx.Done():
			return api.Errorf(errdefs.ErrUnavailable, "join the managers: no leader was heard of within %v: is %s reachable from the other managers?", joinWait, n.settings.RPCAddr)
		}
	}
	select {
	case <-n.session:
		return nil
	case <-ctx.Done():
		st := n.agent.Status()
		return api.Errorf(errdefs.ErrUnavailable, "no session with a manager within %v: %s", joinWait, st.Err)
	}
}

// leave tells the group that this manager goes, and the leader that the node does.
func (n *clusterNode) leave(ctx context.Context) {
	if n.manager != nil && len(n.manager.Managers()) == 1 {
		return
	}
	if n.manager != nil {
		ctx, cancel := context.WithTimeout(ctx, leaveWait)
		defer cancel()
		if err := n.manager.Leave(ctx); err != nil {
			n.log.Warn("leaving without the group's consent", "err", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, goodbyeWait)
	defer cancel()
	if err := n.agent.Leave(ctx); err != nil {
		n.log.Warn("leaving without a goodbye: the managers notice when the lease of this node ends", "err", err)
	}
}

// stop ends all parts and waits for them.
func (n *clusterNode) stop() {
	n.mu.Lock()
	stopped := n.conns == nil
	n.mu.Unlock()
	if stopped {
		return
	}
	close(n.done)
	n.cancel()
	n.mux.Close()
	_ = n.group.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		c.Close()
	}
	n.conns = nil
}

// info is the node's word on the cluster, without asking anybody.
func (n *clusterNode) info(context.Context) swarm.Info {
	host, _, _ := net.SplitHostPort(n.settings.RPCAddr)
	in := swarm.Info{NodeID: n.id.NodeID(), NodeAddr: host, LocalNodeState: swarm.LocalNodeStateActive, ControlAvailable: n.manages()}
	for _, p := range n.agent.Managers() {
		in.RemoteManagers = append(in.RemoteManagers, swarm.Peer{NodeID: p.NodeId, Addr: p.RpcAddr})
	}
	if _, until := n.id.Validity(); time.Now().After(until) {
		in.Error = fmt.Sprintf("the certificate of this node expired on %s because it could not reach the managers in time: leave with \"docker swarm leave --force\" and join again", until.UTC().Format(time.RFC3339))
	} else if st := n.agent.Status(); !st.Connected && st.Err != "" && time.Since(st.Since) > silentFor {
		in.Error = fmt.Sprintf("no session with a manager for %s: %s", time.Since(st.Since).Round(time.Second), st.Err)
	}
	return in
}

// agentOf returns a client of a node's agent service. Connections are kept per address.
func (n *clusterNode) agentOf(nodeID string) (api.AgentClient, error) {
	addr := ""
	n.manager.Store().View(func(tx store.ReadTx) {
		if rec := tx.Node(nodeID); rec != nil {
			addr = rec.RpcAddr
		}
	})
	if addr == "" {
		return nil, api.Errorf(errdefs.ErrNotFound, "node %s not found", nodeID)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conns == nil {
		return nil, errors.New("this node is leaving the cluster")
	}
	c := n.conns[addr]
	if c == nil {
		var err error
		if c, err = n.dialNode(addr); err != nil {
			return nil, fmt.Errorf("reach node %s: %w", nodeID, err)
		}
		n.conns[addr] = c
	}
	return api.NewAgentClient(c), nil
}

// addresses are those that a client on this node may have.
func (m *membership) addresses() []string {
	addrs, err := m.network.NodeAddrs()
	if err != nil {
		m.log.Warn("list this node's addresses", "err", err)
	}
	var out []string
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return out
}
