package forward_test

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/forward"
)

// election is what all managers of a test believe.
type election struct {
	mu      sync.Mutex
	leader  map[string]string // manager → whom it believes to be the leader
	addrs   map[string]string
	changed chan struct{}
}

func (e *election) set(leader map[string]string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.leader = leader
	close(e.changed)
	e.changed = make(chan struct{})
}

type view struct {
	e    *election
	name string
}

func (v view) Leader() (id, addr string, self bool) {
	v.e.mu.Lock()
	defer v.e.mu.Unlock()
	id = v.e.leader[v.name]
	return id, v.e.addrs[id], id == v.name
}

func (v view) Changed() <-chan struct{} {
	v.e.mu.Lock()
	defer v.e.mu.Unlock()
	return v.e.changed
}

// control answers with its manager's name and counts what reaches it.
type control struct {
	api.UnimplementedControlServer
	name string
	mu   sync.Mutex
	seen []authz.Caller
	fail error
	hang bool
}

func (c *control) ListServices(ctx context.Context, _ *api.ListRequest) (*api.Objects, error) {
	return &api.Objects{Json: [][]byte{[]byte(c.name)}}, c.wait(ctx)
}

// wait stands for a leader that is cut off from the others.
func (c *control) wait(ctx context.Context) error {
	if !c.hang {
		return nil
	}
	<-ctx.Done()
	return ctx.Err()
}

func (c *control) CreateService(ctx context.Context, _ *api.CreateRequest) (*api.Created, error) {
	caller, _ := authz.CallerFrom(ctx)
	if err := c.wait(ctx); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen = append(c.seen, caller)
	return &api.Created{Id: c.name}, c.fail
}

func (c *control) calls() []authz.Caller {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]authz.Caller(nil), c.seen...)
}

// auth stands for authz: a forwarded request is known by its metadata.
func auth(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	c := authz.Caller{NodeIdentity: api.NodeIdentity{NodeID: "user"}, Addr: "192.0.2.1"}
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("skein-forwarded-node")) > 0 {
		c = authz.Caller{NodeIdentity: api.NodeIdentity{NodeID: md.Get("skein-forwarded-node")[0]}, Addr: md.Get("skein-forwarded-addr")[0], Forwarded: true}
	}
	reply, err := h(authz.WithCaller(ctx, c), req)
	return reply, api.ToGRPC(err)
}

type cluster struct {
	e        *election
	controls map[string]*control
	clients  map[string]api.ControlClient
}

