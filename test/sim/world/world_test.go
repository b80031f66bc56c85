package world

import (
	"flag"
	"fmt"
	"testing"
	"time"
)

var (
	seeds = flag.Uint64("seeds", 0, "histories to simulate; 0: as many as fit the share of time")
	from  = flag.Uint64("from", 1, "the first seed")
	share = flag.Duration("share", 8*time.Second, "time for the histories of one test run")
)

// past are seeds that found defects; each was mended with a test of its own in the package concerned.
var past = []uint64{8, 11, 13, 103, 230, 406, 1075, 1080, 200381}

func play(t *testing.T, cfg Config) Result {
	t.Helper()
	r := Run(cfg)
	if r.Err != nil {
		t.Fatalf("%s\nseed %d: %v\nagain: go run ./test/sim --seeds 1 --from %d --trace", r.Trace, r.Seed, r.Err, r.Seed)
	}
	return r
}

// TestPastSeeds plays the histories that found defects.
func TestPastSeeds(t *testing.T) {
	for _, seed := range past {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { play(t, Config{Seed: seed}) })
	}
}

// TestSeeds plays as many histories as there is time for.
func TestSeeds(t *testing.T) {
	if *seeds > 0 {
		for i := range *seeds {
			play(t, Config{Seed: *from + i})
		}
		return
	}
	began, n, entries := time.Now(), 0, 0
	for ; time.Since(began) < *share && n < 1000; n++ {
		entries += play(t, Config{Seed: *from + uint64(n), Busy: 40 * time.Second}).Entries
	}
	t.Logf("%d histories from seed %d, %d entries", n, *from, entries)
	if n == 0 {
		t.Error("not one history was played")
	}
}

// TestSameSeedSameHistory: what fails can be played again.
func TestSameSeedSameHistory(t *testing.T) {
	for seed := uint64(1); seed <= 3; seed++ {
		a, b := play(t, Config{Seed: seed, Busy: 30 * time.Second}), play(t, Config{Seed: seed, Busy: 30 * time.Second})
		if a.Entries != b.Entries || a.Events != b.Events || a.Hash != b.Hash {
			t.Errorf("seed %d: %d entries, %d events and hash %x, then %d, %d and %x", seed, a.Entries, a.Events, a.Hash[:4], b.Entries, b.Events, b.Hash[:4])
		}
	}
}
