package cli

import (
	"bytes"
	"strings"
	"testing"
)

func TestPrintNet(t *testing.T) {
	var b bytes.Buffer
	err := printNet(&b, []netRow{
		{NodeID: "a", Hostname: "n1", Network: "mesh", Desired: 7, Applied: 7, Live: true, Notes: []string{"cannot carry encrypted networks: no tun"}},
		{NodeID: "b", Hostname: "n2", Network: "front", Desired: 9, Applied: 7, Live: true, Behind: 1.25},
		{NodeID: "c", Hostname: "n3", Network: "front", Desired: 9, Applied: 7, Behind: 62.5, Reason: "heartbeat failure", Silent: 63},
		{NodeID: "d", Hostname: "n4", Network: "front", Desired: 9, Applied: 8, Live: true, Behind: 3, Err: "no buffer space"},
	})
	want := `NODE   HOSTNAME   NETWORK   DESIRED   APPLIED   LAG     STATE
a      n1         mesh      7         7         -       ok
b      n2         front     9         7         1.3s    behind
c      n3         front     9         7         1m2.5s  stale: heartbeat failure; last heard 1m3s ago
d      n4         front     9         8         3s      failed: no buffer space
n1: cannot carry encrypted networks: no tun
`
	if got := b.String(); err != nil || strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(want), " ") {
		t.Errorf("got %v\n%s", err, got)
	}
}

func TestPrintCheck(t *testing.T) {
	list := []netNode{{Hostname: "n1"}, {Hostname: "n2", Differences: []netDifference{{Table: "mesh", Kind: "route", Object: "10.192.8.0/22", State: "missing", Mended: true}}},
		{Hostname: "n3", Err: "not compared: the node does not answer"}}
	var b bytes.Buffer
	err := printCheck(&b, list)
	want := `NODE WHERE KIND OBJECT STATE MENDED n2 mesh route 10.192.8.0/22 missing yes n3: not compared: the node does not answer 1 of 3 nodes agree with the record.`
	if got := strings.Join(strings.Fields(b.String()), " "); err != nil || got != want {
		t.Errorf("got %v\n%s", err, got)
	}
	if !wrong(list) || wrong(list[:1]) || !wrong(list[2:]) {
		t.Error("the exit code is wrong")
	}
}
