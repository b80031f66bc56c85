package orchestrator

import (
	"math/bits"
	"slices"

	"skein/manager/store"
)

// summary is what is remembered of a service between passes, so that a pass need only look at slots that changed. It is made anew from
// the store by a pass over all slots: whenever the service's record changed, and when something is found that cannot be said by halves.
type summary struct {
	version uint64 // of the record it is of
	// filled are the slot numbers that need no task: of a replicated service those that have one, of a job those that ran, or run.
	filled numbers
	top    uint64 // no slot above has tasks
	shares map[place]share
	dirty  queue // slots a rolling update has still to deal with
	leave  queue // slots that wait for their turn to move
	recent map[place]int64
	sums
	rate rate
}

// share is what one slot contributes to the sums.
type share struct {
	made   bool   // the update has dealt with it
	busy   bool   // of these, not yet up; of a job: runs, or will
	coming bool   // not yet up, and the update waits for it
	dirty  bool   // still to be updated
	leave  bool   // still to be moved
	moving bool   // being moved, and not up yet
	failed string // task that ended within the monitor period, or never ran
	up     int64  // when the updated slot came up
}

type sums struct {
	made, busy, coming, dirtySlots, leaving, moving, failed int

	failedTask string // one that failed
	lastUp     int64  // when the last updated slot came up
}

func newSummary(svc *store.Service, old *summary) *summary {
	s := &summary{version: svc.Meta.GetVersion(), shares: map[place]share{}, recent: map[place]int64{}}
	if old != nil {
		s.rate = old.rate
	}
	return s
}

// set replaces the share of a slot.
func (m *summary) set(at place, n share) {
	old, had := m.shares[at]
	if !had && n == (share{}) {
		return
	}
	m.count(&old, -1)
	m.count(&n, 1)
	if n.dirty && !old.dirty {
		m.dirty.add(at)
	}
	if n.leave && !old.leave {
		m.leave.add(at)
	}
	switch {
	case n.failed != "":
		m.failedTask = n.failed
	}
	if n.up != old.up {
		delete(m.recent, at)
		if n.up != 0 {
			m.recent[at] = n.up
			m.lastUp = max(m.lastUp, n.up)
		}
	}
	if n == (share{}) {
		delete(m.shares, at)
		return
	}
	m.shares[at] = n
}

func (m *summary) count(s *share, by int) {
	for _, c := range []struct {
		on bool
		n  *int
	}{{s.made, &m.made}, {s.busy, &m.busy}, {s.coming, &m.coming}, {s.dirty, &m.dirtySlots}, {s.leave, &m.leaving}, {s.moving, &m.moving}, {s.failed != "", &m.failed}} {
		if c.on {
			*c.n += by
		}
	}
}

// queue holds slots in the order of their numbers; those that need not stay in it are dropped when they are met.
type queue struct {
	slots    []place
	unsorted bool
}

func (q *queue) add(p place) {
	if n := len(q.slots); n > 0 && q.slots[n-1].compare(p) > 0 {
		q.unsorted = true
	}
	q.slots = append(q.slots, p)
}

// next takes the first slot that still wants to be in the queue.
func (q *queue) next(wants func(place) bool) (place, bool) {
	if q.unsorted {
		slices.SortFunc(q.slots, place.compare)
		q.unsorted = false
	}
	for len(q.slots) > 0 {
		p := q.slots[0]
		q.slots = q.slots[1:]
		if wants(p) {
			return p, true
		}
	}
	return place{}, false
}

// numbers is a set of slot numbers.
type numbers struct {
	words []uint64
	count int
	low   int // words before it are full
}

func (s *numbers) set(n uint64, on bool) {
	w := int(n / 64)
	for on && w >= len(s.words) {
		s.words = append(s.words, make([]uint64, max(64, len(s.words)))...)
	}
	if w >= len(s.words) {
		return
	}
	if had := s.words[w]>>(n%64)&1 == 1; had == on {
		return
	}
	s.words[w] ^= 1 << (n % 64)
	if on {
		s.count++
		return
	}
	s.count--
	s.low = min(s.low, w)
}

// free is the lowest number from 1 on, and from at least from, that is not in the set.
func (s *numbers) free(from uint64) uint64 {
	for s.low < len(s.words) && s.words[s.low]|b2u(s.low == 0) == ^uint64(0) {
		s.low++
	}
	from = max(from, 1, uint64(s.low)*64)
	for w := int(from / 64); w < len(s.words); w++ {
		word := ^s.words[w]
		if w == int(from/64) {
			word &= ^uint64(0) << (from % 64)
		}
		if word != 0 {
			return uint64(w)*64 + uint64(bits.TrailingZeros64(word))
		}
	}
	return max(from, uint64(len(s.words))*64)
}

func b2u(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

// rate bounds how many tasks of a service are replaced in a second.
type rate struct {
	second int64
	used   int
	put    int // replacements that were put off in it
}

// take says whether one may be replaced now, and else when to ask again.
func (r *rate) take(now int64, limit int) (later int64, ok bool) {
	const second = int64(1e9)
	if limit <= 0 {
		return 0, true
	}
	if s := now / second; s != r.second {
		*r = rate{second: s}
	}
	if r.used < limit {
		r.used++
		return 0, true
	}
	r.put++
	return (r.second + 1 + int64((r.put-1)/limit)) * second, false
}
