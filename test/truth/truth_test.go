package main

import (
	"os"
	"testing"
	"time"
)

// TestShort is two faults with all the time that a loaded machine needs.
func TestShort(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: real nodes are left out")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces, mounts and cgroups")
	}
	broken, err := run(t.Context(), options{name: "trut", managers: 1, workers: 2, hold: 2 * time.Second, within: settle, rounds: 1, faults: "cut-worker,kill-leader"})
	if err != nil {
		t.Fatal(err)
	}
	if broken > 0 {
		t.Errorf("%d promises were broken", broken)
	}
}
