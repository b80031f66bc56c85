package nemesis

import (
	"slices"
	"testing"
	"time"
)

func TestPlan(t *testing.T) {
	a, b := Plan(7, 10*time.Minute, true), Plan(7, 10*time.Minute, true)
	if !slices.Equal(a, b) {
		t.Error("one seed gave two plans")
	}
	if slices.Equal(a, Plan(8, 10*time.Minute, true)) {
		t.Error("two seeds gave one plan")
	}
	if n := len(a); n < 75 || n > 300 {
		t.Errorf("%d faults in 10 minutes, want one every 2 to 8 s", n)
	}
	seen := map[Kind]int{}
	leaders := 0
	for i, s := range a {
		seen[s.Kind]++
		if s.Leader {
			leaders++
		}
		if i > 0 && (s.At-a[i-1].At < minPause || s.At-a[i-1].At > maxPause) {
			t.Errorf("step %d: %v after the one before", i, s.At-a[i-1].At)
		}
		if s.At+s.For > 10*time.Minute {
			t.Errorf("step %d lasts beyond the end: %v", i, s)
		}
	}
	if len(seen) < len(kinds)-1 || leaders < len(a)/2 {
		t.Errorf("kinds %v, %d of %d at the leader", seen, leaders, len(a))
	}
	for _, s := range Plan(7, 10*time.Minute, false) {
		if slices.Contains(diskFaults, s.Kind) {
			t.Errorf("without disks: %v", s)
		}
	}
	for _, s := range Plan(7, time.Minute, true, Kill, Loss) {
		if s.Kind != Kill && s.Kind != Loss {
			t.Errorf("not asked for: %v", s)
		}
	}
}

func TestKinds(t *testing.T) {
	if got, err := Kinds("kill,slow"); err != nil || !slices.Equal(got, []Kind{Kill, Slow}) {
		t.Errorf("kill,slow: %v, %v", got, err)
	}
	if _, err := Kinds("kill,nosuch"); err == nil {
		t.Error("nosuch was accepted")
	}
}
