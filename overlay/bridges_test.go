package overlay

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	mdns "github.com/miekg/dns"

	"skein/overlay/link"
)

func dualBridge(n string) Bridge {
	p4, p6 := netip.MustParsePrefix("172.31."+n+".0/24"), netip.MustParsePrefix("fd00:31:"+n+"::/64")
	return Bridge{ID: "dual" + n, Network: "net" + n, Name: "skt" + n, Subnet4: p4, Gateway4: p4.Addr().Next(), Subnet6: p6, Gateway6: p6.Addr().Next()}
}

func dualLeg(b Bridge, last byte, names ...string) BridgeLeg {
	a4, a6 := b.Subnet4.Addr().As4(), b.Subnet6.Addr().As16()
	a4[3], a6[15] = last, last
	return BridgeLeg{BridgeID: b.ID, Addr4: netip.PrefixFrom(netip.AddrFrom4(a4), 24), Addr6: netip.PrefixFrom(netip.AddrFrom16(a6), 64), Names: names}
}

func TestDualStackBridge(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	one, two := dualBridge("1"), dualBridge("2")
	shut := dualBridge("3")
	shut.Internal = true
	l.must(h.SetBridges(ctx, []Bridge{one, two, shut}))
	la := dualLeg(one, 2, "a")
	la.Ports = []HostPort{{HostIP: addr("0.0.0.0"), Published: 8080, Target: 80, Protocol: "tcp"}, {HostIP: addr("::"), Published: 8080, Target: 80, Protocol: "tcp"},
		{HostIP: addr("::"), Published: 8080, Target: 80, Protocol: "udp"}, {HostIP: addr("2001:db8:1::1"), Published: 8081, Target: 80, Protocol: "tcp"}}
	a := l.sandbox(h, Sandbox{ID: "a", DNS: true, Bridges: []BridgeLeg{la}})
	b := l.sandbox(h, Sandbox{ID: "b", DNS: true, Bridges: []BridgeLeg{dualLeg(one, 3, "b")}})
	c := l.sandbox(h, Sandbox{ID: "c", DNS: true, Bridges: []BridgeLeg{dualLeg(two, 2, "c")}})
	e := l.sandbox(h, Sandbox{ID: "e", DNS: true, Bridges: []BridgeLeg{dualLeg(shut, 2, "e")}})
	l.serve(a, "a", 80)
	l.spread(b, "tcp6", "[fd00:31:1::2]:80", 1, "fd00:31:1::3")
	const outside = "2001:db8:9::7"
	l.spread(l.cl, "tcp6", "[2001:db8:1::1]:8080", 2, outside)
	l.spread(l.cl, "udp6", "[2001:db8:1::1]:8080", 2, outside)
	l.spread(l.cl, "tcp6", "[2001:db8:1::1]:8081", 1, outside)
	l.spread(h.ns, "tcp6", "[2001:db8:1::1]:8080", 1, "")
	refused6(t, h.ns, "[::1]:8080") // at once, so that a client goes on to 127.0.0.1
	l.must(h.ns.Sysctl(map[string]string{"bridge/bridge-nf-call-ip6tables?": "0"}))
	l.must(h.Check(ctx))
	l.spread(h.ns, "tcp6", "[::1]:8080", 1, "")
	l.spread(h.ns, "udp6", "[::1]:8080", 1, "")
	l.must(h.ns.Sysctl(map[string]string{"bridge/bridge-nf-call-ip6tables?": "1"}))
	l.must(h.Check(ctx))
	l.nothingFound(h, "dual stack")
	l.spread(a, "tcp6", "[2001:db8:1::1]:8080", 1, "")
	l.spread(b, "tcp6", "[2001:db8:1::1]:8080", 1, "")
	l.spread(c, "tcp6", "[2001:db8:1::1]:8080", 1, "")
	l.spread(l.cl, "tcp4", "192.0.2.1:8080", 1, clientAddr)
	refused6(t, l.cl, "[2001:db8:1::1]:8082")
	unreachable6(t, c, "[fd00:31:1::2]:80")
	unreachable6(t, e, "[fd00:31:1::2]:80")
	sw := l.conn(l.sw) // even if the world routes to it
	l.must(sw.Do([]link.Message{link.SetRoute(link.RouteKey{Dst: one.Subnet6}, link.Route{Dev: mustLink(t, sw, "br0"), Via: addr("2001:db8:1::1")})}))
	unreachable6(t, l.cl, "[fd00:31:1::2]:80")
	if m, err := query(b, "udp", "a", mdns.TypeAAAA); err != nil || answers(m) != "fd00:31:1::2" {
		t.Errorf("AAAA of a: %v, %v", m, err)
	}
	if m, err := query(b, "udp", "a.net1", mdns.TypeA); err != nil || answers(m) != "172.31.1.2" {
		t.Errorf("a.net1: %v, %v", m, err)
	}
	// egress
	var out net.Listener
	l.must(l.cl.Do(func() (err error) { out, err = net.Listen("tcp6", "["+outside+"]:7000"); return err }))
	defer out.Close()
	f, err := open(b, "tcp6", "["+outside+"]:7000")
	l.must(err)
	defer f.Close()
	srv, err := out.Accept()
	l.must(err)
	defer srv.Close()
	if from, _, _ := net.SplitHostPort(srv.RemoteAddr().String()); from != "2001:db8:1::1" {
		t.Errorf("outside saw the container as %s", from)
	}
	unreachable6(t, e, "["+outside+"]:7000")
	// An IPv4 container gets a second network while it runs; the better one leads out.
	six := two
	six.ID, six.Name, six.Network, six.Subnet4, six.Gateway4 = "six", "skt4", "a-six", netip.Prefix{}, netip.Addr{}
	six.Subnet6, six.Gateway6 = netip.MustParsePrefix("fd00:31:4::/64"), addr("fd00:31:4::1")
	l.must(h.SetBridges(ctx, []Bridge{one, two, shut, six}))
	only4 := dualLeg(two, 9)
	only4.Addr6 = netip.Prefix{}
	g := l.sandbox(h, Sandbox{ID: "g", Bridges: []BridgeLeg{only4}})
	only6 := BridgeLeg{BridgeID: "six", Addr6: netip.MustParsePrefix("fd00:31:4::9/64"), MAC: "02:11:22:33:44:55", Device: "six0", LinkLocal: []netip.Addr{addr("fe80::99")}}
	l.sandbox(h, Sandbox{ID: "g", Bridges: []BridgeLeg{only4, only6}})
	links, err := l.conn(g).Links()
	if err != nil || links["six0"].MAC.String() != only6.MAC {
		t.Errorf("devices %+v, %v", links, err)
	}
	l.serve(g, "g", 80)
	if f, err := open(g, "tcp6", "["+outside+"]:7000"); err != nil {
		t.Errorf("IPv6 of a container that came to it later: %v", err)
	} else {
		f.Close()
	}
	l.spread(g, "tcp6", "[fe80::99%six0]:80", 1, "")
	l.sandbox(h, Sandbox{ID: "g", Bridges: []BridgeLeg{only4}})
	if links, err := l.conn(g).Links(); err != nil || len(links) != 2 {
		t.Errorf("devices %+v, %v", links, err)
	}
	l.set(h, nil, Mesh{})
	l.must(h.Leave(ctx)) // the cluster's is not the bridges'
	l.spread(l.cl, "tcp6", "[2001:db8:1::1]:8080", 1, outside)
	for _, id := range []string{"a", "b", "c", "e", "g"} {
		l.must(h.RemoveSandbox(ctx, id))
	}
	l.must(h.SetBridges(ctx, nil))
}

