package c1m

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"skein/agent/identity"
	"skein/agent/transport"
	"skein/manager"
	"skein/manager/api"
	"skein/manager/consensus"
	"skein/manager/keyring"
)

const groupSize = 3

// cluster is three managers.
type cluster struct {
	log   *slog.Logger
	book  *book
	fatal chan error
	times time.Duration // of the default election times

	mu  sync.Mutex
	all []*member
}

// member is one manager's process, as the daemon would put it together, with a second door for nodes within this process.
type member struct {
	dir  string
	addr string
	mgr  *manager.Manager
	door *bufconn.Listener
	kill func()
}

// newCluster makes a cluster and waits until all managers are in the group.
func newCluster(ctx context.Context, dir string, timing int, log *slog.Logger) (_ *cluster, err error) {
	c := &cluster{log: log, times: time.Duration(timing), book: newBook(maxNodes), fatal: make(chan error, groupSize)}
	defer func() {
		if err != nil {
			c.stop()
		}
	}()
	first, err := c.found(ctx, filepath.Join(dir, "m1"))
	if err != nil {
		return nil, err
	}
	tokens, err := c.tokens(ctx)
	if err != nil {
		return nil, err
	}
	for i := 2; i <= groupSize; i++ {
		dir := filepath.Join(dir, fmt.Sprintf("m%d", i))
		addr, err := freeAddr()
		if err != nil {
			return nil, err
		}
		if _, err := identity.Join(ctx, first.addr, tokens.Manager, identity.JoinOptions{StateDir: dir, Hostname: fmt.Sprintf("m%d", i), RPCAddr: addr}); err != nil {
			return nil, err
		}
		m, err := c.start(dir, addr, first.addr)
		if err != nil {
			return nil, err
		}
		if err := until(ctx, func() bool { return len(m.mgr.Managers()) == i && m.mgr.LeaderAddr() != "" }); err != nil {
			return nil, fmt.Errorf("manager %d did not join: %w", i, err)
		}
	}
	return c, nil
}

// found starts the first manager of a new cluster.
func (c *cluster) found(ctx context.Context, dir string) (*member, error) {
	req, err := identity.NewRequest()
	if err != nil {
		return nil, err
	}
	seed, err := manager.NewSeed(ctx, req.CSRPEM, swarm.CAConfig{})
	if err != nil {
		return nil, err
	}
	if _, err := identity.Install(dir, req, seed.CertPEM, seed.GossipKey); err != nil {
		return nil, err
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	m, err := c.start(dir, addr)
	if err != nil {
		return nil, err
	}
	return m, m.mgr.InitCluster(ctx, manager.InitSpec{Seed: seed, Hostname: "m1", UnderlayAddr: "127.0.0.1", MeshPool: meshPool, OverlayPools: overlayPools})
}

func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// start runs a manager with the identity in dir.
func (c *cluster) start(dir, addr string, join ...string) (*member, error) {
	id, err := identity.Load(dir, nil)
	if err != nil {
		return nil, err
	}
	open := keyring.Create
	if keyring.Exists(dir) {
		open = keyring.Open
	}
	keys, err := open(dir)
	if err != nil {
		return nil, err
	}
	mux, err := transport.Listen(transport.Config{Addr: addr, Server: id.ServerTLS(), Client: id.ClientTLS(""), Logger: c.log})
	if err != nil {
		return nil, err
	}
	m := &member{dir: dir, addr: addr, door: bufconn.Listen(pipeBytes)}
	m.mgr, err = manager.New(manager.Config{
		NodeID: id.NodeID(), ClusterID: id.ClusterID(), StateDir: dir, RPCAddr: addr, RaftListener: mux.Raft(), Join: join, Logger: c.log, Keys: keys,
		Timing: consensus.Timing{Heartbeat: c.times * 800 * time.Millisecond, Election: c.times * 800 * time.Millisecond, Lease: c.times * 750 * time.Millisecond,
			Commit: 25 * time.Millisecond, RPC: 5 * time.Second},
		DialRaft: func(ctx context.Context, a string) (net.Conn, error) {
			return transport.Dial(ctx, a, api.ALPNRaft, id.ClientTLS(api.RoleManager))
		},
		DialManager: func(a string) (*grpc.ClientConn, error) { return transport.DialGRPC(a, id.ClientTLS(api.RoleManager)) },
		DialNode:    func(a string) (*grpc.ClientConn, error) { return transport.DialGRPC(a, id.ClientTLS("")) },
		Disconnect:  mux.Disconnect,
		Fatal: func(code int, err error) {
			select {
			case c.fatal <- fmt.Errorf("manager %s: fatal (%d): %w", addr, code, err):
			default:
			}
		},
	})
	if err != nil {
		return nil, errors.Join(err, mux.Close())
	}
	nodes := grpc.NewServer(append(transport.ServerOptions(), m.mgr.ServerOptions()...)...)
	inside := grpc.NewServer(append(transport.ServerOptions(), append(m.mgr.ServerOptions(), grpc.Creds(linkCredentials{book: c.book}))...)...)
	m.mgr.Register(nodes)
	m.mgr.Register(inside)
	m.serve(c, mux, nodes, inside)
	c.mu.Lock()
	c.all = append(c.all, m)
	c.mu.Unlock()
	return m, nil
}

// serve starts everything of a manager; kill ends it, the connections first, as a machine that loses its power would.
func (m *member) serve(c *cluster, mux *transport.Mux, nodes, inside *grpc.Server) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = mux.Run(ctx) })
	wg.Go(func() { _ = nodes.Serve(mux.GRPC()) })
	wg.Go(func() { _ = inside.Serve(m.door) })
	wg.Go(func() {
		if err := m.mgr.Run(ctx); err != nil {
			c.fatal <- fmt.Errorf("manager %s: %w", m.addr, err)
		}
	})
	var once sync.Once
	m.kill = func() {
		once.Do(func() {
			_ = mux.Close()
			inside.Stop()
			nodes.Stop()
			cancel()
			wg.Wait()
		})
	}
}

// stop ends all managers.
func (c *cluster) stop() {
	for _, m := range c.members() {
		m.kill()
	}
}

func (c *cluster) members() []*member {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.all)
}

// leader waits for a manager that leads.
func (c *cluster) leader(ctx context.Context) (*member, error) {
	var found *member
	err := until(ctx, func() bool {
		for _, m := range c.members() {
			if m.mgr.IsLeader() {
				found = m
				return true
			}
		}
		return false
	})
	return found, err
}

// killLeader cuts the leader off, ends it, and starts it again after a while, with its disk.
func (c *cluster) killLeader(ctx context.Context, away time.Duration) error {
	m, err := c.leader(ctx)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.all = slices.DeleteFunc(c.all, func(x *member) bool { return x == m })
	c.mu.Unlock()
	m.kill()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(away):
	}
	_, err = c.start(m.dir, m.addr)
	return err
}

func (c *cluster) tokens(ctx context.Context) (swarm.JoinTokens, error) {
	m, err := c.leader(ctx)
	if err != nil {
		return swarm.JoinTokens{}, err
	}
	o, err := m.mgr.Control().GetCluster(ctx, &api.GetRequest{})
	if err != nil {
		return swarm.JoinTokens{}, err
	}
	var s swarm.Swarm
	err = json.Unmarshal(o.Json, &s)
	return s.JoinTokens, err
}

// until waits for a condition.
func until(ctx context.Context, ok func() bool) error {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
	return nil
}
