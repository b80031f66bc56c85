package dispatcher_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"skein/manager/api"
	"skein/manager/dispatcher"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

// lab is one leader, spoken to by hand.
type lab struct {
	t     *testing.T
	ctx   context.Context
	store *store.Store
	front *dispatcher.Front
	conn  *grpc.ClientConn
	deps  []string // secrets of the services to come

	leader string // as the front knows it
	nodes  int    // as it counts them
}

func id(s string) string { return strings.Repeat("0", 25-len(s)) + s }

func bubble(t *testing.T, f func(l *lab)) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := storetest.New()
		l := &lab{t: t, ctx: t.Context(), store: s, leader: "elsewhere"}
		l.front = dispatcher.NewFront(func() string { return l.leader }, func() int { return l.nodes })
		l.apply(&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{
			Id: id("c"), SpecJson: []byte("{}"), OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", OverlayBits: 20, DataPort: 4789, FeatureLevel: api.LevelHistory,
		}}})
		lis, srv := bufconn.Listen(1<<16), grpc.NewServer()
		api.RegisterDispatcherServer(srv, l.front)
		go srv.Serve(lis)
		var err error
		l.conn, err = grpc.NewClient("passthrough:///m", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		d := dispatcher.New(dispatcher.Config{Store: s, NodeID: id("m"), Identify: func(ctx context.Context) (string, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			return md.Get("node")[0], nil
		}})
		done := make(chan struct{})
		go func() { defer close(done); _ = d.Run(ctx) }()
		l.front.Set(d)
		f(l)
		cancel()
		<-done
		l.conn.Close()
		srv.Stop()
	})
}

func (l *lab) apply(changes ...*api.Change) {
	l.t.Helper()
	_, results, err := l.store.Batch(l.ctx, []*api.Txn{{Changes: changes}})
	if err = errors.Join(append(results, err)...); err != nil {
		l.t.Fatalf("apply: %v", err)
	}
}

func (l *lab) node(names ...string) {
	for _, n := range names {
		l.apply(&api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id(n), Hostname: n, Role: "worker", Availability: "active", RpcAddr: n}}})
	}
}

// tasks makes a service with one task per node on one network.
func (l *lab) tasks(service string, nodes ...string) []string {
	l.t.Helper()
	spec := swarm.ServiceSpec{Annotations: swarm.Annotations{Name: service, Labels: map[string]string{"a": "b"}}}
	spec.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Image: "web:1"}
	for _, d := range l.deps {
		spec.TaskTemplate.ContainerSpec.Secrets = append(spec.TaskTemplate.ContainerSpec.Secrets, &swarm.SecretReference{SecretID: id(d), SecretName: d, File: &swarm.SecretReferenceFileTarget{Name: d}})
	}
	spec.TaskTemplate.Networks = []swarm.NetworkAttachmentConfig{{Target: id("net"), Aliases: []string{"www"}}}
	b, err := json.Marshal(spec)
	if err != nil {
		l.t.Fatal(err)
	}
	changes := []*api.Change{
		{Kind: &api.Change_PutNetwork{PutNetwork: &api.NetworkRecord{Id: id("net"), Name: "net", Driver: "overlay", SpecJson: []byte("{}")}}},
		{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: id(service), Name: service, SpecJson: b, RegistryAuth: []byte(`{"username":"` + service + `"}`)}}},
	}
	create, place := &api.TaskCreate{ServiceId: id(service), Revision: 1}, &api.TaskPlacement{}
	for i, n := range nodes {
		create.Items = append(create.Items, &api.TaskCreate_Item{Slot: uint64(i + 1), Desired: uint32(api.TaskRunning), Generation: 1})
		place.TaskIds = append(place.TaskIds, api.TaskID(id(service), uint64(i+1), "", 1))
		place.NodeIds = append(place.NodeIds, id(n))
	}
	l.apply(append(changes, &api.Change{Kind: &api.Change_CreateTasks{CreateTasks: create}}, &api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: place}})...)
	return place.TaskIds
}

func (l *lab) task(id string) (t *store.Task) {
	l.store.View(func(tx store.ReadTx) { t = tx.Task(id) })
	return t
}

// peer is an agent by hand.
type peer struct {
	l      *lab
	s      grpc.BidiStreamingClient[api.AgentMessage, api.ManagerMessage]
	cancel context.CancelFunc
}

func (l *lab) dial(node string) *peer {
	l.t.Helper()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), "node", id(node)))
	s, err := api.NewDispatcherClient(l.conn).Session(ctx)
	if err != nil {
		l.t.Fatal(err)
	}
	return &peer{l: l, s: s, cancel: cancel}
}

