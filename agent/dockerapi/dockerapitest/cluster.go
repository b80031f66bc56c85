package dockerapitest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein/manager/api"
)

// NodeID is the fake cluster's only node; ManagerToken and WorkerToken its tokens.
const (
	NodeID       = "node0000000000000000000a1"
	WorkerToken  = "SWMTKN-1-worker"
	ManagerToken = "SWMTKN-1-manager"
)

// Cluster is a fake cluster of one manager. Tasks advance one state each time they are listed.
type Cluster struct {
	api.ControlClient // what is not faked panics
	api.AgentClient

	mu       sync.Mutex
	Swarm    swarm.Info
	Services map[string]*swarm.Service
	Tasks    []*swarm.Task
	Networks []network.Inspect
	Created  []*api.CreateRequest
	Updated  []*api.UpdateRequest
	Listed   *api.ListRequest
	AgentErr error
	// NetworksErr is why the networks cannot be listed.
	NetworksErr error
	Gone        map[string]bool // nodes that are no members any more
	index       uint64
}

// NewCluster returns a manager's view of a cluster without services.
func NewCluster() *Cluster {
	return &Cluster{
		Swarm:    swarm.Info{NodeID: NodeID, NodeAddr: "127.0.0.1", LocalNodeState: swarm.LocalNodeStateActive, ControlAvailable: true},
		Services: map[string]*swarm.Service{}, index: 10,
		Networks: []network.Inspect{{Network: network.Network{Name: "ingress", ID: "ingress000000000000000000", Driver: "overlay", Scope: "swarm", Ingress: true}}},
	}
}

// NodeNetworks are the attachable ones of Networks.
func (c *Cluster) NodeNetworks(context.Context) ([]network.Inspect, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(c.Networks), func(n network.Inspect) bool { return !n.Attachable }), c.NetworksErr
}

// SwarmInfo is Swarm.
func (c *Cluster) SwarmInfo(context.Context) swarm.Info {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Swarm
}

// SwarmInit makes the node a manager.
func (c *Cluster) SwarmInit(context.Context, swarm.InitRequest) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Swarm = swarm.Info{NodeID: NodeID, LocalNodeState: swarm.LocalNodeStateActive, ControlAvailable: true}
	return NodeID, nil
}

// SwarmJoin refuses every token.
func (c *Cluster) SwarmJoin(_ context.Context, req swarm.JoinRequest) error {
	return api.Errorf(errdefs.ErrInvalidArgument, "join token %q: wrong", req.JoinToken)
}

// SwarmLeave makes the node a single one.
func (c *Cluster) SwarmLeave(context.Context, bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Swarm = swarm.Info{LocalNodeState: swarm.LocalNodeStateInactive}
	return nil
}

// UnlockKey unlocks the cluster.
const UnlockKey = "SWMKEY-1-test"

// SwarmUnlock takes UnlockKey.
func (c *Cluster) SwarmUnlock(_ context.Context, key string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.Swarm.LocalNodeState != swarm.LocalNodeStateLocked:
		return api.Errorf(errdefs.ErrConflict, "swarm is not locked")
	case key != UnlockKey:
		return api.Errorf(errdefs.ErrUnauthenticated, "swarm could not be unlocked: invalid key provided")
	}
	c.Swarm = swarm.Info{NodeID: NodeID, LocalNodeState: swarm.LocalNodeStateActive, ControlAvailable: true}
	return nil
}

// GetUnlockKey shows UnlockKey.
func (c *Cluster) GetUnlockKey(context.Context, *api.Empty, ...grpc.CallOption) (*api.UnlockKey, error) {
	return &api.UnlockKey{Text: UnlockKey}, nil
}

// ListDependencies has one secret and no config.
func (c *Cluster) ListDependencies(_ context.Context, r *api.DependencyListRequest, _ ...grpc.CallOption) (*api.Objects, error) {
	if r.Kind != "secret" {
		return &api.Objects{}, nil
	}
	return &api.Objects{Json: [][]byte{[]byte(`{"ID":"s1","Spec":{"Name":"password","Labels":{}}}`)}}, nil
}

// GetDependency finds nothing.
func (c *Cluster) GetDependency(_ context.Context, r *api.DependencyRequest, _ ...grpc.CallOption) (*api.Object, error) {
	return nil, api.Errorf(errdefs.ErrNotFound, "%s %s not found", r.Kind, r.Ref)
}

// CreateDependency takes every spec.
func (c *Cluster) CreateDependency(_ context.Context, r *api.DependencyRequest, _ ...grpc.CallOption) (*api.Created, error) {
	return &api.Created{Id: "new-" + r.Kind}, nil
}

