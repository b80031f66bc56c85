package apifuzz

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// maxInput is what the searches spend their time on; that more is refused has tests of its own.
const maxInput = 64 << 10

// rich says something of every part of a spec.
const rich = `{"Name":"web","Labels":{"a":"b"},"TaskTemplate":{"ContainerSpec":{"Image":"i:1","Labels":{"x":"y"},"Command":["a"],"Args":["b",""],"Hostname":"h-{{.Task.Slot}}","Env":["A=b","C"],"Dir":"/d","User":"u:g",` +
	`"Groups":["g"],"Privileges":{"CredentialSpec":null,"SELinuxContext":{"Disable":true},"Seccomp":{"Mode":"custom","Profile":"e30="},"AppArmor":{"Mode":"disabled"},"NoNewPrivileges":true},"Init":true,"StopSignal":"TERM","TTY":true,"OpenStdin":true,"ReadOnly":true,` +
	`"Mounts":[{"Type":"volume","Source":"vol","Target":"/v","VolumeOptions":{"Subpath":"s"}},{"Type":"tmpfs","Target":"/t","TmpfsOptions":{"SizeBytes":1,"Mode":511}},{"Type":"bind","Source":"/a","Target":"/b","BindOptions":{"Propagation":"rslave"}}],` +
	`"StopGracePeriod":1,"Healthcheck":{"Test":["CMD","x"],"Interval":1000000,"Retries":3},"Hosts":["1.1.1.1 a"],"DNSConfig":{"Nameservers":["1.1.1.1"],"Search":["s"],"Options":["o"]},"Sysctls":{"net.a":"1"},"CapabilityAdd":["ALL"],"CapabilityDrop":["CAP_CHOWN"],` +
	`"Ulimits":[{"Name":"nofile","Hard":2,"Soft":1}],"OomScoreAdj":5},"Resources":{"Limits":{"NanoCPUs":1000000,"MemoryBytes":4194304,"Pids":5},"Reservations":{"NanoCPUs":1000000},"SwapBytes":0,"MemorySwappiness":5},` +
	`"RestartPolicy":{"Condition":"any","Delay":0,"MaxAttempts":1,"Window":1},"Placement":{"Constraints":["node.id==x"],"Preferences":[{"Spread":{"SpreadDescriptor":"node.labels.z"}}],"MaxReplicas":2,"Platforms":[{"Architecture":"amd64","OS":"linux"}]},` +
	`"Networks":[{"Target":"net","Aliases":["al"]}],"LogDriver":{"Name":"local","Options":{"max-size":"1m"}},"ForceUpdate":1,"Runtime":"container"},"Mode":{"Replicated":{"Replicas":2}},` +
	`"UpdateConfig":{"Parallelism":1,"Delay":1,"FailureAction":"rollback","Monitor":1,"MaxFailureRatio":0.5,"Order":"start-first"},"RollbackConfig":{"Parallelism":0,"MaxFailureRatio":0,"Order":"stop-first"},` +
	`"EndpointSpec":{"Mode":"vip","Ports":[{"Name":"n","Protocol":"udp","TargetPort":1,"PublishedPort":2,"PublishMode":"host"}]}}`

func specSeeds(f *testing.F) {
	for _, s := range []string{rich, `{}`, `{"TaskTemplate":{"ContainerSpec":{"Image":"i"}}}`, `{"Labels":null,"TaskTemplate":{"ContainerSpec":{"Image":"i","Args":[],"Env":null,"Labels":{},"Healthcheck":{}},"Resources":{},"Placement":{}},"EndpointSpec":{}}`,
		`{"TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"Global":{}}}`, `{"TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"ReplicatedJob":{"TotalCompletions":3}}}`, `{"TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"GlobalJob":{}}}`,
		`{"Networks":[{"Target":"net"}],"TaskTemplate":{"ContainerSpec":{"Image":"i"}}}`, `{"Name":"a","name":"b"}`, `[[[[`, "{\"Name\":\"\xff\"}"} {
		f.Add([]byte(s))
	}
}

