package dispatcher

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

const (
	// factsWait bounds the wait for nodes that were asked for their facts; what they said before counts for those that do not answer.
	factsWait = time.Second
	// factsAsked is how many nodes are asked at most: in larger clusters what they said last must do.
	factsAsked = 256
	// Bounds of what a node may say.
	maxFactRoutes = 1 << 14
	maxFactNodes  = 1 << 14
	maxFactPorts  = 1 << 17
	maxFactText   = 256
)

// NodeFacts are what a node that has a session said of its surroundings last.
type NodeFacts struct {
	NodeID   string
	Hostname string
	Underlay string // its tunnel address
	*api.NodeFacts
}

// factsQuery waits for answers.
type factsQuery struct {
	sequence uint64
	open     map[*node]bool
	done     chan struct{}
}

// Facts are those of all nodes with a session, by hostname. With fresh, nodes are asked first, and waited for a moment.
func (d *Dispatcher) Facts(ctx context.Context, fresh bool) ([]NodeFacts, error) {
	if fresh {
		q := &factsQuery{open: map[*node]bool{}, done: make(chan struct{})}
		if err := d.call(ctx, func() { d.askFacts(q) }); err != nil {
			return nil, fmt.Errorf("facts of the nodes: %w", err)
		}
		limit := time.NewTimer(factsWait)
		defer limit.Stop()
		select {
		case <-q.done:
		case <-limit.C:
		case <-ctx.Done():
		}
	}
	var out []NodeFacts
	err := d.call(ctx, func() {
		for _, n := range d.nodes {
			if n.facts != nil && n.session != nil {
				out = append(out, NodeFacts{n.id, n.rec.Hostname, n.rec.UnderlayAddr, n.facts})
			}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("facts of the nodes: %w", err)
	}
	slices.SortFunc(out, func(a, b NodeFacts) int {
		return cmp.Or(strings.Compare(a.Hostname, b.Hostname), strings.Compare(a.NodeID, b.NodeID))
	})
	return out, nil
}

func (d *Dispatcher) askFacts(q *factsQuery) {
	now := time.Now()
	q.sequence = uint64(now.UnixNano())
	d.queries = slices.DeleteFunc(d.queries, func(o *factsQuery) bool { return now.Sub(time.Unix(0, int64(o.sequence))) > factsWait })
	if len(d.nodes) <= factsAsked {
		for _, n := range d.nodes {
			if n.session != nil && n.facts != nil { // else its version knows nothing of them, or it is about to say them
				q.open[n] = true
				n.session.push(&api.ManagerMessage{Kind: &api.ManagerMessage_Facts{Facts: &api.FactsRequest{Sequence: q.sequence}}}, 0)
			}
		}
	}
	if len(q.open) == 0 {
		close(q.done)
		return
	}
	d.queries = append(d.queries, q)
}

// noteFacts takes what a node says.
func (d *Dispatcher) noteFacts(n *node, f *api.NodeFacts) {
	n.facts = f
	d.queries = slices.DeleteFunc(d.queries, func(q *factsQuery) bool {
		if q.open[n] && f.Answers >= q.sequence {
			delete(q.open, n)
		}
		if len(q.open) > 0 {
			return false
		}
		close(q.done)
		return true
	})
	d.lowerMTUs()
}

func checkFacts(node string, f *api.NodeFacts) error {
	long := func(s string) bool { return len(s) > maxFactText }
	if len(f.NoSession) > maxFactNodes || len(f.Routes) > maxFactRoutes || len(f.Ports) > maxFactPorts ||
		slices.ContainsFunc(f.Routes, func(r *api.FactRoute) bool { return long(r.Prefix) || long(r.Device) }) ||
		slices.ContainsFunc(f.Ports, func(p *api.FactPort) bool { return long(p.Protocol) || long(p.Holder) }) {
		return api.Errorf(errdefs.ErrInvalidArgument, "node %s: its facts are too large: %d routes (at most %d), %d ports (at most %d), or a text of more than %d bytes",
			node, len(f.Routes), maxFactRoutes, len(f.Ports), maxFactPorts, maxFactText)
	}
	return nil
}
