package control_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/ca"
	"skein/manager/control"
	"skein/manager/dispatcher"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

type managers struct {
	member, leader, reachable map[string]bool
	removed                   []string
	err                       error
}

func (m *managers) Linearize(context.Context) error { return m.err }

func (m *managers) ManagerStatus(id string) (member, leader, reachable bool) {
	return m.member[id], m.leader[id], m.reachable[id]
}

func (m *managers) RemoveManager(_ context.Context, id string) error {
	m.removed = append(m.removed, id)
	return nil
}

type observer map[string]*api.TaskReport

func (o observer) SoftState(id string) *api.TaskReport { return o[id] }
func (o observer) NetStatus(context.Context) (*api.NetStatusReply, error) {
	return &api.NetStatusReply{Rows: []*api.NetStatusRow{{NodeId: "n"}}}, nil
}
func (o observer) NetCheck(_ context.Context, r *api.NetCheckRequest) (*api.NetCheckReply, error) {
	return &api.NetCheckReply{Nodes: []*api.NetCheckNode{{NodeId: "n"}}}, nil
}

// watching is an observer that nodes tell their facts.
type watching struct {
	observer
	f *fixture
}

func (w watching) Facts(context.Context, bool) ([]dispatcher.NodeFacts, error) {
	return w.f.facts, nil
}

type fixture struct {
	t     testing.TB
	st    *store.Store
	m     *managers
	soft  observer
	facts []dispatcher.NodeFacts
	srv   *control.Server
	node  [2]string // manager and worker
}

func setup(t testing.TB) *fixture {
	t.Helper()
	st, _ := storetest.New()
	f := &fixture{t: t, st: st, m: &managers{member: map[string]bool{}, leader: map[string]bool{}, reachable: map[string]bool{}}, soft: observer{}}
	f.srv = control.New(control.Config{Store: st, Managers: f.m, Observer: func() control.Observer { return watching{f.soft, f} }, Logger: slog.New(slog.DiscardHandler)})
	root, err := ca.NewRoot("c", time.Now())
	f.ok(err)
	keyPEM, err := root.KeyPEM()
	f.ok(err)
	spec, err := json.Marshal(control.DefaultClusterSpec())
	f.ok(err)
	f.put(&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{Id: api.NewID(), SpecJson: spec, CaCertPem: root.CertPEM(), CaKeyPem: keyPEM,
		WorkerToken: root.NewToken(), ManagerToken: root.NewToken(), OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", OverlayBits: 20, DataPort: 4789}}})
	for i, role := range []string{api.RoleManager, api.RoleWorker} {
		f.node[i] = api.NewID()
		f.put(&api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: f.node[i], Hostname: "host-" + role, Role: role, Availability: "active",
			RpcAddr: "192.0.2.1:2377", UnderlayAddr: "192.0.2.1", Labels: map[string]string{"zone": role}, Status: &api.NodeStatus{State: "ready"}}}})
	}
	f.m.member[f.node[0]], f.m.leader[f.node[0]], f.m.reachable[f.node[0]] = true, true, true
	f.put(&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: &api.NetworkRecord{Id: api.NewID(), Name: "ingress", Driver: "overlay", Ingress: true}}})
	return f
}

func (f *fixture) ok(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) put(c *api.Change) {
	f.t.Helper()
	_, err := f.st.Update(context.Background(), func(tx store.WriteTx) error { tx.Add(c); return nil })
	f.ok(err)
}

func (f *fixture) create(spec string) string {
	f.t.Helper()
	r, err := f.srv.CreateService(f.t.Context(), &api.CreateRequest{SpecJson: []byte(spec)})
	f.ok(err)
	return r.Id
}

func (f *fixture) network(spec string) string {
	f.t.Helper()
	r, err := f.srv.CreateNetwork(f.t.Context(), &api.CreateRequest{SpecJson: []byte(spec)})
	f.ok(err)
	return r.Id
}

func get[T any](f *fixture, o *api.Object, err error) T {
	f.t.Helper()
	f.ok(err)
	var v T
	f.ok(json.Unmarshal(o.Json, &v))
	return v
}

func (f *fixture) service(ref string) swarm.Service {
	f.t.Helper()
	o, err := f.srv.GetService(f.t.Context(), &api.GetRequest{Ref: ref})
	return get[swarm.Service](f, o, err)
}

func list[T any](f *fixture, o *api.Objects, err error) []T {
	f.t.Helper()
	f.ok(err)
	out := make([]T, len(o.Json))
	for i := range o.Json {
		f.ok(json.Unmarshal(o.Json[i], &out[i]))
	}
	return out
}

func filter(pairs ...string) map[string]*api.StringList {
	m := map[string]*api.StringList{}
	for i := 0; i < len(pairs); i += 2 {
		if m[pairs[i]] == nil {
			m[pairs[i]] = &api.StringList{}
		}
		m[pairs[i]].Values = append(m[pairs[i]].Values, pairs[i+1])
	}
	return m
}

