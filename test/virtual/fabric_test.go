// Package virtual plays real managers in virtual time: hashicorp/raft on its disk format, gRPC with mutual TLS, dispatcher and controllers, all in
// one bubble over connections in memory. What is cut off neither hears nor is heard. Agents are sessions that run whatever they are told.
package virtual

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"

	"skein/agent/identity"
	"skein/manager"
	"skein/manager/api"
	"skein/manager/store"
)

// fabric joins everybody by buffers in memory.
type fabric struct {
	mu    sync.Mutex
	doors map[string]*door
	cut   map[string]bool
	conns map[net.Conn][2]string
}

// door is what a manager listens on.
type door struct {
	grpc *bufconn.Listener
	raft *raftDoor
	id   api.NodeIdentity
}

// raftDoor hands out connections that tell who is at the other end, as those of package transport do after their handshake.
type raftDoor struct {
	addr   string
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

type raftConn struct {
	net.Conn
	peer api.NodeIdentity
}

func (c raftConn) Peer() api.NodeIdentity { return c.peer }

type addr string

func (a addr) Network() string { return "memory" }
func (a addr) String() string  { return string(a) }

func (d *raftDoor) Accept() (net.Conn, error) {
	select {
	case c := <-d.conns:
		return c, nil
	case <-d.closed:
		return nil, net.ErrClosed
	}
}
func (d *raftDoor) Close() error   { d.once.Do(func() { close(d.closed) }); return nil }
func (d *raftDoor) Addr() net.Addr { return addr(d.addr) }

func newFabric() *fabric {
	return &fabric{doors: map[string]*door{}, cut: map[string]bool{}, conns: map[net.Conn][2]string{}}
}

func (f *fabric) setCut(name string, cut bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cut[name] = cut
	for c, ends := range f.conns {
		if cut && slices.Contains(ends[:], name) {
			_ = c.Close()
			delete(f.conns, c)
		}
	}
}

// way is the door at an address; nobody answers while one of the two is cut off.
func (f *fabric) way(ctx context.Context, from, to string) (*door, error) {
	f.mu.Lock()
	d, cut := f.doors[to], f.cut[from] || f.cut[to]
	f.mu.Unlock()
	if cut {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if d == nil {
		return nil, errors.New("connection refused")
	}
	return d, nil
}

func (f *fabric) keep(c net.Conn, from, to string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conns[c] = [2]string{from, to}
}

func (f *fabric) dialGRPC(from, to string, creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+to, grpc.WithTransportCredentials(creds), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		d, err := f.way(ctx, from, to)
		if err != nil {
			return nil, err
		}
		c, err := d.grpc.DialContext(ctx)
		if err == nil {
			f.keep(c, from, to)
		}
		return c, err
	}))
}

func (f *fabric) dialRaft(ctx context.Context, from, to string, self api.NodeIdentity) (net.Conn, error) {
	d, err := f.way(ctx, from, to)
	if err != nil {
		return nil, err
	}
	l := bufconn.Listen(256 << 10) // for the one pair of buffers in it
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		accepted <- c
	}()
	here, err := l.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	there := <-accepted
	select {
	case d.raft.conns <- raftConn{there, self}:
	case <-d.raft.closed:
		_ = here.Close()
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		_ = here.Close()
		return nil, ctx.Err()
	}
	f.keep(here, from, to)
	return raftConn{here, d.id}, nil
}

// group is the managers of a cluster.
type group struct {
	t   *testing.T
	f   *fabric
	all []*member
}

// member is one manager's process.
type member struct {
	g    *group
	name string
	dir  string
	id   *identity.Identity
	mgr  *manager.Manager
	stop func()
	up   bool
}