func refused6(t *testing.T, ns *link.NS, at string) {
	t.Helper()
	if _, _, err := get(ns, "tcp6", at); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("%s: %v, want a refusal", at, err)
	}
}

func unreachable6(t *testing.T, ns *link.NS, at string) {
	t.Helper()
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = (&net.Dialer{Timeout: 300e6}).Dial("tcp6", at)
		return err
	})
	if err == nil {
		c.Close()
		t.Errorf("%s could be reached", at)
	}
}

func TestBridgeOptions(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	four := func(n string) Bridge {
		b := dualBridge(n)
		b.Subnet6, b.Gateway6 = netip.Prefix{}, netip.Addr{}
		return b
	}
	leg := func(b Bridge, last byte) BridgeLeg {
		k := dualLeg(b, last)
		k.Addr6 = netip.Prefix{}
		return k
	}
	sep, routed, open1, plain := four("1"), four("2"), four("3"), four("4")
	sep.Separate, routed.Mode4, open1.Mode4, plain.Plain = true, ModeRouted, ModeUnprotected, true
	l.must(h.SetBridges(ctx, []Bridge{sep, routed, open1, plain}))
	sw := l.conn(l.sw)
	for _, b := range []Bridge{sep, routed, open1, plain} {
		l.must(sw.Do([]link.Message{link.SetRoute(link.RouteKey{Dst: b.Subnet4}, link.Route{Dev: mustLink(t, sw, "br0"), Via: addr("192.0.2.1")})}))
	}
	ports := []HostPort{{Published: 8080, Target: 80, Protocol: "tcp"}}
	s1, r1 := leg(sep, 2), leg(routed, 2)
	s1.Ports = ports
	r1.Ports = []HostPort{{Published: 8090, Target: 80, Protocol: "tcp"}}
	a := l.sandbox(h, Sandbox{ID: "s1", Bridges: []BridgeLeg{s1}})
	b := l.sandbox(h, Sandbox{ID: "s2", Bridges: []BridgeLeg{leg(sep, 3)}})
	r := l.sandbox(h, Sandbox{ID: "r1", Bridges: []BridgeLeg{r1}})
	o := l.sandbox(h, Sandbox{ID: "o1", Bridges: []BridgeLeg{leg(open1, 2)}})
	p := l.sandbox(h, Sandbox{ID: "p1", Bridges: []BridgeLeg{leg(plain, 2)}})
	for name, ns := range map[string]*link.NS{"s1": a, "s2": b, "r1": r, "o1": o, "p1": p} {
		l.serve(ns, name, 80)
		l.serve(ns, name, 81)
	}
	// separate: not directly, not around by the gateway, but by the published port
	c := l.conn(b)
	for _, filter := range []string{"1", "0"} {
		l.must(h.ns.Sysctl(map[string]string{"bridge/bridge-nf-call-iptables?": filter}))
		l.must(h.Check(ctx))
		around := link.RouteKey{Dst: host(addr("172.31.1.2"))}
		unreachable(t, b, "172.31.1.2:80")
		via := link.Route{Dev: mustLink(t, c, "eth0"), Via: addr("172.31.1.1")}
		l.must(c.Do([]link.Message{link.SetRoute(around, via)}))
		unreachable(t, b, "172.31.1.2:80")
		l.must(c.Do([]link.Message{link.DelRoute(around, via)}))
		l.spread(b, "tcp4", "192.0.2.1:8080", 1, "")
		l.spread(l.cl, "tcp4", "192.0.2.1:8080", 1, clientAddr)
		l.spread(h.ns, "tcp4", "172.31.1.2:80", 1, "")
	}
	l.nothingFound(h, "options")
	// routed: published at its own address, nothing else
	l.spread(l.cl, "tcp4", "172.31.2.2:80", 1, clientAddr)
	unreachable(t, l.cl, "172.31.2.2:81")
	refusedFast(t, l.cl, "192.0.2.1:8090")
	// unprotected: all
	l.spread(l.cl, "tcp4", "172.31.3.2:81", 1, clientAddr)
	unreachable(t, l.cl, "172.31.4.2:81")
	out, err := listenIn(l.cl, clientAddr+":7000")
	l.must(err)
	defer out.Close()
	for _, from := range []struct {
		ns   *link.NS
		want string
	}{{p, "172.31.4.2"}, {r, "172.31.2.2"}, {o, "192.0.2.1"}, {a, "192.0.2.1"}} {
		f, err := open(from.ns, "tcp4", clientAddr+":7000")
		if err != nil {
			t.Errorf("egress, want as %s: %v", from.want, err)
			continue
		}
		srv, err := out.Accept()
		l.must(err)
		if seen, _, _ := net.SplitHostPort(srv.RemoteAddr().String()); seen != from.want {
			t.Errorf("outside saw %s, want %s", seen, from.want)
		}
		srv.Close()
		f.Close()
	}
	for _, id := range []string{"s1", "s2", "r1", "o1", "p1"} {
		l.must(h.RemoveSandbox(ctx, id))
	}
}