func TestServiceLife(t *testing.T) {
	f := setup(t)
	net := f.network(`{"Name":"front"}`)
	id := f.create(`{"Name":"web","Labels":{"a":"b"},"TaskTemplate":{"ContainerSpec":{"Image":"nginx:1"},"Networks":[{"Target":"front"}]},
		"Mode":{"Replicated":{"Replicas":3}},"EndpointSpec":{"Ports":[{"TargetPort":80,"PublishedPort":8080}]}}`)
	svc := f.service("web")
	if svc.ID != id || svc.Version.Index == 0 || svc.CreatedAt.IsZero() || svc.Spec.TaskTemplate.Networks[0].Target != net {
		t.Errorf("service is %+v; want id, version, time and the network's id", svc)
	}
	if p := svc.Endpoint.Ports; len(p) != 1 || p[0].Protocol != "tcp" || p[0].PublishMode != "ingress" || p[0].PublishedPort != 8080 {
		t.Errorf("ports are %+v", p)
	}
	if v := svc.Endpoint.VirtualIPs; len(v) != 1 || v[0].NetworkID != net || v[0].Addr.Bits() != 20 || svc.Endpoint.Spec.Mode != "vip" {
		t.Errorf("endpoint is %+v, want a VIP on the network with its prefix length", svc.Endpoint)
	}
	spec := svc.Spec
	spec.TaskTemplate.ContainerSpec.Image = "nginx:2"
	body, err := json.Marshal(spec)
	f.ok(err)
	update := func(version uint64, rollback string) error {
		_, err := f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: "web", Version: version, SpecJson: body, Rollback: rollback})
		return err
	}
	if err := update(svc.Version.Index-1, ""); !errdefs.IsConflict(err) || !strings.HasPrefix(err.Error(), "update out of sequence") {
		t.Errorf("stale update: %v", err)
	}
	f.ok(update(svc.Version.Index, ""))
	now := f.service(id[:8])
	if now.Spec.TaskTemplate.ContainerSpec.Image != "nginx:2" || now.PreviousSpec.TaskTemplate.ContainerSpec.Image != "nginx:1" || now.Version.Index <= svc.Version.Index {
		t.Errorf("after the update: %+v", now)
	}
	if now.Endpoint.VirtualIPs[0] != svc.Endpoint.VirtualIPs[0] {
		t.Errorf("the VIP moved from %v to %v", svc.Endpoint.VirtualIPs, now.Endpoint.VirtualIPs)
	}
	f.ok(update(now.Version.Index, "previous"))
	back := f.service("web")
	if back.Spec.TaskTemplate.ContainerSpec.Image != "nginx:1" || back.PreviousSpec.TaskTemplate.ContainerSpec.Image != "nginx:2" ||
		back.UpdateStatus == nil || back.UpdateStatus.State != swarm.UpdateStateRollbackStarted {
		t.Errorf("after the rollback: %+v", back)
	}
	if _, err := f.srv.RemoveNetwork(t.Context(), &api.RemoveRequest{Ref: "front"}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "in use by service web") {
		t.Errorf("remove a network in use: %v", err)
	}
	_, err = f.srv.RemoveService(t.Context(), &api.RemoveRequest{Ref: "web"})
	f.ok(err)
	_, err = f.srv.RemoveNetwork(t.Context(), &api.RemoveRequest{Ref: "front"})
	f.ok(err)
	if _, err := f.srv.GetService(t.Context(), &api.GetRequest{Ref: "web"}); !errdefs.IsNotFound(err) || err.Error() != "service web not found" {
		t.Errorf("get a removed service: %v", err)
	}
}

// What clients send comes back as it was.
func TestSpecIsLossless(t *testing.T) {
	f := setup(t)
	in := `{"Name":"web","Labels":{"a":""},"TaskTemplate":{"ContainerSpec":{"Image":"busybox","Labels":{"x":"y"},"Args":["sleep","1"],"Env":["A=b","C"],` +
		`"Privileges":{"CredentialSpec":null,"SELinuxContext":null,"NoNewPrivileges":true},"StopGracePeriod":5000000000,"Sysctls":{"net.core.somaxconn":"1"}},` +
		`"Resources":{"Limits":{"NanoCPUs":1000000000,"MemoryBytes":67108864,"Pids":10}},"RestartPolicy":{"Condition":"on-failure","Delay":0,"MaxAttempts":0},` +
		`"Placement":{"Constraints":["node.role==worker"]},"ForceUpdate":3,"Runtime":"container"},"Mode":{"Global":{}},` +
		`"UpdateConfig":{"Parallelism":0,"FailureAction":"rollback","MaxFailureRatio":0.5,"Order":"start-first"}}`
	f.create(in)
	out, err := f.srv.GetService(t.Context(), &api.GetRequest{Ref: "web"})
	f.ok(err)
	var raw struct{ Spec json.RawMessage }
	f.ok(json.Unmarshal(out.Json, &raw))
	if string(raw.Spec) != in {
		t.Errorf("spec came back as\n%s\nwant\n%s", raw.Spec, in)
	}
	full := func() swarm.Service {
		o, err := f.srv.GetService(t.Context(), &api.GetRequest{Ref: "web", InsertDefaults: true})
		return get[swarm.Service](f, o, err)
	}()
	if full.Spec.RollbackConfig.Monitor != 5*time.Second || full.Spec.EndpointSpec.Mode != "vip" || *full.Spec.TaskTemplate.RestartPolicy.Delay != 0 {
		t.Errorf("defaults: %+v", full.Spec)
	}
	if f.service("web").Spec.RollbackConfig != nil {
		t.Error("showing defaults changed the stored spec")
	}
}

