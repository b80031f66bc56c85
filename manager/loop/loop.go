// Package loop drives controllers: pure deciders of what should change in the store.
//
// A Driver gathers dirty keys, calls Step on a consistent view, commits the changes in bounded batches and makes the keys of refused
// transactions dirty again after a growing pause, for ever: controllers are level-triggered, keep no timers and need no recovery
// code. Run is the shell around it that waits for the watch, the wanted instant or the end of the leadership term. A controller's
// value lives for one term; build a new one for the next. Simulations call Round themselves, with their own clock.
package loop

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// Controller decides what should change, given a consistent view. It performs no I/O and reads no clock.
type Controller interface {
	// Name is for logs.
	Name() string
	// Kinds are the objects whose changes make it look again.
	Kinds() []store.Kind
	// Step considers the dirty keys and returns the changes it wants and the next instant at which it must be called even if
	// nothing happens; the zero time is never.
	Step(view store.ReadTx, dirty Keys, now time.Time) (Changes, time.Time)
}

// Keys are what may have changed since the last Step. With All set, anything: the first Step of a term, or a watch that overflowed.
type Keys struct {
	All  bool
	Keys []store.Key
}

// Change is one small transaction, atomic alone, and the key that becomes dirty again when it is refused.
type Change struct {
	Txn *api.Txn
	Key store.Key
}

// Changes are committed in order.
type Changes []Change

// Store is what a Driver needs of the store.
type Store interface {
	View(func(store.ReadTx))
	Batch(ctx context.Context, txns []*api.Txn) (version uint64, results []error, err error)
}

const (
	// maxEntryBytes bounds what is proposed in one log entry, so that nothing sits in front of the leader's lease for long.
	maxEntryBytes = 128 << 10
	// Refused transactions and failed proposals are tried again after a pause that doubles between these.
	firstPause = 10 * time.Millisecond
	lastPause  = time.Second
)

// Driver makes the rounds of one controller. Not safe for concurrent use.
type Driver struct {
	store   Store
	ctl     Controller
	dirty   map[store.Key]struct{}
	all     bool
	wake    time.Time // wanted by the controller
	refused []store.Key
	retryAt time.Time
	pause   time.Duration
}

// NewDriver returns a driver whose first round considers everything.
func NewDriver(st Store, ctl Controller) *Driver {
	return &Driver{store: st, ctl: ctl, dirty: map[store.Key]struct{}{}, all: true}
}

// Mark adds dirty keys; with overflow everything is dirty.
func (d *Driver) Mark(keys []store.Key, overflow bool) {
	d.all = d.all || overflow
	for _, k := range keys {
		d.dirty[k] = struct{}{}
	}
}

// Round takes the dirty keys, decides and commits. It returns the instant of the next round unless something is marked earlier, zero
// for none. An error means that a proposal failed as a whole; what it held is dirty again.
func (d *Driver) Round(ctx context.Context, now time.Time) (time.Time, error) {
	if !d.retryAt.IsZero() && !now.Before(d.retryAt) {
		d.Mark(d.refused, false)
		d.refused, d.retryAt = nil, time.Time{}
	}
	if d.all || len(d.dirty) > 0 || (!d.wake.IsZero() && !now.Before(d.wake)) {
		var changes Changes
		keys := d.take()
		d.store.View(func(view store.ReadTx) { changes, d.wake = d.ctl.Step(view, keys, now) })
		if err := d.commit(ctx, changes, now); err != nil {
			return d.next(), fmt.Errorf("%s: commit: %w", d.ctl.Name(), err)
		}
	}
	return d.next(), nil
}

// take empties the dirty set, in a deterministic order.
func (d *Driver) take() Keys {
	keys := Keys{All: d.all}
	for k := range d.dirty {
		keys.Keys = append(keys.Keys, k)
	}
	slices.SortFunc(keys.Keys, func(a, b store.Key) int {
		return compareKeys(&a, &b)
	})
	clear(d.dirty)
	d.all = false
	return keys
}

func (d *Driver) commit(ctx context.Context, changes Changes, now time.Time) error {
	var failed []store.Key
	for len(changes) > 0 {
		n, txns := cut(changes)
		_, results, err := d.store.Batch(ctx, txns)
		if err != nil {
			for _, c := range changes {
				failed = append(failed, c.Key)
			}
			d.retry(failed, now)
			return err
		}
		for i, err := range results {
			if err != nil {
				slog.Debug("transaction refused", "controller", d.ctl.Name(), "object", changes[i].Key.ID, "err", err)
				failed = append(failed, changes[i].Key)
			}
		}
		changes = changes[n:]
	}
	d.retry(failed, now)
	return nil
}

// cut takes the first transactions that fit one entry, at least one.
func cut(changes Changes) (int, []*api.Txn) {
	var txns []*api.Txn
	size := 0
	for _, c := range changes {
		size += proto.Size(c.Txn)
		if len(txns) > 0 && size > maxEntryBytes {
			break
		}
		txns = append(txns, c.Txn)
	}
	return len(txns), txns
}

func (d *Driver) retry(keys []store.Key, now time.Time) {
	if len(keys) == 0 {
		if d.retryAt.IsZero() {
			d.pause = 0
		}
		return
	}
	d.pause = min(max(2*d.pause, firstPause), lastPause)
	d.refused = append(d.refused, keys...)
	d.retryAt = now.Add(d.pause)
}

func (d *Driver) next() time.Time {
	if d.wake.IsZero() || (!d.retryAt.IsZero() && d.retryAt.Before(d.wake)) {
		return d.retryAt
	}
	return d.wake
}

func compareKeys(a, b *store.Key) int {
	if a.Kind != b.Kind {
		return int(a.Kind) - int(b.Kind)
	}
	for _, s := range [][2]string{{a.ServiceID, b.ServiceID}, {a.ID, b.ID}, {a.NodeID, b.NodeID}} {
		if s[0] != s[1] {
			if s[0] < s[1] {
				return -1
			}
			return 1
		}
	}
	return 0
}
