package dockerapi_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"skein/agent/dockerapi"
	"skein/agent/dockerapi/dockerapitest"
	"skein/manager/api"
)

// paged is a cluster with a list of several pages, and perhaps an error at one.
type paged struct {
	*dockerapitest.Cluster
	fail int
}

func (p *paged) Control(context.Context) (api.ControlClient, error) { return p, nil }

func (p *paged) ListServices(_ context.Context, r *api.ListRequest, _ ...grpc.CallOption) (*api.Objects, error) {
	n, _ := strconv.Atoi(r.After)
	if n++; n == p.fail {
		return nil, errors.New("the leader is gone")
	}
	out := &api.Objects{Json: [][]byte{fmt.Appendf(nil, `{"ID":"%d"}`, n)}}
	if n < 3 {
		out.Next = strconv.Itoa(n)
	}
	return out, nil
}

// A list is put together from its pages; one that ends in the middle is no list.
func TestListInPages(t *testing.T) {
	n := dockerapitest.NewNode()
	for fail, want := range map[int]string{0: `[{"ID":"1"},{"ID":"2"},{"ID":"3"}]`, 1: `the leader is gone`, 2: "", 3: ""} {
		srv := httptest.NewServer(dockerapi.New(dockerapi.Config{Containers: n, Images: n, Networks: n, System: n, Swarm: &paged{dockerapitest.NewCluster(), fail}}))
		var body []byte
		resp, err := http.Get(srv.URL + "/services")
		if err == nil {
			body, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		srv.Close()
		if (want == "") != (err != nil) || !strings.Contains(string(body), want) {
			t.Errorf("error at page %d: %q, %v; want %q, or a connection that breaks", fail, body, err, want)
		}
	}
}