func TestBadServices(t *testing.T) {
	f := setup(t)
	f.network(`{"Name":"front"}`)
	f.create(`{"Name":"taken","TaskTemplate":{"ContainerSpec":{"Image":"i"}},"EndpointSpec":{"Ports":[{"TargetPort":80,"PublishedPort":80}]}}`)
	with := func(field, value string) string {
		spec := map[string]json.RawMessage{"Name": []byte(`"web"`), "TaskTemplate": []byte(`{"ContainerSpec":{"Image":"i"}}`)}
		spec[field] = []byte(value)
		b, err := json.Marshal(spec)
		f.ok(err)
		return string(b)
	}
	c := func(fields string) string { return with("TaskTemplate", `{"ContainerSpec":{"Image":"i",`+fields+`}}`) }
	task := func(fields string) string { return with("TaskTemplate", `{"ContainerSpec":{"Image":"i"},`+fields+`}`) }
	port := func(s string) string { return with("EndpointSpec", `{"Ports":[`+s+`]}`) }
	is := map[string]func(error) bool{"invalid": errdefs.IsInvalidArgument, "exists": errdefs.IsAlreadyExists, "missing": errdefs.IsNotFound,
		"unbuilt": errdefs.IsNotImplemented, "conflict": errdefs.IsConflict}
	for _, tc := range []struct{ kind, spec, want string }{
		{"invalid", ``, "ends too early"},
		{"invalid", `[]`, "want"},
		{"invalid", with("Name", `"web"`) + "{}", "more after the JSON"},
		{"invalid", with("Nam", `"web"`), `unknown field "Nam"`},
		{"invalid", `{"Name":"` + strings.Repeat("x", 1<<20) + `"}`, "more than the limit"},
		{"invalid", with("Name", `"a b"`), "valid as a DNS name component"},
		{"invalid", with("Name", `"`+strings.Repeat("x", 64)+`"`), "63 characters or fewer"},
		{"exists", with("Name", `"taken"`), "name conflicts with an existing object: service taken already exists"},
		{"invalid", with("Mode", `{"Replicated":{"Replicas":-1}}`), "Mode.Replicated.Replicas = -1: want a whole number from 0"},
		{"invalid", with("Mode", `{"Replicated":{"Replicas":1000001}}`), "limit"},
		{"invalid", with("Mode", `{"Replicated":{},"Global":{}}`), "only one service mode"},
		{"invalid", with("TaskTemplate", `{}`), "TaskTemplate.ContainerSpec is missing"},
		{"invalid", with("TaskTemplate", `{"ContainerSpec":{}}`), "image reference must be provided"},
		{"invalid", with("TaskTemplate", `{"ContainerSpec":{"Image":"UPPER case"}}`), "not a valid repository/tag"},
		{"unbuilt", with("TaskTemplate", `{"PluginSpec":{"name":"p"}}`), "plugin"},
		{"unbuilt", task(`"Runtime":"plugin"`), "runtime"},
		{"invalid", c(`"Secrets":[{"SecretID":"x"}]`), "malformed secret reference"},
		{"invalid", c(`"Configs":[{"ConfigID":"x","ConfigName":"x"}]`), "no target provided"},
		{"invalid", c(`"Secrets":[{"SecretID":"x","SecretName":"x","File":{"Name":""}}]`), "no target given"},
		{"invalid", c(`"Secrets":[{"SecretID":"x","SecretName":"x","File":{"Name":".."}}]`), "is not a file below /run/secrets"},
		{"invalid", c(`"Secrets":[{"SecretID":"x","SecretName":"x","File":{"Name":"a","UID":"bob"}}]`), "not a numeric id"},
		{"invalid", c(`"Secrets":[{"SecretID":"x","SecretName":"x","File":{"Name":"a"}},{"SecretID":"y","SecretName":"y","File":{"Name":"/run/secrets/./a"}}]`), "conflicting target"},
		{"unbuilt", c(`"Configs":[{"ConfigID":"x","ConfigName":"x","Runtime":{}}]`), "credential spec"},
		{"invalid", c(`"Env":["=x"]`), "environment variable"},
		{"invalid", c(`"Env":["A=1","B={{.Task.Slots}}"]`), "ContainerSpec.Env[1] = \"B={{.Task.Slots}}\": invalid template"},
		{"invalid", c(`"Hostname":"{{.Node"`), "invalid template"},
		{"invalid", c(`"Mounts":[{"Type":"volume","Source":"v-{{.Service.Label}}","Target":"/b"}]`), "invalid template"},
		{"invalid", c(`"Dir":"rel"`), "absolute path"},
		{"invalid", c(`"Healthcheck":{"Interval":-1}`), "Interval"},
		{"invalid", c(`"Healthcheck":{"Timeout":10}`), "less than 1ms"},
		{"invalid", c(`"Mounts":[{"Type":"bind","Source":"/a","Target":"b"}]`), "absolute path"},
		{"invalid", c(`"Mounts":[{"Type":"bind","Source":"/a","Target":"/"}]`), "below /"},
		{"invalid", c(`"Mounts":[{"Type":"bind","Target":"/b"}]`), "source must not be empty"},
		{"invalid", c(`"Mounts":[{"Type":"tmpfs","Source":"x","Target":"/b"}]`), "source must be empty"},
		{"invalid", c(`"Mounts":[{"Type":"volume","Source":"vol","Target":"/b"},{"Type":"tmpfs","Target":"/b/"}]`), "duplicate mount point"},
		{"unbuilt", c(`"Mounts":[{"Type":"cluster","Source":"v","Target":"/b"}]`), "cluster"},
		{"invalid", c(`"Mounts":[{"Type":"floppy","Target":"/b"}]`), "mount type"},
		{"invalid", c(`"Privileges":{"Seccomp":{"Mode":"lax"}}`), `Seccomp.Mode = "lax": unknown seccomp mode`},
		{"invalid", c(`"Privileges":{"Seccomp":{"Mode":"custom","Profile":"eA=="}}`), "no JSON"},
		{"invalid", c(`"Privileges":{"Seccomp":{"Profile":"e30="}}`), "needs the mode"},
		{"invalid", c(`"Privileges":{"AppArmor":{"Mode":"web"}}`), `AppArmor.Mode = "web": unknown AppArmor mode`},
		{"unbuilt", c(`"Privileges":{"SELinuxContext":{"Level":"s0"}}`), "SELinux"},
		{"invalid", c(`"CapabilityAdd":["CAP_NET_RAW","nope"]`), `invalid CapabilityAdd: unknown capability: "nope"`},
		{"invalid", c(`"CapabilityDrop":["CAP_X"]`), `invalid CapabilityDrop: unknown capability: "CAP_X"`},
		{"invalid", c(`"Ulimits":[{"Name":"nofile","Soft":2,"Hard":1}]`), "not above the hard limit (1)"},
		{"invalid", c(`"Sysctls":{"net/../kernel/core_pattern":"x"}`), "malformed"},
		{"invalid", c(`"Hosts":["1.2.3.4"]`), `Hosts[0] = "1.2.3.4": invalid host`},
		{"invalid", task(`"Resources":{"Limits":{"NanoCPUs":1}}`), "cpu value"},
		{"invalid", task(`"Resources":{"Reservations":{"MemoryBytes":1024}}`), "at least 4MiB"},
		{"invalid", task(`"Resources":{"Reservations":{"GenericResources":[{"NamedResourceSpec":{"Kind":"gpu","Value":"GPU-1"}}]}}`), "the node chooses which ones"},
		{"invalid", task(`"Resources":{"Reservations":{"GenericResources":[{"DiscreteResourceSpec":{"Kind":"gpu","Value":0}}]}}`), "DiscreteResourceSpec.Value = 0: want 1 to 2147483647"},
		{"invalid", task(`"Resources":{"SwapBytes":5}`), "swap"},
		{"invalid", task(`"RestartPolicy":{"Condition":"sometimes"}`), "restart condition"},
		{"invalid", task(`"RestartPolicy":{"Delay":-1}`), "restart-delay cannot be negative"},
		{"invalid", task(`"Placement":{"Constraints":["node.colour==red"]}`), "node.colour"},
		{"invalid", task(`"Placement":{"Preferences":[{"Spread":{"SpreadDescriptor":"x"}}]}`), "preference"},
		{"unbuilt", task(`"LogDriver":{"Name":"fluentd"}`), "fluentd"},
		{"missing", task(`"Networks":[{"Target":"nowhere"}]`), "network nowhere not found"},
		{"missing", with("Networks", `[{"Target":"nowhere"}]`), "network nowhere not found"},
		{"invalid", task(`"Networks":[{"Target":"ingress"}]`), "ingress network"},
		{"invalid", task(`"Networks":[{"Target":"front"},{"Target":"front"}]`), "listed twice"},
		{"invalid", task(`"Networks":[{"Target":"front","Aliases":["a b"]}]`), "alias"},
		{"invalid", with("UpdateConfig", `{"Delay":-1}`), "update-delay cannot be negative"},
		{"invalid", with("UpdateConfig", `{"MaxFailureRatio":1.5}`), "update-maxfailureratio"},
		{"invalid", with("UpdateConfig", `{"Order":"sideways"}`), "order"},
		{"invalid", with("UpdateConfig", `{"FailureAction":"cry"}`), "failure action"},
		{"invalid", with("RollbackConfig", `{"FailureAction":"rollback"}`), "rolled back"},
		{"invalid", with("EndpointSpec", `{"Mode":"magic"}`), "endpoint mode"},
		{"invalid", with("EndpointSpec", `{"Mode":"dnsrr","Ports":[{"TargetPort":80}]}`), "dnsrr"},
		{"invalid", port(`{"TargetPort":0}`), "invalid port"},
		{"invalid", port(`{"TargetPort":70000}`), "invalid port"},
		{"invalid", port(`{"TargetPort":80,"Protocol":"icmp"}`), "protocol"},
		{"invalid", port(`{"TargetPort":80,"PublishedPort":81},{"TargetPort":82,"PublishedPort":81}`), "duplicate published ports"},
		{"conflict", port(`{"TargetPort":80,"PublishedPort":80}`), `already in use by service "taken"`},
	} {
		_, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: []byte(tc.spec)})
		if err == nil || !is[tc.kind](err) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%.120s: %v; want %s with %q", tc.spec, err, tc.kind, tc.want)
		}
	}
	if o := list2[swarm.Service](f.srv.ListServices(t.Context(), &api.ListRequest{})); len(o) != 1 {
		t.Errorf("%d services after bad requests, want 1", len(o))
	}
	if _, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: []byte(with("Name", `""`)), RegistryAuth: "e30="}); err != nil {
		t.Errorf("empty credentials and no name: %v", err)
	}
}

