package dockerapi_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
)

// FuzzRequest: whatever a request says in its path, query and body, the answer is an answer, not a panic, and it comes. Requests that
// wait for something by their nature are given little time.
func FuzzRequest(f *testing.F) {
	methods := []string{"GET", "POST", "DELETE", "PUT", "HEAD"}
	for _, c := range []struct {
		method    int
		path, val string
	}{
		{1, "/v1.55/containers/create?name=x", `{"Image":"busybox","HostConfig":{"Binds":["a:b"]}}`}, {1, "/services/create", `{}`}, {1, "/services/create", `{"Name":"a","Mode":{"Replicated":{"Replicas":1}},"TaskTemplate":{"ContainerSpec":{"Image":"x"}}}`},
		{0, "/containers/json?all=1&filters=" + url.QueryEscape(`{"label":{"a":true},"name":["x"]}`), ""}, {0, "/containers/web/logs?stdout=1&since=1.5&until=2026-01-01T00:00:00Z&tail=x", ""},
		{1, "/images/create?fromImage=a&tag=sha256:1", ""}, {1, "/images/a/b/tag?repo=x&tag=", ""}, {0, "/images/get?names=a", ""}, {2, "/networks/x", ""}, {1, "/networks/create", `{"Name":"n","IPAM":{"Config":[{"Subnet":"10.0.0.0/8"}]}}`},
		{1, "/services/a/update?version=1&rollback=x", `{"version":1}`}, {1, "/swarm/init", `{"ListenAddr":"x"}`}, {1, "/containers/web/exec", `{"Cmd":["a"]}`}, {1, "/exec/x/start", `{"Detach":true}`},
		{1, "/containers/web/resize?h=1&w=70000", ""}, {0, "/system/df?type=volume", ""}, {1, "/volumes/create", `{"Driver":"x"}`}, {1, "/containers/web/update", `{"PidsLimit":-1}`}, {0, "/tasks?filters=%7B%7D", ""},
	} {
		f.Add(c.method, c.path, []byte(c.val))
	}
	f.Fuzz(func(t *testing.T, method int, path string, body []byte) {
		u, err := url.ParseRequestURI("/" + strings.TrimLeft(path, "/"))
		if err != nil {
			return
		}
		_, _, h := newHandler()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		r := httptest.NewRequest(methods[uint(method)%uint(len(methods))], "/", strings.NewReader(string(body))).WithContext(ctx)
		r.URL, r.RequestURI = u, u.RequestURI()
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("X-Registry-Auth", string(body[:min(len(body), 200)]))
		w := httptest.NewRecorder()
		func() {
			defer func() {
				if p := recover(); p != nil && p != http.ErrAbortHandler {
					panic(p)
				}
			}()
			h.ServeHTTP(w, r)
		}()
		if w.Code == http.StatusInternalServerError && strings.Contains(w.Body.String(), "panic") {
			t.Errorf("%s %s %q: %s", r.Method, path, body, w.Body)
		}
	})
}
