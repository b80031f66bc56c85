package orchestrator

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

// world is a control plane without network, disk and clock: a store, its controllers, and a time that tests move.
type world struct {
	t          testing.TB
	store      *store.Store
	now        time.Time
	loops      []*driven
	log        *storetest.Loopback
	quorumLost bool
	names      map[string]string // task id → web.1#2
	gens       map[string]int    // web.1 → tasks seen
}

type driven struct {
	*loop.Driver
	watcher *store.Watcher
	wake    time.Time
}

var epoch = time.Unix(1_800_000_000, 0)

func newWorld(t testing.TB) *world {
	st, proposer := storetest.New()
	w := &world{t: t, store: st, log: proposer, now: epoch, names: map[string]string{}, gens: map[string]int{}}
	proposer.SetClock(func() time.Time { return w.now })
	w.do(&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{
		Id: "c1", SpecJson: []byte("{}"), OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", UlaPrefix: "fd00:1::/48", OverlayBits: 20, DataPort: 4789, FeatureLevel: api.FeatureLevel,
	}}})
	w.newTerm()
	return w
}

// newTerm drops the controllers, as a change of leadership does.
func (w *world) newTerm() {
	for _, d := range w.loops {
		d.watcher.Close()
	}
	w.loops = nil
	for _, c := range Controllers() {
		w.loops = append(w.loops, &driven{Driver: loop.NewDriver(w.store, c), watcher: w.store.Watch(c.Kinds()...)})
	}
}

func (w *world) do(changes ...*api.Change) {
	w.t.Helper()
	if err := w.try(changes...); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) try(changes ...*api.Change) error {
	_, err := w.store.Update(context.Background(), func(tx store.WriteTx) error {
		for _, c := range changes {
			tx.Add(c)
		}
		return nil
	})
	return err
}

// settle lets the controllers work until none has anything to do at this instant. It returns the next instant one wants.
func (w *world) settle() time.Time {
	w.t.Helper()
	for range 1000 {
		busy := false
		for _, d := range w.loops {
			before := w.store.Version()
			keys, overflow := d.watcher.Take()
			d.Mark(keys, overflow)
			wake, err := d.Round(context.Background(), w.now)
			if err != nil && !w.quorumLost {
				w.t.Fatal(err)
			}
			d.wake = wake
			busy = busy || w.store.Version() != before || len(keys) > 0 || (!wake.IsZero() && !wake.After(w.now))
		}
		if !busy {
			return w.next()
		}
	}
	w.t.Fatal("the controllers do not come to rest")
	return time.Time{}
}

func (w *world) next() time.Time {
	var next time.Time
	for _, d := range w.loops {
		if !d.wake.IsZero() && (next.IsZero() || d.wake.Before(next)) {
			next = d.wake
		}
	}
	return next
}

// loseQuorum makes every proposal fail, or ends that.
func (w *world) loseQuorum(lost bool) {
	w.quorumLost = lost
	if lost {
		w.log.SetError(storetest.ErrNoLeader())
	} else {
		w.log.SetError(nil)
	}
}

// advance moves the clock, stopping wherever a controller wants to be called.
func (w *world) advance(by time.Duration, between func()) {
	end := w.now.Add(by)
	for {
		between()
		next := w.settle()
		if next.IsZero() || next.After(end) {
			break
		}
		w.now = next
	}
	w.now = end
	between()
	w.settle()
}

func (w *world) view(f func(store.ReadTx)) { w.store.View(f) }

func (w *world) tasks() []*store.Task {
	var out []*store.Task
	w.view(func(tx store.ReadTx) { out = tx.Tasks() })
	slices.SortFunc(out, func(a, b *store.Task) int {
		c := cmp.Or(cmp.Compare(a.ServiceID, b.ServiceID), cmp.Compare(a.Slot, b.Slot))
		if a.Slot == 0 {
			c = cmp.Or(c, cmp.Compare(a.NodeID, b.NodeID))
		}
		return cmp.Or(c, cmp.Compare(a.Generation, b.Generation))
	})
	return out
}

// name gives tasks names by slot and order of their creation.
func (w *world) name(t *store.Task) string {
	if n := w.names[t.ID]; n != "" {
		return n
	}
	slot := fmt.Sprintf("%s.%d", t.ServiceID, t.Slot)
	if t.Slot == 0 {
		slot = t.ServiceID + "." + t.NodeID
	}
	w.gens[slot]++
	w.names[t.ID] = fmt.Sprintf("%s#%d", slot, w.gens[slot])
	return w.names[t.ID]
}

func (w *world) putService(id string, spec *swarm.ServiceSpec, status *api.UpdateStatus) error {
	spec.Name = id
	text, err := json.Marshal(spec)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.try(&api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: id, Name: id, SpecJson: text, UpdateStatus: status}}})
}

func (w *world) report(t *store.Task, state api.TaskState, text string) {
	w.t.Helper()
	w.do(&api.Change{Kind: &api.Change_ReportTask{ReportTask: &api.TaskReport{
		TaskId: t.ID, State: uint32(state), Time: w.now.UnixNano(), Err: text, NodeId: t.NodeID,
	}}})
}