func list2[T any](o *api.Objects, err error) []T {
	var out []T
	for _, b := range o.GetJson() {
		var v T
		if json.Unmarshal(b, &v) == nil {
			out = append(out, v)
		}
	}
	return out
}

func TestBadUpdates(t *testing.T) {
	f := setup(t)
	f.create(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"i"}}}`)
	v := f.service("web").Version.Index
	for _, tc := range []struct {
		req  *api.UpdateRequest
		want string
	}{
		{&api.UpdateRequest{Ref: "nope", Version: v, SpecJson: []byte(`{"TaskTemplate":{"ContainerSpec":{"Image":"i"}}}`)}, "service nope not found"},
		{&api.UpdateRequest{Ref: "web", Version: v, SpecJson: []byte(`{"Name":"other","TaskTemplate":{"ContainerSpec":{"Image":"i"}}}`)}, "renaming services is not supported"},
		{&api.UpdateRequest{Ref: "web", Version: v, SpecJson: []byte(`{"Name":"web","Mode":{"Global":{}},"TaskTemplate":{"ContainerSpec":{"Image":"i"}}}`)}, "service mode change is not allowed"},
		{&api.UpdateRequest{Ref: "web", Version: v, Rollback: "previous"}, "does not have a previous spec"},
		{&api.UpdateRequest{Ref: "web", Version: v, Rollback: "next"}, "unrecognized rollback option"},
	} {
		if _, err := f.srv.UpdateService(t.Context(), tc.req); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%v: %v, want %q", tc.req, err, tc.want)
		}
	}
	if f.service("web").Version.Index != v {
		t.Error("a refused update changed the service")
	}
}

func TestListServices(t *testing.T) {
	f := setup(t)
	id := f.create(`{"Name":"web-a","Labels":{"app":"x","tier":"1"},"TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"Replicated":{"Replicas":2}}}`)
	f.create(`{"Name":"web-b","Labels":{"app":"y"},"TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"Global":{}}}`)
	for _, tc := range []struct {
		filters map[string]*api.StringList
		want    string
	}{
		{nil, "web-a web-b"},
		{filter("name", "web"), "web-a web-b"},
		{filter("name", "web-b"), "web-b"},
		{filter("id", id[:6]), "web-a"},
		{filter("label", "app"), "web-a web-b"},
		{filter("label", "app=x", "label", "tier"), "web-a"},
		{filter("mode", "global"), "web-b"},
		{filter("mode", "replicated", "mode", "global"), "web-a web-b"},
		{filter("name", "zzz"), ""},
	} {
		o, err := f.srv.ListServices(t.Context(), &api.ListRequest{Filters: tc.filters, Status: true})
		names := map[string]bool{}
		for _, s := range list[swarm.Service](f, o, err) {
			names[s.Spec.Name] = true
			if s.ServiceStatus == nil {
				t.Errorf("%s has no status", s.Spec.Name)
			}
		}
		for _, n := range []string{"web-a", "web-b"} {
			if names[n] != strings.Contains(tc.want, n) {
				t.Errorf("filters %v: %s listed %v", tc.filters, n, names[n])
			}
		}
	}
	if _, err := f.srv.ListServices(t.Context(), &api.ListRequest{Filters: filter("colour", "red")}); !errdefs.IsInvalidArgument(err) || err.Error() != "invalid filter 'colour'" {
		t.Errorf("unknown filter: %v", err)
	}
}

