package netbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"skein/agent"
	"skein/agent/engine"
	"skein/agent/task"
	"skein/agent/tasktest"
	"skein/manager/api"
	"skein/manager/dispatcher"
	"skein/manager/store"
	"skein/manager/store/storetest"
	"skein/overlay"
)

// fleet is a leader's dispatcher on a store without Raft and simulated nodes: real agents and sessions in memory, containers that exist
// in a map. The first node's network is the product's, in the kernel; the others take note only.
type fleet struct {
	store  *store.Store
	stop   []func()
	agents []*tasktest.Executor
	tasks  []string // task i runs on node i modulo the number of nodes

	mu     sync.Mutex
	victim string
	seen   chan int // nodes that applied tables without the victim
	last   []string // by node: the victim it was without
}

const (
	spreadNetwork = "net"
	fleetUp       = 5 * time.Minute
)

func spread(ctx context.Context, b *bench) (err error) {
	w := newWorld(b)
	defer func() { err = errors.Join(err, w.close()) }()
	d, _, err := oneNode(w)
	if err != nil {
		return err
	}
	f := &fleet{last: make([]string, b.nodes)}
	defer f.close()
	begun, cpu := time.Now(), cpuTime()
	if err := f.start(ctx, b, d); err != nil {
		return err
	}
	fmt.Printf("  %d endpoints of %d services on %d nodes run after %s, CPU %s\n", len(f.tasks), b.endpoints/5, b.nodes, ms(time.Since(begun)), ms(cpuTime()-cpu))
	var kernel, others, all []time.Duration
	cpu = cpuTime()
	for i := range b.changes {
		took, err := f.kill(ctx, i*len(f.tasks)/b.changes)
		if err != nil {
			return err
		}
		kernel, others, all = append(kernel, took[0]), append(others, took[1:]...), append(all, slices.Max(took))
	}
	cpu = cpuTime() - cpu
	times("a task's exit until a node's kernel has it", kernel, 0)
	times("… until each other node has it", others, 0)
	times(fmt.Sprintf("… until all %d nodes have it", b.nodes), all, cpu)
	return nil
}

// kill ends a task and returns when each node was without it.
func (f *fleet) kill(ctx context.Context, n int) ([]time.Duration, error) {
	nodes := len(f.agents)
	f.mu.Lock()
	f.victim, f.seen = f.tasks[n], make(chan int, nodes)
	f.mu.Unlock()
	took := make([]time.Duration, nodes)
	begun := time.Now()
	if err := f.agents[n%nodes].Kill(f.tasks[n], task.Exit{Code: 1}); err != nil {
		return nil, err
	}
	for range nodes {
		select {
		case i := <-f.seen:
			took[i] = time.Since(begun)
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Minute):
			return nil, fmt.Errorf("task %s is still in a node's tables a minute after its end", f.tasks[n])
		}
	}
	return took, pause(ctx, 20*time.Millisecond)
}

// applied is told of each set of tables that a node applied.
func (f *fleet) applied(node int, t agent.Tables) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.victim != "" && f.last[node] != f.victim && t.Mesh.Endpoints[f.victim] == nil && t.Networks[objectID(spreadNetwork)].Endpoints[f.victim] == nil {
		f.last[node] = f.victim
		f.seen <- node
	}
}

func objectID(s string) string { return strings.Repeat("0", 25-len(s)) + s }

func (f *fleet) close() {
	for i := len(f.stop) - 1; i >= 0; i-- {
		f.stop[i]()
	}
}

// background runs f until close.
func (f *fleet) background(run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = run(ctx) }() // ends with its context
	f.stop = append(f.stop, func() { cancel(); <-done })
}

func (f *fleet) apply(ctx context.Context, changes ...*api.Change) error {
	_, results, err := f.store.Batch(ctx, []*api.Txn{{Changes: changes}})
	return errors.Join(append(results, err)...)
}

