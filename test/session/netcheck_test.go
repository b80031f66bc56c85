package session_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"skein/agent"
	"skein/manager/api"
)

// oneDifference is a node whose kernel lacks a route.
type oneDifference struct{}

func (oneDifference) CheckNetworks(_ context.Context, repair bool) (*api.NetCheckNode, error) {
	return &api.NetCheckNode{Differences: []*api.NetDifference{{Table: "mesh", Kind: "route", Object: "10.192.8.0/22", State: "missing", Mended: repair}}}, nil
}

// All nodes are asked; those that do not answer, or cannot, are named, and none is waited for longer than the bound.
func TestNetCheck(t *testing.T) {
	bubble(t, func(c *cluster) {
		c.worker("w1")
		c.worker("w2")
		c.worker("w3")
		c.eventually("ready", 5*time.Second, func() bool {
			return c.nodeState("w1") == "ready" && c.nodeState("w2") == "ready" && c.nodeState("w3") == "ready"
		})
		c.node("w4", api.RoleWorker, "w4")
		h := c.serve("w4")
		api.RegisterAgentServer(h.srv, agent.NewServer(nil, oneDifference{}))
		go h.srv.Serve(h.lis)
		defer h.srv.Stop()
		c.freeze("w2")
		began := time.Now()
		reply, err := c.disp.NetCheck(c.t.Context(), &api.NetCheckRequest{Repair: true, Nodes: []string{id("w1"), "w2", "w4"}})
		if err != nil || len(reply.Nodes) != 3 {
			t.Fatal(reply, err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %v", took)
		}
		w1, w2, w4 := reply.Nodes[0], reply.Nodes[1], reply.Nodes[2]
		if !strings.Contains(w1.Err, "upgrade") || !strings.Contains(w2.Err, "does not answer") || w4.Err != "" || len(w4.Differences) != 1 || !w4.Differences[0].Mended {
			t.Errorf("got %v", reply)
		}
		if _, err := c.disp.NetCheck(c.t.Context(), &api.NetCheckRequest{Nodes: []string{"w9"}}); !errdefs.IsNotFound(err) {
			t.Errorf("an unknown node: %v", err)
		}
		status, err := c.disp.NetStatus(c.t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range status.Nodes {
			if n.Live != (n.Hostname == "w1" || n.Hostname == "w3" || n.Hostname == "w2" && c.nodeState("w2") == "ready") || !n.Live && n.Reason == "" {
				t.Errorf("status of %v", n)
			}
		}
	})
}
