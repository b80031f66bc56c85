package allocator

import (
	"net/netip"
	"strconv"
	"time"

	"skein/manager/api"
)

// Names of what rests besides addresses, which carry their pool's name. Object ids hold no colon.
const (
	restSubnet = "subnet:"
	restIndex  = "index:"
	meshPrefix = "mesh:"
)

type resting struct {
	pool, addr string
	until      int64
}

// queue is a quarantine in order of release. All its items rest equally long, so that is the order of expiry too.
type queue struct {
	rest time.Duration
	all  []resting
	head int   // all[:head] is over and done with
	last int64 // newest time seen
}

func (q *queue) items() []resting { return q.all[q.head:] }
func (q *queue) push(r resting)   { q.all = append(q.all, r) }
func (q *queue) unpush()          { q.all = q.all[:len(q.all)-1] }

// expire takes out what rested long enough. When the proposers' clock went back, nothing rests longer than the queue's time from now.
func (q *queue) expire(now int64) []resting {
	items := q.items()
	if now < q.last {
		limit := now + int64(q.rest)
		for i := range items {
			items[i].until = min(items[i].until, limit)
		}
	}
	q.last = now
	n := 0
	for n < len(items) && items[n].until <= now {
		n++
	}
	if q.head += n; q.head > len(q.all)/2 {
		q.all, q.head = append([]resting(nil), q.items()...), 0
	}
	return items[:n]
}

// Advance lets everything go whose rest is over at the time of the entry about to be applied. It is not undone with a transaction.
func (s *State) Advance(now int64) {
	for _, r := range s.rest.expire(now) {
		s.free(r)
	}
	s.restIdx.expire(now)
}

func (s *State) free(r resting) {
	if r.pool == restSubnet {
		p, err := netip.ParsePrefix(r.addr)
		if err != nil {
			return
		}
		if s.restNets[p]--; s.restNets[p] <= 0 {
			delete(s.restNets, p)
		}
		return
	}
	p := s.poolOf(r.pool)
	a, err := netip.ParseAddr(r.addr)
	if p == nil || err != nil {
		return
	}
	if off, ok := p.offset4(a); ok && p.has(off) {
		p.unset(off)
		p.resting--
	}
}

// Quarantine lists what rests, for a snapshot.
func (s *State) Quarantine() []*api.Quarantine {
	out := make([]*api.Quarantine, 0, len(s.rest.items())+len(s.restIdx.items()))
	for _, q := range []*queue{&s.rest, &s.restIdx} {
		for _, r := range q.items() {
			out = append(out, &api.Quarantine{Pool: r.pool, Addr: r.addr, Until: r.until})
		}
	}
	return out
}

// RestoreQuarantine adds one item of a snapshot; networks and nodes come before.
func (s *State) RestoreQuarantine(q *api.Quarantine) error {
	r := resting{pool: q.Pool, addr: q.Addr, until: q.Until}
	switch {
	case q.Pool == restIndex:
		if _, err := strconv.ParseUint(q.Addr, 10, 32); err != nil {
			return dataLoss("restore quarantine: node index %q is not a number", q.Addr)
		}
		s.restIdx.push(r)
		return nil
	case q.Pool == restSubnet:
		p, err := netip.ParsePrefix(q.Addr)
		if err != nil {
			return dataLoss("restore quarantine: subnet %q: %v", q.Addr, err)
		}
		s.restNets[p]++
	default:
		p := s.poolOf(q.Pool)
		a, err := netip.ParseAddr(q.Addr)
		if p == nil || err != nil {
			return dataLoss("restore quarantine: address %q of pool %q: no such pool or address", q.Addr, q.Pool)
		}
		if err := s.hold(p, a); err != nil {
			return err
		}
		p.resting++
	}
	s.rest.push(r)
	return nil
}

// SetTime tells the quarantine the time of the newest entry a snapshot covers.
func (s *State) SetTime(now int64) { s.rest.last, s.restIdx.last = now, now }

// forget drops the resting addresses of a pool that ceases to exist.
func (s *State) forget(poolName string) {
	old, head := s.rest.all, s.rest.head
	var kept []resting
	for _, r := range s.rest.items() {
		if r.pool != poolName {
			kept = append(kept, r)
		}
	}
	s.j.Add(func() { s.rest.all, s.rest.head = old, head })
	s.rest.all, s.rest.head = kept, 0
}

func (s *State) restingIndexes() map[uint32]bool {
	out := make(map[uint32]bool, len(s.restIdx.items()))
	for _, r := range s.restIdx.items() {
		if n, err := strconv.ParseUint(r.addr, 10, 32); err == nil {
			out[uint32(n)] = true
		}
	}
	return out
}