func (p *peer) hello(h *api.Hello) *peer {
	p.send(&api.AgentMessage{Kind: &api.AgentMessage_Hello{Hello: h}})
	return p
}

func (p *peer) send(m *api.AgentMessage) {
	p.l.t.Helper()
	if err := p.s.Send(m); err != nil && !errors.Is(err, io.EOF) { // refused already: Recv tells why
		p.l.t.Fatal(err)
	}
}

func (p *peer) report(r ...*api.TaskReport) {
	p.send(&api.AgentMessage{Kind: &api.AgentMessage_Statuses{Statuses: &api.StatusBatch{Reports: r}}})
}

func (p *peer) ack(table string, version uint64) {
	p.send(&api.AgentMessage{Kind: &api.AgentMessage_Ack{Ack: &api.TableAck{Table: table, Version: version}}})
}

// until receives messages until one satisfies f.
func until[T any](p *peer, what string, f func(*api.ManagerMessage) (T, bool)) T {
	p.l.t.Helper()
	for range 1000 {
		m, err := p.s.Recv()
		if err != nil {
			p.l.t.Fatalf("%s: %v", what, err)
		}
		if v, ok := f(m); ok {
			return v
		}
	}
	p.l.t.Fatalf("%s: not within 1000 messages", what)
	panic("unreachable")
}

func table(p *peer, name string) *api.TableUpdate {
	return until(p, "table "+name, func(m *api.ManagerMessage) (*api.TableUpdate, bool) {
		return m.GetTable(), m.GetTable().GetTable() == name
	})
}

func assigned(p *peer) *api.AssignmentUpdate {
	return until(p, "assignments", func(m *api.ManagerMessage) (*api.AssignmentUpdate, bool) {
		return m.GetAssignments(), m.GetAssignments() != nil
	})
}

// failure is the error that the session ends with.
func (p *peer) failure() error {
	for {
		if _, err := p.s.Recv(); err != nil {
			return err
		}
	}
}

func running(task string) *api.TaskReport {
	return &api.TaskReport{TaskId: task, State: uint32(api.TaskRunning), Message: "started"}
}

func TestBadAgentsAreRefused(t *testing.T) {
	big := make([]*api.TaskReport, api.MaxStatusReports+1)
	for i := range big {
		big[i] = &api.TaskReport{TaskId: fmt.Sprint(i)}
	}
	tests := []struct {
		name string
		act  func(l *lab) *peer
		code codes.Code
		text string
	}{
		{"unknown node", func(l *lab) *peer { return l.dial("nobody").hello(&api.Hello{}) }, codes.PermissionDenied, "is not part of this cluster"},
		{"no hello", func(l *lab) *peer { return l.dial("w1") }, codes.InvalidArgument, "said no hello within 5s"},
		{"heartbeat first", func(l *lab) *peer {
			p := l.dial("w1")
			p.send(&api.AgentMessage{Kind: &api.AgentMessage_Heartbeat{Heartbeat: &api.Heartbeat{}}})
			return p
		}, codes.InvalidArgument, "must be a hello"},
		{"two hellos", func(l *lab) *peer { return l.dial("w1").hello(&api.Hello{}).hello(&api.Hello{}) }, codes.InvalidArgument, "second hello"},
		{"huge description", func(l *lab) *peer {
			return l.dial("w1").hello(&api.Hello{DescriptionJson: make([]byte, api.MaxSpecBytes+1)})
		}, codes.InvalidArgument, "hello is too large"},
		{"huge batch", func(l *lab) *peer {
			p := l.dial("w1").hello(&api.Hello{})
			p.report(big...)
			return p
		}, codes.InvalidArgument, "batch of 1001 reports, at most 1000 are taken"},
		{"silence", func(l *lab) *peer { return l.dial("w1").hello(&api.Hello{}) }, codes.Unavailable, "nothing heard for 4s"},
		{"follower", func(l *lab) *peer {
			l.front.Set(nil)
			return l.dial("w1").hello(&api.Hello{})
		}, codes.FailedPrecondition, "not the leader"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(l *lab) {
				l.node("w1")
				p := tt.act(l)
				defer p.cancel()
				err := p.failure()
				if status.Code(err) != tt.code || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("got %v, want %v with %q", err, tt.code, tt.text)
				}
				if v := p.s.Trailer().Get("skein-leader"); tt.name == "follower" && (len(v) != 1 || v[0] != "elsewhere") {
					t.Errorf("trailer %v", v)
				}
			})
		})
	}
}