func start(t *testing.T, wait time.Duration, names ...string) *cluster {
	t.Helper()
	c := &cluster{e: &election{addrs: map[string]string{}, changed: make(chan struct{})}, controls: map[string]*control{}, clients: map[string]api.ControlClient{}}
	dial := func(addr string) (*grpc.ClientConn, error) {
		return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	for _, n := range names {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		f := forward.New(forward.Config{Leadership: view{c.e, n}, Dial: dial, Wait: wait})
		srv := grpc.NewServer(grpc.ChainUnaryInterceptor(auth, f.Unary()))
		c.controls[n] = &control{name: n}
		api.RegisterControlServer(srv, c.controls[n])
		c.e.addrs[n] = ln.Addr().String()
		done := make(chan struct{})
		go func() { _ = srv.Serve(ln); close(done) }()
		conn, err := dial(ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.clients[n] = api.NewControlClient(conn)
		t.Cleanup(func() { _ = conn.Close(); _ = f.Close(); srv.Stop(); <-done })
	}
	return c
}

func all(leader string) map[string]string {
	return map[string]string{"a": leader, "b": leader, "c": leader}
}

func TestAnyManagerTakesAnyRequest(t *testing.T) {
	c := start(t, time.Second, "a", "b", "c")
	c.e.set(all("b"))
	for _, n := range []string{"a", "b", "c"} {
		r, err := c.clients[n].CreateService(t.Context(), &api.CreateRequest{})
		if err != nil || r.Id != "b" {
			t.Errorf("through %s: answered by %s, %v; want the leader", n, r.GetId(), err)
		}
	}
	for i, caller := range c.controls["b"].calls() {
		if caller.NodeID != "user" || caller.Addr != "192.0.2.1" {
			t.Errorf("call %d: the leader saw %+v, want the first caller", i, caller)
		}
	}
}

func TestWaitsForAnElection(t *testing.T) {
	c := start(t, 5*time.Second, "a", "b", "c")
	result := make(chan error, 1)
	go func() {
		_, err := c.clients["a"].CreateService(t.Context(), &api.CreateRequest{})
		result <- err
	}()
	select {
	case err := <-result:
		t.Fatalf("answered without a leader: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	c.e.set(all("c"))
	if err := <-result; err != nil {
		t.Errorf("after the election: %v", err)
	}
}

func TestNoLeaderIsAnErrorInTime(t *testing.T) {
	c := start(t, 100*time.Millisecond, "a")
	_, err := c.clients["a"].CreateService(t.Context(), &api.CreateRequest{})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no leader elected") {
		t.Errorf("%v, want unavailable: no leader elected", err)
	}
}

// Two followers that each take the other for the leader must not pass a request to and fro.
func TestDoesNotLoop(t *testing.T) {
	c := start(t, 300*time.Millisecond, "a", "b", "c")
	c.e.set(map[string]string{"a": "b", "b": "a"})
	_, err := c.clients["a"].CreateService(t.Context(), &api.CreateRequest{})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("%v, want unavailable", err)
	}
	c.e.set(map[string]string{"a": "b", "b": "b"})
	if r, err := c.clients["a"].CreateService(t.Context(), &api.CreateRequest{}); err != nil || r.Id != "b" {
		t.Errorf("once b leads: %v, %v", r, err)
	}
	if n := len(c.controls["a"].calls()) + len(c.controls["b"].calls()); n != 1 {
		t.Errorf("%d handlers ran, want 1", n)
	}
}

// A write that failed in the leader may have been carried out: it is not sent again.
func TestWritesAreSentOnce(t *testing.T) {
	c := start(t, time.Second, "a", "b")
	c.e.set(all("b"))
	c.controls["b"].fail = status.Error(codes.Unavailable, "leadership lost: outcome unknown")
	if _, err := c.clients["a"].CreateService(t.Context(), &api.CreateRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("%v, want unavailable", err)
	}
	if n := len(c.controls["b"].calls()); n != 1 {
		t.Errorf("the write reached the leader %d times, want once", n)
	}
}

// A dead leader's address is given up in time for the next one.
func TestDeadLeader(t *testing.T) {
	c := start(t, 3*time.Second, "a", "b", "c")
	c.e.mu.Lock()
	c.e.addrs["b"] = "127.0.0.1:1"
	c.e.mu.Unlock()
	c.e.set(all("b"))
	result := make(chan error, 1)
	go func() {
		_, err := c.clients["a"].CreateService(t.Context(), &api.CreateRequest{})
		result <- err
	}()
	time.AfterFunc(200*time.Millisecond, func() { c.e.set(all("c")) })
	if err := <-result; err != nil || len(c.controls["c"].calls()) != 1 {
		t.Errorf("%v, %d calls at the new leader; want none lost", err, len(c.controls["c"].calls()))
	}
}

func TestMethodsOfTheLeader(t *testing.T) {
	// Each unary method of these services is the leader's, but for the one every manager answers.
	for _, d := range []*grpc.ServiceDesc{&api.CA_ServiceDesc, &api.Control_ServiceDesc, &api.Membership_ServiceDesc} {
		for _, m := range d.Methods {
			full := "/" + d.ServiceName + "/" + m.MethodName
			if got, want := forward.Forwards(full), full != api.CA_GetRootCA_FullMethodName; got != want {
				t.Errorf("%s: forwarded %v, want %v", full, got, want)
			}
		}
	}
}

// A leader that is cut off never answers: calls to it end when another leads.
func TestLeaderThatHangs(t *testing.T) {
	c := start(t, 5*time.Second, "a", "b", "c")
	c.controls["b"].hang = true
	c.e.set(all("b"))
	time.AfterFunc(100*time.Millisecond, func() { c.e.set(all("c")) })
	began := time.Now()
	if r, err := c.clients["a"].ListServices(t.Context(), &api.ListRequest{}); err != nil || string(r.Json[0]) != "c" {
		t.Errorf("read: %v, %v; want the new leader's answer", r, err)
	}
	c.e.set(all("b"))
	time.AfterFunc(100*time.Millisecond, func() { c.e.set(all("c")) })
	_, err := c.clients["a"].CreateService(t.Context(), &api.CreateRequest{})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "whether it was done is unknown") {
		t.Errorf("write: %v, want that its outcome is unknown", err)
	}
	if d := time.Since(began); d > 4*time.Second {
		t.Errorf("took %v", d)
	}
}
