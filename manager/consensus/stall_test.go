package consensus

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestStalls(t *testing.T) {
	var s stalls
	at := time.Now()
	step := func(d time.Duration) time.Time { at = at.Add(d); return at }
	s.look(at)
	for range 20 {
		s.look(step(stallTick))
	}
	if s.recent(step(stallTick)) {
		t.Error("a stall though it looked all the time")
	}
	if !s.end(at).IsZero() {
		t.Error("a stall ended though there was none")
	}
	if !s.recent(step(time.Second)) || !s.end(at).Equal(at) {
		t.Error("no stall while it does not look")
	}
	s.look(at)
	if !s.recent(step(time.Millisecond)) {
		t.Error("the stall is forgotten as soon as it looked again")
	}
	for range int(stallMemory/stallTick) + 1 {
		s.look(step(stallTick))
	}
	if s.recent(at) {
		t.Error("the stall is never forgotten")
	}
}

// A leader that stood still proves its leadership with an entry: an old answer to a heartbeat is none.
func TestReadAfterStallIsAnEntry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub()
		m := h.bootstrapped(t, "m1", func(c *Config) { c.Timing = Timing{} })
		time.Sleep(time.Second)
		before := m.raft.LastIndex()
		if err := m.Linearizable(t.Context()); err != nil || m.raft.LastIndex() != before {
			t.Errorf("a read wrote %d entries (%v)", m.raft.LastIndex()-before, err)
		}
		m.stalls.mu.Lock()
		m.stalls.last = time.Now().Add(-time.Second)
		m.stalls.mu.Unlock()
		if err := m.Linearizable(t.Context()); err != nil || m.raft.LastIndex() != before+1 {
			t.Errorf("a read after a stall wrote %d entries (%v), want 1", m.raft.LastIndex()-before, err)
		}
		time.Sleep(2 * stallMemory)
		if err := m.Linearizable(t.Context()); err != nil || m.raft.LastIndex() != before+1 {
			t.Errorf("later: %d entries (%v), want 1", m.raft.LastIndex()-before, err)
		}
		_ = m.Close()
		time.Sleep(time.Minute)
	})
}