// Control is the cluster itself.
func (c *Cluster) Control(context.Context) (api.ControlClient, error) { return c, nil }

// Agent is the cluster itself.
func (c *Cluster) Agent(_ context.Context, nodeID string) (api.AgentClient, error) {
	if c.Gone[nodeID] {
		return nil, api.Errorf(errdefs.ErrNotFound, "node %s not found", nodeID)
	}
	return c, c.AgentErr
}

func object(v any) (*api.Object, error) {
	b, err := json.Marshal(v)
	return &api.Object{Json: b}, err
}

// GetCluster has tokens.
func (c *Cluster) GetCluster(context.Context, *api.GetRequest, ...grpc.CallOption) (*api.Object, error) {
	return object(swarm.Swarm{
		ClusterInfo: swarm.ClusterInfo{ID: "cluster00000000000000000a", Meta: swarm.Meta{Version: swarm.Version{Index: 3}}},
		JoinTokens:  swarm.JoinTokens{Worker: WorkerToken, Manager: ManagerToken},
	})
}

// UpdateCluster remembers the request.
func (c *Cluster) UpdateCluster(_ context.Context, r *api.UpdateRequest, _ ...grpc.CallOption) (*api.Empty, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Updated = append(c.Updated, r)
	return &api.Empty{}, nil
}

func node() swarm.Node {
	return swarm.Node{
		ID: NodeID, Spec: swarm.NodeSpec{Role: swarm.NodeRoleManager, Availability: swarm.NodeAvailabilityActive},
		Description:   swarm.NodeDescription{Hostname: "n1", Engine: swarm.EngineDescription{EngineVersion: "0.1"}},
		Status:        swarm.NodeStatus{State: swarm.NodeStateReady, Addr: "127.0.0.1"},
		ManagerStatus: &swarm.ManagerStatus{Leader: true, Reachability: swarm.ReachabilityReachable, Addr: "127.0.0.1:2377"},
	}
}

// ListNodes has one node.
func (c *Cluster) ListNodes(context.Context, *api.ListRequest, ...grpc.CallOption) (*api.Objects, error) {
	o, err := object(node())
	return &api.Objects{Json: [][]byte{o.GetJson()}}, err
}

// GetNode knows one node.
func (c *Cluster) GetNode(_ context.Context, r *api.GetRequest, _ ...grpc.CallOption) (*api.Object, error) {
	if r.GetRef() != NodeID && r.GetRef() != "n1" {
		return nil, status.Errorf(codes.NotFound, "node %s not found", r.GetRef())
	}
	return object(node())
}

// UpdateNode finds every version stale.
func (c *Cluster) UpdateNode(context.Context, *api.UpdateRequest, ...grpc.CallOption) (*api.Empty, error) {
	return nil, status.Error(codes.Aborted, "update out of sequence")
}

// RemoveNode refuses.
func (c *Cluster) RemoveNode(_ context.Context, r *api.RemoveRequest, _ ...grpc.CallOption) (*api.Empty, error) {
	return nil, status.Errorf(codes.FailedPrecondition, "node %s is not down and can't be removed", r.GetRef())
}

