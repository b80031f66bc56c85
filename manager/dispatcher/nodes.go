package dispatcher

import (
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
	held    bool         // fenced, and not declared down since many others are silent, too
	leased  bool         // is in the wheel
	probing bool
	since   time.Time // of being fenced
	lost    time.Time // when this leader declared it down
	starts  allowance // of sessions
	acked   map[string]*api.TableAck
	facts   *api.NodeFacts // nil: not said in this session
	nets    map[string]int // live tasks here per network: the tables it needs
	changed []string       // tasks whose assignment may have changed
	removed []string       // tasks that it was sent and that are not its any more
	listed  bool           // among those that are to be told
}

// allowance lets sessions of a node begin in a burst, then one in a while: an agent that loses each at once, or two machines with one
// identity, must not keep the leader busy.
type allowance struct{ until time.Time }

const (
	startBurst = 8
	startEvery = 2 * time.Second
)

// take reports whether another one may begin.
func (a *allowance) take(now time.Time) bool {
	if a.until.Before(now) {
		a.until = now
	}
	if a.until.Sub(now) > (startBurst-1)*startEvery {
		return false
	}
	a.until = a.until.Add(startEvery)
	return true
}

func newNode(rec *store.Node) *node {
	n := &node{id: rec.Id, rec: rec, acked: map[string]*api.TableAck{}, nets: map[string]int{}}
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

// register begins a session: it ends a former one and records the node. Everything is sent by greet, when it is its turn.
func (d *Dispatcher) register(s *session, h *api.Hello) (*node, error) {
	n := d.nodes[s.node]
	if n == nil {
		d.flush() // it may have joined a moment ago
		if n = d.nodes[s.node]; n == nil {
			return nil, errNotMember(s.node)
		}
	}
	now := time.Now()
	if !n.starts.take(now) {
		return nil, api.Errorf(errdefs.ErrResourceExhausted, "node %s began %d sessions in a row: one every %v is taken; is its identity in use on two machines?", n.id, startBurst, startEvery)
	}
	if n.session != nil {
		n.session.end(api.Errorf(errdefs.ErrAborted, "node %s began another session", s.node))
	}
	n.session, n.fenced, n.held = s, false, false
	n.facts = nil
	if n.seen.Swap(now.UnixNano()) == 0 {
		d.came = now
	}
	d.lease(n, now.Add(lease))
	n.acked = make(map[string]*api.TableAck, len(h.Acks))
	for _, a := range h.Acks {
		if t := d.spread.tables[a.Table]; t != nil && a.Version > t.version {
			continue // of a history that this cluster does not have: it was restored from a backup
		}
		n.acked[a.Table] = a
	}
	s.holds = make(map[string]uint64, len(h.Tables))
	for _, t := range h.Tables {
		s.holds[t.Table] = t.Digest
	}
	d.writer.node(n.id, h)
	d.intake(n, h.Statuses)
	d.greets = append(d.greets, n)
	d.schedule()
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
		return // it is looked at earlier, and then put where it belongs
	}
	n.leased = true
	d.await(n, at)
}

// await puts a node into the wheel, which turns as long as there is one.
func (d *Dispatcher) await(n *node, at time.Time) {
	if d.wheel.count == 0 {
		d.turned = time.Now()
		d.wheel.due(d.turned) // nothing: it takes the steps that it stood still for
		d.turn.Reset(wheelStep)
	}
	d.wheel.add(n, at)
}

// expire looks at the leases that may have ended.
func (d *Dispatcher) expire() {
	now := time.Now()
	stalled := now.Sub(d.turned) > heartbeat // this process did not run: it cannot say who was silent
	d.turned = now
	for _, n := range d.wheel.due(now) {
		n.leased = false
		seen := n.seen.Load()
		end := time.Unix(0, seen).Add(lease)
		switch {
		case d.nodes[n.id] != n || (n.fenced && !n.held):
		case stalled:
			d.lease(n, now.Add(2*heartbeat))
		case n.held:
			d.recheck(n, now)
		case seen > 0 && end.After(now):
			d.lease(n, end)
		case seen > 0:
			d.absent(n, fmt.Sprintf("heartbeat failure: nothing heard for %v", lease), now)
		case now.Sub(d.came) < herdPause && now.Sub(d.began) < herdBound:
			d.lease(n, d.came.Add(herdPause))
		default:
			d.absent(n, fmt.Sprintf("no session with the leader within %v", max(grace, now.Sub(d.began).Round(time.Second))), now)
		}
	}
	if d.wheel.count == 0 {
		d.turn.Stop()
	}
}

// fence takes a node's say: its tasks count as gone for traffic until it returns.
func (d *Dispatcher) fence(n *node, why string) {
	n.fenced, n.since = true, time.Now()
	if n.session != nil {
		n.session.end(api.Errorf(errdefs.ErrUnavailable, "node %s: %s", n.id, why))
		n.session = nil
	}
	d.dirty.drains = true
	d.schedule()
}

// down fences a node for good: its tasks are replaced.
func (d *Dispatcher) down(n *node, why string) {
	d.fence(n, why)
	n.held, n.lost = false, n.since
	d.cfg.Log.Warn("node is down", "node", n.id, "why", why)
	d.writer.status(&api.NodeStatus{NodeId: n.id, State: nodeDown, Message: why})
}

// left is the message of a node that said goodbye.
const left = "the node left"

// goodbye has a node down that leaves the cluster. It is not among those that fell silent together.
func (d *Dispatcher) goodbye(n *node) {
	d.down(n, left)
	n.lost = time.Time{}
}

// hasLeft reports whether a node said goodbye and did not come back.
func hasLeft(rec *store.Node) bool {
	return rec.Status.GetState() == nodeDown && rec.Status.GetMessage() == left
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
				d.absent(n, "suspected by its peers and does not answer", time.Now())
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
