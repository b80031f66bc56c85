package consensus

import (
	"sync"
	"time"
)

// Bounds of noticing that this process stood still.
const (
	stallTick   = 50 * time.Millisecond
	stallMax    = 300 * time.Millisecond // well below the heartbeat timeout, after which others may elect a leader
	stallMemory = 2 * time.Second        // until every answer from before was read
)

// stalls knows whether this process stood still for a while: it was frozen, or got no processor. What other managers answered before is
// read only afterwards then, and raft takes it for today's: a leader that was deposed meanwhile would believe that it still leads.
type stalls struct {
	mu   sync.Mutex
	last time.Time // looked
	seen time.Time // the end of the last stall; zero: none
}

// look notes that the process runs.
func (s *stalls) look(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.last.IsZero() && now.Sub(s.last) > stallMax {
		s.seen = now
	}
	s.last = now
}

// recent reports whether answers may be from before a stall.
func (s *stalls) recent(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return now.Sub(s.last) > stallMax || (!s.seen.IsZero() && now.Sub(s.seen) < stallMemory)
}

// end is when the last stall ended: now, if it lasts. Zero: there was none.
func (s *stalls) end(now time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.last) > stallMax {
		return now
	}
	return s.seen
}

// stallLoop looks until closed.
func (n *Node) stallLoop() {
	defer n.wg.Done()
	tick := time.NewTicker(stallTick)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			n.stalls.look(time.Now()) // not the tick's time: it may have waited in its channel
		case <-n.closed:
			return
		}
	}
}
