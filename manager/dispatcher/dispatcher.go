// Package dispatcher is the managers' side of the agents' sessions. It lives on the leader, one value per term.
//
// What it does: it registers nodes and notices when they are gone (the lease is the truth; a hint of memberlist only makes it look
// at once); sends each node its assignments and the endpoint tables it needs, first in full, then what changed; takes reports in
// and writes those worth keeping to the store; and computes drains: a task may be stopped once every live node acknowledged a table
// without it in rotation.
//
// Guarantees: assignments and tables are pure functions of the store; tables carry the store's version they were computed from, so
// that versions of one leader mean the same to the next; a slow session is ended, never waited for; nothing is kept that a new
// leader cannot compute again or agents cannot tell again. Must not: decide which tasks exist, know kernels. One goroutine (Run) owns
// all state; others hand it functions. Used by package manager; agents are its only clients.
package dispatcher

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	"skein/manager/api"
	"skein/manager/store"
)

// Times and bounds of sessions. A lease of four beats tells a pause of the collector from a dead node.
const (
	heartbeat = time.Second
	lease     = 4 * time.Second
	// grace is how long a new leader waits for nodes it has not heard of yet: they look for it once a second or faster.
	grace = 5 * time.Second
	// Thousands of nodes take longer: as long as one that was not heard of yet came back within herdPause, the others may be on their way,
	// too, up to herdBound after the term began.
	herdPause  = 2 * time.Second
	herdBound  = 45 * time.Second
	helloBound = 5 * time.Second
	// gather is the least time between two rounds of updates: a burst of reports becomes one table version. A round that had much to do is
	// followed by a pause of its own length or of what sending costs, up to the limit, so that under load each message carries more. A round
	// that comes late says that this process has no time: the pause becomes a multiple of that, up to its own limit.
	gather      = 10 * time.Millisecond
	messageCost = 200 * time.Microsecond
	gatherLimit = 250 * time.Millisecond
	lateFactor  = 4
	lateLimit   = time.Second
	// tellBound and greetsBound are how many nodes are sent changes, and everything, in one round: a burst to thousands would come before
	// everything else that this process has to do, and before its word to the other managers.
	tellBound   = 256
	greetsBound = 64
	callsBound  = 1024 // functions waiting for Run; agents wait behind them
	pingTimeout = 700 * time.Millisecond
	pingTries   = 2
	pingPause   = 100 * time.Millisecond
	maxProbes   = 64 // at the same time
)

// Store is what the dispatcher needs of the store.
type Store interface {
	View(func(store.ReadTx))
	Batch(ctx context.Context, txns []*api.Txn) (version uint64, results []error, err error)
	Watch(kinds ...store.Kind) *store.Watcher
}

// Config of a Dispatcher.
type Config struct {
	Store Store
	// NodeID is this manager's node, the leader.
	NodeID string
	// Term is this term of the leader's: agents refuse older ones.
	Term uint64
	// Identify returns the node that a session's certificate names.
	Identify func(ctx context.Context) (nodeID string, err error)
	// Dial reaches a node's api.Agent service, for probes. The connection is closed after use.
	Dial func(ctx context.Context, addr string) (*grpc.ClientConn, error)
	Log  *slog.Logger
}

// errTermEnded ends sessions of a leader that is none any more.
var errTermEnded = api.Errorf(errdefs.ErrFailedPrecondition, "this manager is not the leader any more")

// Dispatcher serves agents during one term.
type Dispatcher struct {
	cfg       Config
	writer    *writer
	soft      *softStates
	calls     chan func()
	done      chan struct{} // closed when Run ends
	probes    chan struct{} // tokens
	netChecks chan struct{} // tokens
	wg        sync.WaitGroup
	watcher   *store.Watcher

	// All below belongs to Run.
	ctx          context.Context
	nodes        map[string]*node
	tasks        map[string]*taskEntry
	attached     map[string]*attachedEntry // containers that are no tasks
	spread       *spread
	dirty        dirty
	greets       []*node // with sessions that wait for everything
	creds        *credentials
	wheel        *wheel
	began        time.Time // of the term
	came         time.Time // when a node began its first session of the term
	turned       time.Time // of the wheel
	turn         *time.Ticker
	caution      caution
	drainTimeout int64               // of services that say nothing; see drainTimeoutOf
	heldSaid     time.Time           // when many silent nodes were logged
	managers     *api.ManagerMessage // encoded list; nil: it changed
	managersSize int
	templates    map[templateKey]*template
	queries      []*factsQuery
	mtu          uint32 // what networks were compared with last, at mtuAt
	mtuAt        time.Time
	mtuBusy      bool // their records are on the way
	flushAt      *time.Timer
	told         int           // nodes that the round sent something
	flushed      time.Time     // when the last round ended
	pause        time.Duration // before the next one
	due          time.Time     // when flushAt is to fire
}

