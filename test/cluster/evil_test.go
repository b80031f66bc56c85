package cluster

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"skein/agent/identity"
	"skein/agent/transport"
	"skein/manager/api"
	"skein/manager/store"
)

// allMethods are those of every service that is described anywhere in this program.
func allMethods() (out []protoreflect.MethodDescriptor) {
	protoregistry.GlobalFiles.RangeFilesByPackage("skein.api.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			ms := f.Services().Get(i).Methods()
			for j := range ms.Len() {
				out = append(out, ms.Get(j))
			}
		}
		return true
	})
	return out
}

func path(m protoreflect.MethodDescriptor) string {
	return fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
}

// try calls a method with an empty request and returns what came of it.
func try(ctx context.Context, conn *grpc.ClientConn, m protoreflect.MethodDescriptor) error {
	if !m.IsStreamingClient() && !m.IsStreamingServer() {
		return conn.Invoke(ctx, path(m), &api.Empty{}, &api.Empty{})
	}
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, path(m))
	if err == nil {
		_ = s.SendMsg(&api.Empty{})
		_ = s.CloseSend()
		for err == nil { // a node is greeted before it says anything
			err = s.RecvMsg(&api.Empty{})
		}
	}
	return err
}

func dialAs(t *testing.T, addr string, conf *tls.Config) *grpc.ClientConn {
	t.Helper()
	conn, err := transport.DialGRPC(addr, conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (n *node) worker(t *testing.T, name string) *identity.Identity {
	t.Helper()
	w, err := identity.Join(within(t, 20*time.Second), n.addr, n.cluster(t).JoinTokens.Worker, identity.JoinOptions{StateDir: t.TempDir(), Hostname: name, RPCAddr: freeAddr(t)})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func knows(t *testing.T, n *node, id string) {
	t.Helper()
	eventually(t, 10*time.Second, "the node is known", func() (known bool) {
		n.mgr.Store().View(func(tx store.ReadTx) { known = tx.Node(id) != nil })
		return known
	})
}

// A worker with a good certificate and a stranger call every method there is, on leader and follower, as themselves and with forged words
// on whom they speak for: all are denied but the few that are theirs.
func TestEveryMethodIsClosed(t *testing.T) {
	t.Parallel()
	a := first(t)
	b := joined(t, a, "m2")
	w := a.worker(t, "w")
	open := map[string][]codes.Code{ // what the method itself says to an empty request
		api.CA_GetRootCA_FullMethodName:        {codes.OK},
		api.CA_IssueCertificate_FullMethodName: {codes.PermissionDenied, codes.ResourceExhausted},
	}
	workers := map[string][]codes.Code{
		api.CA_RenewCertificate_FullMethodName: {codes.InvalidArgument},
		api.Dispatcher_Session_FullMethodName:  {codes.InvalidArgument, codes.FailedPrecondition},
		api.Control_NetStatus_FullMethodName:   {codes.OK},
		api.Control_NetCheck_FullMethodName:    {codes.OK},
	}
	forged := func(ctx context.Context, pairs ...string) context.Context {
		return metadata.NewOutgoingContext(ctx, metadata.Pairs(pairs...))
	}
	for _, n := range []*node{a, b} {
		knows(t, n, w.NodeID())
		evil, stranger := dialAs(t, n.addr, w.ClientTLS("")), dialAs(t, n.addr, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
		for _, m := range allMethods() {
			name := path(m)
			served := []codes.Code{codes.Unimplemented} // a manager's port in this test has no agent
			if got := status.Code(try(within(t, 10*time.Second), evil, m)); !slices.Contains(append(append(served, open[name]...), workers[name]...), got) && got != codes.PermissionDenied {
				t.Errorf("worker: %s: %v", name, got)
			}
			if got := status.Code(try(within(t, 10*time.Second), stranger, m)); !slices.Contains(append(served, open[name]...), got) && got != codes.Unauthenticated {
				t.Errorf("stranger: %s: %v", name, got)
			}
			for _, words := range [][]string{
				{"skein-forwarded-node", a.id.NodeID(), "skein-forwarded-role", "manager", "skein-forwarded-addr", "local"},
				{"skein-forwarded-node", "", "skein-forwarded-role", "", "skein-forwarded-addr", ""},
				{"skein-forwarded-node", a.id.NodeID()},
			} {
				for who, conn := range map[string]*grpc.ClientConn{"worker": evil, "stranger": stranger} {
					if got := status.Code(try(forged(within(t, 10*time.Second), words...), conn, m)); got != codes.PermissionDenied && got != codes.Unimplemented {
						t.Errorf("%s with forged metadata: %s: %v", who, name, got)
					}
				}
			}
		}
	}
}

// session is a raw session of a node.
type session struct {
	t    *testing.T
	s    grpc.BidiStreamingClient[api.AgentMessage, api.ManagerMessage]
	msgs chan *api.ManagerMessage
	end  chan error
}

func open(t *testing.T, n *node, w *identity.Identity, hello *api.Hello) *session {
	t.Helper()
	conn := dialAs(t, n.addr, w.ClientTLS(""))
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	s, err := api.NewDispatcherClient(conn).Session(ctx)
	if err != nil {
		t.Fatal(err)
	}
	out := &session{t: t, s: s, msgs: make(chan *api.ManagerMessage, 1000), end: make(chan error, 1)}
	if err := s.Send(&api.AgentMessage{Kind: &api.AgentMessage_Hello{Hello: hello}}); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			m, err := s.Recv()
			if err != nil {
				out.end <- err
				return
			}
			out.msgs <- m
		}
	}()
	go func() {
		beat := time.NewTicker(500 * time.Millisecond)
		defer beat.Stop()
		for i := uint64(1); ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-beat.C:
				_ = s.Send(&api.AgentMessage{Kind: &api.AgentMessage_Heartbeat{Heartbeat: &api.Heartbeat{Sequence: i}}})
			}
		}
	}()
	return out
}