func TestManagerWithoutLeaderSpreadsTheHerd(t *testing.T) {
	for nodes, want := range map[int]string{3: "1", 5000: "2500", 1 << 20: "4000"} {
		bubble(t, func(l *lab) {
			l.node("w1")
			l.front.Set(nil)
			l.leader, l.nodes = "", nodes
			p := l.dial("w1").hello(&api.Hello{})
			defer p.cancel()
			if err := p.failure(); status.Code(err) != codes.FailedPrecondition {
				t.Errorf("got %v", err)
			}
			if v := p.s.Trailer().Get("skein-spread-millis"); len(v) != 1 || v[0] != want {
				t.Errorf("%d nodes: trailer %v, want %s", nodes, v, want)
			}
		})
	}
}

func TestOnlyOwnTasksAreReported(t *testing.T) {
	bubble(t, func(l *lab) {
		l.node("w1", "w2")
		tasks := l.tasks("web", "w1", "w2")
		p := l.dial("w1").hello(&api.Hello{Statuses: []*api.TaskReport{running(tasks[1])}})
		defer p.cancel()
		assigned(p)
		p.report(
			running(tasks[1]), // another node's
			running("unknown"),
			&api.TaskReport{TaskId: tasks[0], State: uint32(api.TaskOrphaned)}, // not an agent's to say
			&api.TaskReport{TaskId: tasks[0], State: 513},                      // no such state
		)
		time.Sleep(time.Second)
		synctest.Wait()
		for _, id := range tasks {
			if got := l.task(id).State; got != api.TaskAssigned {
				t.Errorf("task is %s", got)
			}
		}
		p.report(&api.TaskReport{TaskId: tasks[0], State: uint32(api.TaskFailed), Err: strings.Repeat("é", 1<<20), NodeId: id("w2")})
		time.Sleep(time.Second)
		synctest.Wait()
		if got := l.task(tasks[0]); got.State != api.TaskFailed || len(got.Status.Err) > 5000 || got.Status.NodeId != id("w1") {
			t.Errorf("task is %s, error of %d bytes, told by %s", got.State, len(got.Status.Err), got.Status.NodeId)
		}
	})
}

func TestUpdatesCarryOnlyWhatChanged(t *testing.T) {
	bubble(t, func(l *lab) {
		l.node("w1", "w2")
		nodes := slices.Repeat([]string{"w1", "w2"}, 50)
		tasks := l.tasks("web", nodes...)
		p := l.dial("w1").hello(&api.Hello{})
		defer p.cancel()
		full := assigned(p)
		if !full.Full || full.Sequence != 1 || len(full.Set) != 50 || len(full.Networks) != 1 {
			t.Fatalf("full set: sequence %d, %d tasks, %d networks", full.Sequence, len(full.Set), len(full.Networks))
		}
		if len(full.Templates) != 1 || full.Total != 50 || full.More {
			t.Fatalf("full set: %d templates, total %d", len(full.Templates), full.Total)
		}
		a, made := full.Set[0], full.Templates[0]
		var spec swarm.TaskSpec
		if err := json.Unmarshal(made.SpecJson, &spec); err != nil || spec.ContainerSpec.Image != "web:1" || made.ServiceName != "web" || string(made.ServiceLabelsJson) != `{"a":"b"}` ||
			len(a.Attachments) != 1 || !a.Templated || a.ServiceName != "" {
			t.Errorf("assignment %v, template %v, spec error %v", a, made, err)
		}
		if u := table(p, "mesh"); !u.Full || len(u.Nodes) != 0 || len(u.Endpoints) != 0 { // nothing is published
			t.Errorf("mesh: %v", u)
		}
		u := table(p, id("net"))
		if !u.Full || len(u.Endpoints) != 100 || len(u.Services) != 1 || len(u.Nodes) != 2 || u.Network.GetSubnet4() == "" {
			t.Errorf("network table: %d endpoints, %d services, %d nodes", len(u.Endpoints), len(u.Services), len(u.Nodes))
		}
		if s := u.Services[0]; s.Vip4 == "" || s.Aliases[0] != "www" {
			t.Errorf("service: %v", s)
		}
		if e := u.Endpoints[0]; slices.Contains(e.Names, "www") || strings.Contains(e.Addr4, "/") {
			t.Errorf("endpoint: %v", e)
		}
		version := u.Version
		p.report(running(full.Set[0].TaskId))
		u = table(p, id("net"))
		if u.Full || u.Version <= version || len(u.Endpoints) != 1 || u.Endpoints[0].State != "ready" || len(u.Services)+len(u.Nodes) != 0 || u.Network != nil {
			t.Errorf("after one report: %v", u)
		}
		l.apply(&api.Change{Kind: &api.Change_DesireTasks{DesireTasks: &api.TaskDesire{TaskIds: []string{full.Set[0].TaskId}, Desired: uint32(api.TaskShutdown)}}})
		drained := table(p, id("net"))
		if len(drained.Endpoints) != 1 || drained.Endpoints[0].State != "draining" {
			t.Errorf("draining: %v", drained)
		}
		inc := assigned(p)
		if inc.Full || inc.Sequence != 2 || len(inc.Set) != 1 || inc.Set[0].Drained || len(inc.Networks) != 0 {
			t.Errorf("increment: %v", inc)
		}
		p.ack(id("net"), drained.Version-1)
		p.ack(id("net"), drained.Version)
		if inc = assigned(p); inc.Sequence != 3 || len(inc.Set) != 1 || !inc.Set[0].Drained {
			t.Errorf("after the ack: %v", inc)
		}
		_ = tasks
	})
}