func TestTasks(t *testing.T) {
	f := setup(t)
	f.network(`{"Name":"front"}`)
	svcID := f.create(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"i:1"},"Networks":[{"Target":"front"}]},"Mode":{"Replicated":{"Replicas":2}}}`)
	f.put(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: &api.TaskCreate{ServiceId: svcID, Revision: 1, Items: []*api.TaskCreate_Item{
		{Slot: 1, Desired: uint32(api.TaskRunning), Generation: 1}, {Slot: 2, Desired: uint32(api.TaskRunning), Generation: 1}}}}})
	one, two := api.TaskID(svcID, 1, "", 1), api.TaskID(svcID, 2, "", 1)
	f.put(&api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: &api.TaskPlacement{TaskIds: []string{one, two}, NodeIds: []string{f.node[1], ""}, Refused: []string{"", "no suitable node (1 node lacks memory)"}}}})
	task := func(ref string) swarm.Task {
		o, err := f.srv.GetTask(t.Context(), &api.GetRequest{Ref: ref})
		return get[swarm.Task](f, o, err)
	}
	got := task(two)
	if got.Status.State != "pending" || !strings.Contains(got.Status.Err+got.Status.Message, "lacks memory") || got.NodeID != "" {
		t.Errorf("unplaceable task: %+v", got.Status)
	}
	got = task(one)
	if got.Status.State != "assigned" || got.DesiredState != "running" || got.Slot != 1 || got.NodeID != f.node[1] || got.ServiceID != svcID ||
		got.Spec.ContainerSpec.Image != "i:1" || got.Version.Index == 0 || len(got.NetworksAttachments) != 1 || got.NetworksAttachments[0].Network.Spec.Name != "front" ||
		len(got.NetworksAttachments[0].Addresses) != 1 {
		t.Errorf("placed task: %+v", got)
	}
	f.soft[one] = &api.TaskReport{TaskId: one, State: uint32(api.TaskPreparing), Message: "pulling", Time: 5}
	if got = task("web.1"); got.Status.State != "preparing" || got.Status.Message != "pulling" {
		t.Errorf("soft state: %+v", got.Status)
	}
	f.put(&api.Change{Kind: &api.Change_ReportTask{ReportTask: &api.TaskReport{TaskId: one, NodeId: f.node[1], State: uint32(api.TaskRunning), ContainerId: "c1", Pid: 42, Time: 7, Message: "started"}}})
	if got = task(one); got.Status.State != "running" || got.Status.ContainerStatus.ContainerID != "c1" || got.Status.ContainerStatus.PID != 42 {
		t.Errorf("the log's state is greater: %+v", got.Status)
	}
	o, err := f.srv.ListServices(t.Context(), &api.ListRequest{Status: true})
	if st := list[swarm.Service](f, o, err)[0].ServiceStatus; st.RunningTasks != 1 || st.DesiredTasks != 2 {
		t.Errorf("service status %+v, want 1 of 2", st)
	}
	count := func(want int, pairs ...string) {
		t.Helper()
		o, err := f.srv.ListTasks(t.Context(), &api.ListRequest{Filters: filter(pairs...)})
		if got := len(list[swarm.Task](f, o, err)); got != want {
			t.Errorf("filter %v: %d tasks, want %d", pairs, got, want)
		}
	}
	count(2)
	count(2, "service", "web", "desired-state", "running")
	count(2, "service", svcID, "_up-to-date", "true")
	count(1, "node", "host-worker")
	count(0, "node", "host-manager")
	count(1, "name", "web.1")
	count(1, "id", one[:9])
	count(0, "desired-state", "shutdown")
	// Scaling leaves the tasks up to date, another image does not.
	update := func(spec string) {
		t.Helper()
		_, err := f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: "web", Version: f.service("web").Version.Index, SpecJson: []byte(spec)})
		f.ok(err)
	}
	update(`{"TaskTemplate":{"ContainerSpec":{"Image":"i:1"},"Networks":[{"Target":"front"}]},"Mode":{"Replicated":{"Replicas":5}}}`)
	count(2, "service", "web", "_up-to-date", "true")
	update(`{"TaskTemplate":{"ContainerSpec":{"Image":"i:2"},"Networks":[{"Target":"front"}]},"Mode":{"Replicated":{"Replicas":5}}}`)
	count(0, "service", "web", "_up-to-date", "true")
	if got = task(one); got.Spec.ContainerSpec.Image != "i:1" {
		t.Errorf("a task shows image %s, want that of its own revision", got.Spec.ContainerSpec.Image)
	}
	f.put(&api.Change{Kind: &api.Change_DeleteService{DeleteService: svcID}})
	o, err = f.srv.ListTasks(t.Context(), &api.ListRequest{})
	for _, tk := range list[swarm.Task](f, o, err) {
		if tk.Spec.ContainerSpec == nil {
			t.Errorf("a task that outlives its service has no container spec: %+v", tk)
		}
	}
}

func TestNodes(t *testing.T) {
	f := setup(t)
	o, err := f.srv.GetNode(t.Context(), &api.GetRequest{Ref: "host-manager"})
	n := get[swarm.Node](f, o, err)
	if n.ManagerStatus == nil || !n.ManagerStatus.Leader || n.ManagerStatus.Reachability != "reachable" || n.Status.State != "ready" || n.Status.Addr != "192.0.2.1" ||
		n.Spec.Role != "manager" || n.Description.Hostname != "host-manager" {
		t.Errorf("manager is %+v", n)
	}
	for _, tc := range []struct {
		want  int
		pairs []string
	}{{2, nil}, {1, []string{"role", "worker"}}, {1, []string{"name", "host-w"}}, {1, []string{"node.label", "zone=worker"}}, {0, []string{"label", "zone"}},
		{2, []string{"membership", "accepted"}}, {1, []string{"id", f.node[0][:10]}}} {
		o, err := f.srv.ListNodes(t.Context(), &api.ListRequest{Filters: filter(tc.pairs...)})
		if got := len(list[swarm.Node](f, o, err)); got != tc.want {
			t.Errorf("filter %v: %d nodes, want %d", tc.pairs, got, tc.want)
		}
	}
	update := func(spec string, version uint64) error {
		_, err := f.srv.UpdateNode(t.Context(), &api.UpdateRequest{Ref: "host-manager", Version: version, SpecJson: []byte(spec)})
		return err
	}
	for spec, want := range map[string]string{
		`{"Availability":"drain","Role":"worker"}`: "attempting to demote the last manager of the swarm",
		`{"Availability":"sometimes"}`:             "Availability",
		`{}`:                                       "Availability is missing",
		`{"Availability":"drain","Role":"manager","Labls":null}`: "unknown field",
	} {
		if err := update(spec, n.Version.Index); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", spec, err, want)
		}
	}
	if err := update(`{"Availability":"drain"}`, 1); !errdefs.IsConflict(err) {
		t.Errorf("stale node update: %v", err)
	}
	f.ok(update(`{"Availability":"drain","Role":"manager","Labels":{"a":"b"}}`, n.Version.Index))
	o, err = f.srv.GetNode(t.Context(), &api.GetRequest{Ref: f.node[0]})
	if n := get[swarm.Node](f, o, err); n.Spec.Availability != "drain" || n.Spec.Labels["a"] != "b" || n.Spec.Role != "manager" {
		t.Errorf("after the update: %+v", n.Spec)
	}
}

func TestRemoveNode(t *testing.T) {
	f := setup(t)
	remove := func(ref string, force bool) error {
		_, err := f.srv.RemoveNode(t.Context(), &api.RemoveRequest{Ref: ref, Force: force})
		return err
	}
	if err := remove("host-manager", true); err == nil || !strings.Contains(err.Error(), "is the leader") {
		t.Errorf("remove the leader: %v", err)
	}
	if err := remove("host-worker", false); err == nil || !strings.Contains(err.Error(), "is not down and can't be removed") {
		t.Errorf("remove a live worker: %v", err)
	}
	f.ok(remove("host-worker", true))
	f.m.leader[f.node[0]] = false
	if err := remove("host-manager", true); err == nil || !strings.Contains(err.Error(), "is a cluster manager that is reachable") {
		t.Errorf("remove a live manager: %v", err)
	}
	f.m.reachable[f.node[0]] = false
	if err := remove("host-manager", false); err == nil || !strings.Contains(err.Error(), "member of the raft cluster") {
		t.Errorf("remove a manager without force: %v", err)
	}
	f.ok(remove("host-manager", true))
	if len(f.m.removed) != 1 || f.m.removed[0] != f.node[0] {
		t.Errorf("taken out of Raft: %v, want the manager", f.m.removed)
	}
	o, err := f.srv.ListNodes(t.Context(), &api.ListRequest{})
	if left := list[swarm.Node](f, o, err); len(left) != 0 {
		t.Errorf("%d nodes left", len(left))
	}
	f.st.View(func(tx store.ReadTx) {
		if r := tx.Cluster().Removed; len(r) != 2 || r[1].NodeId != f.node[0] || time.Until(time.Unix(0, r[1].Until)) < 89*24*time.Hour {
			t.Errorf("removed nodes are %v, want both until their certificates expire", r)
		}
	})
}

func TestNetworks(t *testing.T) {
	f := setup(t)
	id := f.network(`{"Name":"front","Driver":"overlay","Scope":"","Attachable":true,"IPAM":{"Driver":"default","Config":[{"Subnet":"192.168.7.0/24"}]},"Labels":{"a":"b"},"Options":{"com.docker.network.driver.mtu":"1400"}}`)
	o, err := f.srv.GetNetwork(t.Context(), &api.GetRequest{Ref: "front"})
	n := get[network.Inspect](f, o, err)
	if n.ID != id || n.Scope != "swarm" || n.Driver != "overlay" || n.IPAM.Config[0].Subnet.String() != "192.168.7.0/24" || !n.Attachable ||
		n.Options["com.docker.network.driver.mtu"] != "1400" || n.Labels["a"] != "b" || n.Created.IsZero() {
		t.Errorf("network is %+v", n)
	}
	for spec, want := range map[string]string{
		`{"Name":"front"}`:                                               "network with name front already exists",
		`{"Name":""}`:                                                    "invalid network name",
		`{"Name":"a/b"}`:                                                 "invalid network name",
		`{"Name":"host"}`:                                                "every node has",
		`{"Name":"n","Driver":"bridge"}`:                                 "use overlay",
		`{"Name":"n","Scope":"local"}`:                                   "scope",
		`{"Name":"n","Ingress":true}`:                                    "ingress",
		`{"Name":"n","ConfigOnly":true}`:                                 "config-only",
		`{"Name":"n","Options":{"encrypted":"aes"}}`:                     "true or false",
		`{"Name":"n","EnableIPv6":false}`:                                "feature level",
		`{"Name":"n","Options":{"x":"y"}}`:                               "option",
		`{"Name":"n","IPAM":{"Driver":"dhcp"}}`:                          "IPAM driver",
		`{"Name":"n","IPAM":{"Config":[{"Subnet":"192.168.7.128/25"}]}}`: "overlaps",
		`{"Name":"n","IPAM":{"Config":[{"Subnet":"10.0.0.0/24","Gateway":"10.0.0.1"}]}}`: "feature level",
	} {
		if _, err := f.srv.CreateNetwork(t.Context(), &api.CreateRequest{SpecJson: []byte(spec)}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", spec, err, want)
		}
	}
	o2, err := f.srv.ListNetworks(t.Context(), &api.ListRequest{Filters: filter("name", "fro", "driver", "overlay")})
	if got := list[network.Inspect](f, o2, err); len(got) != 1 {
		t.Errorf("%d networks, want 1", len(got))
	}
	o2, err = f.srv.ListNetworks(t.Context(), &api.ListRequest{Filters: filter("type", "builtin")})
	if got := list[network.Inspect](f, o2, err); len(got) != 1 || !got[0].Ingress {
		t.Errorf("builtin networks: %+v, want ingress", got)
	}
	if _, err := f.srv.GetNetwork(t.Context(), &api.GetRequest{Ref: "zzz"}); err == nil || err.Error() != "network zzz not found" {
		t.Errorf("get: %v", err)
	}
}

func TestCluster(t *testing.T) {
	f := setup(t)
	show := func() swarm.Swarm {
		o, err := f.srv.GetCluster(t.Context(), &api.GetRequest{})
		return get[swarm.Swarm](f, o, err)
	}
	c := show()
	if c.JoinTokens.Worker == "" || c.Spec.Name != "default" || c.SubnetSize != 20 || c.DefaultAddrPool[0].String() != "10.0.0.0/9" || c.TLSInfo.TrustRoot == "" || len(c.TLSInfo.CertIssuerSubject) == 0 {
		t.Errorf("cluster is %+v", c)
	}
	o, _ := f.srv.GetCluster(t.Context(), &api.GetRequest{})
	if strings.Contains(string(o.Json), "PRIVATE KEY") {
		t.Error("the cluster object shows a private key")
	}
	update := func(change func(*swarm.Spec), r *api.UpdateRequest) error {
		spec := c.Spec
		change(&spec)
		b, err := json.Marshal(spec)
		f.ok(err)
		r.SpecJson = b
		if r.Version == 0 {
			r.Version = show().Version.Index
		}
		_, err = f.srv.UpdateCluster(t.Context(), r)
		return err
	}
	f.ok(update(func(s *swarm.Spec) { s.Orchestration.TaskHistoryRetentionLimit = proto.Int64(2) }, &api.UpdateRequest{RotateWorkerToken: true}))
	after := show()
	if *after.Spec.Orchestration.TaskHistoryRetentionLimit != 2 || after.JoinTokens.Worker == c.JoinTokens.Worker || after.JoinTokens.Manager != c.JoinTokens.Manager {
		t.Errorf("after the update: %+v", after)
	}
	if err := update(func(*swarm.Spec) {}, &api.UpdateRequest{Version: c.Version.Index}); !errdefs.IsConflict(err) {
		t.Errorf("stale update: %v", err)
	}
	for name, change := range map[string]func(*swarm.Spec){
		"heartbeat": func(s *swarm.Spec) { s.Dispatcher.HeartbeatPeriod = time.Second },
		"raft":      func(s *swarm.Spec) { s.Raft.SnapshotInterval = 1 },
		"logdriver": func(s *swarm.Spec) { s.TaskDefaults.LogDriver = &swarm.Driver{Name: "syslog"} },
	} {
		if err := update(change, &api.UpdateRequest{}); !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v, want not implemented", name, err)
		}
	}
}

func TestUnlockKey(t *testing.T) {
	f := setup(t)
	update := func(lock, rotate bool) error {
		o, err := f.srv.GetCluster(t.Context(), &api.GetRequest{})
		c := get[swarm.Swarm](f, o, err)
		c.Spec.EncryptionConfig.AutoLockManagers = lock
		b, err := json.Marshal(c.Spec)
		f.ok(err)
		_, err = f.srv.UpdateCluster(t.Context(), &api.UpdateRequest{Version: c.Version.Index, SpecJson: b, RotateUnlockKey: rotate})
		return err
	}
	key := func() string {
		k, err := f.srv.GetUnlockKey(t.Context(), &api.Empty{})
		f.ok(err)
		return k.Text
	}
	if err := update(false, true); !errdefs.IsInvalidArgument(err) || key() != "" {
		t.Errorf("rotation of nothing: %v, key %q", err, key())
	}
	f.ok(update(true, false))
	first := key()
	f.ok(update(true, false))
	if first == "" || key() != first {
		t.Errorf("key %q, after an update that asks for none %q", first, key())
	}
	f.ok(update(true, true))
	if key() == first || !strings.HasPrefix(key(), "SWMKEY-1-") {
		t.Errorf("after the rotation of %q: %q", first, key())
	}
	f.ok(update(false, false))
	if key() != "" {
		t.Errorf("not locked any more, yet key %q", key())
	}
}

func TestNothingWithoutAQuorum(t *testing.T) {
	f := setup(t)
	f.m.err = api.Errorf(errdefs.ErrUnavailable, "no quorum")
	if _, err := f.srv.ListServices(t.Context(), &api.ListRequest{}); !errdefs.IsUnavailable(err) {
		t.Errorf("list: %v", err)
	}
	if _, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: []byte(`{"TaskTemplate":{"ContainerSpec":{"Image":"i"}}}`)}); !errdefs.IsUnavailable(err) {
		t.Errorf("create: %v", err)
	}
	if _, err := f.srv.NetStatus(t.Context(), &api.ListRequest{}); !errdefs.IsUnavailable(err) {
		t.Errorf("net status: %v", err)
	}
}

// A worker is told of itself only.
func TestNetworkOfAWorker(t *testing.T) {
	f := setup(t)
	f.put(&api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: "n", Hostname: "alpha", Role: api.RoleWorker, Availability: "active",
		Status: &api.NodeStatus{State: "ready"}}}})
	manager := f.node[0]
	as := func(id, role string) context.Context {
		return authz.WithCaller(t.Context(), authz.Caller{NodeIdentity: api.NodeIdentity{NodeID: id, Role: role}})
	}
	for _, c := range []struct {
		node, role string
		rows       int
		denied     bool
	}{{"n", api.RoleWorker, 1, true}, {"n", api.RoleManager, 1, true}, {f.node[1], api.RoleWorker, 0, true}, {manager, api.RoleManager, 1, false}} {
		r, err := f.srv.NetStatus(as(c.node, c.role), &api.ListRequest{})
		if err != nil || len(r.Rows) != c.rows {
			t.Errorf("%s as %s: %v, %v, want %d rows", c.node, c.role, r, err, c.rows)
		}
		if _, err := f.srv.NetCheck(as(c.node, c.role), &api.NetCheckRequest{Nodes: []string{"x"}}); errdefs.IsPermissionDenied(err) != c.denied {
			t.Errorf("%s as %s compares another: %v, want denied %v", c.node, c.role, err, c.denied)
		}
		if _, err := f.srv.NetCheck(as(c.node, c.role), &api.NetCheckRequest{}); err != nil {
			t.Errorf("%s as %s: %v", c.node, c.role, err)
		}
	}
}

// A rollback to a network that was removed since would leave a service that never runs.
func TestRollbackToRemovedNetwork(t *testing.T) {
	f := setup(t)
	f.network(`{"Name":"front"}`)
	id := f.create(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"i:1"},"Networks":[{"Target":"front"}]},"Mode":{"Replicated":{"Replicas":1}}}`)
	version := func() uint64 {
		o, err := f.srv.GetService(t.Context(), &api.GetRequest{Ref: id})
		return get[swarm.Service](f, o, err).Version.Index
	}
	if _, err := f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: id, Version: version(),
		SpecJson: []byte(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"i:1"}},"Mode":{"Replicated":{"Replicas":1}}}`)}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.srv.RemoveNetwork(t.Context(), &api.RemoveRequest{Ref: "front"}); err != nil {
		t.Fatal(err)
	}
	_, err := f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: id, Version: version(), SpecJson: []byte(`{}`), Rollback: "previous"})
	if err == nil || !strings.Contains(err.Error(), "service web cannot be rolled back: network") {
		t.Errorf("rollback: %v", err)
	}
}
