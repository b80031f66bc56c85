package consensus

import (
	"context"
	"slices"
	"sync"
)

// progress knows which entries of ours are in the log and not yet applied. Raft's own applied index runs ahead of the store, and its
// commit index counts entries that never reach the store.
type progress struct {
	mu      sync.Mutex
	pending []uint64 // indexes of our entries, ascending
	applied uint64   // newest entry or snapshot the store holds
	changed chan struct{}
}

func newProgress() *progress { return &progress{changed: make(chan struct{})} }

// appended notes entries that were written to the log.
func (p *progress) appended(index uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.pending); n == 0 || p.pending[n-1] < index {
		p.pending = append(p.pending, index)
	}
}

// truncated notes that a range of the log was deleted.
func (p *progress) truncated(lo, hi uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pending = slices.DeleteFunc(p.pending, func(i uint64) bool { return i >= lo && i <= hi })
	p.signal()
}

// reached notes that the store holds everything up to index.
func (p *progress) reached(index uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applied = max(p.applied, index)
	n := 0
	for n < len(p.pending) && p.pending[n] <= index {
		n++
	}
	p.pending = slices.Delete(p.pending, 0, n)
	p.signal()
}

func (p *progress) signal() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// wait returns when none of our entries up to index is pending.
func (p *progress) wait(ctx context.Context, index uint64) error {
	return p.until(ctx, func() bool { return len(p.pending) == 0 || p.pending[0] > index })
}

func (p *progress) waitVersion(ctx context.Context, version uint64) error {
	return p.until(ctx, func() bool { return p.applied >= version })
}

func (p *progress) until(ctx context.Context, done func() bool) error {
	for {
		p.mu.Lock()
		ok, changed := done(), p.changed
		p.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