// FuzzServiceSpec: a body is refused and nothing changed, or stored; then it is shown, sent as it was shown, and shown again the same, byte
// for byte, without a new revision.
func FuzzServiceSpec(f *testing.F) {
	specSeeds(f)
	c := newCluster(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		if len(body) > maxInput {
			return
		}
		before := c.st.Hash()
		w := c.do(t.Context(), "POST", "/services/create", body)
		if w.Code != http.StatusCreated {
			c.refused(t, before, w.Code, w.Body.String())
			return
		}
		var created struct{ ID string }
		ok(t, json.Unmarshal(w.Body.Bytes(), &created))
		defer c.do(context.Background(), "DELETE", "/services/"+created.ID, nil)
		spec, version := c.service(t, created.ID)
		w = c.do(t.Context(), "POST", "/services/"+created.ID+"/update?version="+strconv.FormatUint(version, 10), spec)
		if w.Code != http.StatusOK {
			t.Fatalf("what was shown is refused: %s\nsent  %s\nshown %s", w.Body, body, spec)
		}
		if again, _ := c.service(t, created.ID); !bytes.Equal(again, spec) {
			t.Fatalf("shown  %s\nstored %s", spec, again)
		}
		c.st.View(func(tx store.ReadTx) {
			if svc := tx.Service(created.ID); svc.Revision != 1 && !svc.Job() { // each update executes a job anew
				t.Errorf("the same spec again made revision %d: %s", svc.Revision, spec)
			}
		})
		sameAsSent(t, body, spec)
	})
}

func (c *cluster) refused(t *testing.T, before [32]byte, code int, text string) {
	t.Helper()
	if code == http.StatusInternalServerError || code == 0 {
		t.Errorf("answered with %d: %s", code, text)
	}
	if c.st.Hash() != before {
		t.Errorf("refused with %s, and the store changed", text)
	}
}

func (c *cluster) service(t *testing.T, id string) (spec []byte, version uint64) {
	t.Helper()
	w := c.do(t.Context(), "GET", "/services/"+id, nil)
	var o struct {
		Version struct{ Index uint64 }
		Spec    json.RawMessage
	}
	if w.Code != http.StatusOK {
		t.Fatalf("inspect: %s", w.Body)
	}
	ok(t, json.Unmarshal(w.Body.Bytes(), &o))
	return o.Spec, o.Version.Index
}

// sameAsSent: whatever was sent and is not empty is there. Targets of networks are ids, and old clients put networks elsewhere.
func sameAsSent(t *testing.T, sent, shown []byte) {
	t.Helper()
	var want, have any
	ok(t, json.Unmarshal(sent, &want))
	ok(t, json.Unmarshal(shown, &have))
	if lost := lost("", want, have); lost != "" {
		t.Errorf("%s is not shown:\nsent  %s\nshown %s", lost, sent, shown)
	}
}

func lost(at string, want, have any) string {
	if at == ".Networks" || strings.HasSuffix(at, ".Target") {
		return ""
	}
	switch w := want.(type) {
	case map[string]any:
		h, _ := have.(map[string]any)
		for k, v := range w {
			if l := lost(at+"."+k, v, h[k]); l != "" {
				return l
			}
		}
		return ""
	case []any:
		h, _ := have.([]any)
		if len(w) != len(h) {
			return at
		}
		for i := range w {
			if l := lost(at+"[]", w[i], h[i]); l != "" {
				return l
			}
		}
		return ""
	case float64:
		if h, _ := have.(float64); h == w || float32(h) == float32(w) {
			return ""
		}
		return at
	case nil:
		return ""
	}
	if want == "" || want == false || want == have {
		return ""
	}
	return at
}

// FuzzObjects: bodies for networks, secrets, configs, nodes and the cluster are refused and changed nothing, or taken.
func FuzzObjects(f *testing.F) {
	targets := []string{"/networks/create", "/secrets/create", "/configs/create", "/nodes/NODE/update?version=VERSION", "/swarm/update?version=VERSION"}
	for i, s := range []string{`{"Name":"n","Driver":"overlay","IPAM":{"Driver":"default","Config":[{"Subnet":"10.9.0.0/16"}]},"Options":{"com.docker.network.driver.mtu":"1400"},"Labels":{"a":"b"},"Attachable":true,"CheckDuplicate":true}`,
		`{"Name":"s","Labels":{"a":"b"},"Data":"eA==","Templating":{"Name":"golang"}}`, `{"Name":"c","Data":"eA=="}`, `{"Availability":"drain","Role":"worker","Name":"n","Labels":{"a":"b"}}`,
		`{"Name":"default","Labels":null,"Orchestration":{"TaskHistoryRetentionLimit":5},"Raft":{"ElectionTick":10},"CAConfig":{"NodeCertExpiry":3600000000000,"ExternalCAs":[{"Protocol":"cfssl"}]},"EncryptionConfig":{"AutoLockManagers":true}}`} {
		f.Add(i, []byte(s))
	}
	c := newCluster(f)
	f.Fuzz(func(t *testing.T, kind int, body []byte) {
		if len(body) > maxInput {
			return
		}
		target := targets[uint(kind)%uint(len(targets))]
		c.st.View(func(tx store.ReadTx) {
			node, version := tx.Nodes()[0], tx.Cluster().Meta.Version
			if strings.Contains(target, "NODE") {
				version = node.Meta.Version
			}
			target = strings.NewReplacer("NODE", node.Id, "VERSION", strconv.FormatUint(version, 10)).Replace(target)
		})
		before := c.st.Hash()
		w := c.do(t.Context(), "POST", target, body)
		if w.Code >= http.StatusBadRequest {
			c.refused(t, before, w.Code, w.Body.String())
			return
		}
		var created struct{ ID string }
		if json.Unmarshal(w.Body.Bytes(), &created) == nil && api.ValidID(created.ID) { // another id is that of a network of the node
			at := path.Dir(strings.SplitN(target, "?", 2)[0]) + "/" + created.ID
			if w := c.do(t.Context(), "GET", at, nil); w.Code != http.StatusOK && !strings.HasPrefix(at, "/networks") {
				t.Errorf("inspect %s after %s: %s", at, body, w.Body)
			}
			if w := c.do(t.Context(), "DELETE", at, nil); w.Code >= http.StatusBadRequest {
				t.Errorf("delete %s after %s: %s", at, body, w.Body)
			}
		}
	})
}

