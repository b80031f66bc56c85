package dispatcher

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein/manager/api"
	"skein/manager/store"
)

// Bounds of a comparison of the cluster's nodes with the record.
const (
	netCheckNodes = 32               // asked at the same time
	netCheckReach = 3 * time.Second  // for a node to answer at all
	netCheckBound = 30 * time.Second // for a node's comparison: thousands of containers take seconds
	netCheckCalls = 4                // comparisons of the cluster at the same time; others wait
)

// NetStatus compares per node and table the desired version with the one applied there, and tells how each node stands.
func (d *Dispatcher) NetStatus(ctx context.Context) (*api.NetStatusReply, error) {
	reply := &api.NetStatusReply{}
	if err := d.call(ctx, func() { reply.Rows, reply.Nodes = d.netRows(), d.netNodes() }); err != nil {
		return nil, fmt.Errorf("net status: %w", err)
	}
	return reply, nil
}

func (d *Dispatcher) netRows() []*api.NetStatusRow {
	var rows []*api.NetStatusRow
	now := time.Now()
	for _, n := range d.nodes {
		if hasLeft(n.rec) {
			continue
		}
		row := func(id string) {
			t := d.spread.tables[id]
			if t == nil {
				return
			}
			ack := n.acked[id]
			r := &api.NetStatusRow{NodeId: n.id, Table: id, Desired: t.version, Applied: ack.GetVersion(), Live: n.hasSay(), Err: ack.GetErr(), Network: api.MeshTable}
			if t.network != nil {
				r.Network = t.network.Name
			}
			if r.Applied < r.Desired {
				r.BehindNanos = max(1, now.Sub(t.at).Nanoseconds())
			}
			rows = append(rows, r)
		}
		row(api.MeshTable)
		for id := range n.nets {
			row(id)
		}
	}
	slices.SortFunc(rows, func(a, b *api.NetStatusRow) int {
		if c := strings.Compare(a.NodeId, b.NodeId); c != 0 {
			return c
		}
		return strings.Compare(a.Table, b.Table)
	})
	return rows
}

func (d *Dispatcher) netNodes() []*api.NetStatusNode {
	var nodes []*api.NetStatusNode
	now := time.Now()
	for _, n := range d.nodes {
		if hasLeft(n.rec) {
			continue
		}
		r := &api.NetStatusNode{NodeId: n.id, Hostname: n.rec.Hostname, Addr: n.rec.UnderlayAddr, Live: n.hasSay(), SilentNanos: -1}
		if seen := n.seen.Load(); seen != 0 {
			r.SilentNanos = max(0, now.UnixNano()-seen)
		}
		if !r.Live {
			r.Reason = n.whySilent()
		}
		if e := n.rec.Crypt.GetErr(); e != "" {
			r.Notes = append(r.Notes, "cannot carry encrypted networks: "+e)
		}
		r.Notes = append(r.Notes, d.unencrypted(n)...)
		nodes = append(nodes, r)
	}
	slices.SortFunc(nodes, func(a, b *api.NetStatusNode) int {
		if c := strings.Compare(a.Hostname, b.Hostname); c != 0 {
			return c
		}
		return strings.Compare(a.NodeId, b.NodeId)
	})
	return nodes
}

// whySilent tells why a node has no say.
func (n *node) whySilent() string {
	switch {
	case n.rec.Status.GetMessage() != "":
		return n.rec.Status.GetMessage()
	case n.held:
		return "its lease ended, and it is not given up yet because many others are silent, too"
	case n.fenced:
		return "its lease ended"
	}
	return "it had no session with this leader yet"
}

// NetCheck has nodes compare their kernels with the record. It takes a bounded time; a node that does not answer is in the reply with the
// reason.
func (d *Dispatcher) NetCheck(ctx context.Context, req *api.NetCheckRequest) (*api.NetCheckReply, error) {
	select {
	case d.netChecks <- struct{}{}:
		defer func() { <-d.netChecks }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	var nodes []*store.Node
	d.cfg.Store.View(func(tx store.ReadTx) {
		for _, rec := range tx.Nodes() {
			if !hasLeft(rec) && (len(req.Nodes) == 0 || slices.Contains(req.Nodes, rec.Id) || slices.Contains(req.Nodes, rec.Hostname)) {
				nodes = append(nodes, rec)
			}
		}
	})
	for _, name := range req.Nodes {
		if !slices.ContainsFunc(nodes, func(rec *store.Node) bool { return rec.Id == name || rec.Hostname == name }) {
			return nil, api.Errorf(errdefs.ErrNotFound, "node %s not found", name)
		}
	}
	reply := &api.NetCheckReply{Nodes: make([]*api.NetCheckNode, len(nodes))}
	turn := make(chan struct{}, netCheckNodes)
	var wg sync.WaitGroup
	for i, rec := range nodes {
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			reply.Nodes[i] = d.netCheckNode(ctx, rec, req.Repair)
		})
	}
	wg.Wait()
	slices.SortFunc(reply.Nodes, func(a, b *api.NetCheckNode) int {
		if c := strings.Compare(a.Hostname, b.Hostname); c != 0 {
			return c
		}
		return strings.Compare(a.NodeId, b.NodeId)
	})
	return reply, nil
}

// netCheckNode asks one node.
func (d *Dispatcher) netCheckNode(ctx context.Context, rec *store.Node, repair bool) *api.NetCheckNode {
	began := time.Now()
	out, err := d.askNetCheck(ctx, rec.RpcAddr, repair)
	if err != nil {
		out = &api.NetCheckNode{Err: notAnswered(rec, err)}
	}
	out.NodeId, out.Hostname, out.TookNanos = rec.Id, rec.Hostname, time.Since(began).Nanoseconds()
	return out
}

func (d *Dispatcher) askNetCheck(ctx context.Context, addr string, repair bool) (*api.NetCheckNode, error) {
	if d.cfg.Dial == nil || addr == "" {
		return nil, errors.New("its address is not known")
	}
	conn, err := d.cfg.Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	agent := api.NewAgentClient(conn)
	reach, cancel := context.WithTimeout(ctx, netCheckReach)
	defer cancel()
	if _, err := agent.Ping(reach, &api.Empty{}); err != nil {
		return nil, err
	}
	ctx, done := context.WithTimeout(ctx, netCheckBound)
	defer done()
	return agent.CheckNetworks(ctx, &api.NetCheckRequest{Repair: repair})
}

// notAnswered says why a node was not compared.
func notAnswered(rec *store.Node, err error) string {
	switch status.Code(err) {
	case codes.Unimplemented:
		return "not compared: its version of skein cannot do that; upgrade it"
	case codes.DeadlineExceeded:
		err = errors.New("no answer in time")
	}
	if s, ok := status.FromError(err); ok {
		err = errors.New(s.Message())
	}
	text := fmt.Sprintf("not compared: the node does not answer at %s: %v", rec.RpcAddr, err)
	if rec.Status.GetState() == nodeDown {
		text += " (it is down: " + rec.Status.GetMessage() + ")"
	}
	return text
}
