package dockerapi_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein/agent/dockerapi"
	"skein/agent/dockerapi/dockerapitest"
)

func newHandler() (*dockerapitest.Node, *dockerapitest.Cluster, http.Handler) {
	n, c := dockerapitest.NewNode(), dockerapitest.NewCluster()
	return n, c, dockerapi.New(dockerapi.Config{Containers: n, Images: n, Networks: n, System: n, Swarm: c, Version: "0.1"})
}

func do(h http.Handler, method, path, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestAnswers(t *testing.T) {
	web := strings.Repeat("ab", 32)
	f := func(s string) string { return url.QueryEscape(s) }
	for _, tc := range []struct {
		method, path, body string
		code               int
		want               string // of the body; "…" at the end: a prefix
	}{
		{"GET", "/_ping", "", 200, "OK"},
		{"GET", "/v1.41/_ping", "", 200, "OK"},
		{"GET", "/v1.99/version", "", 400, `{"message":"client version 1.99 is too new. Maximum supported API version is 1.55"}`},
		{"GET", "/v1.12/version", "", 400, `{"message":"client version 1.12 is too old. Minimum supported API version is 1.40, please upgrade your client to a newer version"}`},
		{"GET", "/v2.0/version", "", 400, `{"message":"client version 2.0 is too new. Maximum supported API version is 1.55"}`},
		{"GET", "/nothing", "", 404, `{"message":"page not found"}`},
		{"PUT", "/v1.55/version", "", 404, `{"message":"page not found"}`},
		{"GET", "/images/busybox/nothing", "", 404, `{"message":"page not found"}`},

		{"GET", "/containers/none/json", "", 404, `{"message":"No such container: none"}`},
		{"POST", "/containers/create?name=web", `{"Image":"busybox"}`, 409, `{"message":"Conflict. The container name \"/web\" is already in use by container \"` + web + `\"…`},
		{"POST", "/containers/create", `{"HostConfig":{}}`, 400, `{"message":"config cannot be empty in order to create a container"}`},
		{"POST", "/containers/create?name=b", `{"Image":"busybox","Unknown":1}`, 201, `{"Id":"0000000000000000000000000000000000000000000000000000000000000002","Warnings":[]}`},
		{"POST", "/containers/create", `{`, 400, `{"message":"invalid JSON: unexpected EOF"}`},
		{"POST", "/containers/create", `{"Image":"a"} x`, 400, `{"message":"unexpected content after JSON"}`},
		{"POST", "/containers/create", `{"Image":"a"}]`, 400, `{"message":"unexpected content after JSON"}`},
		{"POST", "/containers/web/start", "", 304, ``},
		{"POST", "/containers/web/start?checkpoint=c", "", 501, `{"message":"starting from a checkpoint is not supported by Skein"}`},
		{"DELETE", "/containers/web", "", 409, `{"message":"cannot remove container \"/web\": container is running: stop the container before removing or force remove"}`},
		{"POST", "/containers/web/stop?t=x", "", 400, `{"message":"invalid value for \"t\": \"x\" is no number"}`},
		{"POST", "/containers/web/wait?condition=bad", "", 400, `{"message":"invalid condition: \"bad\""}`},
		{"GET", "/containers/web/logs", "", 400, `{"message":"Bad parameters: you must choose at least one stream"}`},
		{"GET", "/containers/json?filters=" + f(`{"bad":["x"]}`), "", 400, `{"message":"invalid filter 'bad'"}`},
		{"GET", "/containers/json?filters=" + f(`{"label":`), "", 400, `{"message":"invalid filter: unexpected end of JSON input"}`},
		{"POST", "/containers/web/exec", `{"Cmd":[]}`, 400, `{"message":"No exec command specified"}`},
		{"GET", "/exec/nope/json", "", 404, `{"message":"No such exec instance: nope"}`},
		{"POST", "/containers/web/resize?h=24&w=80", "", 200, ``},
		{"POST", "/containers/web/update", "{}", 501, `{"message":"updating a container's limits is not built yet in Skein"}`},

		{"GET", "/images/localhost:5000/a/b/missing/json", "", 404, `{"message":"No such image: localhost:5000/a/b/missing"}`},
		{"POST", "/images/create?fromSrc=-", "", 501, `{"message":"importing an image from a tar file is not built yet: build or load an image instead"}`},
		{"POST", "/images/create?fromImage=UPPER&tag=x", "", 400, `{"message":"invalid reference format: \"UPPER\"…`},
		{"POST", "/images/create?fromImage=localhost:5000/web&tag=1", "", 200, `{"status":"Pulling localhost:5000/web:1"}`},
		{"POST", "/images/create?fromImage=docker.io/library/web&tag=" + dockerapitest.Digest, "", 200, `{"status":"Pulling web@` + dockerapitest.Digest + `"}`},
		{"GET", "/images/missing/get", "", 404, `{"message":"No such image: missing"}`},
		{"GET", "/images/get?names=a&names=b", "", 200, `a,b`},
		{"DELETE", "/images/localhost:5000/web:1", "", 200, `[{"Untagged":"localhost:5000/web:1"}]`},
		{"POST", "/images/a/b/tag?repo=c&tag=2", "", 201, ``},
		{"GET", "/images/a/history", "", 200, `[]`},

		{"GET", "/networks/ingress", "", 200, `{"Name":"ingress","Id":"ingress000000000000000000"…`},
		{"GET", "/networks/nope", "", 404, `{"message":"network nope not found"}`},
		{"DELETE", "/networks/bridge", "", 403, `{"message":"bridge is a pre-defined network and cannot be removed"}`},
		{"POST", "/networks/ingress/connect", `{"Container":"web"}`, 200, ``},
		{"GET", "/networks?filters=" + f(`{"scope":{"swarm":true}}`), "", 200, `[{"Name":"ingress"…`},
		{"GET", "/networks?filters=" + f(`{"driver":["none"]}`), "", 200, `[{"Name":"none"…`},

		{"GET", "/networks/host?scope=swarm", "", 200, `{"Name":"host","Id":"host","Created":"0001-01-01T00:00:00Z","Scope":"swarm","Driver":"host"…`},
		{"GET", "/networks/host", "", 200, `{"Name":"host","Id":"host000000000000000000000000000000000000000000000000000000000000","Created":"0001-01-01T00:00:00Z","Scope":"local"…`},
		{"GET", "/networks/none?scope=swarm", "", 200, `{"Name":"none","Id":"none","Created":"0001-01-01T00:00:00Z","Scope":"swarm","Driver":"null"…`},
		{"GET", "/networks/web?scope=swarm", "", 404, `{"message":"network web not found"}`},
		{"POST", "/networks/prune", "", 200, `{"NetworksDeleted":[]}`}, // docker's own and the mesh's stay
		{"POST", "/networks/prune?filters=" + f(`{"until":["x"]}`), "", 400, `{"message":"invalid value for \"until\": \"x\" is neither Unix seconds nor RFC 3339"}`},
		{"POST", "/networks/prune?filters=" + f(`{"name":["x"]}`), "", 400, `{"message":"invalid filter 'name'"}`},

		{"GET", "/v1.50/system/df", "", 200, `{"LayersSize":7,"Images":[{"Containers":0,"Created":1,"Id":"` + dockerapitest.Digest + `"…`},
		{"GET", "/v1.50/system/df?type=volume", "", 200, `{"LayersSize":0,"Images":null,"Containers":null,"Volumes":[],"BuildCache":null}`},
		{"GET", "/v1.55/system/df", "", 200, `{"ImageUsage":{"Reclaimable":7,"TotalCount":1,"TotalSize":7},"ContainerUsage":{"ActiveCount":1,"TotalCount":1},"VolumeUsage":{},"BuildCacheUsage":{}}`},
		{"GET", "/system/df?type=images", "", 400, `{"message":"unknown object type: images"}`},
		{"POST", "/build/prune", "", 200, `{"CachesDeleted":[],"SpaceReclaimed":0}`},

		{"GET", "/volumes", "", 200, `{"Volumes":[],"Warnings":[]}`},
		{"POST", "/volumes/create", `{}`, 501, `{"message":"the volumes part of the API is not built yet in Skein"}`},
		{"GET", "/plugins", "", 200, `[]`},
		{"POST", "/plugins/pull", "", 501, `{"message":"engine plugins are not supported by Skein"}`},
		{"GET", "/secrets", "", 200, `[{"ID":"s1"…`},
		{"POST", "/secrets/create", "{}", 201, `{"ID":"new-secret"}`},
		{"POST", "/configs/create", "{}", 201, `{"ID":"new-config"}`},
		{"POST", "/secrets/x/update", "{}", 400, `{"message":"invalid secret version ''…`},
		{"GET", "/configs", "", 200, `[]`},

		{"GET", "/services/nope", "", 404, `{"message":"service nope not found"}`},
		{"POST", "/services/x/update", `{}`, 400, `{"message":"invalid service version ''…`},
		{"POST", "/services/create", `[]`, 400, `{"message":"invalid JSON: json: cannot unmarshal array…`},
		{"GET", "/tasks/nope", "", 404, `{"message":"task nope not found"}`},
		{"GET", "/tasks?filters=" + f(`{"service":["nope"]}`), "", 404, `{"message":"service nope not found"}`},
		{"POST", "/nodes/n1/update?version=1", `{}`, 409, `{"message":"update out of sequence"}`},
		{"DELETE", "/nodes/n1", "", 400, `{"message":"node n1 is not down and can't be removed"}`},
		{"GET", "/nodes/self", "", 200, `{"ID":"` + dockerapitest.NodeID + `"…`},
		{"POST", "/swarm/join", `{"RemoteAddrs":["a"],"JoinToken":"t"}`, 400, `{"message":"join token \"t\": wrong"}`},
		{"GET", "/swarm/unlockkey", "", 200, `{"UnlockKey":"` + dockerapitest.UnlockKey + `"}`},
		{"POST", "/swarm/unlock", `{"UnlockKey":"x"}`, 409, `{"message":"swarm is not locked"}`},
	} {
		_, _, h := newHandler()
		w := do(h, tc.method, tc.path, tc.body)
		got := strings.TrimSpace(w.Body.String())
		want, prefix := strings.CutSuffix(tc.want, "…")
		if w.Code != tc.code || got != want && !(prefix && strings.HasPrefix(got, want)) {
			t.Errorf("%s %s %s:\n got %d %s\nwant %d %s", tc.method, tc.path, tc.body, w.Code, got, tc.code, tc.want)
		}
	}
}

func TestNoManager(t *testing.T) {
	const none = `{"message":"This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to connect this node to swarm and try again."}`
	const worker = `{"message":"This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. Please run this command on a manager node or promote the current node to a manager."}`
	for _, tc := range []struct {
		info   swarm.Info
		want   string
		header string
	}{
		{swarm.Info{}, none, "inactive"},
		{swarm.Info{LocalNodeState: swarm.LocalNodeStateActive}, worker, "active/worker"},
	} {
		_, c, h := newHandler()
		c.Swarm = tc.info
		for _, path := range []string{"/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs", "/services/x", "/services/x/logs?stdout=1"} {
			if w := do(h, "GET", path, ""); w.Code != 503 || strings.TrimSpace(w.Body.String()) != tc.want {
				t.Errorf("GET %s with %+v: %d %s", path, tc.info, w.Code, w.Body)
			}
		}
		if w := do(h, "GET", "/networks", ""); w.Code != 200 {
			t.Errorf("networks must be listed without a cluster: %d %s", w.Code, w.Body)
		}
		if got := do(h, "HEAD", "/_ping", "").Header().Get("Swarm"); got != tc.header {
			t.Errorf("Swarm header %q, want %q", got, tc.header)
		}
	}
}

func TestPingHeaders(t *testing.T) {
	_, _, h := newHandler()
	for _, method := range []string{"HEAD", "GET"} {
		hd := do(h, method, "/_ping", "").Header()
		for k, want := range map[string]string{
			"Api-Version": "1.55", "Ostype": "linux", "Docker-Experimental": "false", "Builder-Version": "1", "Swarm": "active/manager",
		} {
			if got := hd.Get(k); got != want {
				t.Errorf("%s /_ping: %s is %q, want %q", method, k, got, want)
			}
		}
	}
}

func TestFiltersBothForms(t *testing.T) {
	for _, raw := range []string{`{"label":["a","b=1"],"name":["web"]}`, `{"label":{"a":true,"b=1":true},"name":{"web":true}}`} {
		n, _, h := newHandler()
		if w := do(h, "GET", "/containers/json?all=1&filters="+url.QueryEscape(raw), ""); w.Code != 200 {
			t.Fatalf("%s: %d %s", raw, w.Code, w.Body)
		}
		if got := fmt.Sprint(n.Filters); got != "map[label:[a b=1] name:[web]]" {
			t.Errorf("%s: %s", raw, got)
		}
	}
}

func TestBodies(t *testing.T) {
	_, _, h := newHandler()
	big := `{"Image":"` + strings.Repeat("a", 9<<20) + `"}`
	if w := do(h, "POST", "/containers/create", big); w.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("9 MiB of JSON: %d", w.Code)
	}
	if w := do(h, "POST", "/services/create", `{"Name":"`+strings.Repeat("a", 2<<20)+`"}`); w.Code != 400 {
		t.Errorf("2 MiB of service spec: %d %s", w.Code, w.Body)
	}
	r := httptest.NewRequest("POST", "/containers/create", strings.NewReader(`{"Image":"a"}`))
	r.Header.Set("Content-Type", "text/plain")
	w := httptest.NewRecorder()
	if h.ServeHTTP(w, r); w.Code != 400 || !strings.Contains(w.Body.String(), "unsupported Content-Type header (text/plain): must be 'application/json'") {
		t.Errorf("text/plain: %d %s", w.Code, w.Body)
	}
	w = httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("POST", "/images/load?quiet=1", io.LimitReader(zeros{}, 20<<20)))
	if w.Code != 200 || !strings.Contains(w.Body.String(), "Loaded 20971520 bytes") {
		t.Errorf("20 MiB tar: %d %s", w.Code, w.Body)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestPullErrors(t *testing.T) {
	n, _, h := newHandler()
	n.PullErr = fmt.Errorf("pull: %w", status.Error(codes.NotFound, "manifest for web:1 not found"))
	if w := do(h, "POST", "/images/create?fromImage=web&tag=1", ""); w.Code != 404 || !strings.Contains(w.Body.String(), `{"message":"pull: manifest for web:1 not found"}`) {
		t.Errorf("early: %d %s", w.Code, w.Body)
	}
	n.PullErr, n.PullLate = nil, errors.New("connection reset")
	w := do(h, "POST", "/images/create?fromImage=web&tag=1", "")
	want := `{"status":"Pulling web:1"}` + "\r\n" + `{"status":"Downloading"}` + "\r\n" + `{"errorDetail":{"message":"connection reset"},"error":"connection reset"}` + "\r\n"
	if w.Code != 200 || w.Body.String() != want {
		t.Errorf("late: %d %q", w.Code, w.Body)
	}
}

// dockerode sends an update's options as query and as body; the managers take no unknown field.
func TestParametersInBody(t *testing.T) {
	_, c, h := newHandler()
	if w := do(h, "POST", "/services/create", `{"Name":"a","Mode":{"Replicated":{"Replicas":1}}}`); w.Code != 201 {
		t.Fatalf("create: %d %s", w.Code, w.Body)
	}
	spec := `{"Name":"a","Mode":{"Replicated":{"Replicas":2}}`
	for _, body := range []string{spec + `}`, spec + `,"version":1,"registryAuthFrom":"spec"}`} {
		do(h, "POST", "/services/a/update?version=1&registryAuthFrom=spec&Name=a&Mode=x", body)
	}
	if n := len(c.Updated); n != 2 || string(c.Updated[0].SpecJson) != spec+`}` || strings.Contains(string(c.Updated[1].SpecJson), "version") ||
		!strings.Contains(string(c.Updated[1].SpecJson), `"Replicas":2`) {
		t.Errorf("%d updates: %s", n, c.Updated)
	}
}

func TestRegistryAuth(t *testing.T) {
	n, c, h := newHandler()
	const hdr = "eyJ1c2VybmFtZSI6InUiLCJwYXNzd29yZCI6InAifQ==" // {"username":"u","password":"p"}
	r := httptest.NewRequest("POST", "/images/create?fromImage=web&tag=1", nil)
	r.Header.Set(registry.AuthHeader, hdr)
	h.ServeHTTP(httptest.NewRecorder(), r)
	if n.Auth == nil || n.Auth.Username != "u" || n.Auth.Password != "p" {
		t.Errorf("pull got %+v", n.Auth)
	}
	body := `{"Name":"a","Mode":{"Replicated":{"Replicas":1}},"Future":{"b":null}}`
	r = httptest.NewRequest("POST", "/v1.41/services/create", strings.NewReader(body))
	r.Header.Set(registry.AuthHeader, hdr)
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != 201 || len(c.Created) != 1 || c.Created[0].RegistryAuth != hdr || string(c.Created[0].SpecJson) != body {
		t.Errorf("create: %d %s %v", w.Code, w.Body, c.Created)
	}
}

type panicking struct{ dockerapi.System }

func (panicking) Info(context.Context) (_ system.Info, _ error) { panic("broken") }

func TestPanicIsAnAnswer(t *testing.T) {
	n, c := dockerapitest.NewNode(), dockerapitest.NewCluster()
	h := dockerapi.New(dockerapi.Config{Containers: n, Images: n, Networks: n, System: panicking{n}, Swarm: c})
	if w := do(h, "GET", "/info", ""); w.Code != 500 || !strings.Contains(w.Body.String(), "internal error") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func TestWaitFlushesHeaders(t *testing.T) {
	n, _, h := newHandler()
	srv := httptest.NewServer(h)
	defer srv.Close()
	resp, err := http.Post(srv.URL+"/containers/web/wait?condition=next-exit", "", nil) // returns with the headers
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := n.ContainerKill(context.Background(), "web", ""); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(resp.Body).ReadString('\n')
	if line != `{"StatusCode":137}`+"\n" || err != nil {
		t.Errorf("%q %v", line, err)
	}
}