// A node is sent the secrets and configs that its tasks need, once, before the tasks, and nothing of others'.
func TestDependenciesGoWhereTheyAreNeeded(t *testing.T) {
	bubble(t, func(l *lab) {
		l.node("w1", "w2")
		for _, n := range []string{"sec1", "sec2"} {
			l.apply(&api.Change{Kind: &api.Change_PutDependency{PutDependency: &api.DependencyRecord{Kind: "secret", Id: id(n), Name: n, SpecJson: []byte("{}"), Data: []byte("data of " + n)}}})
		}
		l.deps = []string{"sec1"}
		web := l.tasks("web", "w1", "w1")
		l.deps = []string{"sec1", "sec2"}
		api1 := l.tasks("api", "w2")
		got := func(p *peer) (names []string, u *api.AssignmentUpdate) {
			u = until(p, "assignments", func(m *api.ManagerMessage) (*api.AssignmentUpdate, bool) {
				for _, d := range m.GetDependencies().GetSet() {
					names = append(names, d.Name)
				}
				return m.GetAssignments(), m.GetAssignments() != nil
			})
			return names, u
		}
		p1, p2 := l.dial("w1").hello(&api.Hello{}), l.dial("w2").hello(&api.Hello{})
		defer p1.cancel()
		defer p2.cancel()
		if names, u := got(p1); !slices.Equal(names, []string{"sec1"}) || len(u.Set) != 2 || !slices.Equal(u.Templates[0].Dependencies, []string{id("sec1")}) {
			t.Errorf("w1 got %v", names)
		}
		if names, u := got(p2); !slices.Equal(names, []string{"sec1", "sec2"}) || !strings.Contains(u.String(), `"{\"username\":\"api\"}"`) || strings.Contains(u.String(), `username\":\"web`) {
			t.Errorf("w2 got %v and %v, want the registry credentials of its own task and no others", names, u)
		}
		// A third task needs nothing new; when all of them are gone the agent has forgotten, and a later one needs it again.
		l.deps = []string{"sec1"}
		more := l.tasks("more", "w1")
		if names, u := got(p1); len(names) != 0 || len(u.Set) != 1 {
			t.Errorf("w1 got %v again", names)
		}
		end := func(ids ...string) {
			for _, task := range ids {
				p1.report(&api.TaskReport{TaskId: task, State: uint32(api.TaskFailed)})
			}
			for ; len(ids) > 0; synctest.Wait() {
				if tsk := l.task(ids[0]); tsk.State == api.TaskFailed {
					ids = ids[1:]
				}
				time.Sleep(time.Second)
			}
		}
		all := append(web, more...)
		end(all...)
		l.apply(&api.Change{Kind: &api.Change_DeleteTasks{DeleteTasks: &api.TaskDelete{TaskIds: all}}})
		for gone := 0; gone < len(all); {
			_, u := got(p1)
			gone += len(u.Removed)
		}
		l.tasks("again", "w1")
		if names, _ := got(p1); !slices.Equal(names, []string{"sec1"}) {
			t.Errorf("w1, which had forgotten it, got %v", names)
		}
		_ = api1
	})
}

