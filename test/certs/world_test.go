// Package certs_test lets a cluster's certificates live in virtual time: real identities on disk, real mutual TLS and gRPC over connections in
// memory, the certificate authority, the authorisation table, dispatchers and agents; a store without Raft, fake containers.
package certs_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"skein/agent"
	"skein/agent/identity"
	"skein/agent/tasktest"
	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/ca"
	"skein/manager/dispatcher"
	"skein/manager/loop"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

type world struct {
	t     *testing.T
	store *store.Store

	mu       sync.Mutex
	ports    map[string]*port // by address
	leader   string
	term     context.CancelFunc
	termDone sync.WaitGroup
}

// port is what listens at an address.
type port struct {
	lis   *bufconn.Listener
	srv   *grpc.Server
	front *dispatcher.Front
}

// node is a member with its daemon's parts.
type node struct {
	w       *world
	name    string // its address, too
	dir     string
	id      *identity.Identity
	exec    *tasktest.Executor
	agent   *agent.Agent
	creds   chan *api.Credentials
	stop    context.CancelFunc
	done    sync.WaitGroup
	renewed int
}

func logger() *slog.Logger {
	if os.Getenv("SKEIN_TEST_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

// bubble makes a cluster whose first manager is m1, and runs f in virtual time.
func bubble(t *testing.T, conf swarm.CAConfig, f func(w *world, first *node)) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := storetest.New()
		w := &world{t: t, store: s, ports: map[string]*port{}}
		first := w.found(conf)
		f(w, first)
		w.unlead()
	})
}

// found makes the cluster.
func (w *world) found(conf swarm.CAConfig) *node {
	w.t.Helper()
	req, err := identity.NewRequest()
	w.ok(err)
	csr, err := ca.ParseRequest(req.CSRPEM)
	w.ok(err)
	cid := api.NewID()
	id := api.NodeIdentity{ClusterID: cid, NodeID: api.NodeIDFor(cid, csr.RawSubjectPublicKeyInfo), Role: api.RoleManager}
	root, certPEM, err := ca.Found(w.t.Context(), conf, csr, id, time.Now())
	w.ok(err)
	key, err := root.KeyPEM()
	w.ok(err)
	spec, err := json.Marshal(swarm.Spec{CAConfig: conf})
	w.ok(err)
	w.apply(&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{Id: cid, SpecJson: spec, CaCertPem: root.CertPEM(), CaKeyPem: key,
		WorkerToken: root.NewToken(), ManagerToken: root.NewToken(), OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", OverlayBits: 20, DataPort: 4789,
		FeatureLevel: api.FeatureLevel, GossipKey: make([]byte, 32)}}},
		&api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id.NodeID, Hostname: "m1", Role: api.RoleManager, Availability: "active", RpcAddr: "m1", UnderlayAddr: "192.0.2.1"}}})
	n := &node{w: w, name: "m1", dir: w.t.TempDir()}
	n.id, err = identity.Install(n.dir, req, certPEM, make([]byte, 32))
	w.ok(err)
	n.boot()
	w.lead("m1")
	return n
}

func (w *world) ok(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) apply(changes ...*api.Change) {
	w.t.Helper()
	_, results, err := w.store.Batch(w.t.Context(), []*api.Txn{{Changes: changes}})
	w.ok(errors.Join(append(results, err)...))
}

func (w *world) cluster() (c *store.Cluster) {
	w.store.View(func(tx store.ReadTx) { c = tx.Cluster() })
	return c
}

func (w *world) record(id string) (n *store.Node) {
	w.store.View(func(tx store.ReadTx) { n = tx.Node(id) })
	return n
}

// setRole changes a node's role in the store.
func (w *world) setRole(id, role string) {
	n := proto.Clone(w.record(id)).(*store.Node)
	n.Role = role
	w.apply(&api.Change{Kind: &api.Change_PutNode{PutNode: n}})
}

// reconfigure changes the cluster's certificate authority.
func (w *world) reconfigure(conf swarm.CAConfig) {
	w.t.Helper()
	for {
		old := w.cluster()
		p, err := ca.NewServer(w.store, logger(), nil).PlanConfig(w.t.Context(), old, conf)
		w.ok(err)
		c := proto.Clone(old).(*api.ClusterRecord)
		c.SpecJson, err = json.Marshal(swarm.Spec{CAConfig: p.Config})
		w.ok(err)
		p.Apply(c)
		_, results, err := w.store.Batch(w.t.Context(), []*api.Txn{{Changes: []*api.Change{
			{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "cluster", Id: c.Id, Version: old.Meta.Version}}},
			{Kind: &api.Change_PutCluster{PutCluster: c}}}}})
		w.ok(err)
		if results[0] == nil {
			return
		}
	}
}

