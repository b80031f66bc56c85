package main

import (
	"os"
	"testing"
)

// TestSmoke is a short run of the program: three faults whose outcome does not depend on how busy the machine is.
func TestSmoke(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: real clusters are left out")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces, mounts and cgroups")
	}
	broken, err := run(t.Context(), options{name: "chs", managers: 3, minutes: 1, rounds: 3, seed: 1, faults: "kill-follower,kill-supervisor,kill-both"})
	if err != nil {
		t.Fatal(err)
	}
	if broken > 0 {
		t.Errorf("%d promises broken: see the output", broken)
	}
}

func TestChoose(t *testing.T) {
	if all, err := choose(""); err != nil || len(all) != len(faults) {
		t.Errorf("no names: %d faults, %v", len(all), err)
	}
	if some, err := choose("kill-leader,cut-*"); err != nil || len(some) != 4 {
		t.Errorf("kill-leader,cut-*: %d faults, %v", len(some), err)
	}
	if _, err := choose("nosuch"); err == nil {
		t.Error("nosuch was accepted")
	}
}

func TestGrowth(t *testing.T) {
	got := growth(map[string]int{"n1 devices": 3, "n1 mounts": 5}, map[string]int{"n1 devices": 4, "n1 mounts": 5, "n1 entries below /x": 2})
	if len(got) != 1 || got["n1 devices"] != "3 → 4" {
		t.Errorf("growth: %v", got)
	}
}
