package dispatcher

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

const (
	// batchBound is how many transactions go to the store at once, some entries in flight; meanwhile the next ones gather.
	batchBound = 8000
	writeRetry = 100 * time.Millisecond
)

// writer carries observations to the store: one batch on its way at a time, the newest observation of each object in it. What waits is
// bounded by the number of tasks and nodes.
type writer struct {
	store Store
	log   *slog.Logger
	wake  chan struct{}

	mu       sync.Mutex
	order    []string // task ids
	reports  map[string]*api.TaskReport
	hellos   map[string]*api.Hello
	statuses map[string]*api.NodeStatus
}

func newWriter(s Store, log *slog.Logger) *writer {
	return &writer{
		store: s, log: log, wake: make(chan struct{}, 1),
		reports: map[string]*api.TaskReport{}, hellos: map[string]*api.Hello{}, statuses: map[string]*api.NodeStatus{},
	}
}

func (w *writer) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// report has a task's report written, unless a greater one comes before it is.
func (w *writer) report(r *api.TaskReport) {
	w.mu.Lock()
	w.reportLocked(r)
	w.mu.Unlock()
	w.poke()
}

func (w *writer) reportLocked(r *api.TaskReport) {
	old := w.reports[r.TaskId]
	if old == nil {
		w.order = append(w.order, r.TaskId)
	} else if old.State > r.State {
		return
	}
	w.reports[r.TaskId] = r
}

// node has a node recorded as its agent describes it, and as ready.
func (w *writer) node(id string, h *api.Hello) {
	w.mu.Lock()
	w.hellos[id] = h
	delete(w.statuses, id)
	w.mu.Unlock()
	w.poke()
}

// said has recorded what a node says of one thing alone, its certificate or its addresses: a hello that says nothing else.
func (w *writer) said(id string, part *api.Hello) {
	w.mu.Lock()
	if h := w.hellos[id]; h != nil {
		add(h, part) // it is written as soon as the rest
	} else {
		w.hellos[id] = part
	}
	w.mu.Unlock()
	w.poke()
}

// add puts into h what a newer part says.
func add(h, part *api.Hello) {
	if part.Tls != nil {
		h.Tls = part.Tls
	}
	if part.Crypt != nil {
		h.Crypt = part.Crypt
	}
	if part.Addrs != nil {
		h.Addrs = part.Addrs
	}
}

// status has a node's status recorded.
func (w *writer) status(s *api.NodeStatus) {
	w.mu.Lock()
	w.statuses[s.NodeId] = s
	w.mu.Unlock()
	w.poke()
}

func (w *writer) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		}
		for ctx.Err() == nil {
			b := w.take()
			if len(b.txns) == 0 {
				break
			}
			_, results, err := w.store.Batch(ctx, b.txns)
			if err != nil {
				if ctx.Err() != nil {
					return
				}
				w.log.Warn("write observations", "transactions", len(b.txns), "err", err)
				w.putBack(b)
				t := time.NewTimer(writeRetry)
				select {
				case <-t.C:
				case <-ctx.Done():
				}
				t.Stop()
				continue
			}
			w.settle(b, results)
		}
	}
}

// batch is what is on its way; the slices are parallel to txns, with one of the three set.
type batch struct {
	txns     []*api.Txn
	reports  []*api.TaskReport
	hellos   []*api.Hello
	nodes    []string
	statuses []*api.NodeStatus
}

func (b *batch) add(r *api.TaskReport, node string, h *api.Hello, s *api.NodeStatus, changes ...*api.Change) {
	b.txns = append(b.txns, &api.Txn{Changes: changes})
	b.reports, b.nodes, b.hellos, b.statuses = append(b.reports, r), append(b.nodes, node), append(b.hellos, h), append(b.statuses, s)
}

