package consensus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"skein/manager/api"
)

// leadership turns raft's notices into an ordered stream for one reader and knows when reads may be served.
type leadership struct {
	mu    sync.Mutex
	ready chan struct{} // closed when this term's barrier is applied; nil when not leading
	moved chan struct{} // closed and replaced when ready is
	out   chan bool
	queue []bool // not yet delivered: at most a loss and a gain
	wake  chan struct{}
}

func newLeadership() *leadership {
	return &leadership{moved: make(chan struct{}), out: make(chan bool), wake: make(chan struct{}, 1)}
}

// LeaderCh tells true when this node leads and has applied everything committed before its term, and false when it lost that. Each
// loss is delivered before the next gain, however slow the reader is. For one reader.
func (n *Node) LeaderCh() <-chan bool { return n.leaders.out }

// push queues a transition. Two opposite ones that nobody saw cancel out, but a loss the reader has to see stays.
func (l *leadership) push(leads bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.queue); n > 0 && l.queue[n-1] == leads {
		return
	}
	l.queue = append(l.queue, leads)
	if n := len(l.queue); n > 2 || (n == 2 && l.queue[0]) {
		l.queue = l.queue[:n-2]
	}
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (l *leadership) first() (bool, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) == 0 {
		return false, false
	}
	return l.queue[0], true
}

// deliver runs until closed.
func (l *leadership) deliver(closed <-chan struct{}) {
	for {
		v, ok := l.first()
		if !ok {
			select {
			case <-l.wake:
				continue
			case <-closed:
				return
			}
		}
		select {
		case l.out <- v:
			l.mu.Lock()
			if len(l.queue) > 0 && l.queue[0] == v {
				l.queue = l.queue[1:]
			} else { // cancelled out while it was being delivered
				l.queue = append(l.queue, !v)
			}
			l.mu.Unlock()
		case <-l.wake: // the queue changed
		case <-closed:
			return
		}
	}
}

func (l *leadership) setReady(ch chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ready = ch
	close(l.moved)
	l.moved = make(chan struct{})
}

func (l *leadership) current() (ready, moved chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ready, l.moved
}

// leaderLoop follows raft's notices. In a new term it runs a barrier before anybody is told.
func (n *Node) leaderLoop() {
	defer n.wg.Done()
	n.wg.Add(1)
	go func() {
		defer n.wg.Done()
		n.leaders.deliver(n.closed)
	}()
	told := false
	for {
		select {
		case <-n.closed:
			return
		case leads := <-n.notify:
			if told {
				n.leaders.push(false)
				told = false
			}
			if !leads {
				n.leaders.setReady(nil)
				continue
			}
			ready := make(chan struct{})
			n.leaders.setReady(ready)
			if err := n.termBarrier(); err != nil {
				n.log.Info("leadership was lost before it began", "error", err)
				n.leaders.setReady(nil)
				continue
			}
			close(ready)
			n.leaders.push(true)
			told = true
		}
	}
}

// termBarrier waits until the store shows everything of earlier terms.
func (n *Node) termBarrier() error {
	for {
		err := n.raft.Barrier(0).Error()
		if !errors.Is(err, raft.ErrLeadershipTransferInProgress) {
			return err
		}
		select { // raft has no event for the end of a hand-over that failed
		case <-time.After(n.cfg.Timing.Heartbeat / 4):
		case <-n.closed:
			return err
		}
	}
}

// Barrier returns when everything committed before the call is applied here. Leader only.
func (n *Node) Barrier(ctx context.Context) error {
	return n.mapError("wait for the log", wait(ctx, n.raft.Barrier(timeLeft(ctx))))
}

// VerifyLeader asks a majority whether this node still leads.
func (n *Node) VerifyLeader(ctx context.Context) error {
	return n.mapError("verify the leadership", wait(ctx, n.raft.VerifyLeader()))
}

// Linearizable returns when the store shows every write acknowledged before the call: it proves the leadership with a majority and
// waits until what was committed is applied. Leader only.
//
// Raft counts every answer to a heartbeat as proof, also one to a heartbeat sent long ago. Answers are old only if this process stood still
// (else it has stepped down, as its lease is shorter than an election); then an entry of the log is the proof, which nothing old can be.
func (n *Node) Linearizable(ctx context.Context) error {
	const doing = "read"
	if err := n.awaitTerm(ctx, doing); err != nil {
		return err
	}
	commit := n.raft.CommitIndex()
	if !n.stalls.recent(time.Now()) {
		if err := wait(ctx, n.raft.VerifyLeader()); err != nil {
			return n.mapError(doing, err)
		}
	}
	if n.stalls.recent(time.Now()) {
		return n.mapError(doing, wait(ctx, n.raft.Barrier(timeLeft(ctx))))
	}
	return n.progress.wait(ctx, commit)
}

// handOverPause is how long a leader whose disk is full waits before it hands the leadership on again: when all disks are full it goes
// around once.
const handOverPause = 30 * time.Second

// handOver gives the leadership to another manager because this one cannot take writes. The answer says whether the write may be sent
// again, or is full where there is nobody to hand it to. Called by proposeLoop alone.
func (n *Node) handOver(full error) error {
	peers, err := n.Peers()
	if err != nil || len(peers) < 2 {
		return full
	}
	if now := time.Now(); n.handed.IsZero() || now.Sub(n.handed) >= handOverPause {
		n.handed, n.handing = now, n.raft.LeadershipTransfer()
		n.log.Warn("the leadership is handed to another manager: this one has no room for writes", "error", full)
	}
	const most = 2 * time.Second // raft gives up after an election timeout
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	if err := wait(ctx, n.handing); err != nil || n.IsLeader() {
		return full
	}
	return api.NotDone(unavailable("write to the cluster: this manager has no room for writes (%v) and handed the leadership to another: try again", full))
}

// awaitTerm waits until the barrier of a term just begun is applied.
func (n *Node) awaitTerm(ctx context.Context, doing string) error {
	for {
		ready, moved := n.leaders.current()
		if ready == nil && !n.IsLeader() {
			return n.notLeader(doing)
		}
		select {
		case <-ready: // nil blocks
			return nil
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("%s: the new leader is not ready: %w", doing, ctx.Err())
		case <-n.closed:
			return unavailable("%s: this manager is stopping", doing)
		}
	}
}

// ReadIndex is Linearizable, and tells the version the store has reached at least.
func (n *Node) ReadIndex(ctx context.Context) (uint64, error) {
	if err := n.Linearizable(ctx); err != nil {
		return 0, err
	}
	return n.cfg.Store.Version(), nil
}

// WaitApplied returns when this manager, leader or not, has applied the store version: a follower shows a write it forwarded.
func (n *Node) WaitApplied(ctx context.Context, version uint64) error {
	return n.progress.waitVersion(ctx, version)
}
