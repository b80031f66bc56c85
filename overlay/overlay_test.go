package overlay

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// webNetwork: service web (VIP 10.10.0.2) with one endpoint per host, 10.10.0.1<host>.
func webNetwork(states ...EndpointState) Network {
	nw := Network{ID: "netwebidnetwebidnetwebid1", Name: "front", VNI: 4097, Subnet4: netip.MustParsePrefix("10.10.0.0/24"),
		Services: []Service{
			{ID: "svcweb", Names: []string{"web"}, VIP4: addr("10.10.0.2")},
			{ID: "svcrr", Names: []string{"rr"}, DNSRR: true},
			{ID: "svcempty", Names: []string{"empty"}, VIP4: addr("10.10.0.3")},
		}}
	for i, s := range states {
		nw.Endpoints = append(nw.Endpoints, Endpoint{ID: fmt.Sprintf("task%d", i+1), ServiceID: "svcweb", Node: uint32(i + 1), State: s,
			Addr4: netip.AddrFrom4([4]byte{10, 10, 0, byte(11 + i)}), Names: []string{fmt.Sprintf("web.%d", i+1)}})
	}
	return nw
}

func gatewayOf(node int) netip.Addr {
	b := nodeBlock(labPool, uint32(node)).Addr().As4()
	b[3] = 2
	return netip.AddrFrom4(b)
}

// webPort publishes 8080 → 80 on the given hosts' tasks.
func webMesh(hosts ...int) Mesh {
	var b []Backend
	for _, h := range hosts {
		b = append(b, Backend{EndpointID: fmt.Sprintf("task%d", h), Node: uint32(h), Addr4: gatewayOf(h)})
	}
	return Mesh{Ports: []PublishedPort{
		{ServiceID: "svcweb", Protocol: "tcp", Published: 8080, Target: 80, Backends: b},
		{ServiceID: "svcweb", Protocol: "udp", Published: 8080, Target: 80, Backends: b},
		{ServiceID: "svcempty", Protocol: "tcp", Published: 8081, Target: 80},
		{ServiceID: "svchost", Protocol: "tcp", Published: 8082, Target: 80, Local: true, Backends: b[:1]},
	}}
}

func webSandbox(host int) Sandbox {
	return Sandbox{ID: fmt.Sprintf("task%d", host), DNS: true, Gateway4: gatewayOf(host),
		Legs: []Leg{{NetworkID: "netwebidnetwebidnetwebid1", Addr4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 10, 0, byte(10 + host)}), 24)}}}
}

func TestClusterPaths(t *testing.T) {
	l := newLab(t, 3)
	l.setAll([]Network{webNetwork(Ready, Ready, Ready)}, webMesh(1, 2, 3))
	for i, h := range l.hosts {
		ns := l.sandbox(h, webSandbox(i+1))
		l.serve(ns, fmt.Sprintf("task%d", i+1), 80)
		defer func() { _ = h.RemoveSandbox(context.Background(), fmt.Sprintf("task%d", i+1)) }()
	}
	box := func(i int) string { return l.hosts[i-1].sandboxFile(fmt.Sprintf("task%d", i)) }
	t1 := openNS(t, box(1))
	t.Run("container to container", func(t *testing.T) {
		l := l.in(t)
		for i := 1; i <= 3; i++ {
			to := fmt.Sprintf("10.10.0.1%d:80", i)
			for _, network := range []string{"tcp4", "udp4"} {
				if got := l.spread(t1, network, to, 1, "10.10.0.11"); got[fmt.Sprintf("task%d", i)] != 1 {
					t.Errorf("%s %s: %v", network, to, got)
				}
			}
		}
	})
	t.Run("vip", func(t *testing.T) {
		l := l.in(t)
		if got := l.spread(t1, "tcp4", "10.10.0.2:80", 60, ""); len(got) != 3 {
			t.Errorf("VIP reached %v, want three tasks", got)
		}
		if _, _, err := get(t1, "tcp4", "10.10.0.3:80"); err == nil {
			t.Error("an empty service answered")
		}
	})
	t.Run("published", func(t *testing.T) {
		l := l.in(t)
		for i := 1; i <= 3; i++ {
			at := fmt.Sprintf("192.0.2.%d:8080", i)
			for _, network := range []string{"tcp4", "udp4"} {
				if got := l.spread(l.cl, network, at, 30, clientAddr); len(got) != 3 {
					t.Errorf("%s %s reached %v, want three tasks", network, at, got)
				}
			}
		}
	})
	t.Run("from nodes", func(t *testing.T) {
		l := l.in(t)
		for _, at := range []string{"127.0.0.1:8080", "192.0.2.1:8080", "192.0.2.2:8080", "192.0.2.3:8080"} {
			for _, network := range []string{"tcp4", "udp4"} {
				if got := l.spread(l.hosts[0].ns, network, at, 30, ""); len(got) != 3 {
					t.Errorf("%s %s from node 1 reached %v, want three tasks", network, at, got)
				}
			}
		}
	})
	t.Run("hairpin", func(t *testing.T) {
		l := l.in(t)
		for _, at := range []string{"192.0.2.1:8080", "192.0.2.3:8080"} {
			if got := l.spread(t1, "tcp4", at, 30, ""); len(got) != 3 {
				t.Errorf("%s from task 1 reached %v, want three tasks", at, got)
			}
		}
	})
}
