// Package session_test joins dispatchers and agents over real gRPC streams, in memory and in virtual time: fake containers and
// networks, a store without Raft.
package session_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"skein/agent"
	"skein/agent/tasktest"
	"skein/manager/api"
	"skein/manager/dispatcher"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

// cluster is managers m1..m3 on one store, of which one leads, and agents.
type cluster struct {
	t        *testing.T
	store    *store.Store
	loop     *storetest.Loopback
	mu       sync.Mutex
	services map[string]*host // by address
	leader   string
	term     context.CancelFunc
	termDone chan struct{}
	disp     *dispatcher.Dispatcher
	agents   map[string]*testAgent
}

// host is a listener with a gRPC server: a manager, or a node's agent service.
type host struct {
	lis   *bufconn.Listener
	srv   *grpc.Server
	front *dispatcher.Front
	cut   bool
}

type testAgent struct {
	c      *cluster
	id     string
	exec   *tasktest.Executor
	net    *tasktest.Network
	a      *agent.Agent
	dir    string
	cancel context.CancelFunc
	done   chan struct{}
	conns  []net.Conn
	cut    bool
}

func id(s string) string { return strings.Repeat("0", 25-len(s)) + s }

// bubble runs f on a cluster in virtual time.
func bubble(t *testing.T, f func(c *cluster)) {
	synctest.Test(t, func(t *testing.T) { run(t, f) })
}

func run(t *testing.T, f func(c *cluster)) {
	s, loop := storetest.New()
	c := &cluster{t: t, store: s, loop: loop, services: map[string]*host{}, agents: map[string]*testAgent{}}
	c.apply(&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{
		Id: id("c"), SpecJson: []byte("{}"), OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", OverlayBits: 20, DataPort: 4789, FeatureLevel: 1,
	}}})
	for i := 1; i <= 3; i++ {
		c.manager(fmt.Sprintf("m%d", i))
	}
	c.lead("m1")
	f(c)
	for _, a := range c.agents {
		a.halt()
	}
	c.unlead()
	for _, h := range c.services {
		h.srv.Stop()
	}
}

func (c *cluster) apply(changes ...*api.Change) {
	c.t.Helper()
	_, results, err := c.store.Batch(c.t.Context(), []*api.Txn{{Changes: changes}})
	if err = errors.Join(append(results, err)...); err != nil {
		c.t.Fatalf("apply: %v", err)
	}
}

func (c *cluster) serve(addr string) *host {
	h := &host{lis: bufconn.Listen(1 << 16), srv: grpc.NewServer(grpc.MaxRecvMsgSize(api.MaxMessageBytes))}
	c.mu.Lock()
	c.services[addr] = h
	c.mu.Unlock()
	return h
}

func (c *cluster) manager(name string) {
	h := c.serve(name)
	h.front = dispatcher.NewFront(func() string { c.mu.Lock(); defer c.mu.Unlock(); return c.leader }, nil)
	api.RegisterDispatcherServer(h.srv, h.front)
	go h.srv.Serve(h.lis)
	c.node(name, api.RoleManager, name)
}

func (c *cluster) node(name, role, addr string) {
	c.apply(&api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{
		Id: id(name), Hostname: name, Role: role, Availability: "active", RpcAddr: addr, Status: &api.NodeStatus{State: "down", Message: "test"},
	}}})
}

// lead begins a term on a manager.
func (c *cluster) lead(name string) { c.leadIn(name, 0) }

// leadIn begins a term of a number.
func (c *cluster) leadIn(name string, number uint64) {
	c.unlead()
	d := dispatcher.New(dispatcher.Config{
		Store: c.store, NodeID: id(name), Term: number,
		Identify: func(ctx context.Context) (string, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			return md.Get("node")[0], nil
		},
		Dial: func(ctx context.Context, addr string) (*grpc.ClientConn, error) { return c.dial(addr, nil) },
	})
	ctx, cancel := context.WithCancel(context.Background())
	c.term, c.termDone = cancel, make(chan struct{})
	done := c.termDone
	go func() { defer close(done); _ = d.Run(ctx) }()
	c.mu.Lock()
	c.leader, c.disp = name, d
	front := c.services[name].front
	c.mu.Unlock()
	front.Set(d)
}

// unlead ends the term; nobody leads.
func (c *cluster) unlead() {
	if c.term == nil {
		return
	}
	c.mu.Lock()
	front := c.services[c.leader].front
	c.leader = ""
	c.mu.Unlock()
	front.Set(nil)
	c.term()
	<-c.termDone
	c.term = nil
}

func (c *cluster) dial(addr string, a *testAgent) (*grpc.ClientConn, error) {
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c.mu.Lock()
			h := c.services[addr]
			lost := h == nil || h.cut || (a != nil && a.cut)
			c.mu.Unlock()
			if lost {
				<-ctx.Done() // nobody answers
				return nil, ctx.Err()
			}
			conn, err := h.lis.DialContext(ctx)
			if a != nil && err == nil {
				c.mu.Lock()
				a.conns = append(a.conns, conn)
				c.mu.Unlock()
			}
			return conn, err
		}),
	}
	if a != nil {
		opts = append(opts, grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, s grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
			return s(metadata.AppendToOutgoingContext(ctx, "node", a.id), desc, cc, method, o...)
		}))
	}
	return grpc.NewClient("passthrough:///"+addr, opts...)
}