// take moves what waits into a batch: nodes first, a node's description before its status.
func (w *writer) take() *batch {
	w.mu.Lock()
	hellos := w.hellos
	w.hellos = map[string]*api.Hello{}
	w.mu.Unlock()
	b := &batch{}
	w.store.View(func(tx store.ReadTx) { // not under the lock: others take it inside a view
		for id, h := range hellos {
			if changes := describe(tx.Node(id), h, tx.Cluster().GetFeatureLevel()); changes != nil {
				b.add(nil, id, h, nil, changes...)
			}
		}
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, s := range w.statuses {
		b.add(nil, id, nil, s, &api.Change{Kind: &api.Change_NodeStatus{NodeStatus: s}})
	}
	clear(w.statuses)
	n := min(len(w.order), batchBound)
	for _, id := range w.order[:n] {
		r := w.reports[id]
		b.add(r, "", nil, nil, &api.Change{Kind: &api.Change_ReportTask{ReportTask: r}})
		delete(w.reports, id)
	}
	w.order = append([]string(nil), w.order[n:]...)
	return b
}

// describe returns the changes that make a node's record agree with what its agent says; nil when the node is gone.
func describe(rec *store.Node, h *api.Hello, level uint32) []*api.Change {
	if rec == nil {
		return nil
	}
	ready := &api.NodeStatus{NodeId: rec.Id, State: nodeReady}
	next := proto.Clone(rec).(*api.NodeRecord)
	update := func(field *string, said string) { // what an agent does not say stays as it was registered
		if said != "" {
			*field = said
		}
	}
	update(&next.Hostname, h.Hostname)
	update(&next.UnderlayAddr, h.UnderlayAddr)
	update(&next.RpcAddr, h.RpcAddr)
	if len(h.DescriptionJson) > 0 {
		next.DescriptionJson = h.DescriptionJson
	}
	whole := h.FeatureLevel > 0 || h.Hostname != "" // else it says nothing but its certificate or its keys
	if whole {
		next.FeatureLevel = h.FeatureLevel
	}
	if (whole || h.Crypt != nil) && validCrypt(h.Crypt) && level >= api.LevelNetworks {
		next.Crypt = h.Crypt
	}
	if validTLS(h.Tls) {
		next.Tls = h.Tls
	}
	if h.Addrs != nil && validAddrs(h.Addrs) && level >= api.LevelNetworks {
		next.Addrs = h.Addrs.Addrs
	}
	if proto.Equal(next, rec) {
		return []*api.Change{{Kind: &api.Change_NodeStatus{NodeStatus: ready}}}
	}
	next.Status = ready
	return []*api.Change{
		{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "node", Id: rec.Id, Version: rec.Meta.GetVersion()}}},
		{Kind: &api.Change_PutNode{PutNode: next}},
	}
}

// putBack returns a batch of unknown outcome to the queue; writing an observation twice changes nothing.
func (w *writer) putBack(b *batch) {
	for i := range b.txns {
		w.again(b, i)
	}
	w.poke()
}

func (w *writer) again(b *batch, i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case b.reports[i] != nil:
		w.reportLocked(b.reports[i])
	case b.hellos[i] != nil:
		waiting := w.hellos[b.nodes[i]]
		switch {
		case waiting == nil && w.statuses[b.nodes[i]] == nil:
			w.hellos[b.nodes[i]] = b.hellos[i]
		case waiting != nil && waiting.RpcAddr == "": // it says nothing but what is newer
			said := proto.Clone(b.hellos[i]).(*api.Hello)
			add(said, waiting)
			w.hellos[b.nodes[i]] = said
		}
	case w.hellos[b.nodes[i]] == nil && w.statuses[b.nodes[i]] == nil:
		w.statuses[b.nodes[i]] = b.statuses[i]
	}
}

// settle looks at what the store refused: a node's record that changed meanwhile is described once more, the rest has become void.
func (w *writer) settle(b *batch, results []error) {
	for i, err := range results {
		switch {
		case err == nil:
		case b.hellos[i] != nil && (errdefs.IsConflict(err) || errdefs.IsAborted(err)):
			w.again(b, i)
			w.poke()
		case b.reports[i] != nil:
			w.log.Debug("report refused", "task", b.reports[i].TaskId, "err", err)
		default:
			w.log.Warn("node's record refused", "node", b.nodes[i], "err", err)
		}
	}
}

// validAddrs tells that all are addresses that a client can have, and not too many: they are kept in the log and sent to all nodes.
func validAddrs(a *api.NodeAddrs) bool {
	return len(a.Addrs) <= api.MaxNodeAddrs && !slices.ContainsFunc(a.Addrs, func(text string) bool {
		ip, err := netip.ParseAddr(text)
		return err != nil || !ip.IsGlobalUnicast() || ip.Zone() != ""
	})
}