func TestTablesAreTakenBack(t *testing.T) {
	bubble(t, func(l *lab) {
		l.node("w1")
		tasks := l.tasks("web", "w1")
		p := l.dial("w1").hello(&api.Hello{Acks: []*api.TableAck{{Table: "old network", Version: 5}, {Table: "mesh", Version: 1 << 40}}})
		defer p.cancel()
		if u := table(p, "old network"); !u.Gone {
			t.Errorf("a table of another leader's time: %v", u)
		}
		p.report(&api.TaskReport{TaskId: tasks[0], State: uint32(api.TaskFailed)})
		until(p, "table without a task is taken back", func(m *api.ManagerMessage) (bool, bool) {
			return true, m.GetTable().GetTable() == id("net") && m.GetTable().Gone
		})
		d := l.front.Current()
		status, err := d.NetStatus(l.ctx)
		if err != nil || len(status.Rows) != 1 || status.Rows[0].Table != "mesh" || status.Rows[0].Applied != 0 {
			t.Errorf("an ack from another history counts: %v %v", status, err)
		}
	})
}

func TestNodeRecordFollowsTheAgent(t *testing.T) {
	bubble(t, func(l *lab) {
		l.node("w1")
		node := func() (n *store.Node) {
			l.store.View(func(tx store.ReadTx) { n = tx.Node(id("w1")) })
			return n
		}
		h := &api.Hello{Hostname: "box", DescriptionJson: []byte(`{"Hostname":"box"}`), UnderlayAddr: "192.0.2.1", RpcAddr: "192.0.2.1:2377"}
		p := l.dial("w1").hello(h)
		defer p.cancel()
		w := until(p, "welcome", func(m *api.ManagerMessage) (*api.Welcome, bool) { return m.GetWelcome(), m.GetWelcome() != nil })
		if w.NodeIndex != 1 || w.DataPort != 4789 || w.HeartbeatMillis != 1000 || w.LeaseMillis != 4000 {
			t.Errorf("welcome: %v", w)
		}
		time.Sleep(time.Second)
		n := node()
		if n.Hostname != "box" || n.UnderlayAddr != "192.0.2.1" || n.Status.State != "ready" || n.Role != "worker" {
			t.Errorf("node: %v", n)
		}
		version := n.Meta.Version
		q := l.dial("w1").hello(h) // the same once more: nothing to write
		defer q.cancel()
		if err := p.failure(); status.Code(err) != codes.Aborted {
			t.Errorf("first session ended with %v", err)
		}
		time.Sleep(time.Second)
		if got := node().Meta.Version; got != version {
			t.Errorf("record was written again: version %d, before %d", got, version)
		}
		next := *node()
		l.apply(&api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{
			Id: next.Id, Hostname: next.Hostname, Role: "manager", Availability: "drain", RpcAddr: next.RpcAddr, UnderlayAddr: next.UnderlayAddr,
		}}})
		w = until(q, "promotion", func(m *api.ManagerMessage) (*api.Welcome, bool) {
			return m.GetWelcome(), m.GetWelcome().GetNode().GetRole() == "manager"
		})
		if w.Node.Availability != "drain" {
			t.Errorf("welcome: %v", w)
		}
		list := until(q, "managers", func(m *api.ManagerMessage) (*api.ManagerList, bool) {
			return m.GetManagers(), len(m.GetManagers().GetManagers()) == 1
		})
		if list.Managers[0].NodeId != id("w1") || list.Managers[0].Leader {
			t.Errorf("managers: %v", list)
		}
	})
}

// As long as nodes come back to a new leader, those that did not yet may be on their way; who does not come is down soon after the last.
func TestHerdHasTime(t *testing.T) {
	bubble(t, func(l *lab) {
		names := []string{"w1", "w2", "w3", "w4", "w5"}
		l.node(names...)
		state := func(n string) (s string) {
			l.store.View(func(tx store.ReadTx) { s = tx.Node(id(n)).Status.GetState() })
			return s
		}
		for i, n := range names[:4] {
			time.Sleep(1800 * time.Millisecond)
			if s := state(n); s == "down" {
				t.Fatalf("%s is down after %v, while others came", n, time.Duration(i+1)*1800*time.Millisecond)
			}
			p := l.dial(n).hello(&api.Hello{Hostname: n, DescriptionJson: []byte(`{}`), UnderlayAddr: "192.0.2.1", RpcAddr: n})
			defer p.cancel()
			until(p, "welcome", func(m *api.ManagerMessage) (*api.Welcome, bool) { return m.GetWelcome(), m.GetWelcome() != nil })
		}
		time.Sleep(1500 * time.Millisecond)
		if s := state("w5"); s == "down" {
			t.Error("w5 is down 1.5 s after another came")
		}
		time.Sleep(time.Second)
		if s := state("w5"); s != "down" {
			t.Errorf("w5 is %s 2.5 s after the last came, want down", s)
		}
	})
}
