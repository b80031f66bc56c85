package loop_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

// controller records its steps and does what the test says.
type controller struct {
	steps []loop.Keys
	times []time.Time
	step  func(view store.ReadTx, dirty loop.Keys, now time.Time) (loop.Changes, time.Time)
}

func (c *controller) Name() string        { return "test" }
func (c *controller) Kinds() []store.Kind { return []store.Kind{store.KindNode} }
func (c *controller) Step(view store.ReadTx, dirty loop.Keys, now time.Time) (loop.Changes, time.Time) {
	c.steps, c.times = append(c.steps, dirty), append(c.times, now)
	if c.step == nil {
		return nil, time.Time{}
	}
	return c.step(view, dirty, now)
}

func node(id string) *api.Txn {
	return &api.Txn{Changes: []*api.Change{{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id, Hostname: id}}}}}
}

func refused() *api.Txn {
	return &api.Txn{Changes: []*api.Change{{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "node", Id: "nobody", Version: 7}}}}}
}

func key(id string) store.Key { return store.Key{Kind: store.KindNode, ID: id} }

func newStore(t *testing.T) (*store.Store, *storetest.Loopback) {
	st, log := storetest.New()
	cluster := &api.ClusterRecord{Id: "c", SpecJson: []byte("{}"), OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", UlaPrefix: "fd00:1::/48", OverlayBits: 20}
	if _, results, err := st.Batch(t.Context(), []*api.Txn{{Changes: []*api.Change{{Kind: &api.Change_PutCluster{PutCluster: cluster}}}}}); err != nil || results[0] != nil {
		t.Fatal(err, results)
	}
	return st, log
}

// TestDriverRetries: a refused transaction does not hold up its neighbours, and its key comes back after pauses that grow to a bound.
func TestDriverRetries(t *testing.T) {
	st, _ := newStore(t)
	now := time.Unix(1000, 0)
	c := &controller{step: func(store.ReadTx, loop.Keys, time.Time) (loop.Changes, time.Time) {
		return loop.Changes{{Txn: refused(), Key: key("a")}, {Txn: node("b"), Key: key("b")}}, time.Time{}
	}}
	d := loop.NewDriver(st, c)
	var pauses []time.Duration
	for range 12 {
		wake, err := d.Round(t.Context(), now)
		if err != nil || wake.IsZero() {
			t.Fatalf("round: wake %v, %v", wake, err)
		}
		pauses = append(pauses, wake.Sub(now))
		if again, _ := d.Round(t.Context(), wake.Add(-1)); !again.Equal(wake) || len(c.steps) != len(pauses) {
			t.Fatalf("a round before its time: wake %v, %d steps", again, len(c.steps))
		}
		now = wake
	}
	if pauses[0] != 10*time.Millisecond || pauses[3] != 80*time.Millisecond || pauses[11] != time.Second {
		t.Errorf("pauses %v", pauses)
	}
	if !c.steps[0].All || c.steps[1].All || !slices.Equal(c.steps[1].Keys, []store.Key{key("a")}) {
		t.Errorf("first steps saw %+v", c.steps[:2])
	}
	st.View(func(tx store.ReadTx) {
		if tx.Node("b") == nil {
			t.Error("the neighbour of the refused transaction was not applied")
		}
	})
}

// TestDriverFailure: without a leader all that was decided is dirty again.
func TestDriverFailure(t *testing.T) {
	st, log := newStore(t)
	now := time.Unix(1000, 0)
	c := &controller{step: func(_ store.ReadTx, dirty loop.Keys, _ time.Time) (changes loop.Changes, _ time.Time) {
		for _, k := range dirty.Keys {
			changes = append(changes, loop.Change{Txn: node(k.ID), Key: k})
		}
		return changes, time.Time{}
	}}
	d := loop.NewDriver(st, c)
	if _, err := d.Round(t.Context(), now); err != nil {
		t.Fatal(err)
	}
	log.SetError(storetest.ErrNoLeader())
	d.Mark([]store.Key{key("b"), key("a"), key("a")}, false)
	wake, err := d.Round(t.Context(), now)
	if err == nil || !strings.HasPrefix(err.Error(), "test: commit: ") {
		t.Fatalf("error %v", err)
	}
	log.SetError(nil)
	if _, err = d.Round(t.Context(), wake); err != nil {
		t.Fatal(err)
	}
	if got := c.steps[2].Keys; !slices.Equal(got, []store.Key{key("a"), key("b")}) {
		t.Errorf("dirty after the failure: %v", got)
	}
}

// TestDriverCutsEntries: what is decided at once is proposed in bounded entries, in order.
func TestDriverCutsEntries(t *testing.T) {
	st, log := newStore(t)
	before := len(log.Log())
	c := &controller{step: func(store.ReadTx, loop.Keys, time.Time) (changes loop.Changes, _ time.Time) {
		for i := range 100 {
			txn := node(fmt.Sprint("n", i))
			txn.Changes[0].GetPutNode().Labels = map[string]string{"l": strings.Repeat("x", 10_000)}
			changes = append(changes, loop.Change{Txn: txn, Key: key(fmt.Sprint("n", i))})
		}
		return changes, time.Time{}
	}}
	if _, err := loop.NewDriver(st, c).Round(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	entries := log.Log()[before:]
	if len(entries) != 8 {
		t.Errorf("%d entries", len(entries))
	}
	for _, e := range entries {
		if len(e) > 130<<10 {
			t.Errorf("an entry of %d bytes", len(e))
		}
	}
}

// TestRun: Run calls the controller at once, at the instant it wants and on changes, and ends with its context.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, _ := newStore(t)
		start := time.Now()
		c := &controller{}
		c.step = func(_ store.ReadTx, _ loop.Keys, now time.Time) (loop.Changes, time.Time) {
			if len(c.steps) == 1 {
				return nil, now.Add(time.Hour)
			}
			return nil, time.Time{}
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- loop.Run(ctx, st, c) }()
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if _, _, err := st.Batch(ctx, []*api.Txn{node("a"), node("b")}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
		var at []time.Duration
		for _, when := range c.times {
			at = append(at, when.Sub(start))
		}
		if !slices.Equal(at, []time.Duration{0, time.Hour, 2 * time.Hour}) || len(c.steps[2].Keys) != 2 {
			t.Errorf("stepped at %v, last with %v", at, c.steps[len(c.steps)-1].Keys)
		}
	})
}

func TestAgenda(t *testing.T) {
	var a loop.Agenda[string]
	t0 := time.Unix(1000, 0)
	if !a.Next().IsZero() || a.Due(t0) != nil {
		t.Fatal("an empty agenda wants something")
	}
	a.Set("b", t0)
	a.Set("a", t0)
	a.Set("c", t0.Add(1))
	a.Set("d", t0.Add(-1))
	a.Set("d", time.Time{})
	got := a.Due(t0)
	slices.Sort(got)
	if !slices.Equal(got, []string{"a", "b"}) || !a.Next().Equal(t0.Add(1)) || a.Due(t0) != nil {
		t.Errorf("due %v, next %v", got, a.Next())
	}
}
