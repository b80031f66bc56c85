package consensus

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestFailoverTime cuts leaders off and measures, in virtual time and with the timing that managers have, how long nobody can lead.
func TestFailoverTime(t *testing.T) {
	for _, count := range []int{3, 5} {
		t.Run(fmt.Sprint(count), func(t *testing.T) { synctest.Test(t, func(t *testing.T) { failoverTime(t, count) }) })
	}
}

func failoverTime(t *testing.T, count int) {
	normal := func(c *Config) { c.Timing = Timing{} }
	h := newHub()
	t.Cleanup(func() { // last of all: everything in the bubble must end
		for i := range count {
			h.setCut(fmt.Sprintf("m%d", i+1), true)
		}
		time.Sleep(time.Minute)
	})
	ms := []*manager{h.bootstrapped(t, "m1", normal)}
	for i := 2; i <= count; i++ {
		id := fmt.Sprintf("m%d", i)
		m := h.open(t, id, t.TempDir(), normal)
		if err := ms[0].AddVoter(t.Context(), id, id); err != nil {
			t.Fatal(err)
		}
		ms = append(ms, m)
	}
	var took []time.Duration
	for i := range 10 {
		old := leader(t, ms)
		time.Sleep(2*time.Second + time.Duration(i)*137*time.Millisecond)
		term := old.raft.CurrentTerm()
		time.Sleep(30 * time.Second)
		if now := old.raft.CurrentTerm(); now != term || !old.IsLeader() {
			t.Fatalf("term %d became %d though nothing happened", term, now)
		}
		begun := time.Now()
		h.setCut(old.id, true)
		for written := false; !written; time.Sleep(5 * time.Millisecond) {
			for _, m := range ms {
				if m != old && m.IsLeader() && !written {
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					_, _, err := m.store.Batch(ctx, nil)
					written = err == nil && m.Linearizable(ctx) == nil
					cancel()
				}
			}
		}
		took = append(took, time.Since(begun))
		h.setCut(old.id, false)
		time.Sleep(5 * time.Second)
	}
	slices.Sort(took)
	t.Logf("%d managers: min %v median %v max %v", count, took[0], took[len(took)/2], took[len(took)-1])
	if took[len(took)/2] > 1200*time.Millisecond || took[len(took)-1] > 2500*time.Millisecond {
		t.Errorf("failover took %v", took)
	}
}
