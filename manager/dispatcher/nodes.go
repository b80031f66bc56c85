package dispatcher

import (
	"container/heap"
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/store"
)

// States of a node, as the store has them.
const (
	nodeUnknown = "unknown"
	nodeReady   = "ready"
	nodeDown    = "down"
)

// node is what this leader knows of one node.
type node struct {
	id      string
	rec     *store.Node  // newest seen
	seen    atomic.Int64 // unix nanos of the last message; written by the session's reader
	session *session     // nil: none
	fenced  bool         // its lease ended: it has no say
	leased  bool         // has an entry in the lease heap
	probing bool
	since   time.Time // of being fenced
	acked   map[string]*api.TableAck
	nets    map[string]int      // live tasks here per network: the tables it needs
	changed map[string]struct{} // tasks whose assignment may have changed
}

func newNode(rec *store.Node) *node {
	n := &node{id: rec.Id, rec: rec, acked: map[string]*api.TableAck{}, nets: map[string]int{}, changed: map[string]struct{}{}}
	n.fenced = rec.Status.GetState() == nodeDown
	if n.fenced {
		n.since = time.Unix(0, rec.Meta.GetUpdated())
	}
	return n
}

// hasSay reports whether drains wait for this node: it has a session, or had one and its lease still runs.
func (n *node) hasSay() bool {
	return n.session != nil || (!n.fenced && n.rec.Status.GetState() == nodeReady)
}

// register begins a session: it ends a former one, records the node, and sends everything.
func (d *Dispatcher) register(s *session, h *api.Hello) (*node, error) {
	d.flush() // so that the full set is of the newest store
	n := d.nodes[s.node]
	if n == nil {
		return nil, api.Errorf(errdefs.ErrPermissionDenied, "node %s is not part of this cluster: it was removed; let it leave and join again", s.node)
	}
	if n.session != nil {
		n.session.end(api.Errorf(errdefs.ErrAborted, "node %s began another session", s.node))
	}
	n.session, n.fenced = s, false
	n.seen.Store(time.Now().UnixNano())
	d.lease(n, time.Now().Add(lease))
	n.acked = make(map[string]*api.TableAck, len(h.Acks))
	for _, a := range h.Acks {
		if t := d.spread.tables[a.Table]; t != nil && a.Version > t.version {
			continue // of a history that this cluster does not have: it was restored from a backup
		}
		n.acked[a.Table] = a
	}
	d.writer.node(n.id, h)
	d.intake(n, h.Statuses)
	d.cfg.Store.View(func(tx store.ReadTx) { d.greet(tx, n) })
	d.cfg.Log.Info("session", "node", n.id, "hostname", h.Hostname)
	return n, nil
}

// leave notes that a session's stream ended. The node stays ready until its lease ends: its daemon may only be restarting.
func (d *Dispatcher) leave(s *session) {
	if n := d.nodes[s.node]; n != nil && n.session == s {
		n.session = nil
		d.cfg.Log.Info("session ended", "node", n.id, "err", s.err)
	}
}

// lease makes sure that the node is looked at when its lease may have ended.
func (d *Dispatcher) lease(n *node, at time.Time) {
	if n.leased {
		return // the entry is checked against the last message when it is due
	}
	n.leased = true
	heap.Push(&d.leases, leaseEntry{at: at, node: n})
	d.armExpiry()
}

func (d *Dispatcher) armExpiry() {
	if len(d.leases) > 0 {
		d.expiry.Reset(time.Until(d.leases[0].at))
	}
}

// expire looks at the leases that may have ended.
func (d *Dispatcher) expire() {
	now := time.Now()
	stalled := len(d.leases) > 0 && now.Sub(d.leases[0].at) > heartbeat // this process did not run: it cannot say who was silent
	for len(d.leases) > 0 && !d.leases[0].at.After(now) {
		n := heap.Pop(&d.leases).(leaseEntry).node
		n.leased = false
		if d.nodes[n.id] != n || n.fenced {
			continue
		}
		if stalled {
			d.lease(n, now.Add(2*heartbeat))
			continue
		}
		if seen := n.seen.Load(); seen > 0 {
			if end := time.Unix(0, seen).Add(lease); end.After(now) {
				d.lease(n, end)
				continue
			}
			d.down(n, fmt.Sprintf("heartbeat failure: nothing heard for %v", lease))
			continue
		}
		d.down(n, fmt.Sprintf("no session with the leader within %v", grace))
	}
	d.armExpiry()
}

