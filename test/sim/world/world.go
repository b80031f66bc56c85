// Package world is a whole cluster in one goroutine: managers with real stores, controllers and the users' API, a replicated log, agents,
// containers, users and faults, all driven by one seed and one queue of events on a virtual clock. The same seed gives the same history.
//
// What is real: manager/store (one per manager), manager/orchestrator and manager/placement through loop.Driver, manager/control. What is
// modelled: Raft (log.go: entries that are lost, acknowledged late or never, leaders that do not know yet that they are deposed), the
// dispatcher and its sessions (dispatcher.go), agents and containers (agent.go, worker.go). Package check says after every entry whether
// what must always hold does. Used by test/sim and its tests only.
package world

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"strings"
	"time"

	"skein/manager/loop"
	"skein/manager/orchestrator"
	"skein/manager/store"
	"skein/test/sim/check"
)

// Config of one history.
type Config struct {
	Seed uint64
	// Busy is how long users and faults go on; then everything heals.
	Busy time.Duration
	// Trace keeps the whole history for the report of a failure, not only its end.
	Trace bool
	// Hooks plant defects; the zero value is the product.
	Hooks Hooks
}

// Hooks replace parts by defective ones, to see that the checker notices.
type Hooks struct {
	Controllers func() []loop.Controller
	// Entry may change what is appended to the log.
	Entry func(entry []byte) []byte
	// Applied may change an entry for one manager only.
	Applied func(manager int, entry []byte) []byte
	// Snapshot may change a snapshot before it is restored.
	Snapshot func([]byte) []byte
	// LoseAcked drops every nth acknowledged entry.
	LoseAcked int
	// Reports of agents that are made up: tasks are said to run when they are prepared.
	EarlyRunning bool
	// KeepContainers has agents forget containers of removed tasks without ending them.
	KeepContainers bool
	// SecretsEverywhere has the dispatcher send all secrets to every node.
	SecretsEverywhere bool
	// NoStop has agents report an end without ending the container.
	NoStop bool
}

// Result says how a history went.
type Result struct {
	Seed    uint64
	Entries int
	Events  int
	Tasks   int // that ever existed
	Terms   int
	Trace   string // of a failure
	Err     error
	Hash    [32]byte // of the final store: equal for equal seeds
}

// World is one history.
type World struct {
	cfg    Config
	r      *rand.Rand
	now    time.Duration // since epoch
	queue  events
	serial uint64
	events int

	log      *log
	managers []*manager
	leader   *manager // that a majority follows; nil: there is none
	terms    int
	nodes    map[string]*node
	names    []string // of nodes, in the order they were made
	users    *users
	check    *check.Checker
	calm     bool // no more faults
	trace    trace
}

var epoch = time.Unix(1_800_000_000, 0)

// failure ends a history.
type failure struct{ err error }

// Run plays one history.
func Run(cfg Config) (res Result) {
	if cfg.Busy == 0 {
		cfg.Busy = 60 * time.Second
	}
	w := &World{cfg: cfg, r: rand.New(rand.NewPCG(cfg.Seed, 0x5ce1)), nodes: map[string]*node{}, check: check.New()}
	w.trace.whole = cfg.Trace
	res.Seed = cfg.Seed
	defer func() {
		res.Entries, res.Events, res.Terms, res.Tasks = len(w.log.entries), w.events, w.terms, w.check.Tasks()
		if p := recover(); p != nil {
			f, ours := p.(failure)
			if !ours {
				f.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
			}
			res.Err = f.err
			res.Trace = w.trace.String()
		}
	}()
	w.log = newLog(w)
	w.begin()
	w.until(cfg.Busy)
	w.settle()
	res.Hash = w.log.observer.Hash()
	return res
}

func (w *World) fail(format string, args ...any) {
	panic(failure{fmt.Errorf("at %v: %s", w.now, fmt.Sprintf(format, args...))})
}

