package overlay

import (
	"net"
	"net/netip"
	"sync"
	"testing"

	mdns "github.com/miekg/dns"

	"skein/overlay/dns"
	"skein/overlay/link"
)

// foreignResolver answers every question with its own name as text and remembers who asked.
type foreignResolver struct {
	mu   sync.Mutex
	from []string
}

func (l *lab) foreignResolver(ns *link.NS, at string) *foreignResolver {
	l.t.Helper()
	r := &foreignResolver{}
	var udp net.PacketConn
	l.must(ns.Do(func() (err error) {
		udp, err = net.ListenPacket("udp", at)
		return err
	}))
	srv := &mdns.Server{PacketConn: udp, Handler: mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		r.mu.Lock()
		r.from = append(r.from, plainAddr(w.RemoteAddr()))
		r.mu.Unlock()
		m := new(mdns.Msg).SetReply(q)
		m.Answer = []mdns.RR{&mdns.A{Hdr: mdns.RR_Header{Name: q.Question[0].Name, Rrtype: mdns.TypeA, Class: mdns.ClassINET, Ttl: 9}, A: net.IPv4(192, 0, 2, 99)}}
		_ = w.WriteMsg(m)
	})}
	up := make(chan struct{})
	srv.NotifyStartedFunc = func() { close(up) }
	go srv.ActivateAndServe()
	<-up
	l.t.Cleanup(func() { srv.Shutdown() })
	return r
}

// asked returns who asked since the last call.
func (r *foreignResolver) asked() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.from
	r.from = nil
	return out
}

// Foreign names are asked for from the container's namespace where it has a way out, from the node's where it has none, and from no place
// but its own where it is shut in.
func TestForeignNames(t *testing.T) {
	l, _ := webLab(t, 1)
	h := l.hosts[0]
	local, remote := l.foreignResolver(h.ns, "127.0.0.1:53"), l.foreignResolver(l.cl, clientAddr+":53")
	at := func(addrs ...string) []netip.AddrPort {
		var out []netip.AddrPort
		for _, a := range addrs {
			out = append(out, netip.AddrPortFrom(addr(a), 53))
		}
		return out
	}
	user := Bridge{ID: "brid1", Name: "skt1", Subnet4: netip.MustParsePrefix("172.31.0.0/24"), Gateway4: addr("172.31.0.1")}
	shut := Bridge{ID: "brid2", Name: "skt2", Subnet4: netip.MustParsePrefix("172.29.0.0/24"), Gateway4: addr("172.29.0.1"), Internal: true}
	l.must(h.SetBridges(t.Context(), []Bridge{user, shut}))
	peer := l.sandbox(h, Sandbox{ID: "peer", Bridges: []BridgeLeg{{BridgeID: shut.ID, Addr4: netip.MustParsePrefix("172.29.0.9/24")}}})
	inside := l.foreignResolver(peer, "172.29.0.9:53")
	for i, c := range []struct {
		what string
		box  Sandbox
		host []netip.AddrPort // the node's resolvers
		want string
		by   *foreignResolver
		from string
	}{
		{"the node's, with a gateway leg", Sandbox{Gateway4: addr("10.192.4.77")}, at(clientAddr), "192.0.2.99", remote, "192.0.2.1"}, // translated, as all that leaves
		{"the node's, on a bridge", Sandbox{Bridges: []BridgeLeg{{BridgeID: user.ID, Addr4: netip.MustParsePrefix("172.31.0.7/24")}}}, at(clientAddr), "192.0.2.99", remote, "192.0.2.1"},
		{"the node's, at its loopback", Sandbox{Gateway4: addr("10.192.4.77")}, at("127.0.0.1"), "192.0.2.99", local, "127.0.0.1"},
		{"the node's, without a way out", Sandbox{Legs: []Leg{{NetworkID: webNetwork().ID, Addr4: netip.MustParsePrefix("10.10.0.77/24")}}}, at(clientAddr), "192.0.2.99", remote, "192.0.2.1"},
		{"its own", Sandbox{Gateway4: addr("10.192.4.77"), Upstreams: at(clientAddr)}, at("127.0.0.1"), "192.0.2.99", remote, "192.0.2.1"},
		{"shut in", Sandbox{Bridges: []BridgeLeg{{BridgeID: shut.ID, Addr4: netip.MustParsePrefix("172.29.0.7/24")}}}, at("127.0.0.1", clientAddr), "REFUSED", nil, ""},
		{"shut in, its own outside", Sandbox{Bridges: []BridgeLeg{{BridgeID: shut.ID, Addr4: netip.MustParsePrefix("172.29.0.7/24")}}, Upstreams: at(clientAddr)}, nil, "SERVFAIL", nil, ""},
		{"shut in, its own inside", Sandbox{Bridges: []BridgeLeg{{BridgeID: shut.ID, Addr4: netip.MustParsePrefix("172.29.0.7/24")}}, Upstreams: at("172.29.0.9")}, nil, "192.0.2.99", inside, "172.29.0.7"},
		{"none", Sandbox{Gateway4: addr("10.192.4.77")}, nil, "REFUSED", nil, ""},
	} {
		h.resolvers = func() []netip.AddrPort { return c.host }
		c.box.ID, c.box.DNS = "asker", true
		ns := l.sandbox(h, c.box)
		m, err := query(ns, "udp", "example.com", mdns.TypeA)
		if err != nil || answers(m) != c.want {
			t.Errorf("%d: %s: %v, %v, want %s", i, c.what, m, err, c.want)
		}
		for _, r := range []*foreignResolver{local, remote, inside} {
			from := r.asked()
			if r != c.by && len(from) > 0 {
				t.Errorf("%s: another resolver was asked, by %v", c.what, from)
			} else if r == c.by && (len(from) == 0 || netip.MustParseAddrPort(from[0]).Addr().String() != c.from) {
				t.Errorf("%s: asked by %v, want %s", c.what, from, c.from)
			}
		}
		l.must(h.RemoveSandbox(t.Context(), "asker"))
	}
}

