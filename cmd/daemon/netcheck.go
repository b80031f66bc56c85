package daemon

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"

	"skein/manager/api"
	"skein/overlay"
)

// clusterAnswer bounds the wait of a node that is no manager for one.
const clusterAnswer = 90 * time.Second

// netChecker compares this node's networks (agent.NetChecker).
type netChecker struct{ network *overlay.Driver }

func (c netChecker) CheckNetworks(ctx context.Context, repair bool) (*api.NetCheckNode, error) {
	began := time.Now()
	report, err := c.network.Compare(ctx, repair)
	out := &api.NetCheckNode{More: uint32(report.More), TookNanos: time.Since(began).Nanoseconds(), Mended: uint32(c.network.Mended())}
	if err != nil {
		out.Err = err.Error()
	}
	for _, f := range report.Findings {
		out.Differences = append(out.Differences, &api.NetDifference{
			Table: f.Table, Kind: f.Kind, Object: f.Object, State: f.State, Mended: repair && f.Err == "", Err: f.Err,
		})
	}
	return out, ctx.Err()
}

// SwarmNetCheck has the nodes of the cluster compare their kernels with the record, or without a cluster this node alone. When no manager answers,
// this node is compared all the same.
func (m *membership) SwarmNetCheck(ctx context.Context, repair bool, nodes []string) ([]*api.NetCheckNode, error) {
	n := m.current()
	if n == nil {
		own, err := m.ownNetCheck(ctx, "", repair)
		return []*api.NetCheckNode{own}, err
	}
	var reply *api.NetCheckReply
	asked := m.askManagers(ctx, n, func(ctx context.Context, ctl api.ControlClient) (err error) {
		reply, err = ctl.NetCheck(ctx, &api.NetCheckRequest{Repair: repair, Nodes: nodes})
		return err
	})
	if asked == nil {
		return reply.Nodes, nil
	}
	if ctx.Err() != nil || len(nodes) > 0 {
		return nil, asked
	}
	own, err := m.ownNetCheck(ctx, n.id.NodeID(), repair)
	others := &api.NetCheckNode{Hostname: "(other nodes)", Err: fmt.Sprintf("not compared: %v", api.FromGRPC(asked))}
	return []*api.NetCheckNode{own, others}, err
}

func (m *membership) ownNetCheck(ctx context.Context, id string, repair bool) (*api.NetCheckNode, error) {
	own, err := netChecker{m.network}.CheckNetworks(ctx, repair)
	own.NodeId, own.Hostname = id, m.cfg.Hostname
	return own, err
}

// SwarmNetStatus asks the managers how far the nodes are with their tables.
func (m *membership) SwarmNetStatus(ctx context.Context) (*api.NetStatusReply, error) {
	n := m.current()
	if n == nil {
		_, err := m.managerNode()
		return nil, err
	}
	var reply *api.NetStatusReply
	err := m.askManagers(ctx, n, func(ctx context.Context, ctl api.ControlClient) (err error) {
		reply, err = ctl.NetStatus(ctx, &api.ListRequest{})
		return err
	})
	return reply, err
}

// askManagers calls the cluster's control service, of a node that is no manager over a connection of its own.
func (m *membership) askManagers(ctx context.Context, n *clusterNode, call func(context.Context, api.ControlClient) error) error {
	if n.manages() {
		return call(ctx, n.control)
	}
	ctx, cancel := context.WithTimeout(ctx, clusterAnswer)
	defer cancel()
	conn, err := n.dialAnyManager(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return api.FromGRPC(call(ctx, &limitedControl{api.NewControlClient(conn)}))
}

// limitedControl takes answers as large as those of a large cluster.
type limitedControl struct{ api.ControlClient }

func (c *limitedControl) NetCheck(ctx context.Context, r *api.NetCheckRequest, o ...grpc.CallOption) (*api.NetCheckReply, error) {
	return c.ControlClient.NetCheck(ctx, r, append(o, grpc.MaxCallRecvMsgSize(maxClusterReply))...)
}

func (c *limitedControl) NetStatus(ctx context.Context, r *api.ListRequest, o ...grpc.CallOption) (*api.NetStatusReply, error) {
	return c.ControlClient.NetStatus(ctx, r, append(o, grpc.MaxCallRecvMsgSize(maxClusterReply))...)
}

// maxClusterReply bounds what a manager may answer to a node.
const maxClusterReply = 64 << 20