// A bridge of somebody else's is used when it is asked for by name, and is left as it was.
func TestLentBridge(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	c := l.conn(h.ns)
	l.must(c.AddBridge(link.End{Name: "theirs"}))
	b := dualBridge("1")
	b.Name = "theirs"
	if err := h.SetBridges(ctx, []Bridge{b}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("took a device that nobody gave: %v", err)
	}
	b.External = true
	l.must(h.SetBridges(ctx, []Bridge{b}))
	a := l.sandbox(h, Sandbox{ID: "a", Bridges: []BridgeLeg{dualLeg(b, 2)}})
	l.serve(a, "a", 80)
	l.spread(h.ns, "tcp4", "172.31.1.2:80", 1, "")
	l.nothingFound(h, "a lent bridge")
	l.must(h.RemoveSandbox(ctx, "a"))
	l.must(h.SetBridges(ctx, nil))
	their, err := c.Link("theirs")
	l.must(err)
	addrs, err := c.Addrs()
	l.must(err)
	if slices.ContainsFunc(addrs, func(a link.Addr) bool { return a.Dev == their.Index && !a.Prefix.Addr().IsLinkLocalUnicast() }) || their.Alias != "" {
		t.Errorf("left on it: %+v %q", addrs, their.Alias)
	}
}

func TestMacvlan(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	outer := Bridge{ID: "mv1", Network: "mv1", Name: "eth0", External: true, Macvlan: &Macvlan{Mode: "bridge"}, Subnet4: netip.MustParsePrefix("192.0.2.0/24"),
		Gateway4: addr("192.0.2.254")}
	inner := Bridge{ID: "mv2", Network: "mv2", Name: "dm-mv2", Macvlan: &Macvlan{}, Internal: true, Subnet4: netip.MustParsePrefix("172.31.7.0/24")}
	l.must(h.SetBridges(ctx, []Bridge{outer, inner}))
	leg := func(b Bridge, a string, names ...string) BridgeLeg {
		return BridgeLeg{BridgeID: b.ID, Addr4: netip.MustParsePrefix(a), Names: names}
	}
	a := l.sandbox(h, Sandbox{ID: "a", DNS: true, Bridges: []BridgeLeg{leg(outer, "192.0.2.100/24", "a")}})
	b := l.sandbox(h, Sandbox{ID: "b", DNS: true, Bridges: []BridgeLeg{leg(outer, "192.0.2.101/24", "b"), leg(inner, "172.31.7.2/24", "b")}})
	c := l.sandbox(h, Sandbox{ID: "c", DNS: true, Bridges: []BridgeLeg{leg(inner, "172.31.7.3/24", "c")}})
	l.serve(a, "a", 80)
	l.serve(b, "b", 80)
	l.spread(l.cl, "tcp4", "192.0.2.100:80", 1, clientAddr)
	l.spread(b, "tcp4", "192.0.2.100:80", 1, "192.0.2.101")
	l.spread(c, "tcp4", "172.31.7.2:80", 1, "172.31.7.3")
	unreachable(t, h.ns, "192.0.2.100:80") // as always with macvlan
	if m, err := query(a, "udp", "b", mdns.TypeA); err != nil || answers(m) != "192.0.2.101" {
		t.Errorf("b from a: %v, %v", m, err)
	}
	l.nothingFound(h, "macvlan")
	// what goes missing comes back
	l.must(l.conn(h.ns).DelLink("dm-mv2"))
	l.must(h.Check(ctx))
	l.spread(c, "tcp4", "172.31.7.2:80", 1, "172.31.7.3")
	// leaves one, keeps the other
	l.sandbox(h, Sandbox{ID: "b", DNS: true, Bridges: []BridgeLeg{leg(inner, "172.31.7.2/24", "b")}})
	l.spread(c, "tcp4", "172.31.7.2:80", 1, "172.31.7.3")
	unreachable(t, l.cl, "192.0.2.101:80")
	for _, id := range []string{"a", "b", "c"} {
		l.must(h.RemoveSandbox(ctx, id))
	}
	l.must(h.awaitAllDeparted(ctx))
	unreachable(t, l.cl, "192.0.2.100:80")
	missing := outer
	missing.Name = "nothere"
	if err := h.SetBridges(ctx, []Bridge{missing}); !errdefs.IsNotFound(err) {
		t.Errorf("parent that is not there: %v", err)
	}
	l.must(h.SetBridges(ctx, nil))
	links, err := l.conn(h.ns).Links()
	l.must(err)
	if len(links) != 2 {
		t.Errorf("left: %+v", links)
	}
}