// start makes everything and waits until all tasks run.
func (f *fleet) start(ctx context.Context, b *bench, d *overlay.Driver) error {
	f.store, _ = storetest.New()
	err := f.apply(ctx,
		&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{Id: objectID("c"), SpecJson: []byte("{}"), OverlayPool: "10.0.0.0/9",
			MeshPool: meshPool.String(), OverlayBits: 20, DataPort: dataPort, FeatureLevel: 1}}},
		&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: &api.NetworkRecord{Id: objectID(spreadNetwork), Name: spreadNetwork, Driver: "overlay", SpecJson: []byte("{}"), Subnet4: "10.64.0.0/16"}}})
	if err != nil {
		return err
	}
	for i := range b.nodes {
		err := f.apply(ctx, &api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: nodeID(i), Hostname: nodeID(i), Role: api.RoleWorker, Availability: "active",
			RpcAddr: nodeID(i), Status: &api.NodeStatus{State: "down", Message: "new"}}}})
		if err != nil {
			return err
		}
	}
	if err := f.services(ctx, b); err != nil {
		return err
	}
	lis := f.dispatcher()
	for i := range b.nodes {
		if err := f.node(i, b.path(nodeID(i)), lis, d); err != nil {
			return err
		}
	}
	for deadline := time.Now().Add(fleetUp); !f.running(); {
		if time.Now().After(deadline) {
			return fmt.Errorf("the tasks do not run after %s", fleetUp)
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	return pause(ctx, 3*time.Second) // what is under way settles
}

func nodeID(i int) string { return objectID(fmt.Sprintf("w%d", i)) }

// services makes services of five tasks each with a published port.
func (f *fleet) services(ctx context.Context, b *bench) error {
	for s := range b.endpoints / 5 {
		name := fmt.Sprintf("svc%d", s)
		spec := swarm.ServiceSpec{Annotations: swarm.Annotations{Name: name}}
		spec.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Image: "web:1"}
		spec.TaskTemplate.Networks = []swarm.NetworkAttachmentConfig{{Target: objectID(spreadNetwork)}}
		spec.EndpointSpec = &swarm.EndpointSpec{Ports: []swarm.PortConfig{{Protocol: "tcp", TargetPort: 80, PublishMode: swarm.PortConfigPublishModeIngress}}}
		text, err := json.Marshal(spec)
		if err != nil {
			return err
		}
		create := &api.TaskCreate{ServiceId: objectID(name), Revision: 1}
		place := &api.TaskPlacement{}
		for i := range 5 {
			create.Items = append(create.Items, &api.TaskCreate_Item{Slot: uint64(i + 1), Desired: uint32(api.TaskRunning), Generation: 1})
			place.TaskIds = append(place.TaskIds, api.TaskID(objectID(name), uint64(i+1), "", 1))
			place.NodeIds = append(place.NodeIds, nodeID((s*5+i)%b.nodes))
		}
		f.tasks = append(f.tasks, place.TaskIds...)
		err = f.apply(ctx, &api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: objectID(name), Name: name, SpecJson: text}}},
			&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: create}}, &api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: place}})
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *fleet) running() bool {
	all := true
	f.store.View(func(tx store.ReadTx) {
		for _, id := range f.tasks {
			if t := tx.Task(id); t == nil || t.State != api.TaskRunning {
				all = false
				return
			}
		}
	})
	return all
}

// dispatcher serves sessions in memory.
func (f *fleet) dispatcher() *bufconn.Listener {
	d := dispatcher.New(dispatcher.Config{
		Store: f.store, NodeID: objectID("m1"),
		Identify: func(ctx context.Context) (string, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			return md.Get("node")[0], nil
		},
		Dial: func(_ context.Context, addr string) (*grpc.ClientConn, error) { // nobody is to be found there: nodes are not probed
			return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return nil, os.ErrNotExist }))
		},
	})
	f.background(d.Run)
	front := dispatcher.NewFront(func() string { return "m1" }, nil)
	front.Set(d)
	lis, srv := bufconn.Listen(1<<16), grpc.NewServer(grpc.MaxRecvMsgSize(api.MaxMessageBytes))
	api.RegisterDispatcherServer(srv, front)
	go srv.Serve(lis)
	f.stop = append(f.stop, srv.Stop)
	return lis
}

// node starts a simulated node.
func (f *fleet) node(i int, dir string, lis *bufconn.Listener, d *overlay.Driver) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	exec, fake := tasktest.NewExecutor(), tasktest.NewNetwork()
	fake.OnChange(func(t agent.Tables) { f.applied(i, t) })
	var nw agent.Network = fake
	if i == 0 {
		nw = kernelNetwork{d, fake}
	}
	f.agents = append(f.agents, exec)
	a, err := agent.New(agent.Config{NodeID: nodeID(i), Hostname: nodeID(i), RPCAddr: nodeID(i), UnderlayAddr: fmt.Sprintf("192.0.2.%d", i+1), StateDir: dir,
		Seeds: []string{"m1"}, Executor: exec, Network: nw,
		Dial: func(_ context.Context, addr string) (*grpc.ClientConn, error) {
			return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
				grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, s grpc.Streamer, o ...grpc.CallOption) (grpc.ClientStream, error) {
					return s(metadata.AppendToOutgoingContext(ctx, "node", nodeID(i)), desc, cc, method, o...)
				}))
		}})
	if err == nil {
		f.background(a.Run)
	}
	return err
}

// kernelNetwork applies tables as the engine does, then takes note.
type kernelNetwork struct {
	driver *overlay.Driver
	fake   *tasktest.Network
}

func (k kernelNetwork) SetTables(ctx context.Context, t agent.Tables) map[string]error {
	cfg, bad := engine.OverlayConfig(t)
	applied, err := k.driver.Set(ctx, cfg)
	for id, e := range applied {
		if e != nil {
			bad[id] = e
		}
	}
	if err != nil {
		bad[api.MeshTable] = err
	}
	if len(bad) == 0 {
		k.fake.SetTables(ctx, t)
	}
	return bad
}
