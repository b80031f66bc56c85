// Package cluster tests managers as a group: real Raft on disk, real gRPC and mutual TLS over loopback, no containers.
package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein/agent/identity"
	"skein/agent/transport"
	"skein/manager"
	"skein/manager/api"
	"skein/manager/store"
)

// node is one manager's process, as cmd/daemon would put it together.
type node struct {
	t    *testing.T
	dir  string
	addr string // stays the same over restarts
	id   *identity.Identity
	mgr  *manager.Manager
	mux  *transport.Mux
	stop func()
}

func logger() *slog.Logger {
	if os.Getenv("SKEIN_TEST_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func freeAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// start runs a manager with the identity in dir.
func start(t *testing.T, dir, addr string, join ...string) *node {
	t.Helper()
	id, err := identity.Load(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir, addr: addr, id: id}
	n.mux, err = transport.Listen(transport.Config{Addr: addr, Server: id.ServerTLS(), Client: id.ClientTLS(""), Logger: logger()})
	if err != nil {
		t.Fatal(err)
	}
	n.mgr, err = manager.New(manager.Config{
		NodeID: id.NodeID(), ClusterID: id.ClusterID(), StateDir: dir, RPCAddr: addr, RaftListener: n.mux.Raft(), Join: join, Logger: logger(),
		DialRaft: func(ctx context.Context, a string) (net.Conn, error) {
			return transport.Dial(ctx, a, api.ALPNRaft, id.ClientTLS(api.RoleManager))
		},
		DialManager: func(a string) (*grpc.ClientConn, error) { return transport.DialGRPC(a, id.ClientTLS(api.RoleManager)) },
		DialNode:    func(a string) (*grpc.ClientConn, error) { return transport.DialGRPC(a, id.ClientTLS("")) },
		Disconnect:  n.mux.Disconnect,
		Fatal:       func(code int, err error) { t.Errorf("fatal %d: %v", code, err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(append(transport.ServerOptions(), n.mgr.ServerOptions()...)...)
	n.mgr.Register(srv)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = n.mux.Run(ctx) })
	wg.Go(func() { _ = srv.Serve(n.mux.GRPC()) })
	wg.Go(func() {
		if err := n.mgr.Run(ctx); err != nil {
			t.Errorf("manager %s: %v", addr, err)
		}
	})
	var once sync.Once
	n.stop = func() { once.Do(func() { srv.Stop(); cancel(); wg.Wait() }) }
	t.Cleanup(n.stop)
	return n
}

func (n *node) restart(t *testing.T) *node {
	t.Helper()
	n.stop()
	return start(t, n.dir, n.addr)
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t *testing.T, d time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", d, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// first makes a cluster of one.
func first(t *testing.T) *node {
	t.Helper()
	dir := t.TempDir()
	req, err := identity.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := manager.NewSeed(t.Context(), req.CSRPEM, swarm.CAConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.Install(dir, req, seed.CertPEM, seed.GossipKey); err != nil {
		t.Fatal(err)
	}
	n := start(t, dir, freeAddr(t))
	if err := n.mgr.InitCluster(within(t, 20*time.Second), manager.InitSpec{Seed: seed, Hostname: "m1", UnderlayAddr: "127.0.0.1"}); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) cluster(t *testing.T) swarm.Swarm {
	t.Helper()
	o, err := n.mgr.Control().GetCluster(within(t, 20*time.Second), &api.GetRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var c swarm.Swarm
	if err := json.Unmarshal(o.Json, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// joined runs one more manager.
func joined(t *testing.T, through *node, name string) *node {
	t.Helper()
	dir, addr := t.TempDir(), freeAddr(t)
	_, err := identity.Join(within(t, 20*time.Second), through.addr, through.cluster(t).JoinTokens.Manager, identity.JoinOptions{StateDir: dir, Hostname: name, RPCAddr: addr})
	if err != nil {
		t.Fatal(err)
	}
	n := start(t, dir, addr, through.addr)
	eventually(t, 20*time.Second, name+" is a member", func() bool { return len(n.mgr.Managers()) > 1 && n.mgr.LeaderAddr() != "" })
	return n
}

func three(t *testing.T) []*node {
	t.Helper()
	a := first(t)
	b := joined(t, a, "m2")
	c := joined(t, b, "m3") // through a follower
	ns := []*node{a, b, c}
	eventually(t, 20*time.Second, "three members everywhere", func() bool {
		for _, n := range ns {
			if len(n.mgr.Managers()) != 3 {
				return false
			}
		}
		return true
	})
	return ns
}

func (n *node) create(t *testing.T, name string) error {
	t.Helper()
	_, err := n.mgr.Control().CreateService(within(t, 20*time.Second),
		&api.CreateRequest{SpecJson: fmt.Appendf(nil, `{"Name":%q,"TaskTemplate":{"ContainerSpec":{"Image":"i"}}}`, name)})
	return err
}

// mustCreate does what a user does whose request was on the wire when the leader went: look, and try again.
func (n *node) mustCreate(t *testing.T, name string) {
	t.Helper()
	err := n.create(t, name)
	if err != nil && strings.Contains(err.Error(), "whether it was done is unknown") {
		err = n.create(t, name)
	}
	if err != nil && !strings.Contains(err.Error(), "already exists") {
		t.Fatalf("create %s: %v", name, err)
	}
}

func (n *node) services(t *testing.T) (names []string) {
	t.Helper()
	o, err := n.mgr.Control().ListServices(within(t, 20*time.Second), &api.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range o.Json {
		var s swarm.Service
		if err := json.Unmarshal(b, &s); err != nil {
			t.Fatal(err)
		}
		names = append(names, s.Spec.Name)
	}
	return names
}

func leaderOf(ns []*node) *node {
	for _, n := range ns {
		if n.mgr.IsLeader() {
			return n
		}
	}
	return nil
}

func TestThreeManagers(t *testing.T) {
	t.Parallel()
	ns := three(t)
	for i, n := range ns {
		if err := n.create(t, fmt.Sprintf("web%d", i)); err != nil {
			t.Fatalf("create through manager %d: %v", i, err)
		}
	}
	for i, n := range ns {
		if got := n.services(t); len(got) != 3 {
			t.Errorf("manager %d lists %v, want 3 services", i, got)
		}
	}
	if err := ns[2].create(t, "web0"); err == nil || !strings.Contains(err.Error(), "name conflicts with an existing object") {
		t.Errorf("duplicate name through a follower: %v", err)
	}
	o, err := ns[1].mgr.Control().ListNodes(within(t, 10*time.Second), &api.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	leaders := 0
	for _, b := range o.Json {
		var n swarm.Node
		if err := json.Unmarshal(b, &n); err != nil {
			t.Fatal(err)
		}
		if n.ManagerStatus == nil || n.ManagerStatus.Reachability != swarm.ReachabilityReachable {
			t.Errorf("node %s: manager status %+v", n.Description.Hostname, n.ManagerStatus)
		} else if n.ManagerStatus.Leader {
			leaders++
		}
	}
	if leaders != 1 || len(o.Json) != 3 {
		t.Errorf("%d leaders among %d nodes", leaders, len(o.Json))
	}
	// The leader dies: another takes writes. Then all die and come back.
	dead := leaderOf(ns)
	began := time.Now()
	dead.stop()
	var alive []*node
	for _, n := range ns {
		if n != dead {
			alive = append(alive, n)
		}
	}
	alive[0].mustCreate(t, "after")
	t.Logf("first write %v after the leader's death", time.Since(began).Round(time.Millisecond))
	eventually(t, 10*time.Second, "the dead manager shows as unreachable", func() bool {
		o, err := alive[1].mgr.Control().GetNode(within(t, 10*time.Second), &api.GetRequest{Ref: dead.id.NodeID()})
		return err == nil && strings.Contains(string(o.Json), `"Reachability":"unreachable"`)
	})
	for _, n := range alive {
		n.stop()
	}
	for i, n := range ns {
		ns[i] = n.restart(t)
	}
	if got := ns[1].services(t); len(got) != 4 {
		t.Errorf("after the restart of all: %v, want 4 services", got)
	}
}

func TestTokens(t *testing.T) {
	t.Parallel()
	a := first(t)
	join := func(token string) error {
		_, err := identity.Join(within(t, 20*time.Second), a.addr, token, identity.JoinOptions{StateDir: t.TempDir(), Hostname: "w", RPCAddr: freeAddr(t)})
		return err
	}
	c := a.cluster(t)
	if err := join(c.JoinTokens.Worker); err != nil {
		t.Fatal(err)
	}
	if err := join(c.JoinTokens.Worker[:84] + "!"); err == nil || !strings.Contains(err.Error(), "invalid join token") {
		t.Errorf("mistyped token: %v", err)
	}
	spec, err := json.Marshal(c.Spec)
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.mgr.Control().UpdateCluster(within(t, 10*time.Second), &api.UpdateRequest{Version: a.cluster(t).Version.Index, SpecJson: spec, RotateWorkerToken: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := join(c.JoinTokens.Worker); err == nil || !strings.Contains(err.Error(), "has been rotated") || !strings.Contains(err.Error(), "docker swarm join-token worker") {
		t.Errorf("rotated token: %v", err)
	}
	if err := join(a.cluster(t).JoinTokens.Worker); err != nil {
		t.Errorf("new token: %v", err)
	}
	other := first(t)
	if err := join(other.cluster(t).JoinTokens.Worker); err == nil || !strings.Contains(err.Error(), "the secret was not sent") {
		t.Errorf("token of another cluster: %v", err)
	}
}

// A worker with a good certificate tries everything a manager may do, on leader and follower.
func TestEvilWorker(t *testing.T) {
	t.Parallel()
	a := first(t)
	b := joined(t, a, "m2")
	dir := t.TempDir()
	w, err := identity.Join(within(t, 20*time.Second), b.addr, a.cluster(t).JoinTokens.Worker, identity.JoinOptions{StateDir: dir, Hostname: "w", RPCAddr: freeAddr(t)})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{a, b} {
		eventually(t, 10*time.Second, "the worker is known", func() (known bool) {
			n.mgr.Store().View(func(tx store.ReadTx) { known = tx.Node(w.NodeID()) != nil })
			return known
		})
		conn, err := transport.DialGRPC(n.addr, w.ClientTLS(api.RoleManager))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for _, d := range []*grpc.ServiceDesc{&api.Control_ServiceDesc, &api.Membership_ServiceDesc} {
			for _, m := range d.Methods {
				if m.MethodName == "NetStatus" || m.MethodName == "NetCheck" { // every node may look at the truth of the network
					continue
				}
				err := conn.Invoke(within(t, 10*time.Second), "/"+d.ServiceName+"/"+m.MethodName, &api.Empty{}, &api.Empty{})
				if status.Code(err) != codes.PermissionDenied {
					t.Errorf("worker on %s: %s: %v, want denied", n.addr, m.MethodName, err)
				}
			}
		}
		c, err := transport.Dial(within(t, 10*time.Second), n.addr, api.ALPNRaft, w.ClientTLS(""))
		if err == nil {
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			_, err = c.Read(make([]byte, 1))
			if ne, ok := err.(net.Error); err == nil || (ok && ne.Timeout()) {
				t.Errorf("worker's raft stream on %s is open", n.addr)
			}
			_ = c.Close()
		}
		if err := w.Renew(within(t, 10*time.Second), conn); err != nil {
			t.Errorf("worker renews through %s: %v", n.addr, err)
		}
	}
	// Once removed, it can do nothing at all.
	if _, err := b.mgr.Control().RemoveNode(within(t, 10*time.Second), &api.RemoveRequest{Ref: w.NodeID(), Force: true}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{a, b} {
		conn, err := transport.DialGRPC(n.addr, w.ClientTLS(api.RoleManager))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		eventually(t, 10*time.Second, "the removed worker is denied", func() bool {
			return strings.Contains(fmt.Sprint(w.Renew(within(t, 10*time.Second), conn)), "was removed from the cluster")
		})
	}
}

func TestLeaveAndRemoveManagers(t *testing.T) {
	t.Parallel()
	ns := three(t)
	leader := leaderOf(ns)
	var rest []*node
	for _, n := range ns {
		if n != leader {
			rest = append(rest, n)
		}
	}
	if err := leader.mgr.Leave(within(t, 20*time.Second)); err != nil {
		t.Fatalf("the leader leaves: %v", err)
	}
	leader.stop()
	rest[0].mustCreate(t, "web")
	if got := len(rest[1].mgr.Managers()); got != 2 {
		t.Errorf("%d members, want 2", got)
	}
	if err := rest[1].mgr.Leave(within(t, 20*time.Second)); err != nil {
		t.Fatalf("a second one leaves: %v", err)
	}
	rest[1].stop()
	rest[0].mustCreate(t, "web2")
	if err := rest[0].mgr.Leave(within(t, 20*time.Second)); err == nil || !strings.Contains(err.Error(), "last manager") {
		t.Errorf("the last manager leaves: %v", err)
	}
	for _, n := range []*node{leader, rest[1]} {
		if _, err := rest[0].mgr.Control().RemoveNode(within(t, 10*time.Second), &api.RemoveRequest{Ref: n.id.NodeID()}); err != nil {
			t.Errorf("remove a manager that left: %v", err)
		}
	}
}

func TestNoQuorum(t *testing.T) {
	t.Parallel()
	a := first(t)
	b := joined(t, a, "m2")
	b.stop()
	err := a.create(t, "web")
	if err == nil || !(strings.Contains(err.Error(), "no leader") || strings.Contains(err.Error(), "lost the leadership")) {
		t.Errorf("write without a majority: %v", err)
	}
	if err := a.create(t, "web"); err == nil || !strings.Contains(err.Error(), "no leader elected") {
		t.Errorf("second write: %v, want no leader elected", err)
	}
	start(t, b.dir, b.addr)
	if err := a.create(t, "web2"); err != nil {
		t.Errorf("with the majority back: %v", err)
	}
}
