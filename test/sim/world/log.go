package world

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
	"skein/test/sim/check"
)

// log is what a majority of the managers agreed on. The observer applies every entry at once: the checker's eyes. The purist applies them
// without the transactions that were refused: its state must be the same, or a refusal left a trace.
type log struct {
	w        *World
	entries  [][]byte
	observer *store.Store
	watcher  *store.Watcher
	purist   *store.Store
	depth    int // of proposals that others get in front of
}

func newLog(w *World) *log {
	l := &log{w: w, observer: store.New(nil), purist: store.New(nil)}
	l.watcher = l.observer.Watch()
	return l
}

// init writes the cluster's record. Some clusters come from an older version, and are raised to what this one can do on the way.
func (l *log) init() {
	level := uint32(api.FeatureLevel)
	if l.w.r.IntN(4) == 0 {
		level = 1 + uint32(l.w.r.IntN(api.FeatureLevel))
		l.w.after(l.w.between(0, 2*l.w.cfg.Busy), l.raise)
	}
	l.append(epoch.UnixNano(), []*api.Txn{{Changes: []*api.Change{{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{
		Id: "c1", SpecJson: []byte("{}"), OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", UlaPrefix: "fd00:1::/48", OverlayBits: 20, DataPort: 4789,
		CaCertPem: []byte("none"), FeatureLevel: level,
	}}}}}})
}

// raise lets the cluster use all this version can do.
func (l *log) raise() {
	if l.w.leader != nil {
		var c *api.ClusterRecord
		l.observer.View(func(tx store.ReadTx) { c = proto.Clone(tx.Cluster()).(*api.ClusterRecord) })
		c.FeatureLevel = api.FeatureLevel
		if _, _, err := l.w.leader.store.Batch(ctx, []*api.Txn{{Changes: []*api.Change{{Kind: &api.Change_PutCluster{PutCluster: c}}}}}); err == nil {
			return
		}
	}
	l.w.after(time.Second, l.raise)
}

// append commits an entry: from now on it happened.
func (l *log) append(clock int64, txns []*api.Txn) []error {
	entry, err := l.observer.EncodeEntry(clock, txns)
	if err != nil {
		l.w.fail("encode entry: %v", err)
	}
	if h := l.w.cfg.Hooks.Entry; h != nil {
		entry = h(entry)
	}
	l.entries = append(l.entries, entry)
	index := uint64(len(l.entries))
	results := l.observer.Apply(index, entry)
	l.applyPure(index, entry, results)
	keys, overflow := l.watcher.Take()
	var vs []check.Violation
	l.observer.View(func(tx store.ReadTx) { vs = l.w.check.Entry(tx, keys, overflow, l.w.time()) })
	for i, t := range txns {
		for _, c := range t.Changes {
			if c.GetExpect() == nil {
				l.w.note("  entry %d.%d %v%v", index, i, told{c}, refusal(results, i))
			}
		}
	}
	l.w.failed(vs)
	if index%64 == 0 && l.purist.Hash() != l.observer.Hash() {
		l.w.fail("a refused transaction left a trace: the store differs from one that never saw it, at entry %d", index)
	}
	return results
}

func refusal(results []error, i int) string {
	if i < len(results) && results[i] != nil {
		return " REFUSED: " + results[i].Error()
	}
	return ""
}

// applyPure applies an entry without what was refused.
func (l *log) applyPure(index uint64, entry []byte, results []error) {
	clean := true
	for _, err := range results {
		var partial *store.PartialError
		clean = clean && (err == nil || errors.As(err, &partial))
	}
	if clean {
		l.purist.Apply(index, entry)
		return
	}
	var e, pure api.Entry
	if err := proto.Unmarshal(entry, &e); err != nil {
		l.w.fail("entry %d: %v", index, err)
	}
	pure.Format, pure.Level, pure.TimeUnixNano = e.Format, e.Level, e.TimeUnixNano
	for i, t := range e.Txns {
		var partial *store.PartialError
		if err := results[i]; err == nil || errors.As(err, &partial) {
			pure.Txns = append(pure.Txns, t)
		}
	}
	b, err := proto.Marshal(&pure)
	if err != nil {
		l.w.fail("entry %d: %v", index, err)
	}
	l.purist.Apply(index, b)
}

// manager is one manager: its own store, clock and, when it leads, term.
type manager struct {
	w       *World
	name    string
	number  int
	store   *store.Store
	applied int
	skew    time.Duration
	up      bool
	cut     bool // from the other managers
	member  bool
	lag     bool // an event that applies entries is on its way
	life    int  // counts restarts
	term    *term
}

func (w *World) addManager(name string) *manager {
	m := &manager{w: w, name: name, number: len(w.managers), up: true, member: true, skew: w.between(-3*time.Second, 3*time.Second)}
	m.reset(store.New(m), 0)
	w.managers = append(w.managers, m)
	return m
}

func (m *manager) reset(st *store.Store, applied int) { m.store, m.applied = st, applied }

func (m *manager) clock() time.Time { return m.w.time().Add(m.skew) }

// catchUp applies what is committed, up to an index.
func (m *manager) catchUp(to int) []error {
	var results []error
	for m.applied < to {
		entry := m.w.log.entries[m.applied]
		if h := m.w.cfg.Hooks.Applied; h != nil {
			entry = h(m.number, entry)
		}
		m.applied++
		results = m.store.Apply(uint64(m.applied), entry)
	}
	return results
}