// until reads messages until one fits.
func (s *session) until(what string, fits func(*api.ManagerMessage) bool) {
	s.t.Helper()
	late := time.After(20 * time.Second)
	for {
		select {
		case m := <-s.msgs:
			if fits(m) {
				return
			}
		case err := <-s.end:
			s.t.Fatalf("%s: the session ended: %v", what, err)
		case <-late:
			s.t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func assigned(m *api.ManagerMessage) string {
	for _, a := range m.GetAssignments().GetSet() {
		if a.Desired == uint32(api.TaskRunning) {
			return a.TaskId
		}
	}
	return ""
}

// A node speaks only for itself, gets only what its own tasks need, and has one session.
func TestSessionsKeepToThemselves(t *testing.T) {
	t.Parallel()
	const canary = "CANARY-4711"
	a := first(t)
	good, evil := a.worker(t, "good"), a.worker(t, "evil")
	desc, err := json.Marshal(swarm.NodeDescription{Hostname: "x", Platform: swarm.Platform{OS: "linux", Architecture: "x86_64"},
		Resources: swarm.Resources{NanoCPUs: 4e9, MemoryBytes: 1 << 33}})
	if err != nil {
		t.Fatal(err)
	}
	hello := func(name string) *api.Hello { return &api.Hello{Hostname: name, DescriptionJson: desc} }
	gs, es := open(t, a, good, hello("good")), open(t, a, evil, hello("evil"))
	var leaked []string
	watch := func(m *api.ManagerMessage) {
		if b, err := json.Marshal(m); err == nil && (strings.Contains(string(b), canary) || len(m.GetDependencies().GetSet()) > 0) {
			leaked = append(leaked, fmt.Sprintf("%T", m.Kind))
		}
	}
	ctl := a.mgr.Control()
	made, err := ctl.CreateDependency(within(t, 20*time.Second), &api.DependencyRequest{Kind: "secret", SpecJson: []byte(`{"Name":"can","Data":"Q0FOQVJZLTQ3MTE="}`)})
	if err != nil {
		t.Fatal(err)
	}
	spec := `{"Name":"s","TaskTemplate":{"Placement":{"Constraints":["node.hostname==%s"]},"ContainerSpec":{"Image":"i","Secrets":[{"SecretID":%q,"SecretName":"can","File":{"Name":"can","UID":"0","GID":"0","Mode":292}}]}}}`
	if _, err = ctl.CreateService(within(t, 20*time.Second), &api.CreateRequest{SpecJson: fmt.Appendf(nil, spec, "good", made.Id)}); err != nil {
		t.Fatal(err)
	}
	task, secret := "", false
	gs.until("the good node gets task and secret", func(m *api.ManagerMessage) bool {
		for _, d := range m.GetDependencies().GetSet() {
			secret = secret || string(d.Data) == canary
		}
		if id := assigned(m); id != "" {
			task = id
		}
		return task != "" && secret
	})
	// The evil node reports for the other's task, in every way there is.
	for _, claim := range []string{evil.NodeID(), good.NodeID(), ""} {
		err := es.s.Send(&api.AgentMessage{Kind: &api.AgentMessage_Statuses{Statuses: &api.StatusBatch{Reports: []*api.TaskReport{
			{TaskId: task, State: uint32(api.TaskFailed), NodeId: claim, Err: "evil"}}}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	second := open(t, a, evil, &api.Hello{Hostname: "evil", DescriptionJson: desc, Statuses: []*api.TaskReport{{TaskId: task, State: uint32(api.TaskRejected), NodeId: good.NodeID(), Err: "evil"}}})
	second.until("the second session of a certificate begins", func(m *api.ManagerMessage) bool { watch(m); return m.GetWelcome() != nil })
	select {
	case err := <-es.end:
		if status.Code(err) != codes.Aborted {
			t.Errorf("the first session ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("two sessions with one certificate")
	}
	time.Sleep(500 * time.Millisecond) // for what must not happen
	a.mgr.Store().View(func(tx store.ReadTx) {
		if x := tx.Task(task); x == nil || x.State >= api.TaskRunning || x.NodeID != good.NodeID() {
			t.Errorf("the evil node's word on another's task was taken: %+v", x)
		}
	})
	for len(es.msgs) > 0 {
		watch(<-es.msgs)
	}
	for len(second.msgs) > 0 {
		watch(<-second.msgs)
	}
	if len(leaked) > 0 {
		t.Errorf("the evil node was sent %v: none of its tasks needs a secret", leaked)
	}
}

// Removed nodes are cut off within a second, by every manager, and stay so when managers are started again.
func TestRemovedIsOut(t *testing.T) {
	t.Parallel()
	ns := three(t)
	w := ns[0].worker(t, "w")
	for _, n := range ns {
		knows(t, n, w.NodeID())
	}
	s := open(t, leaderOf(ns), w, &api.Hello{Hostname: "w"})
	s.until("welcome", func(m *api.ManagerMessage) bool { return m.GetWelcome() != nil })
	var conns []*grpc.ClientConn
	for _, n := range ns {
		conn := dialAs(t, n.addr, w.ClientTLS(""))
		if err := w.Renew(within(t, 10*time.Second), conn); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	gossip := func(n *node) (key string, all int) {
		n.mgr.Store().View(func(tx store.ReadTx) {
			key = string(tx.Cluster().GossipKey)
			if tx.Cluster().GossipRotation != nil {
				all = 1
			}
		})
		return key, all
	}
	before, _ := gossip(ns[0])
	began := time.Now()
	if _, err := ns[0].mgr.Control().RemoveNode(within(t, 10*time.Second), &api.RemoveRequest{Ref: w.NodeID(), Force: true}); err != nil {
		t.Fatal(err)
	}
	removed := time.Now()
	select {
	case err := <-s.end:
		t.Logf("the session was cut %v after the answer: %v", time.Since(removed), status.Code(err))
	case <-time.After(10 * time.Second):
		t.Error("the session of a removed node goes on")
	}
	denied := func(n *node, conn *grpc.ClientConn) {
		t.Helper()
		eventually(t, 10*time.Second, "denied by "+n.addr, func() bool {
			err := w.Renew(within(t, 10*time.Second), conn)
			if err == nil {
				t.Errorf("a removed node renewed its certificate through %s", n.addr)
			}
			return strings.Contains(fmt.Sprint(err), "was removed from the cluster")
		})
	}
	for i, n := range ns {
		denied(n, conns[i])
	}
	eventually(t, 20*time.Second, "another gossip key", func() bool { key, under := gossip(ns[1]); return key != before && under == 0 })
	t.Logf("the gossip key was replaced in %v", time.Since(began))
	for i, n := range ns {
		ns[i] = n.restart(t)
	}
	eventually(t, 20*time.Second, "a leader", func() bool { return leaderOf(ns) != nil })
	for _, n := range ns {
		denied(n, dialAs(t, n.addr, w.ClientTLS("")))
	}
	// What the node recorded is worth nothing: its own request, sent again, makes no node.
	_, err := api.NewCAClient(dialAs(t, ns[0].addr, w.ClientTLS(""))).IssueCertificate(within(t, 10*time.Second), &api.IssueRequest{Token: "SWMTKN-1-x"})
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("%v", err)
	}
}