// Names, reverse names and ports in both families, as a network with services of both modes has them.
func TestNamesOfNetworks(t *testing.T) {
	nw := Network{ID: "front", Name: "front", Subnet4: netip.MustParsePrefix("10.10.0.0/24"), Subnet6: netip.MustParsePrefix("fd00:1::/64"),
		Services: []Service{
			{ID: "s1", Names: []string{"web", "www", "web"}, VIP4: addr("10.10.0.2"), VIP6: addr("fd00:1::2"), Ports: []dns.Port{{Name: "http", Protocol: "tcp", Number: 80}}},
			{ID: "s2", Names: []string{"rr"}, DNSRR: true},
		},
		Endpoints: []Endpoint{
			{ID: "t1", ServiceID: "s1", Addr4: addr("10.10.0.11"), Addr6: addr("fd00:1::11"), State: Ready, Names: []string{"web.1.t1", "0123456789ab", "host1"}},
			{ID: "t2", ServiceID: "s1", Addr4: addr("10.10.0.12"), Addr6: addr("fd00:1::12"), State: Draining, Names: []string{"web.2.t2"}},
			{ID: "t3", ServiceID: "s2", Addr4: addr("10.10.0.13"), Addr6: addr("fd00:1::13"), State: Ready, Names: []string{"rr.1.t3"}},
			{ID: "t4", ServiceID: "s2", Addr4: addr("10.10.0.14"), Addr6: addr("fd00:1::14"), State: Starting, Names: []string{"rr.2.t4"}},
			{ID: "c1", Addr4: addr("10.10.0.15"), Addr6: addr("fd00:1::15"), State: Ready, Names: []string{"box", "rr"}},
		}}
	v := &dns.View{Zones: []*dns.Zone{networkZone(&nw)}}
	for _, c := range []struct {
		name string
		typ  uint16
		want string
	}{
		{"web", mdns.TypeA, "10.10.0.2"},
		{"www", mdns.TypeAAAA, "fd00:1::2"},
		{"www.front", mdns.TypeA, "10.10.0.2"},
		{"tasks.web", mdns.TypeA, "10.10.0.11"},
		{"tasks.www", mdns.TypeAAAA, "fd00:1::11"},
		{"web.1.t1", mdns.TypeA, "10.10.0.11"},
		{"0123456789ab", mdns.TypeAAAA, "fd00:1::11"},
		{"host1.front", mdns.TypeA, "10.10.0.11"},
		{"rr", mdns.TypeA, "10.10.0.13 10.10.0.15"}, // a container may be its alias
		{"tasks.rr", mdns.TypeAAAA, "fd00:1::13"},
		{"rr.2.t4", mdns.TypeA, "unknown"},
		{"box", mdns.TypeAAAA, "fd00:1::15"},
		{"2.0.10.10.in-addr.arpa", mdns.TypePTR, "web.front."},
		{"12.0.10.10.in-addr.arpa", mdns.TypePTR, "web.2.t2.front."},
		{"1.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa", mdns.TypePTR, "web.1.t1.front."},
		{"99.0.10.10.in-addr.arpa", mdns.TypePTR, "NXDOMAIN"},
	} {
		got := "unknown"
		if m, ok := v.Answer(c.name, c.typ); ok {
			got = answers(m)
		}
		if got != c.want {
			t.Errorf("%s %s: %q, want %q", c.name, mdns.TypeToString[c.typ], got, c.want)
		}
	}
}

// The very first packet of a new container is answered: the kernel activates the outer end of a leg some time after the container's end
// is up, and drops what it is to send until then.
func TestFirstPacketIsAnswered(t *testing.T) {
	l, _ := webLab(t, 1)
	h := l.hosts[0]
	user := Bridge{ID: "brid1", Name: "skt1", Subnet4: netip.MustParsePrefix("172.31.0.0/24"), Gateway4: addr("172.31.0.1")}
	l.must(h.SetBridges(t.Context(), []Bridge{user}))
	l.serve(l.cl, "client", 53)
	l.serve(l.sandbox(h, Sandbox{ID: "peer", Bridges: []BridgeLeg{{BridgeID: user.ID, Addr4: netip.MustParsePrefix("172.31.0.9/24")}}}), "peer", 80)
	for _, c := range []struct {
		box Sandbox
		to  string
	}{
		{Sandbox{Gateway4: addr("10.192.4.77")}, clientAddr + ":53"},
		{Sandbox{Bridges: []BridgeLeg{{BridgeID: user.ID, Addr4: netip.MustParsePrefix("172.31.0.7/24")}}}, clientAddr + ":53"},
		{Sandbox{Bridges: []BridgeLeg{{BridgeID: user.ID, Addr4: netip.MustParsePrefix("172.31.0.7/24")}}}, "172.31.0.9:80"},
		{Sandbox{Legs: []Leg{{NetworkID: webNetwork().ID, Addr4: netip.MustParsePrefix("10.10.0.77/24")}}}, "10.10.0.11:80"},
		{Sandbox{Legs: []Leg{{NetworkID: webNetwork().ID, Addr4: netip.MustParsePrefix("10.10.0.77/24")}}}, "10.10.0.2:80"},
	} {
		c.box.ID = "new"
		for range 4 {
			ns := l.sandbox(h, c.box)
			if _, _, err := get(ns, "udp4", c.to); err != nil {
				t.Errorf("the first packet to %s was not answered: %v", c.to, err)
			}
			l.must(h.RemoveSandbox(t.Context(), "new"))
		}
	}
}