// FuzzQuery: filters, versions and other parameters of swarm's requests, and names in paths. Whatever they are, there is an answer.
func FuzzQuery(f *testing.F) {
	paths := []string{"/services", "/tasks", "/nodes", "/networks", "/secrets", "/configs", "/services/%s", "/tasks/%s", "/nodes/%s", "/networks/%s", "/secrets/%s", "/configs/%s", "/swarm", "/events"}
	for i, s := range []string{`{"label":["a=b"]}`, `{"name":{"web":true}}`, `{"desired-state":["running"],"_up-to-date":["true"]}`, `{"node.label":["x"],"role":["manager"]}`, `{"driver":["overlay"],"dangling":["true"]}`, `{"names":["a"]}`, `{"names":["a"]}`,
		`x`, `web.1`, `self`, `ingress`, `..`, `%00`, `{}`} {
		f.Add(i, s)
	}
	c := newCluster(f)
	c.do(context.Background(), "POST", "/services/create", []byte(rich))
	f.Fuzz(func(t *testing.T, i int, text string) {
		if len(text) > maxInput {
			return
		}
		p := paths[uint(i)%uint(len(paths))]
		if strings.Contains(p, "%s") {
			p = strings.Replace(p, "%s", url.PathEscape(text), 1)
		} else {
			p += "?until=1&status=true&filters=" + url.QueryEscape(text)
		}
		if w := c.do(t.Context(), "GET", p, nil); w != nil && w.Code == http.StatusInternalServerError {
			t.Errorf("GET %s: %s", p, w.Body)
		}
	})
}

// FuzzControl: any message to any method of the control service, as a broken or hostile peer would send it: an error or an answer, and an
// error means that nothing changed.
func FuzzControl(f *testing.F) {
	methods := api.Control_ServiceDesc.Methods
	seed := func(name string, m proto.Message) {
		b, err := proto.Marshal(m)
		ok(f, err)
		for i := range methods {
			if methods[i].MethodName == name {
				f.Add(i, b)
			}
		}
	}
	list := map[string]*api.StringList{"id": {Values: []string{"x"}}, "name": nil}
	for _, m := range methods {
		seed(m.MethodName, &api.GetRequest{Ref: "web"})
	}
	for _, name := range []string{"ListServices", "ListTasks", "ListNodes", "ListNetworks"} {
		seed(name, &api.ListRequest{Filters: list, Status: true})
	}
	seed("ListDependencies", &api.DependencyListRequest{Kind: "secret", Filters: list})
	seed("CreateService", &api.CreateRequest{SpecJson: []byte(rich)})
	seed("UpdateService", &api.UpdateRequest{Ref: "web", Version: 5, SpecJson: []byte(rich)})
	seed("CreateDependency", &api.DependencyRequest{Kind: "config", SpecJson: []byte(`{"Name":"a","Data":"eA=="}`)})
	seed("CreateNetwork", &api.CreateRequest{SpecJson: []byte(`{"Name":"n"}`)})
	seed("UpdateCluster", &api.UpdateRequest{SpecJson: []byte(`{}`), RotateUnlockKey: true})
	c := newCluster(f)
	f.Fuzz(func(t *testing.T, i int, message []byte) {
		if len(message) > maxInput {
			return
		}
		m := methods[uint(i)%uint(len(methods))]
		before := c.st.Hash()
		_, err := m.Handler(c.srv, t.Context(), func(in any) error { return proto.Unmarshal(message, in.(proto.Message)) }, nil)
		switch after := c.st.Hash(); {
		case err != nil && after != before:
			t.Errorf("%s %x: %v, and the store changed", m.MethodName, message, err)
		case err == nil && after != before && slices.Contains([]string{"RemoveNode", "RemoveNetwork", "RemoveService", "CreateService", "CreateNetwork", "CreateDependency"}, m.MethodName):
			c = newCluster(t)
		}
	})
}
