package consensus

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/raft"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
)

// Bounds of proposing. An entry sits in front of the leader's heartbeats on every connection, hence the small ones.
const (
	maxEntryBytes  = 256 << 10 // transactions are gathered up to this
	maxTxnBytes    = 4 << 20   // one transaction, which is never split
	maxQueuedBytes = 8 << 20   // waiting or in flight; more callers wait for room
	maxInFlight    = 4         // entries
)

// request is one call of Propose.
type request struct {
	ctx     context.Context
	left    int   // transactions without a result
	weight  int64 // of room
	version uint64
	results []error
	err     error
	done    chan struct{}
}

// item is one transaction of a request.
type item struct {
	req  *request
	at   int
	txn  *api.Txn
	size int
}

// queue holds what waits to be proposed.
type queue struct {
	room *semaphore.Weighted // bytes

	mu       sync.Mutex
	items    []item
	bytes    int
	inFlight int
	wake     chan struct{}
}

func newQueue() *queue {
	return &queue{room: semaphore.NewWeighted(maxQueuedBytes), wake: make(chan struct{}, 1)}
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// take removes the next batch: at once when nothing is in flight; behind an outstanding entry only what fills one.
func (q *queue) take() []item {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.items) == 0 || q.inFlight >= maxInFlight || (q.inFlight > 0 && q.bytes < maxEntryBytes) {
		return nil
	}
	n, size := 0, 0
	for n < len(q.items) && (n == 0 || size+q.items[n].size <= maxEntryBytes) {
		size += q.items[n].size
		n++
	}
	batch := q.items[:n:n]
	if q.items = q.items[n:]; len(q.items) == 0 {
		q.items = nil
	}
	q.bytes -= size
	q.inFlight++
	return batch
}

func (q *queue) landed() {
	q.mu.Lock()
	q.inFlight--
	q.mu.Unlock()
	q.signal()
}

// Propose implements store.Proposer. Transactions of one call keep their order, but may become several entries.
func (n *Node) Propose(ctx context.Context, txns []*api.Txn) (uint64, []error, error) {
	const doing = "write to the cluster"
	if !n.IsLeader() {
		return 0, nil, n.notLeader(doing)
	}
	r := &request{ctx: ctx, left: len(txns), results: make([]error, len(txns)), done: make(chan struct{})}
	items := make([]item, len(txns))
	total := 0
	for i, t := range txns {
		size := proto.Size(t) + 8
		if size > maxTxnBytes {
			return 0, nil, api.Errorf(errdefs.ErrInvalidArgument, "%s: one transaction has %d bytes, the limit is %d: make smaller objects", doing, size, maxTxnBytes)
		}
		items[i] = item{req: r, at: i, txn: t, size: size}
		total += size
	}
	if total == 0 {
		return n.cfg.Store.Version(), nil, nil
	}
	r.weight = int64(min(total, maxQueuedBytes))
	if err := n.queue.room.Acquire(ctx, r.weight); err != nil {
		return 0, nil, fmt.Errorf("%s: too many writes are waiting: %w", doing, err)
	}
	n.queue.mu.Lock()
	n.queue.items = append(n.queue.items, items...)
	n.queue.bytes += total
	n.queue.mu.Unlock()
	n.queue.signal()
	select {
	case <-r.done:
		return r.version, r.results, r.err
	case <-n.closed:
		return 0, nil, unavailable("%s: this manager is stopping; whether it was done is unknown", doing)
	case <-ctx.Done():
		return 0, nil, fmt.Errorf("%s: no majority answered in time; whether it was done is unknown: %w", doing, ctx.Err())
	}
}

// proposeLoop is the only caller of raft.Apply, so that entries keep the order of the queue.
func (n *Node) proposeLoop() {
	defer n.wg.Done()
	for {
		batch := n.queue.take()
		if batch == nil {
			select {
			case <-n.queue.wake:
			case <-n.closed:
				return
			}
			continue
		}
		n.propose(batch)
	}
}

func (n *Node) propose(batch []item) {
	batch = n.dropAbandoned(batch)
	if len(batch) == 0 {
		n.queue.landed()
		return
	}
	f, err := n.apply(batch)
	if err != nil {
		n.finish(batch, 0, nil, err)
		n.queue.landed()
		return
	}
	n.wg.Add(1)
	go func() { // at most maxInFlight
		defer n.wg.Done()
		err := n.mapError("write to the cluster", f.Error())
		results, _ := f.Response().([]error)
		if err == nil && len(results) != len(batch) {
			err = api.Errorf(errdefs.ErrInternal, "write to the cluster: %d results for %d transactions: %v", len(results), len(batch), results)
		}
		n.finish(batch, f.Index(), results, err)
		n.queue.landed()
	}()
}

func (n *Node) apply(batch []item) (raft.ApplyFuture, error) {
	if err := n.reserve.check(); err != nil {
		return nil, n.handOver(err)
	}
	n.handed = time.Time{} // there was room: should it end again, that is another time
	txns := make([]*api.Txn, len(batch))
	for i, it := range batch {
		txns[i] = it.txn
	}
	entry, err := n.cfg.Store.EncodeEntry(n.cfg.Now().UnixNano(), txns)
	if err != nil {
		return nil, api.Errorf(errdefs.ErrInvalidArgument, "write to the cluster: encode: %v", err)
	}
	return n.raft.Apply(entry, 5*time.Second), nil
}

// dropAbandoned leaves out transactions whose caller is gone already.
func (n *Node) dropAbandoned(batch []item) []item {
	kept := batch[:0]
	for _, it := range batch {
		if err := it.req.ctx.Err(); err != nil {
			n.finish([]item{it}, 0, nil, fmt.Errorf("write to the cluster: not proposed: %w", err))
			continue
		}
		kept = append(kept, it)
	}
	return kept
}

// finish hands results to their requests. The first error of any part is the request's.
func (n *Node) finish(batch []item, version uint64, results []error, err error) {
	n.queue.mu.Lock()
	defer n.queue.mu.Unlock()
	for i, it := range batch {
		r := it.req
		if err == nil {
			r.results[it.at] = results[i]
			r.version = max(r.version, version)
		} else if r.err == nil {
			r.err = err
		}
		if r.left--; r.left == 0 {
			n.queue.room.Release(r.weight)
			close(r.done)
		}
	}
}
