package overlay

import (
	"net/netip"
	"testing"
)

// A node with more containers than its block of the mesh pool holds has some in further blocks: they are backends as the others are, on their own
// node and through another, keep their clients while they leave rotation, and find their way out.
func TestBackendInAFurtherBlock(t *testing.T) {
	l := newLab(t, 2)
	far4 := nodeBlock(labPool, 4000).Addr().Next()
	far6 := nodeAddr6(labPool6, 4000)
	b := Backend{EndpointID: "far", Node: 2, Addr4: far4, Addr6: far6}
	mesh := Mesh{Ports: []PublishedPort{{ServiceID: "svc", Protocol: "tcp", Published: 8080, Target: 80, Backends: []Backend{b}}}}
	l.setAll(nil, mesh)
	far := l.sandbox(l.hosts[1], Sandbox{ID: "far", Gateway4: far4, Gateway6: far6})
	l.serve(far, "far", 80)
	for network, ats := range map[string][]string{"tcp4": {"192.0.2.1:8080", "192.0.2.2:8080"}, "tcp6": {"[2001:db8:1::1]:8080", "[2001:db8:1::2]:8080"}} {
		want := clientAddr
		if network == "tcp6" {
			want = client6
		}
		for _, at := range ats {
			if got := l.spread(l.cl, network, at, 5, want); got["far"] != 5 {
				t.Errorf("%s %s: %v", network, at, got)
			}
		}
	}
	for _, at := range []string{"127.0.0.1:8080", "192.0.2.2:8080"} { // the node itself as client of another's backend
		if got := l.spread(l.hosts[0].ns, "tcp4", at, 5, ""); got["far"] != 5 {
			t.Errorf("from node 1 to %s: %v", at, got)
		}
	}
	kept, err := open(l.cl, "tcp4", "192.0.2.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	mesh.Ports[0].Backends = nil
	mesh.Leaving = []Backend{b}
	l.setAll(nil, mesh)
	if name, _, err := kept.ask(); err != nil || name != "far" {
		t.Errorf("a client of a backend that leaves: %s, %v", name, err)
	}
	l.serve(l.cl, "client", 90)
	if name, from, err := get(far, "tcp4", clientAddr+":90"); err != nil || name != "client" || from != netip.MustParseAddr("192.0.2.2") {
		t.Errorf("the way out: %s from %s, %v", name, from, err)
	}
}