// New returns a dispatcher that does nothing before Run.
func New(cfg Config) *Dispatcher {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Dispatcher{
		cfg: cfg, writer: newWriter(cfg.Store, cfg.Log), soft: newSoftStates(),
		calls: make(chan func(), callsBound), done: make(chan struct{}), probes: make(chan struct{}, maxProbes), netChecks: make(chan struct{}, netCheckCalls),
		nodes: map[string]*node{}, tasks: map[string]*taskEntry{}, attached: map[string]*attachedEntry{}, spread: newSpread(), templates: map[templateKey]*template{}, caution: cautionOf(nil),
		creds: newCredentials(),
	}
}

// Run serves until ctx, the term, ends; then all sessions end and their agents look for the next leader.
func (d *Dispatcher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.ctx = ctx
	d.watcher = d.cfg.Store.Watch()
	defer d.watcher.Close()
	d.flushAt = time.NewTimer(0)
	defer d.flushAt.Stop()
	d.began = time.Now()
	d.due = d.began
	d.turned, d.wheel = d.began, newWheel(d.began)
	d.turn = time.NewTicker(wheelStep)
	defer d.turn.Stop()
	d.wg.Go(func() { d.writer.run(ctx) })
	d.dirty.all = true
	d.flush()
	d.loop(ctx)
	close(d.done)
	d.creds.stop()
	for _, n := range d.nodes {
		if n.session != nil {
			n.session.end(errTermEnded)
		}
	}
	cancel()
	d.wg.Wait()
	return ctx.Err()
}

func (d *Dispatcher) loop(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case f := <-d.calls:
			f()
		case <-d.watcher.C():
			d.schedule()
		case <-d.flushAt.C:
			d.flush()
		case <-d.turn.C:
			d.expire()
		}
	}
}

// schedule sees to it that a round of updates comes: at once, unless there was one just now.
func (d *Dispatcher) schedule() {
	wait := max(0, d.pause-time.Since(d.flushed))
	if !d.due.After(d.flushed) { // else it was due before, and is late if that is over
		d.due = time.Now().Add(wait)
	}
	d.flushAt.Reset(wait)
}

// do has Run execute f. It waits for a place in the queue, not for f.
func (d *Dispatcher) do(ctx context.Context, f func()) error {
	select {
	case <-d.done:
		return errTermEnded
	default:
	}
	select {
	case d.calls <- f:
		return nil
	case <-d.done:
		return errTermEnded
	case <-ctx.Done():
		return ctx.Err()
	}
}

// call has Run execute f and waits for it.
func (d *Dispatcher) call(ctx context.Context, f func()) error {
	ran := make(chan struct{})
	if err := d.do(ctx, func() { f(); close(ran) }); err != nil {
		return err
	}
	select {
	case <-ran:
		return nil
	case <-d.done:
		return errTermEnded
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Hint tells that a node may be dead (memberlist suspects it): it is probed at once. Only the probe or the lease decides. It never
// blocks: a hint that finds the queue full is dropped, the lease ends all the same.
func (d *Dispatcher) Hint(nodeID string) {
	select {
	case d.calls <- func() { d.probe(nodeID) }:
	default:
	}
}

// SoftState returns the newest report of a task that is not worth a log entry; nil when the store knows as much.
func (d *Dispatcher) SoftState(taskID string) *api.TaskReport { return d.soft.get(taskID) }

// isTermEnd reports whether a session ended because its manager is not the leader.
func isTermEnd(err error) bool { return errors.Is(err, errTermEnded) }
