package store

import (
	"context"
	"slices"
	"sync"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// Store is the cluster's state on this manager. Its methods may be called from any goroutine.
type Store struct {
	highest uint32 // feature level

	mu    sync.RWMutex // held for View callbacks and Apply, never while an entry commits
	state *state

	proposerMu sync.RWMutex
	proposer   Proposer

	watchMu  sync.Mutex
	watchers map[*Watcher]struct{}
}

// New returns an empty store. The proposer may be nil and set later: until then writes are unavailable.
func New(p Proposer) *Store { return NewAt(p, api.FeatureLevel) }

// NewAt returns a store that knows feature levels up to the given one only, as those of older versions of Skein do.
func NewAt(p Proposer, level uint32) *Store {
	return &Store{highest: level, state: newState(), proposer: p, watchers: map[*Watcher]struct{}{}}
}

// SetProposer sets what replicates writes from now on; nil makes writes unavailable.
func (s *Store) SetProposer(p Proposer) {
	s.proposerMu.Lock()
	defer s.proposerMu.Unlock()
	s.proposer = p
}

// Version is the Raft index of the newest entry applied.
func (s *Store) Version() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.version
}

// View calls f with a consistent view. Keep it short: entries wait for it.
func (s *Store) View(f func(ReadTx)) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	f(view{s.state})
}

// Update runs f on a view, proposes the changes it added as one transaction and returns when they are applied here. It is not repeated
// on a conflict: a stale Expect comes back as an error. Nothing added means nothing done.
func (s *Store) Update(ctx context.Context, f func(WriteTx) error) (uint64, error) {
	changes, version, err := s.collect(f)
	if err != nil || len(changes) == 0 {
		return version, err
	}
	version, results, err := s.Batch(ctx, []*api.Txn{{Changes: changes}})
	if err != nil {
		return version, err
	}
	return version, results[0]
}

func (s *Store) collect(f func(WriteTx) error) ([]*api.Change, uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	w := &writeTx{view: view{s.state}}
	err := f(w)
	return w.changes, s.state.version, err
}

// Batch proposes small transactions, each atomic alone, and returns the result of each. A *PartialError says that a transaction was
// applied but for some items.
func (s *Store) Batch(ctx context.Context, txns []*api.Txn) (uint64, []error, error) {
	if len(txns) == 0 {
		return s.Version(), nil, nil
	}
	s.proposerMu.RLock()
	p := s.proposer
	s.proposerMu.RUnlock()
	if p == nil {
		return 0, nil, api.Errorf(errdefs.ErrUnavailable, "this manager takes no writes: it is not part of a cluster, or is starting")
	}
	packed, unpack := s.pack(trim(txns))
	version, results, err := p.Propose(ctx, packed)
	if err != nil {
		return version, nil, err
	}
	if len(results) != len(packed) {
		return version, nil, api.Errorf(errdefs.ErrInternal, "proposer returned %d results for %d transactions", len(results), len(packed))
	}
	return version, unpack(results), nil
}

func (s *Store) pack(txns []*api.Txn) ([]*api.Txn, func([]error) []error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.pack(txns)
}

// trim leaves out of services what Apply sets anyway: a record that was read and changed carries all its revisions.
func trim(txns []*api.Txn) []*api.Txn {
	var out []*api.Txn
	for i, t := range txns {
		for j, c := range t.Changes {
			rec := c.GetPutService()
			if rec == nil || (len(rec.Revisions) == 0 && len(rec.PreviousSpecJson) == 0) {
				continue
			}
			if out == nil {
				out = slices.Clone(txns)
			}
			if out[i] == t {
				out[i] = &api.Txn{Changes: slices.Clone(t.Changes)}
			}
			slim := &api.ServiceRecord{Id: rec.Id, Name: rec.Name, SpecJson: rec.SpecJson, UpdateStatus: rec.UpdateStatus,
				ForceUpdate: rec.ForceUpdate, PendingRollback: rec.PendingRollback,
				Author: rec.Author, Note: rec.Note, ForgetPrevious: rec.ForgetPrevious, RegistryAuth: rec.RegistryAuth}
			slim.ProtoReflect().SetUnknown(rec.ProtoReflect().GetUnknown())
			out[i].Changes[j] = &api.Change{Kind: &api.Change_PutService{PutService: slim}}
		}
	}
	if out == nil {
		return txns
	}
	return out
}