func (w *World) failed(vs []check.Violation) {
	if len(vs) == 0 {
		return
	}
	var b strings.Builder
	for i, v := range vs {
		if i == 10 {
			fmt.Fprintf(&b, "\n  and %d more", len(vs)-i)
			break
		}
		fmt.Fprintf(&b, "\n  %s", v)
	}
	w.fail("%d invariants do not hold:%s", len(vs), b.String())
}

// time is true time; managers and agents have clocks of their own.
func (w *World) time() time.Time { return epoch.Add(w.now) }

type event struct {
	at     time.Duration
	serial uint64
	do     func()
}

type events []event

func (q events) Len() int { return len(q) }
func (q events) Less(i, j int) bool {
	return q[i].at < q[j].at || (q[i].at == q[j].at && q[i].serial < q[j].serial)
}
func (q events) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *events) Push(x any)   { *q = append(*q, x.(event)) }
func (q *events) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = event{}
	*q = old[:len(old)-1]
	return e
}

// after has something happen.
func (w *World) after(d time.Duration, do func()) {
	w.serial++
	heap.Push(&w.queue, event{w.now + max(d, 0), w.serial, do})
}

// maxEvents bounds a history: beyond it something turns in circles.
const maxEvents = 400_000

// until lets things happen up to an instant.
func (w *World) until(end time.Duration) {
	for len(w.queue) > 0 && w.queue[0].at <= end {
		e := heap.Pop(&w.queue).(event)
		w.now = e.at
		e.do()
		w.poll()
		if w.events++; w.events > maxEvents {
			w.fail("%d events: something does not come to rest", w.events)
		}
	}
	w.now = end
}

// poll wakes what watches stores.
func (w *World) poll() {
	for _, m := range w.managers {
		if m.term != nil {
			m.term.poll()
		}
	}
}

// between is a duration drawn from [a, b).
func (w *World) between(a, b time.Duration) time.Duration {
	if b <= a {
		return a
	}
	return a + time.Duration(w.r.Int64N(int64(b-a)))
}

// chance is true with probability p, and never once all is calm.
func (w *World) chance(p float64) bool { return !w.calm && w.r.Float64() < p }

func pick[T any](w *World, from []T) T { return from[w.r.IntN(len(from))] }

func (w *World) controllers() []loop.Controller {
	if w.cfg.Hooks.Controllers != nil {
		return w.cfg.Hooks.Controllers()
	}
	return orchestrator.Controllers()
}

// begin makes the cluster: three or five managers, some workers, a first leader, users and faults.
func (w *World) begin() {
	w.log.init()
	n := 3
	if w.r.IntN(4) == 0 {
		n = 5
	}
	for i := range n {
		w.addManager(fmt.Sprint("m", i))
	}
	w.elect()
	for _, m := range w.managers {
		w.join(m.name, "manager")
	}
	for i := range 1 + w.r.IntN(5) {
		w.join(fmt.Sprint("w", i), "worker")
	}
	w.users = newUsers(w)
	w.users.begin()
	w.faults()
}

// state is what the whole log says.
func (w *World) state(f func(store.ReadTx)) { w.log.observer.View(f) }

// trace is the history as told to humans.
type trace struct {
	whole bool
	lines []line
}

type line struct {
	at     time.Duration
	format string
	args   []any
}

const traceEnd = 400

func (t *trace) add(at time.Duration, format string, args ...any) {
	if !t.whole && len(t.lines) >= 2*traceEnd {
		t.lines = append(t.lines[:0], t.lines[traceEnd:]...)
	}
	t.lines = append(t.lines, line{at, format, args})
}

func (t *trace) String() string {
	lines := t.lines
	if !t.whole && len(lines) > traceEnd {
		lines = lines[len(lines)-traceEnd:]
	}
	var b strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&b, "%10.3f  %s\n", l.at.Seconds(), fmt.Sprintf(l.format, l.args...))
	}
	return b.String()
}

// note adds to the trace. Arguments must not change later.
func (w *World) note(format string, args ...any) { w.trace.add(w.now, format, args...) }