// lead begins a term.
func (w *world) lead(name string) {
	ctx, cancel := context.WithCancel(context.Background())
	d := dispatcher.New(dispatcher.Config{Store: w.store, NodeID: name, Log: logger(), Identify: func(ctx context.Context) (string, error) {
		c, _ := authz.CallerFrom(ctx)
		return c.NodeID, nil
	}})
	w.termDone.Go(func() { _ = d.Run(ctx) })
	w.termDone.Go(func() { _ = loop.Run(ctx, w.store, ca.NewKeeper()) })
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leader, w.term = name, cancel
	w.ports[name].front.Set(d)
}

func (w *world) unlead() {
	w.mu.Lock()
	if w.term == nil {
		w.mu.Unlock()
		return
	}
	if p := w.ports[w.leader]; p != nil {
		p.front.Set(nil)
	}
	w.leader = ""
	cancel := w.term
	w.term = nil
	w.mu.Unlock()
	cancel()
	w.termDone.Wait()
}

func (w *world) leaderAddr() string { w.mu.Lock(); defer w.mu.Unlock(); return w.leader }

// dial reaches a node's port.
func (w *world) dial(addr string, conf *tls.Config) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(conf)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			w.mu.Lock()
			p := w.ports[addr]
			w.mu.Unlock()
			if p == nil {
				return nil, errors.New("connection refused")
			}
			return p.lis.DialContext(ctx)
		}))
}

// onLeader lets only the leader's certificate authority answer, as package forward sees to.
type onLeader struct {
	*ca.Server
	w    *world
	name string
}

func (s onLeader) ready() error {
	if s.w.leaderAddr() != s.name {
		return errors.New("not the leader")
	}
	return nil
}

func (s onLeader) IssueCertificate(ctx context.Context, r *api.IssueRequest) (*api.IssueReply, error) {
	if err := s.ready(); err != nil {
		return nil, err
	}
	return s.Server.IssueCertificate(ctx, r)
}

func (s onLeader) RenewCertificate(ctx context.Context, r *api.IssueRequest) (*api.IssueReply, error) {
	if err := s.ready(); err != nil {
		return nil, err
	}
	return s.Server.RenewCertificate(ctx, r)
}

// listen opens the node's port.
func (n *node) listen() {
	w := n.w
	az := authz.New(authz.Config{Logger: logger(), Role: func(_ context.Context, id api.NodeIdentity) (string, error) {
		if rec := w.record(id.NodeID); rec != nil {
			return rec.Role, nil
		}
		return "", fmt.Errorf("node %s was removed", id.NodeID)
	}})
	p := &port{lis: bufconn.Listen(1 << 16), front: dispatcher.NewFront(w.leaderAddr, nil)}
	p.srv = grpc.NewServer(grpc.Creds(credentials.NewTLS(n.id.ServerTLS())), grpc.UnaryInterceptor(az.Unary()), grpc.StreamInterceptor(az.Stream()))
	api.RegisterAgentServer(p.srv, agent.NewServer(nil, nil))
	if n.id.Role() == api.RoleManager {
		api.RegisterCAServer(p.srv, onLeader{ca.NewServer(w.store, logger(), nil), w, n.name})
		api.RegisterDispatcherServer(p.srv, p.front)
	}
	w.mu.Lock()
	w.ports[n.name] = p
	w.mu.Unlock()
	n.done.Go(func() { _ = p.srv.Serve(p.lis) })
}

// boot starts a node's daemon, without an agent.
func (n *node) boot() {
	n.listen()
	ctx, cancel := context.WithCancel(context.Background())
	n.stop = cancel
	n.done.Go(func() {
		_ = n.id.Run(ctx, identity.Renewal{Logger: logger(), Renewed: func() {
			n.renewed++
			if n.agent != nil {
				n.agent.TLSChanged()
			}
		}, Dial: func(context.Context) (*grpc.ClientConn, error) {
			addr := n.w.leaderAddr()
			if addr == "" {
				return nil, errors.New("no leader")
			}
			return n.w.dial(addr, n.id.ClientTLS(api.RoleManager))
		}})
	})
}