// down fences a node: its tasks count as gone for traffic, and it has no say until it returns.
func (d *Dispatcher) down(n *node, why string) {
	n.fenced, n.since = true, time.Now()
	if n.session != nil {
		n.session.end(api.Errorf(errdefs.ErrUnavailable, "node %s: %s", n.id, why))
		n.session = nil
	}
	d.cfg.Log.Warn("node is down", "node", n.id, "why", why)
	d.writer.status(&api.NodeStatus{NodeId: n.id, State: nodeDown, Message: why})
	d.dirty.drains = true
	d.schedule()
}

// probe asks a suspected node directly, and fences it when it does not answer.
func (d *Dispatcher) probe(id string) {
	n := d.nodes[id]
	if n == nil || n.fenced || n.probing || n.rec.RpcAddr == "" || d.cfg.Dial == nil || id == d.cfg.NodeID {
		return
	}
	select {
	case d.probes <- struct{}{}:
	default:
		return // many are suspected at once: the leases decide
	}
	n.probing = true
	addr, began := n.rec.RpcAddr, time.Now().UnixNano()
	d.wg.Go(func() {
		alive := d.answers(d.ctx, addr)
		<-d.probes
		_ = d.do(d.ctx, func() {
			n.probing = false
			if !alive && d.nodes[id] == n && !n.fenced && n.seen.Load() < began {
				d.down(n, "suspected by its peers and does not answer")
			}
		})
	})
}

// answers pings a node. A refused connection answers fast, yet a daemon that restarts refuses too: it is asked again until the time of
// all tries is over.
func (d *Dispatcher) answers(ctx context.Context, addr string) bool {
	ctx, cancel := context.WithTimeout(ctx, pingTries*pingTimeout)
	defer cancel()
	again := time.NewTicker(pingPause)
	defer again.Stop()
	for ctx.Err() == nil {
		try, done := context.WithTimeout(ctx, pingTimeout)
		err := d.ping(try, addr)
		done()
		if err == nil {
			return true
		}
		select {
		case <-ctx.Done():
		case <-again.C:
		}
	}
	return d.ctx.Err() != nil // the term ended: nothing is decided
}

func (d *Dispatcher) ping(ctx context.Context, addr string) error {
	conn, err := d.cfg.Dial(ctx, addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = api.NewAgentClient(conn).Ping(ctx, &api.Empty{})
	return err
}

// orphan gives up the tasks of nodes that have been down for long.
func (d *Dispatcher) orphan() {
	for _, n := range d.nodes {
		if !n.fenced || time.Since(n.since) < orphanAfter {
			continue
		}
		d.cfg.Store.View(func(tx store.ReadTx) {
			for _, t := range tx.TasksByNode(n.id) {
				if t.Live() {
					d.writer.report(&api.TaskReport{
						TaskId: t.ID, State: uint32(api.TaskOrphaned), Time: time.Now().UnixNano(), NodeId: n.id,
						Message: "orphaned", Err: fmt.Sprintf("node %s has been down for %v", n.id, orphanAfter),
					})
				}
			}
		})
	}
}

type leaseEntry struct {
	at   time.Time
	node *node
}

// leaseHeap orders nodes by the next instant at which their lease may have ended; each node has at most one entry.
type leaseHeap []leaseEntry

func (h leaseHeap) Len() int           { return len(h) }
func (h leaseHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h leaseHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *leaseHeap) Push(x any)        { *h = append(*h, x.(leaseEntry)) }
func (h *leaseHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	*h = old[:len(old)-1]
	return e
}