// worker adds a node with its agent.
func (c *cluster) worker(name string) *testAgent {
	c.node(name, api.RoleWorker, name)
	h := c.serve(name)
	api.RegisterAgentServer(h.srv, agent.NewServer(nil, nil))
	go h.srv.Serve(h.lis)
	a := &testAgent{c: c, id: id(name), exec: tasktest.NewExecutor(), net: tasktest.NewNetwork(), dir: c.t.TempDir()}
	c.agents[name] = a
	a.boot()
	return a
}

// boot starts the node's daemon.
func (a *testAgent) boot() {
	var err error
	a.a, err = agent.New(agent.Config{
		NodeID: a.id, Hostname: strings.TrimLeft(a.id, "0"), RPCAddr: strings.TrimLeft(a.id, "0"), UnderlayAddr: "192.0.2.1", StateDir: a.dir,
		Seeds: []string{"m1", "m2", "m3"}, Executor: a.exec, Network: a.net,
		Dial: func(ctx context.Context, addr string) (*grpc.ClientConn, error) { return a.c.dial(addr, a) },
	})
	if err != nil {
		a.c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel, a.done = cancel, make(chan struct{})
	go func() { defer close(a.done); _ = a.a.Run(ctx) }()
}

// halt ends the daemon; containers stay.
func (a *testAgent) halt() {
	a.cancel()
	<-a.done
}

// setCut takes the node off the network, or back.
func (a *testAgent) setCut(cut bool) {
	a.c.mu.Lock()
	defer a.c.mu.Unlock()
	a.cut = cut
	if h := a.c.services[strings.TrimLeft(a.id, "0")]; h != nil {
		h.cut = cut
	}
}

// service makes a service on the network "net" with a published port and n tasks on the nodes given, round robin.
func (c *cluster) service(name string, nodes ...string) []string {
	c.t.Helper()
	if c.network() == nil {
		c.apply(&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: &api.NetworkRecord{Id: id("net"), Name: "net", Driver: "overlay", SpecJson: []byte("{}")}}})
	}
	spec := swarm.ServiceSpec{Annotations: swarm.Annotations{Name: name}}
	spec.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Image: "web:1"}
	spec.TaskTemplate.Networks = []swarm.NetworkAttachmentConfig{{Target: id("net")}}
	spec.EndpointSpec = &swarm.EndpointSpec{Ports: []swarm.PortConfig{{Protocol: "tcp", TargetPort: 80, PublishMode: swarm.PortConfigPublishModeIngress}}}
	b, err := json.Marshal(spec)
	if err != nil {
		c.t.Fatal(err)
	}
	c.apply(&api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: id(name), Name: name, SpecJson: b}}})
	create := &api.TaskCreate{ServiceId: id(name), Revision: 1}
	place := &api.TaskPlacement{}
	for i, n := range nodes {
		create.Items = append(create.Items, &api.TaskCreate_Item{Slot: uint64(i + 1), Desired: uint32(api.TaskRunning), Generation: 1})
		place.TaskIds = append(place.TaskIds, api.TaskID(id(name), uint64(i+1), "", 1))
		place.NodeIds = append(place.NodeIds, id(n))
	}
	c.apply(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: create}}, &api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: place}})
	return place.TaskIds
}

func (c *cluster) network() (n *store.Network) {
	c.store.View(func(tx store.ReadTx) { n = tx.Network(id("net")) })
	return n
}

func (c *cluster) desire(state api.TaskState, tasks ...string) {
	c.t.Helper()
	c.apply(&api.Change{Kind: &api.Change_DesireTasks{DesireTasks: &api.TaskDesire{TaskIds: tasks, Desired: uint32(state)}}})
}

func (c *cluster) task(id string) (t *store.Task) {
	c.store.View(func(tx store.ReadTx) { t = tx.Task(id) })
	return t
}

func (c *cluster) nodeState(name string) (s string) {
	c.store.View(func(tx store.ReadTx) { s = tx.Node(id(name)).Status.GetState() })
	return s
}

// eventually waits in virtual time until f holds, and returns how long it took.
func (c *cluster) eventually(what string, bound time.Duration, f func() bool) time.Duration {
	c.t.Helper()
	began := time.Now()
	for !f() {
		if time.Since(began) > bound {
			c.t.Fatalf("%s: not within %v", what, bound)
		}
		time.Sleep(5 * time.Millisecond)
		synctest.Wait()
	}
	return time.Since(began)
}

func (c *cluster) running(tasks ...string) bool {
	for _, id := range tasks {
		if t := c.task(id); t == nil || t.State != api.TaskRunning {
			return false
		}
	}
	return true
}

func (c *cluster) connected(names ...string) bool {
	return !slices.ContainsFunc(names, func(n string) bool { return !c.agents[n].a.Status().Connected })
}

// endpoint is a task's state in a node's table, "" when it is not there.
func (a *testAgent) endpoint(table, task string) string {
	t, _ := a.net.Last()
	tab := t.Mesh
	if table != api.MeshTable {
		tab = t.Networks[table]
	}
	return tab.Endpoints[task].GetState()
}

func preparing(d time.Duration) func(*api.Assignment) tasktest.Script {
	return func(*api.Assignment) tasktest.Script { return tasktest.Script{PrepareTime: d} }
}