// withAgent starts the node's agent, too.
func (n *node) withAgent() *node {
	if n.exec == nil {
		n.exec = tasktest.NewExecutor()
	}
	n.creds = make(chan *api.Credentials, 64)
	var err error
	n.agent, err = agent.New(agent.Config{
		NodeID: n.id.NodeID(), Hostname: n.name, RPCAddr: n.name, UnderlayAddr: "192.0.2.1", StateDir: n.dir, Seeds: []string{"m1", "m2", "m3"},
		Executor: n.exec, Network: tasktest.NewNetwork(), TLS: n.id.TLS,
		Dial: func(_ context.Context, addr string) (*grpc.ClientConn, error) {
			return n.w.dial(addr, n.id.ClientTLS(api.RoleManager))
		},
		OnCredentials: func(c *api.Credentials) {
			if c.Renew {
				n.id.RenewSoon()
			}
			n.creds <- c
		},
	})
	n.w.ok(err)
	ctx, cancel := context.WithCancel(context.Background())
	parts := n.stop
	n.stop = func() { parts(); cancel() }
	n.done.Go(func() { _ = n.agent.Run(ctx) })
	n.done.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case c := <-n.creds:
				if changed, _ := n.id.Trust(c.TrustPem); changed {
					n.agent.TLSChanged()
				}
				_, _ = n.id.SetGossipKeys(c.GossipKeys)
			}
		}
	})
	return n
}

// halt ends the node's daemon.
func (n *node) halt() {
	n.stop()
	n.w.mu.Lock()
	p := n.w.ports[n.name]
	delete(n.w.ports, n.name)
	n.w.mu.Unlock()
	p.srv.Stop()
	n.done.Wait()
	n.agent = nil
}

// reboot starts it again from what is on disk.
func (n *node) reboot() error {
	id, err := identity.Load(n.dir, nil)
	if err != nil {
		return err
	}
	n.id = id
	n.boot()
	return nil
}

// join makes one more node with a token of the role.
func (w *world) join(name, role string) *node {
	w.t.Helper()
	token := w.cluster().WorkerToken
	if role == api.RoleManager {
		token = w.cluster().ManagerToken
	}
	n := &node{w: w, name: name, dir: w.t.TempDir()}
	var err error
	n.id, err = w.joining(n.dir, name, token)
	w.ok(err)
	n.boot()
	return n
}

// joining does what identity.Join does, over connections in memory.
func (w *world) joining(dir, name, token string) (*identity.Identity, error) {
	return identity.Join(w.t.Context(), w.leaderAddr(), token, identity.JoinOptions{StateDir: dir, Hostname: name, RPCAddr: "192.0.2.1:2377", UnderlayAddr: "192.0.2.1",
		Dial: func(addr string, conf *tls.Config) (*grpc.ClientConn, error) { return w.dial(addr, conf) }})
}

// meets makes a handshake between two nodes.
func (n *node) meets(o *node) error {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	_ = a.SetDeadline(time.Now().Add(time.Minute))
	_ = b.SetDeadline(time.Now().Add(time.Minute))
	conf := n.id.ClientTLS(o.id.Role())
	conf.NextProtos = []string{api.ALPNGRPC}
	there := make(chan error, 1)
	go func() {
		c := tls.Server(b, o.id.ServerTLS())
		err := c.Handshake()
		if err == nil && len(c.ConnectionState().VerifiedChains) == 0 {
			err = errors.New("the client was not verified")
		}
		if err == nil {
			_, err = c.Write([]byte("x"))
		}
		there <- err
	}()
	c := tls.Client(a, conf)
	err := c.Handshake()
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	} else {
		a.Close()
	}
	return errors.Join(err, <-there)
}

// eventually waits in virtual time.
func (w *world) eventually(what string, bound time.Duration, f func() bool) time.Duration {
	w.t.Helper()
	began := time.Now()
	for !f() {
		if time.Since(began) > bound {
			w.t.Fatalf("%s: not within %v", what, bound)
		}
		time.Sleep(10 * time.Millisecond)
		synctest.Wait()
	}
	return time.Since(began)
}