func logger() *slog.Logger {
	if os.Getenv("SKEIN_TEST_LOG") == "" {
		return slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

// found makes a cluster of n managers.
func found(t *testing.T, n int) *group {
	t.Helper()
	g := &group{t: t, f: newFabric()}
	t.Cleanup(g.close)
	ctx := g.within(20 * time.Second)
	req, err := identity.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := manager.NewSeed(ctx, req.CSRPEM, swarm.CAConfig{})
	if err != nil {
		t.Fatal(err)
	}
	m := &member{g: g, name: place(1), dir: t.TempDir()}
	if _, err := identity.Install(m.dir, req, seed.CertPEM, seed.GossipKey); err != nil {
		t.Fatal(err)
	}
	m.start()
	g.all = append(g.all, m)
	if err := m.mgr.InitCluster(ctx, manager.InitSpec{Seed: seed, Hostname: "m1", UnderlayAddr: "192.0.2.1"}); err != nil {
		t.Fatal(err)
	}
	for i := 2; i <= n; i++ {
		g.join(place(i))
	}
	return g
}

// close ends everything; the longest timeout inside passes before the bubble may end.
func (g *group) close() {
	for _, m := range g.all {
		m.kill()
	}
	time.Sleep(time.Minute)
}

func (g *group) within(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(g.t.Context(), d)
	g.t.Cleanup(cancel)
	return ctx
}

// join adds a manager.
func (g *group) join(name string) *member {
	g.t.Helper()
	m := &member{g: g, name: name, dir: g.t.TempDir()}
	m.id = g.certificate(name, m.dir, api.RoleManager)
	m.start(g.names(m)...)
	g.all = append(g.all, m)
	g.eventually(name+" votes", 20*time.Second, func() bool {
		l := g.leader()
		return l != nil && slices.ContainsFunc(l.mgr.Managers(), func(p *api.ManagerPeer) bool { return p.NodeId == m.id.NodeID() })
	})
	return m
}

// certificate gets a node into the cluster, as a join with a token does.
func (g *group) certificate(name, dir, role string) *identity.Identity {
	g.t.Helper()
	req, err := identity.NewRequest()
	if err != nil {
		g.t.Fatal(err)
	}
	var token string
	g.leaderView(func(tx store.ReadTx) {
		token = tx.Cluster().WorkerToken
		if role == api.RoleManager {
			token = tx.Cluster().ManagerToken
		}
	})
	l := g.waitLeader()
	conn, err := g.f.dialGRPC(name, l.name, credentials.NewTLS(bootstrapTLS()))
	if err != nil {
		g.t.Fatal(err)
	}
	defer conn.Close()
	reply, err := api.NewCAClient(conn).IssueCertificate(g.within(20*time.Second), &api.IssueRequest{Token: token, CsrPem: req.CSRPEM, Hostname: strings.NewReplacer(".", "-", ":", "-").Replace(name), RpcAddr: name, UnderlayAddr: "192.0.2.9"})
	if err != nil {
		g.t.Fatalf("certificate for %s: %v", name, err)
	}
	id, err := identity.Install(dir, req, reply.CertPem, reply.GossipKey)
	if err != nil {
		g.t.Fatal(err)
	}
	return id
}

func (g *group) names(but *member) []string {
	var out []string
	for _, m := range g.all {
		if m != but {
			out = append(out, m.name)
		}
	}
	return out
}

// start runs the manager's process.
func (m *member) start(join ...string) {
	t, f := m.g.t, m.g.f
	t.Helper()
	var err error
	if m.id, err = identity.Load(m.dir, nil); err != nil {
		t.Fatal(err)
	}
	self := api.NodeIdentity{NodeID: m.id.NodeID(), Role: m.id.Role(), ClusterID: m.id.ClusterID()}
	d := &door{grpc: bufconn.Listen(256 << 10), raft: &raftDoor{addr: m.name, conns: make(chan net.Conn), closed: make(chan struct{})}, id: self}
	dial := func(to, role string) (*grpc.ClientConn, error) {
		return f.dialGRPC(m.name, to, credentials.NewTLS(m.id.ClientTLS(role)))
	}
	m.mgr, err = manager.New(manager.Config{
		NodeID: self.NodeID, ClusterID: self.ClusterID, StateDir: m.dir, RPCAddr: m.name, RaftListener: d.raft, Join: join, Logger: logger(),
		DialRaft:    func(ctx context.Context, to string) (net.Conn, error) { return f.dialRaft(ctx, m.name, to, self) },
		DialManager: func(to string) (*grpc.ClientConn, error) { return dial(to, api.RoleManager) },
		DialNode:    func(to string) (*grpc.ClientConn, error) { return dial(to, "") },
		Fatal:       func(code int, err error) { t.Errorf("%s: fatal %d: %v", m.name, code, err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(append([]grpc.ServerOption{grpc.Creds(credentials.NewTLS(m.id.ServerTLS())), grpc.MaxRecvMsgSize(api.MaxMessageBytes)}, m.mgr.ServerOptions()...)...)
	m.mgr.Register(srv)
	f.mu.Lock()
	f.doors[m.name] = d
	f.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(d.grpc) })
	wg.Go(func() {
		if err := m.mgr.Run(ctx); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
	})
	m.up = true
	m.stop = func() {
		f.mu.Lock()
		delete(f.doors, m.name)
		f.mu.Unlock()
		_ = d.raft.Close()
		srv.Stop()
		cancel()
		wg.Wait()
	}
}

// kill ends the process, connections first.
func (m *member) kill() {
	if !m.up {
		return
	}
	m.up = false
	m.g.f.setCut(m.name, true)
	m.stop()
	m.g.f.setCut(m.name, false)
}

func (g *group) eventually(what string, bound time.Duration, ok func() bool) time.Duration {
	g.t.Helper()
	began := time.Now()
	for !ok() {
		if time.Since(began) > bound {
			g.t.Fatalf("%s: not within %v", what, bound)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(began)
}

// leader is who leads and is not cut off, nil for none.
func (g *group) leader() *member {
	for _, m := range g.all {
		g.f.mu.Lock()
		cut := g.f.cut[m.name]
		g.f.mu.Unlock()
		if m.up && !cut && m.mgr.IsLeader() {
			return m
		}
	}
	return nil
}

func (g *group) waitLeader() *member {
	g.t.Helper()
	var l *member
	g.eventually("a leader", 20*time.Second, func() bool { l = g.leader(); return l != nil })
	return l
}

func (g *group) leaderView(f func(store.ReadTx)) {
	g.t.Helper()
	g.waitLeader().mgr.Store().View(f)
}

// same waits until all managers that are up have the same state.
func (g *group) same() {
	g.t.Helper()
	g.eventually("equal stores", 10*time.Second, func() bool {
		l := g.waitLeader()
		version, hash := l.mgr.Store().Version(), l.mgr.Store().Hash()
		for _, m := range g.all {
			if !m.up {
				continue
			}
			st := m.mgr.Store()
			if v := st.Version(); v != version {
				return false
			}
			if st.Hash() != hash && st.Version() == version {
				g.t.Fatalf("%s and %s differ at version %d", m.name, l.name, version)
			}
		}
		return true
	})
}

// place is the name and address of the nth manager.
func place(n int) string { return fmt.Sprintf("192.0.2.%d:2377", n) }
