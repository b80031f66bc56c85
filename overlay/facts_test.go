package overlay

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"testing"
)

// A port that a process on one node had before it was published is left to that process there, and served everywhere else; once the process
// is gone it is served there, too. A process that comes later gets nothing.
func TestPortThatAHostProcessHolds(t *testing.T) {
	l := newLab(t, 2)
	stop := l.serve(l.hosts[1].ns, "process", 8080)
	networks := []Network{webNetwork(Ready)}
	l.setAll(networks, Mesh{})
	box := l.sandbox(l.hosts[0], webSandbox(1))
	l.serve(box, "task1", 80)
	l.setAll(networks, webMesh(1))
	for _, network := range []string{"tcp4", "udp4"} {
		for at, want := range map[string]string{"192.0.2.1:8080": "task1", "192.0.2.2:8080": "process"} {
			if name, _, err := get(l.cl, network, at); err != nil || name != want {
				t.Errorf("%s %s: %s answered, want %s: %v", network, at, name, want, err)
			}
		}
		if name, _, err := get(l.hosts[1].ns, network, "127.0.0.1:8080"); err != nil || name != "process" {
			t.Errorf("%s on the node itself: %s answered: %v", network, name, err)
		}
	}
	l.serve(l.hosts[0].ns, "late", 8080)
	l.must(l.hosts[0].Check(context.Background()))
	if name, _, err := get(l.cl, "tcp4", "192.0.2.1:8080"); err != nil || name != "task1" {
		t.Errorf("a process that came later took the port: %s: %v", name, err)
	}
	stop()
	l.must(l.hosts[1].Check(context.Background()))
	if name, _, err := get(l.cl, "tcp4", "192.0.2.2:8080"); err != nil || name != "task1" {
		t.Errorf("after the process ended: %s answered: %v", name, err)
	}
	// The next daemon finds what was served, and keeps it.
	l.hosts[0].Close()
	l.hosts[0].Driver = l.driver(1, nil)
	l.set(l.hosts[0], networks, webMesh(1))
	if name, _, err := get(l.cl, "tcp4", "192.0.2.1:8080"); err != nil || name != "task1" {
		t.Errorf("after a restart: %s answered: %v", name, err)
	}
}

func TestFacts(t *testing.T) {
	l := newLab(t, 1)
	h := l.hosts[0]
	defer l.serve(h.ns, "x", 7777)()
	l.setAll([]Network{webNetwork(Ready)}, webMesh(1))
	f, err := h.Facts()
	l.must(err)
	if want := (FactRoute{netip.MustParsePrefix("192.0.2.0/24"), "eth0"}); !slices.Contains(f.Routes, want) || slices.ContainsFunc(f.Routes, func(r FactRoute) bool { return r.Device != "eth0" }) {
		t.Errorf("routes %v, want %v, and none but eth0's", f.Routes, want)
	}
	if f.UnderlayMTU != 1500 {
		t.Errorf("MTU %d", f.UnderlayMTU)
	}
	for _, proto := range []string{"tcp", "udp"} {
		i := slices.IndexFunc(f.Ports, func(p PortUse) bool { return p.Protocol == proto && p.Port == 7777 })
		if i < 0 || f.Ports[i].PID != os.Getpid() || f.Ports[i].Holder == "" {
			t.Errorf("%s 7777 is not among %v", proto, f.Ports)
		}
	}
	if i := slices.IndexFunc(f.Ports, func(p PortUse) bool { return p.Port == dataPort }); i < 0 || f.Ports[i].Holder != unseen {
		t.Errorf("the data port is not the kernel's among %v", f.Ports)
	}
}
