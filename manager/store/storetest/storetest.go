// Package storetest gives tests a store that needs no Raft: a proposer that applies each entry at once, in memory, through the same
// encoding that the log has. Used by the tests of all packages that read or write the store.
package storetest

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/store"
)

// Loopback is a Proposer on one store. Entries get consecutive indexes and the time of its clock.
type Loopback struct {
	store *store.Store

	mu    sync.Mutex
	index uint64
	now   func() time.Time
	fail  error
	log   [][]byte
}

// New returns an empty store that takes writes, and its proposer.
func New() (*store.Store, *Loopback) {
	l := &Loopback{now: time.Now}
	l.store = store.New(l)
	return l.store, l
}

// SetClock replaces the clock that entries carry.
func (l *Loopback) SetClock(now func() time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now = now
}

// SetError makes all proposals fail, as without a leader; nil ends that.
func (l *Loopback) SetError(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail = err
}

// ErrNoLeader is what proposals fail with when there is no leader.
func ErrNoLeader() error {
	return api.Errorf(errdefs.ErrUnavailable, "the cluster has no leader")
}

// Propose implements store.Proposer.
func (l *Loopback) Propose(ctx context.Context, txns []*api.Txn) (uint64, []error, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, nil, err
	}
	if l.fail != nil {
		return 0, nil, l.fail
	}
	entry, err := l.store.EncodeEntry(l.now().UnixNano(), txns)
	if err != nil {
		return 0, nil, err
	}
	l.index++
	l.log = append(l.log, entry)
	return l.index, l.store.Apply(l.index, entry), nil
}

// Log returns the entries so far; entry i has index i+1.
func (l *Loopback) Log() [][]byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([][]byte(nil), l.log...)
}
