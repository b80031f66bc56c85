package dockerapi_test

import (
	"net/http"
	"net/url"
	"testing"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// A list without the cluster's networks would tell a client that they are gone.
func TestNetworksWithoutQuorum(t *testing.T) {
	_, c, h := newHandler()
	c.NetworksErr = api.Errorf(errdefs.ErrUnavailable, "the cluster has no leader")
	for query, want := range map[string]int{
		"": http.StatusServiceUnavailable, `{"name":["web"]}`: http.StatusServiceUnavailable, `{"scope":["swarm"]}`: http.StatusServiceUnavailable,
		`{"driver":["overlay","bridge"]}`: http.StatusServiceUnavailable, `{"scope":["local"]}`: http.StatusOK, `{"driver":["bridge"]}`: http.StatusOK,
		`{"type":["builtin"]}`: http.StatusOK,
	} {
		if w := do(h, "GET", "/networks?filters="+url.QueryEscape(query), ""); w.Code != want {
			t.Errorf("filters %s: status %d, want %d: %s", query, w.Code, want, w.Body)
		}
	}
	if w := do(h, "GET", "/networks/web", ""); w.Code != http.StatusServiceUnavailable {
		t.Errorf("a network that cannot be seen: status %d: %s", w.Code, w.Body)
	}
	if w := do(h, "GET", "/networks/bridge", ""); w.Code != http.StatusOK {
		t.Errorf("the node's own network: status %d: %s", w.Code, w.Body)
	}
}
