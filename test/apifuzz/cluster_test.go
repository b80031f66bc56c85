package apifuzz

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"skein/agent/dockerapi"
	"skein/agent/dockerapi/dockerapitest"
	"skein/manager/api"
	"skein/manager/ca"
	"skein/manager/control"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

// cluster is a store with a control service and the Docker API before it, without a network between them.
type cluster struct {
	st  *store.Store
	srv *control.Server
	api http.Handler
	rpc grpc.ClientConnInterface
}

func newCluster(t testing.TB) *cluster {
	t.Helper()
	st, _ := storetest.New()
	c := &cluster{st: st}
	c.srv = control.New(control.Config{Store: st, Managers: group{}, Logger: slog.New(slog.DiscardHandler)})
	c.rpc = direct{c.srv}
	n := dockerapitest.NewNode()
	c.api = dockerapi.New(dockerapi.Config{Containers: n, Images: n, Networks: n, System: n, Swarm: &member{dockerapitest.NewCluster(), api.NewControlClient(c.rpc)}})
	root, err := ca.NewRoot("c", time.Now())
	ok(t, err)
	key, err := root.KeyPEM()
	ok(t, err)
	spec, err := json.Marshal(control.DefaultClusterSpec())
	ok(t, err)
	c.put(t, &api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{Id: api.NewID(), SpecJson: spec, CaCertPem: root.CertPEM(), CaKeyPem: key,
		WorkerToken: root.NewToken(), ManagerToken: root.NewToken(), OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", OverlayBits: 20, DataPort: 4789}}})
	c.put(t, &api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: dockerapitest.NodeID[:24] + "1", Hostname: "a", Role: api.RoleWorker, Availability: "active", UnderlayAddr: "192.0.2.1",
		Status: &api.NodeStatus{State: "ready"}}}})
	c.put(t, &api.Change{Kind: &api.Change_PutNetwork{PutNetwork: &api.NetworkRecord{Id: api.NewID(), Name: "net", Driver: "overlay"}}})
	return c
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) put(t testing.TB, ch *api.Change) {
	t.Helper()
	_, err := c.st.Update(context.Background(), func(tx store.WriteTx) error { tx.Add(ch); return nil })
	ok(t, err)
}

// do answers one HTTP request. Streams that follow something get little time.
func (c *cluster) do(ctx context.Context, method, target string, body []byte) *httptest.ResponseRecorder {
	u, err := url.ParseRequestURI("/" + strings.TrimLeft(target, "/"))
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r := httptest.NewRequest(method, "/", strings.NewReader(string(body))).WithContext(ctx)
	r.URL, r.RequestURI = u, u.RequestURI()
	if len(body) > 0 {
		r.Header.Set("Content-Type", "application/json")
	}
	w := httptest.NewRecorder()
	defer func() {
		if p := recover(); p != nil && p != http.ErrAbortHandler {
			panic(p)
		}
	}()
	c.api.ServeHTTP(w, r)
	return w
}

// group is a group of managers of which there is one.
type group struct{}

func (group) Linearize(context.Context) error                       { return nil }
func (group) ManagerStatus(string) (member, leader, reachable bool) { return false, false, false }
func (group) RemoveManager(context.Context, string) error           { return nil }

// member is a node of the cluster whose control service is the real one.
type member struct {
	*dockerapitest.Cluster
	control api.ControlClient
}

func (m *member) Control(context.Context) (api.ControlClient, error) { return m.control, nil }

// direct calls a server's methods without a connection.
type direct struct{ srv api.ControlServer }

func (d direct) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
	for _, m := range api.Control_ServiceDesc.Methods {
		if m.MethodName != path.Base(method) {
			continue
		}
		out, err := m.Handler(d.srv, ctx, func(in any) error { proto.Merge(in.(proto.Message), args.(proto.Message)); return nil }, nil)
		if err != nil {
			return api.ToGRPC(err)
		}
		proto.Merge(reply.(proto.Message), out.(proto.Message))
		return nil
	}
	return errors.New("no method " + method)
}

func (d direct) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, io.ErrUnexpectedEOF
}