func (c *Cluster) find(ref string) (*swarm.Service, error) {
	for _, s := range c.Services {
		if s.Spec.Name == ref || strings.HasPrefix(s.ID, ref) {
			return s, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "service %s not found", ref)
}

// ListServices lists all, with counts if asked.
func (c *Cluster) ListServices(_ context.Context, r *api.ListRequest, _ ...grpc.CallOption) (*api.Objects, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := &api.Objects{}
	for _, s := range c.Services {
		cp := *s
		if r.GetStatus() {
			cp.ServiceStatus = &swarm.ServiceStatus{DesiredTasks: *s.Spec.Mode.Replicated.Replicas}
			for _, t := range c.Tasks {
				if t.ServiceID == s.ID && t.DesiredState == swarm.TaskStateRunning && t.Status.State == swarm.TaskStateRunning {
					cp.ServiceStatus.RunningTasks++
				}
			}
		}
		o, err := object(cp)
		if err != nil {
			return nil, err
		}
		out.Json = append(out.Json, o.GetJson())
	}
	return out, nil
}

// GetService knows what was created.
func (c *Cluster) GetService(_ context.Context, r *api.GetRequest, _ ...grpc.CallOption) (*api.Object, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, err := c.find(r.GetRef())
	if err != nil {
		return nil, err
	}
	return object(s)
}

// CreateService makes a service and its tasks.
func (c *Cluster) CreateService(_ context.Context, r *api.CreateRequest, _ ...grpc.CallOption) (*api.Created, error) {
	var spec swarm.ServiceSpec
	if err := json.Unmarshal(r.GetSpecJson(), &spec); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Created = append(c.Created, r)
	if _, err := c.find(spec.Name); err == nil {
		return nil, status.Errorf(codes.AlreadyExists, "name conflicts with an existing object: service %s already exists", spec.Name)
	}
	c.index++
	s := &swarm.Service{ID: api.NewID(), Meta: swarm.Meta{Version: swarm.Version{Index: c.index}, CreatedAt: time.Now(), UpdatedAt: time.Now()}, Spec: spec}
	c.Services[s.ID] = s
	c.fill(s)
	return &api.Created{Id: s.ID}, nil
}

// maxReplicas is as many tasks as a fake service gets.
const maxReplicas = 1000

// fill gives each slot a task of the service's spec and retires others.
func (c *Cluster) fill(s *swarm.Service) {
	for _, t := range c.Tasks {
		if t.ServiceID == s.ID && t.DesiredState == swarm.TaskStateRunning {
			t.DesiredState, t.Status.State = swarm.TaskStateShutdown, swarm.TaskStateShutdown
		}
	}
	replicas := uint64(1)
	if m := s.Spec.Mode.Replicated; m != nil && m.Replicas != nil {
		replicas = min(*m.Replicas, maxReplicas)
	}
	for slot := 1; slot <= int(replicas); slot++ {
		t := &swarm.Task{
			ID: api.NewID(), ServiceID: s.ID, Slot: slot, NodeID: NodeID, DesiredState: swarm.TaskStateRunning, Spec: s.Spec.TaskTemplate,
			Meta: swarm.Meta{Version: swarm.Version{Index: c.index}, CreatedAt: time.Now(), UpdatedAt: time.Now()},
		}
		t.Status = swarm.TaskStatus{State: swarm.TaskStateNew, Timestamp: time.Now()}
		c.Tasks = append(c.Tasks, t)
	}
}

// UpdateService replaces spec and tasks, and checks the version.
func (c *Cluster) UpdateService(_ context.Context, r *api.UpdateRequest, _ ...grpc.CallOption) (*api.Updated, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Updated = append(c.Updated, r)
	s, err := c.find(r.GetRef())
	if err != nil {
		return nil, err
	}
	if s.Version.Index != r.GetVersion() {
		return nil, status.Error(codes.Aborted, "update out of sequence")
	}
	old := s.Spec
	if r.GetRollback() != "" {
		if s.PreviousSpec == nil {
			return nil, status.Errorf(codes.FailedPrecondition, "service %s does not have a previous spec", r.GetRef())
		}
		s.Spec, s.PreviousSpec = *s.PreviousSpec, nil
	} else {
		var spec swarm.ServiceSpec
		if err := json.Unmarshal(r.GetSpecJson(), &spec); err != nil {
			return nil, err
		}
		s.Spec, s.PreviousSpec = spec, &old
	}
	c.index++
	s.Version.Index = c.index
	now := time.Now()
	s.UpdateStatus = &swarm.UpdateStatus{State: swarm.UpdateStateUpdating, StartedAt: &now, Message: "update in progress"}
	c.fill(s)
	return &api.Updated{}, nil
}

// RemoveService removes it with its tasks.
func (c *Cluster) RemoveService(_ context.Context, r *api.RemoveRequest, _ ...grpc.CallOption) (*api.Empty, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, err := c.find(r.GetRef())
	if err != nil {
		return nil, err
	}
	delete(c.Services, s.ID)
	c.Tasks = slices.DeleteFunc(c.Tasks, func(t *swarm.Task) bool { return t.ServiceID == s.ID })
	return &api.Empty{}, nil
}

// next is the way of a task that goes well.
var next = map[swarm.TaskState]swarm.TaskState{
	swarm.TaskStateNew: swarm.TaskStateAssigned, swarm.TaskStateAssigned: swarm.TaskStatePreparing,
	swarm.TaskStatePreparing: swarm.TaskStateStarting, swarm.TaskStateStarting: swarm.TaskStateRunning,
}

// ListTasks lists the tasks of the asked service and lets them advance.
func (c *Cluster) ListTasks(_ context.Context, r *api.ListRequest, _ ...grpc.CallOption) (*api.Objects, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Listed = r
	out := &api.Objects{}
	running := map[string]uint64{}
	for _, t := range c.Tasks {
		if want := r.GetFilters()["service"].GetValues(); len(want) > 0 && !slices.Contains(want, t.ServiceID) {
			continue
		}
		if s, ok := next[t.Status.State]; ok {
			t.Status.State, t.UpdatedAt = s, time.Now()
		}
		if t.Status.State == swarm.TaskStateRunning {
			running[t.ServiceID]++
		}
		o, err := object(t)
		if err != nil {
			return nil, err
		}
		out.Json = append(out.Json, o.GetJson())
	}
	for id, n := range running {
		if s := c.Services[id]; s.UpdateStatus != nil && n == *s.Spec.Mode.Replicated.Replicas {
			now := time.Now()
			s.UpdateStatus.State, s.UpdateStatus.CompletedAt, s.UpdateStatus.Message = swarm.UpdateStateCompleted, &now, "update completed"
		}
	}
	return out, nil
}

// GetTask knows tasks by id.
func (c *Cluster) GetTask(_ context.Context, r *api.GetRequest, _ ...grpc.CallOption) (*api.Object, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.Tasks {
		if strings.HasPrefix(t.ID, r.GetRef()) {
			return object(t)
		}
	}
	return nil, status.Errorf(codes.NotFound, "task %s not found", r.GetRef())
}

// ListNetworks is Networks, or NetworksErr.
func (c *Cluster) ListNetworks(context.Context, *api.ListRequest, ...grpc.CallOption) (*api.Objects, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.NetworksErr != nil {
		return nil, c.NetworksErr
	}
	out := &api.Objects{}
	for _, n := range c.Networks {
		o, err := object(n)
		if err != nil {
			return nil, err
		}
		out.Json = append(out.Json, o.GetJson())
	}
	return out, nil
}

// CreateNetwork appends to Networks.
func (c *Cluster) CreateNetwork(_ context.Context, r *api.CreateRequest, _ ...grpc.CallOption) (*api.Created, error) {
	var req network.CreateRequest
	if err := json.Unmarshal(r.GetSpecJson(), &req); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	id := api.NewID()
	c.Networks = append(c.Networks, network.Inspect{Network: network.Network{Name: req.Name, ID: id, Driver: "overlay", Scope: "swarm", Labels: req.Labels}})
	return &api.Created{Id: id}, nil
}

// RemoveNetwork removes by id.
func (c *Cluster) RemoveNetwork(_ context.Context, r *api.RemoveRequest, _ ...grpc.CallOption) (*api.Empty, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Networks = slices.DeleteFunc(c.Networks, func(n network.Inspect) bool { return n.ID == r.GetRef() })
	return &api.Empty{}, nil
}

// SwarmNetStatus has one table that is behind.
func (c *Cluster) SwarmNetStatus(context.Context) (*api.NetStatusReply, error) {
	return &api.NetStatusReply{Rows: []*api.NetStatusRow{{NodeId: NodeID, Table: api.MeshTable, Network: api.MeshTable, Desired: 7, Applied: 6, Live: true, BehindNanos: 2e9}},
		Nodes: []*api.NetStatusNode{{NodeId: NodeID, Hostname: "one", Live: true, SilentNanos: 1e9}}}, nil
}

// SwarmNetCheck finds one route missing, and mends it.
func (c *Cluster) SwarmNetCheck(_ context.Context, repair bool, _ []string) ([]*api.NetCheckNode, error) {
	return []*api.NetCheckNode{{NodeId: NodeID, Hostname: "one", Differences: []*api.NetDifference{{Table: "network front", Kind: "route", Object: "10.0.0.5/32", State: "missing", Mended: repair}}}}, nil
}

// Ping answers.
func (c *Cluster) Ping(context.Context, *api.Empty, ...grpc.CallOption) (*api.Empty, error) {
	return &api.Empty{}, nil
}

// TaskLogs has two lines for every task.
func (c *Cluster) TaskLogs(_ context.Context, r *api.TaskLogsRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[api.LogChunk], error) {
	at := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC).UnixNano()
	return &chunks{list: []*api.LogChunk{
		{Time: at, Stream: 1, Line: fmt.Appendf(nil, "out of %s", r.GetTaskId())},
		{Time: at + 1, Stream: 2, Line: fmt.Appendf(nil, "err of %s", r.GetTaskId())},
	}}, nil
}

type chunks struct {
	grpc.ClientStream
	list []*api.LogChunk
}

func (s *chunks) Recv() (*api.LogChunk, error) {
	if len(s.list) == 0 {
		return nil, io.EOF
	}
	c := s.list[0]
	s.list = s.list[1:]
	return c, nil
}
