package main

import (
	"os"
	"testing"
	"time"
)

// TestSmoke is a short run of the program.
func TestSmoke(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: real clusters are left out")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces, mounts and cgroups")
	}
	broken, err := run(t.Context(), options{name: "flo", managers: 3, workers: 1, replicas: 3, ops: 4, seed: 1, only: "start-first,stop-first,drain-worker,kill-leader",
		stream: time.Second, drain: 2 * time.Second, pause: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if broken > 0 {
		t.Errorf("%d requests failed or operations did not end: see the output", broken)
	}
}

func TestChoose(t *testing.T) {
	if all, err := choose(""); err != nil || len(all) != len(operations()) {
		t.Errorf("no names: %d operations, %v", len(all), err)
	}
	if some, err := choose("kill-*,sick"); err != nil || len(some) != 4 {
		t.Errorf("kill-*,sick: %d operations, %v", len(some), err)
	}
	if _, err := choose("nosuch"); err == nil {
		t.Error("nosuch was accepted")
	}
}