func TestPortFree(t *testing.T) {
	l := newLab(t, 1)
	h := l.hosts[0]
	var both, one net.Listener
	var udp net.PacketConn
	l.must(h.ns.Do(func() (err error) {
		if both, err = net.Listen("tcp", ":6000"); err != nil {
			return err
		}
		if one, err = net.Listen("tcp4", "127.0.0.1:6001"); err != nil {
			return err
		}
		udp, err = net.ListenPacket("udp6", "[::1]:6002")
		return err
	}))
	defer both.Close()
	defer one.Close()
	defer udp.Close()
	for _, c := range []struct {
		proto, at string
		port      uint16
		free      bool
	}{
		{"tcp", "0.0.0.0", 6000, false}, {"tcp", "::", 6000, false}, {"udp", "0.0.0.0", 6000, true}, {"tcp", "127.0.0.1", 6000, false},
		{"tcp", "0.0.0.0", 6001, false}, {"tcp", "192.0.2.1", 6001, true}, {"tcp", "::", 6001, true},
		{"udp", "::", 6002, false}, {"udp", "0.0.0.0", 6002, true}, {"sctp", "0.0.0.0", 6000, true},
	} {
		err := h.PortFree(c.proto, addr(c.at), c.port)
		if (err == nil) != c.free || !c.free && (!errdefs.IsConflict(err) || !strings.Contains(err.Error(), "(pid "+strconv.Itoa(os.Getpid())+")")) {
			t.Errorf("%s %s:%d: %v, want free=%v", c.proto, c.at, c.port, err, c.free)
		}
	}
	if err := h.PortUnbound("tcp", addr("0.0.0.0"), 6000); !errdefs.IsConflict(err) {
		t.Errorf("a process's port: %v", err)
	}
	if err := h.PortFree("tcp", addr("203.0.113.1"), 6003); !errdefs.IsInvalidArgument(err) {
		t.Errorf("address of another: %v", err)
	}
}

// There are kernels without sockets of SCTP that translate it all the same, so the packets are made by hand.
func TestPublishedSCTP(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	if !h.SCTP() {
		t.Skip("the kernel does not track connections of SCTP")
	}
	b := dualBridge("1")
	l.must(h.SetBridges(ctx, []Bridge{b}))
	leg := dualLeg(b, 2)
	leg.Ports = []HostPort{{HostIP: addr("0.0.0.0"), Published: 9100, Target: 132, Protocol: "sctp"}}
	box := l.sandbox(h, Sandbox{ID: "a", Bridges: []BridgeLeg{leg}})
	in, out := l.rawSCTP(box, "ip4:132", "172.31.1.2"), l.rawSCTP(l.cl, "ip4:132", clientAddr)
	got, from := l.deliver(out, sctpInit(4000, 9100, false), "192.0.2.1", in)
	if !bytes.Equal(got, sctpInit(4000, 132, false)) || from.String() != clientAddr {
		t.Errorf("the container got %x from %s", got, from)
	}
}