// follow has a follower apply what it lacks, some time later and not always all of it.
func (m *manager) follow() {
	if m.lag || !m.up || m.cut || m.applied == len(m.w.log.entries) {
		return
	}
	m.lag = true
	delay := m.w.between(time.Millisecond, 30*time.Millisecond)
	if m.w.chance(0.02) {
		delay = m.w.between(0, 5*time.Second)
	}
	life := m.life
	m.w.after(delay, func() {
		if m.life != life {
			return
		}
		m.lag = false
		if !m.up || m.cut || !m.member {
			return
		}
		m.catchUp(len(m.w.log.entries))
	})
}

var errUnknown = api.Errorf(errdefs.ErrUnavailable, "this manager lost the leadership meanwhile; whether it was done is unknown: look, then try again")

// Propose implements store.Proposer: what a leader, or one that believes to be, gets as an answer.
func (m *manager) Propose(ctx context.Context, txns []*api.Txn) (uint64, []error, error) {
	w := m.w
	if err := ctx.Err(); err != nil {
		return 0, nil, err
	}
	if m.term == nil || !m.up {
		return 0, nil, api.Errorf(errdefs.ErrUnavailable, "the cluster has no leader")
	}
	if w.leader == m && w.log.depth < 2 && w.chance(0.1) {
		w.log.depth++ // others are faster
		m.term.interlope()
		w.log.depth--
	}
	if w.leader != m || m.term == nil {
		return 0, nil, errUnknown // deposed, and does not know it yet
	}
	switch {
	case w.chance(0.002): // it loses the leadership, and the entry with it
		w.note("%s loses the leadership, an entry is lost", m.name)
		w.depose(m)
		return 0, nil, errUnknown
	case w.chance(0.002): // the entry is committed, the answer is lost with the leadership
		w.note("%s loses the leadership, an entry is committed all the same", m.name)
		w.log.append(m.clock().UnixNano(), txns)
		w.depose(m)
		return 0, nil, errUnknown
	case w.chance(0.005): // never sent
		return 0, nil, api.Errorf(errdefs.ErrUnavailable, "this manager is overloaded: try again")
	}
	if n := w.cfg.Hooks.LoseAcked; n > 0 && !w.calm && w.r.IntN(n) == 0 {
		return uint64(m.applied), make([]error, len(txns)), nil
	}
	w.log.append(m.clock().UnixNano(), txns)
	results := m.catchUp(len(w.log.entries))
	for _, o := range w.managers {
		if o != m && o.member {
			o.follow()
		}
	}
	if len(results) != len(txns) {
		w.fail("entry %d has %d transactions and %d results: %v", m.applied, len(txns), len(results), results)
	}
	return uint64(m.applied), results, nil
}

// compare asserts that two stores at the same index are the same.
func (w *World) compare() {
	byIndex := map[int]*manager{}
	var want [32]byte
	have := false
	for _, m := range w.managers {
		if !m.up {
			continue
		}
		if m.applied == len(w.log.entries) {
			if !have {
				want, have = w.log.observer.Hash(), true
			}
			if m.store.Hash() != want {
				w.fail("the store of %s differs from others at the same index %d", m.name, m.applied)
			}
			continue
		}
		if o := byIndex[m.applied]; o != nil && o.store.Hash() != m.store.Hash() {
			w.fail("the stores of %s and %s differ at the same index %d", m.name, o.name, m.applied)
		}
		byIndex[m.applied] = m
	}
}

// restore gives a manager a new store from the snapshot of another.
func (m *manager) restore(from *store.Store, index int) {
	var b bytes.Buffer
	if err := from.Snapshot()(&b); err != nil {
		m.w.fail("snapshot at %d: %v", index, err)
	}
	text := b.Bytes()
	if h := m.w.cfg.Hooks.Snapshot; h != nil {
		text = h(text)
	}
	st := store.New(m)
	if err := st.Restore(bytes.NewReader(text)); err != nil {
		m.w.fail("restore at %d: %v", index, err)
	}
	if m.w.cfg.Hooks.Snapshot == nil && st.Hash() != from.Hash() {
		m.w.fail("a restored store differs from its snapshot at %d", index)
	}
	m.reset(st, index)
}

// told is a change as the trace tells it, should it be printed.
type told struct{ c *api.Change }

func (t told) String() string {
	c := t.c
	switch k := c.Kind.(type) {
	case *api.Change_PutService:
		return fmt.Sprintf("service %s %s", k.PutService.Id, k.PutService.SpecJson)
	case *api.Change_PutNode:
		return fmt.Sprintf("node %s %s %s %v %v", k.PutNode.Id, k.PutNode.Role, k.PutNode.Availability, k.PutNode.Labels, k.PutNode.Status.GetState())
	case *api.Change_PutNetwork:
		return fmt.Sprintf("network %s %s", k.PutNetwork.Name, k.PutNetwork.Subnet4)
	case *api.Change_PutDependency:
		return fmt.Sprintf("%s %s", k.PutDependency.Kind, k.PutDependency.Name)
	case *api.Change_ReportTask:
		r := k.ReportTask
		return fmt.Sprintf("report of %s: %s %s %s %s", r.NodeId, r.TaskId, api.TaskState(r.State), r.Message, r.Err)
	case *api.Change_DesireTasks:
		return fmt.Sprintf("desire %s %v", api.TaskState(k.DesireTasks.Desired), k.DesireTasks.TaskIds)
	case *api.Change_CreateTasks:
		s := fmt.Sprintf("create %s r%d", k.CreateTasks.ServiceId, k.CreateTasks.Revision)
		for _, it := range k.CreateTasks.Items {
			node := it.NodeId
			if it.Slot != 0 {
				node = ""
			}
			s += fmt.Sprintf(" %s(%d%s→%s)", api.TaskID(k.CreateTasks.ServiceId, it.Slot, node, it.Generation), it.Slot, it.NodeId, api.TaskState(it.Desired))
		}
		return s
	}
	return fmt.Sprint(c)
}
