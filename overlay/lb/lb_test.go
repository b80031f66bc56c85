package lb

import (
	"math/rand/v2"
	"testing"
)

func TestClass(t *testing.T) {
	for _, c := range []struct{ n, want int }{{0, 64}, {64, 64}, {65, 256}, {5000, 1024}} {
		if got := Class(c.n, []int{64, 256, 1024}); got != c.want {
			t.Errorf("Class(%d) = %d, want %d", c.n, got, c.want)
		}
	}
}

// Whatever comes and goes: shares differ by at most one, only backends hold slots, and no more slots move than balance demands.
func TestFillProperties(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var prev []int
	for round := range 3000 {
		size := []int{64, 256}[r.IntN(2)]
		if round%10 != 0 && prev != nil {
			size = len(prev)
		}
		backends := r.Perm(40)[:r.IntN(20)]
		for i := range backends {
			backends[i]++ // zero is the empty slot
		}
		got := Fill(prev, backends, size)
		if len(backends) == 0 {
			if got != nil {
				t.Fatalf("no backends: %v", got)
			}
			prev = nil
			continue
		}
		held := map[int]int{}
		for _, b := range got {
			held[b]++
		}
		least, most := size, 0
		for _, b := range backends {
			least, most = min(least, held[b]), max(most, held[b])
			delete(held, b)
		}
		if len(held) != 0 || most-least > 1 || len(got) != size {
			t.Fatalf("round %d: size %d backends %v: %v", round, size, backends, got)
		}
		if len(prev) == size {
			before, moved, need := map[int]int{}, 0, 0
			for i := range prev {
				before[prev[i]]++
				if prev[i] != got[i] {
					moved++
				}
			}
			for _, b := range backends {
				need += max(0, size/len(backends)-before[b])
			}
			if slack := size % len(backends); moved > need+slack {
				t.Fatalf("round %d: %d slots moved, %d needed and %d slack", round, moved, need, slack)
			}
		}
		prev = got
	}
}

func TestFillMoreBackendsThanSlots(t *testing.T) {
	var many []int
	for i := range 100 {
		many = append(many, i+1)
	}
	got := Fill(nil, many, 64)
	seen := map[int]bool{}
	for _, b := range got {
		seen[b] = true
	}
	if len(seen) != 64 {
		t.Errorf("%d backends in 64 slots, want 64", len(seen))
	}
}
