package overlay

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// bigNetwork has 1,000 services with five endpoints each, spread over ten nodes of which the first is here.
func bigNetwork() (Network, Mesh) {
	nw := Network{ID: "bignetwork", Name: "big", VNI: 4100, Subnet4: netip.MustParsePrefix("10.20.0.0/16")}
	var mesh Mesh
	for s := range 1000 {
		id := fmt.Sprintf("svc%d", s)
		nw.Services = append(nw.Services, Service{ID: id, Names: []string{id}, VIP4: netip.AddrFrom4([4]byte{10, 20, byte(128 + s>>8), byte(s)})})
		port := PublishedPort{ServiceID: id, Protocol: "tcp", Published: uint16(10000 + s), Target: 80}
		for e := range 5 {
			n := s*5 + e
			a := netip.AddrFrom4([4]byte{10, 20, byte(1 + n>>8), byte(n)})
			nw.Endpoints = append(nw.Endpoints, Endpoint{ID: fmt.Sprint(n), ServiceID: id, Node: uint32(1 + n%10), Addr4: a, State: Ready, Names: []string{fmt.Sprintf("%s.%d", id, e)}})
			g := nodeBlock(labPool, uint32(1+n%10)).Addr().As4()
			g[2], g[3] = g[2]+byte(n/10>>8), byte(n/10)
			port.Backends = append(port.Backends, Backend{EndpointID: fmt.Sprint(n), Node: uint32(1 + n%10), Addr4: netip.AddrFrom4(g)})
		}
		mesh.Ports = append(mesh.Ports, port)
	}
	return nw, mesh
}

// TestBigTables shows what a change costs where 1,000 services and 5,000 endpoints are known; figures are logged, not asserted.
func TestBigTables(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 128,000 elements")
	}
	l := newLab(t, 1)
	h := l.hosts[0]
	nw, mesh := bigNetwork()
	cfg := l.baseConfig(h)
	for i := uint32(2); i <= 10; i++ {
		cfg.Peers = append(cfg.Peers, Node{Index: i, Underlay: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})})
	}
	cfg.Networks, cfg.Mesh = []Network{nw}, mesh
	set := func(what string) {
		t.Helper()
		start := time.Now()
		applied, err := h.Set(context.Background(), cfg)
		l.must(err)
		for table, err := range applied {
			if err != nil {
				t.Fatalf("%s: %v", table, err)
			}
		}
		t.Logf("%s: %s", what, time.Since(start).Round(10*time.Microsecond))
	}
	set("first")
	set("nothing changed")
	for i := range 3 {
		next := nw
		next.Endpoints = slices.Clone(cfg.Networks[0].Endpoints)
		next.Endpoints[7+i].State = Draining
		ports := slices.Clone(cfg.Mesh.Ports)
		ports[1].Backends = ports[1].Backends[1:]
		cfg.Networks, cfg.Mesh.Ports = []Network{next}, ports
		set("one endpoint drains")
	}
	start := time.Now()
	l.must(h.Check(context.Background()))
	t.Logf("full comparison: %s", time.Since(start).Round(time.Millisecond))
	for i := range 20 {
		s := Sandbox{ID: fmt.Sprintf("box%d", i), DNS: true, Gateway4: netip.AddrFrom4([4]byte{10, 192, 7, byte(i + 2)}),
			Legs: []Leg{{NetworkID: "bignetwork", Addr4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 20, 100, byte(i)}), 16)}}}
		start := time.Now()
		l.sandbox(h, s)
		if i >= 17 {
			t.Logf("sandbox: %s", time.Since(start).Round(10*time.Microsecond))
		}
	}
}
