package netbench

import (
	"os"
	"strings"
	"testing"
	"time"
)

// TestParts does a little of each part; figures are for people.
func TestParts(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: makes networks of a few nodes")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	o := options{rounds: 1, slice: 5 * time.Millisecond, metrics: "rr,udp,conn,stream", containers: 6, nodes: 3, endpoints: 50, changes: 4}
	t.Setenv("TMPDIR", t.TempDir())
	if err := run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), os.Getenv("TMPDIR")) {
		t.Errorf("mounts left: %v", err)
	}
}

// TestMeshAddr: addresses of blocks are those that the product gives.
func TestMeshAddr(t *testing.T) {
	for _, c := range []struct {
		node, n int
		want    string
	}{{1, 1, "10.192.4.1"}, {1, 300, "10.192.5.44"}, {64, 2, "10.193.0.2"}} {
		if got := meshAddr(c.node, c.n).String(); got != c.want {
			t.Errorf("address %d of node %d is %s, want %s", c.n, c.node, got, c.want)
		}
	}
}
