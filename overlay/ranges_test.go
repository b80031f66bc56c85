package overlay

import (
	"fmt"
	"net/netip"
	"testing"
)

// A network that got further ranges while a container ran on it: the container reaches them, and is reached from there, in both families and
// by VIP, also one in the new range; the router answers where it was told to be.
func TestNetworkWithSeveralRanges(t *testing.T) {
	l := newLab(t, 2)
	nw := Network{ID: "netwebidnetwebidnetwebid1", Name: "front", VNI: 4097, Subnet4: netip.MustParsePrefix("10.10.0.0/28"), Subnet6: netip.MustParsePrefix("fd00:7::/64"),
		Router4: addr("10.10.0.14"), Endpoints: []Endpoint{{ID: "old", Node: 1, State: Ready, Addr4: addr("10.10.0.1"), Addr6: addr("fd00:7::21")}}}
	l.setAll([]Network{nw}, Mesh{})
	old := l.sandbox(l.hosts[0], Sandbox{ID: "old", Gateway4: gatewayOf(1), Legs: []Leg{{NetworkID: nw.ID, Addr4: netip.MustParsePrefix("10.10.0.1/28"), Addr6: netip.MustParsePrefix("fd00:7::21/64")}}})
	l.serve(old, "old", 80)

	nw.More = []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24"), netip.MustParsePrefix("fd00:7::/64"), netip.MustParsePrefix("fd00:8::/64")}
	nw.Services = []Service{{ID: "svc", Names: []string{"web"}, VIP4: addr("10.77.0.9"), VIP6: addr("fd00:8::9")}}
	nw.Endpoints = append(nw.Endpoints, Endpoint{ID: "new", ServiceID: "svc", Node: 2, State: Ready, Addr4: addr("10.77.0.1"), Addr6: addr("fd00:8::1")})
	l.setAll([]Network{nw}, Mesh{})
	fresh := l.sandbox(l.hosts[1], Sandbox{ID: "new", Gateway4: gatewayOf(2), Legs: []Leg{{NetworkID: nw.ID, Addr4: netip.MustParsePrefix("10.77.0.1/24"), Addr6: netip.MustParsePrefix("fd00:8::1/64")}}})
	l.serve(fresh, "new", 80)
	for _, k := range []struct{ network, to, from string }{
		{"tcp4", "10.77.0.1:80", "10.10.0.1"}, {"tcp6", "[fd00:8::1]:80", "fd00:7::21"}, {"tcp4", "10.77.0.9:80", "10.10.0.1"}, {"tcp6", "[fd00:8::9]:80", "fd00:7::21"},
	} {
		if name, from, err := get(old, k.network, k.to); err != nil || name != "new" || from.String() != k.from {
			t.Errorf("from the old range to %s: %s %s %v", k.to, name, from, err)
		}
	}
	for network, to := range map[string]string{"tcp4": "10.10.0.1:80", "tcp6": "[fd00:7::21]:80"} {
		if name, _, err := get(fresh, network, to); err != nil || name != "old" {
			t.Errorf("from the new range to %s: %s %v", to, name, err)
		}
	}
}

// Two networks with the same subnet: each one's containers reach their own peers at the same addresses, and nobody else's.
func TestSameSubnetSideBySide(t *testing.T) {
	l := newLab(t, 2)
	var networks []Network
	for i, name := range []string{"left", "right"} {
		nw := Network{ID: fmt.Sprintf("net%dnetnetnetnetnetnetnet", i), Name: name, VNI: uint32(4097 + i), Subnet4: netip.MustParsePrefix("10.10.0.0/24")}
		for h := range 2 {
			nw.Endpoints = append(nw.Endpoints, Endpoint{ID: fmt.Sprint(name, h+1), ServiceID: "svc" + name, Node: uint32(h + 1), State: Ready, Addr4: netip.AddrFrom4([4]byte{10, 10, 0, byte(11 + h)})})
		}
		nw.Services = []Service{{ID: "svc" + name, Names: []string{"web"}, VIP4: addr("10.10.0.2")}}
		networks = append(networks, nw)
	}
	networks[0].Endpoints = append(networks[0].Endpoints, Endpoint{ID: "only", Node: 2, State: Ready, Addr4: addr("10.10.0.99")})
	l.setAll(networks, Mesh{})
	box := func(h int, id string, nw Network, a string) Sandbox {
		return Sandbox{ID: id, Legs: []Leg{{NetworkID: nw.ID, Addr4: netip.MustParsePrefix(a + "/24")}}}
	}
	for i, h := range l.hosts {
		for _, nw := range networks {
			a := fmt.Sprintf("10.10.0.%d", 11+i)
			ns := l.sandbox(h, box(i, fmt.Sprint(nw.Name, i+1), nw, a))
			l.serve(ns, fmt.Sprint(nw.Name, i+1), 80)
		}
	}
	l.serve(l.sandbox(l.hosts[1], box(1, "only", networks[0], "10.10.0.99")), "only", 80)
	for _, name := range []string{"left", "right"} {
		ns := openNS(t, l.hosts[0].sandboxFile(name+"1"))
		if got, _, err := get(ns, "tcp4", "10.10.0.12:80"); err != nil || got != name+"2" {
			t.Errorf("%s reached %s: %v", name, got, err)
		}
		got := l.spread(ns, "tcp4", "10.10.0.2:80", 20, "")
		for who := range got {
			if who != name+"1" && who != name+"2" {
				t.Errorf("%s reached %v by the VIP", name, got)
			}
		}
	}
	if got, _, err := get(openNS(t, l.hosts[0].sandboxFile("left1")), "tcp4", "10.10.0.99:80"); err != nil || got != "only" {
		t.Errorf("left reached %s: %v", got, err)
	}
	if got, _, err := get(openNS(t, l.hosts[0].sandboxFile("right1")), "tcp4", "10.10.0.99:80"); err == nil {
		t.Errorf("right reached %s of the network left", got)
	}
}
