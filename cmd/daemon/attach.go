package daemon

import (
	"context"
	"encoding/json"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"

	"skein/agent/identity"
	"skein/manager/api"
)

// What the engine asks of the cluster (engine.Cluster): on a manager in this process, on a worker any manager, with the node's certificate.

// askAgain is the pause before another manager is asked; an election, or a daemon that is just starting, has time until the caller's ctx ends.
const askAgain = 200 * time.Millisecond

// askTry bounds how long one manager may take: it may be cut off, or wait for an election that does not come.
const askTry = 6 * time.Second

// Member reports whether this node is part of a cluster, be it cut off or just starting.
func (m *membership) Member() bool { return m.current() != nil || identity.Exists(m.identityDir()) }

// NodeNetworks lists the networks that concern this node.
func (m *membership) NodeNetworks(ctx context.Context) ([]network.Inspect, error) {
	var out []network.Inspect
	err := m.ask(ctx, func(node string, ctl api.ControlClient) error {
		out = nil
		list := func(ctx context.Context, r *api.ListRequest) (*api.Objects, error) {
			return ctl.ListNodeNetworks(ctx, &api.NodeNetworksRequest{NodeId: node, After: r.After, PageBytes: r.PageBytes})
		}
		return api.EachPage(ctx, &api.ListRequest{}, list, func(objects [][]byte) error {
			for _, raw := range objects {
				var n network.Inspect
				if err := json.Unmarshal(raw, &n); err != nil {
					return err
				}
				out = append(out, n)
			}
			return nil
		})
	})
	return out, err
}

// NodeNetwork is the network of the cluster that a name, id or unique id prefix means.
func (m *membership) NodeNetwork(ctx context.Context, ref string) (n network.Inspect, err error) {
	err = m.ask(ctx, func(node string, ctl api.ControlClient) error {
		reply, err := ctl.ListNodeNetworks(ctx, &api.NodeNetworksRequest{NodeId: node, Ref: ref})
		if err != nil {
			return err
		}
		if len(reply.Json) != 1 {
			return api.Errorf(errdefs.ErrNotFound, "network %s not found", ref)
		}
		return json.Unmarshal(reply.Json[0], &n)
	})
	return n, err
}

// Attach sets and removes what containers of this node hold of the cluster's networks.
func (m *membership) Attach(ctx context.Context, r *api.AttachRequest) (reply *api.AttachReply, err error) {
	err = m.ask(ctx, func(node string, ctl api.ControlClient) (err error) {
		r.NodeId = node
		for _, w := range r.Set {
			w.NodeId = node
		}
		reply, err = ctl.Attach(ctx, r)
		return err
	})
	return reply, err
}

// AwaitNetworks returns when this node's network has the container as an endpoint of the networks.
func (m *membership) AwaitNetworks(ctx context.Context, container string, networks []string, gateway bool) error {
	n := m.current()
	if n == nil {
		return api.Errorf(errdefs.ErrUnavailable, "%s", textNotPart)
	}
	return n.agent.AwaitNetworks(ctx, container, networks, gateway)
}

// ask calls f with a client of a manager until one answers or ctx ends. f must be safe to repeat.
func (m *membership) ask(ctx context.Context, f func(node string, ctl api.ControlClient) error) error {
	for {
		try, cancel := context.WithTimeout(ctx, askTry)
		err := m.askOnce(try, f)
		cancel()
		if err == nil || !errdefs.IsUnavailable(err) && !errdefs.IsDeadlineExceeded(err) || !m.Member() {
			return err
		}
		t := time.NewTimer(askAgain)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

func (m *membership) askOnce(ctx context.Context, f func(node string, ctl api.ControlClient) error) error {
	n := m.current()
	if n == nil {
		return api.Errorf(errdefs.ErrUnavailable, "%s", textNotPart)
	}
	if n.control != nil {
		return f(n.id.NodeID(), n.control)
	}
	conn, err := n.dialAnyManager(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return api.FromGRPC(f(n.id.NodeID(), api.NewControlClient(conn)))
}
