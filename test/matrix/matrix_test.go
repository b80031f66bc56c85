package main

import (
	"os"
	"testing"
)

// TestShort is the whole matrix with few requests.
func TestShort(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: real nodes are left out")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces, mounts and cgroups")
	}
	broken, err := run(t.Context(), options{name: "mtxt", nodes: 3, requests: 300, clients: 4}, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	if broken > 0 {
		t.Errorf("%d requests were not answered as promised", broken)
	}
}
