package dns

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func here(f func() error) error { return f() }

// sockets are of one port. The kernel chooses it for one protocol, and somebody may have it of the other.
func sockets(t *testing.T) (net.PacketConn, net.Listener) {
	t.Helper()
	var failed error
	for range 50 {
		tcp, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		udp, err := net.ListenPacket("udp4", tcp.Addr().String())
		if err == nil {
			return udp, tcp
		}
		tcp.Close()
		failed = err
	}
	t.Fatal(failed)
	return nil, nil
}

// start serves a view on loopback ports and returns a function that asks it.
func start(t *testing.T, v *View) (*Server, func(network, name string, typ uint16) (*dns.Msg, error)) {
	t.Helper()
	s := NewServer(here, slog.New(slog.NewTextHandler(io.Discard, nil)))
	udp, tcp := sockets(t)
	if err := s.Add("box", v, udp, tcp, here); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, func(network, name string, typ uint16) (*dns.Msg, error) {
		m := new(dns.Msg).SetQuestion(dns.Fqdn(name), typ)
		c := &dns.Client{Net: network, Timeout: 6 * time.Second}
		r, _, err := c.Exchange(m, udp.LocalAddr().String())
		return r, err
	}
}

// upstream is a resolver that answers with what f makes.
func upstream(t *testing.T, f func(q *dns.Msg) *dns.Msg) (netip.AddrPort, *atomic.Int64) {
	t.Helper()
	var asked atomic.Int64
	udp, tcp := sockets(t)
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		asked.Add(1)
		if m := f(q); m != nil {
			if _, isTCP := w.RemoteAddr().(*net.TCPAddr); !isTCP {
				m.Truncate(512)
			}
			_ = w.WriteMsg(m)
		}
	})
	for _, s := range []*dns.Server{{PacketConn: udp, Handler: h}, {Listener: tcp, Handler: h}} {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		go s.ActivateAndServe()
		<-up
		t.Cleanup(func() { s.Shutdown() })
	}
	return netip.MustParseAddrPort(udp.LocalAddr().String()), &asked
}

// ups are resolvers to be asked from inside.
func ups(addrs ...netip.AddrPort) []Upstream {
	var out []Upstream
	for _, a := range addrs {
		out = append(out, Upstream{Addr: a})
	}
	return out
}

func answerWith(addrs ...string) func(*dns.Msg) *dns.Msg {
	return func(q *dns.Msg) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		for _, a := range addrs {
			m.Answer = append(m.Answer, &dns.A{Hdr: header(q.Question[0].Name, dns.TypeA, 60), A: net.ParseIP(a)})
		}
		return m
	}
}

func text(m *dns.Msg, err error) string {
	if err != nil {
		return err.Error()
	}
	if m.Rcode != 0 {
		return dns.RcodeToString[m.Rcode]
	}
	var out []string
	for _, rr := range m.Answer {
		out = append(out, strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	return strings.Join(out, " ")
}

func zone() *Zone {
	z := NewZone("front", netip.MustParsePrefix("10.0.0.0/24"))
	z.Add("web", true, netip.MustParseAddr("10.0.0.2"), netip.Addr{})
	z.Add("rr", false)
	z.Point(netip.MustParseAddr("10.0.0.2"), "web", true)
	return z
}

func TestLocalNames(t *testing.T) {
	foreign, asked := upstream(t, answerWith("192.0.2.9"))
	second := NewZone("back", netip.MustParsePrefix("10.1.0.0/24"))
	second.Add("web", true, netip.MustParseAddr("10.1.0.2"))
	second.Add("db", true, netip.MustParseAddr("10.1.0.3"))
	second.Add("six", true, netip.MustParseAddr("fd00::3"))
	second.Point(netip.MustParseAddr("fd00::3"), "six", true)
	_, ask := start(t, &View{Zones: []*Zone{zone(), second}, Upstreams: ups(foreign)})
	for _, c := range []struct {
		name    string
		typ     uint16
		want    string
		forward bool
	}{
		{"web", dns.TypeA, "10.0.0.2", false},
		{"wEb.Front", dns.TypeA, "10.0.0.2", false},
		{"web.back", dns.TypeA, "10.1.0.2", false},
		{"db", dns.TypeA, "10.1.0.3", false},
		{"web", dns.TypeAAAA, "", false},
		{"web", dns.TypeMX, "", false},
		{"six", dns.TypeAAAA, "fd00::3", false},
		{"rr", dns.TypeA, "", false},
		{"unknown", dns.TypeA, "NXDOMAIN", false},
		{"2.0.0.10.in-addr.arpa", dns.TypePTR, "web.front.", false},
		{"77.0.0.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN", false},
		{"3.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa", dns.TypePTR, "six.back.", false},
		{"example.com", dns.TypeA, "192.0.2.9", true},
		{"9.2.0.192.in-addr.arpa", dns.TypeA, "192.0.2.9", true},
		{"x.in-addr.arpa", dns.TypeA, "192.0.2.9", true},
	} {
		before := asked.Load()
		if got := text(ask("udp", c.name, c.typ)); got != c.want {
			t.Errorf("%s %s: %q, want %q", c.name, dns.TypeToString[c.typ], got, c.want)
		}
		if got := asked.Load() != before; got != c.forward {
			t.Errorf("%s %s: passed on %v, want %v", c.name, dns.TypeToString[c.typ], got, c.forward)
		}
	}
}

func TestViewsChange(t *testing.T) {
	s, ask := start(t, &View{Zones: []*Zone{zone()}})
	if got := text(ask("udp", "example.com", dns.TypeA)); got != "REFUSED" {
		t.Errorf("without upstream: %s", got)
	}
	if got := text(ask("tcp", "later", dns.TypeA)); got != "NXDOMAIN" {
		t.Errorf("before: %s", got)
	}
	z := NewZone("front")
	for i := range 100 {
		z.Add("later", false, netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}))
	}
	s.SetView("box", &View{Zones: []*Zone{z}, Bare: true})
	if got := text(ask("udp", "nolabel", dns.TypeA)); got != "REFUSED" {
		t.Errorf("an unknown label with search domains is a foreign name: %s", got)
	}
	m, err := ask("udp", "later", dns.TypeA)
	if err != nil || !m.Truncated {
		t.Errorf("100 addresses over UDP must be truncated: %v %v", m, err)
	}
	m, err = ask("tcp", "later", dns.TypeA)
	if err != nil || len(m.Answer) != 100 || m.Answer[0].Header().Ttl != ttlEndpoint {
		t.Errorf("over TCP: %v %v", m, err)
	}
	s.Remove("box")
	s.Remove("box")
}

func TestForwarding(t *testing.T) {
	silent, _ := upstream(t, func(*dns.Msg) *dns.Msg { return nil })
	broken, _ := upstream(t, func(q *dns.Msg) *dns.Msg { return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure) })
	good, _ := upstream(t, answerWith("192.0.2.9"))
	var many []string
	for i := range 100 {
		many = append(many, fmt.Sprintf("192.0.2.%d", i+1))
	}
	large, _ := upstream(t, answerWith(many...))
	dead := netip.MustParseAddrPort("127.0.0.1:1")
	s, ask := start(t, &View{})
	for _, c := range []struct {
		name      string
		upstreams []Upstream
		network   string
		want      string
		within    time.Duration
	}{
		{"first answers", ups(good, silent), "udp", "192.0.2.9", 250 * time.Millisecond},
		{"first is silent", ups(silent, good), "udp", "192.0.2.9", time.Second},
		{"first refuses connections", ups(dead, good), "udp", "192.0.2.9", 250 * time.Millisecond},
		{"first fails", ups(broken, good), "udp", "192.0.2.9", 250 * time.Millisecond},
		{"all fail", ups(broken, dead), "udp", "SERVFAIL", time.Second},
		{"all are silent", ups(silent), "udp", "SERVFAIL", 3 * time.Second},
		{"large by TCP", ups(large), "tcp", strings.Join(many, " "), time.Second},
	} {
		s.SetView("box", &View{Upstreams: c.upstreams})
		begin := time.Now()
		if got := text(ask(c.network, "example.com", dns.TypeA)); got != c.want || time.Since(begin) > c.within {
			t.Errorf("%s: %q after %s, want %q within %s", c.name, got, time.Since(begin), c.want, c.within)
		}
	}
	s.SetView("box", &View{Upstreams: ups(large)})
	if m, err := ask("udp", "example.com", dns.TypeA); err != nil || !m.Truncated {
		t.Errorf("a large answer over UDP: %v %v", m, err)
	}
}

func TestHostResolvers(t *testing.T) {
	dir := t.TempDir()
	stub, real := filepath.Join(dir, "stub"), filepath.Join(dir, "real")
	os.WriteFile(stub, []byte("# x\nnameserver 127.0.0.53\noptions edns0\n"), 0o644)
	os.WriteFile(real, []byte("nameserver 192.0.2.1\nnameserver bad\nnameserver fd00::1\nsearch a b\n"), 0o644)
	got := HostResolvers(filepath.Join(dir, "none"), stub, real)
	if fmt.Sprint(got) != "[192.0.2.1:53 [fd00::1]:53]" {
		t.Errorf("got %v", got)
	}
	if got := HostResolvers(stub, filepath.Join(dir, "none")); fmt.Sprint(got) != "[127.0.0.53:53]" {
		t.Errorf("nothing but a stub: %v", got)
	}
	if got := HostResolvers(filepath.Join(dir, "none")); got != nil {
		t.Errorf("no file: %v", got)
	}
	c := HostConf(real)
	if fmt.Sprint(c.Search) != "[a b]" || len(HostConf(stub, real).Options) != 0 || fmt.Sprint(ReadConf(stub).Options) != "[edns0]" {
		t.Errorf("got %+v, %+v", c, ReadConf(stub))
	}
}

// SRV queries find the ports that a service names, or a number, on the VIP or on each container.
func TestServices(t *testing.T) {
	z := NewZone("front", netip.MustParsePrefix("10.0.0.0/24"))
	a, b := netip.MustParseAddr("10.0.0.11"), netip.MustParseAddr("10.0.0.12")
	z.Add("web", true, netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2"))
	z.Add("tasks.web", false, a)
	z.Add("tasks.web", false, b)
	ports := []Port{{"http", "tcp", 80}, {"http", "udp", 443}}
	z.Serve("web", ports)
	z.Serve("tasks.web", ports)
	z.Serve("nosuch", ports)
	z.Point(a, "web.1.x", false)
	z.Point(b, "web.2.y", false)
	_, ask := start(t, &View{Zones: []*Zone{z}})
	for _, c := range []struct {
		name  string
		typ   uint16
		want  string
		extra string
	}{
		{"_http._tcp.web", dns.TypeSRV, "0 1 80 web.front.", "10.0.0.2 fd00::2"},
		{"_HTTP._udp.web.front", dns.TypeSRV, "0 1 443 web.front.", "10.0.0.2 fd00::2"},
		{"_5432._tcp.web", dns.TypeSRV, "0 1 5432 web.front.", "10.0.0.2 fd00::2"},
		{"_http._tcp.tasks.web", dns.TypeSRV, "0 1 80 web.1.x.front. 0 1 80 web.2.y.front.", "10.0.0.11 10.0.0.12"},
		{"_smtp._tcp.web", dns.TypeSRV, "NXDOMAIN", ""},
		{"_http._sctp.web", dns.TypeSRV, "NXDOMAIN", ""},
		{"_0._tcp.web", dns.TypeSRV, "NXDOMAIN", ""},
		{"_http._tcp.web", dns.TypeA, "", ""},
		{"_http._tcp.nosuch", dns.TypeSRV, "NXDOMAIN", ""},
		{"_http._tcp.example.com", dns.TypeSRV, "REFUSED", ""},
	} {
		m, err := ask("udp", c.name, c.typ)
		if err != nil {
			t.Fatal(err)
		}
		sort := func(rrs []dns.RR) string {
			out := strings.Split(text(&dns.Msg{Answer: rrs}, nil), "\x00")
			if len(rrs) > 0 {
				out = nil
				for _, rr := range rrs {
					out = append(out, text(&dns.Msg{Answer: []dns.RR{rr}}, nil))
				}
			}
			slices.Sort(out)
			return strings.Join(out, " ")
		}
		got := text(m, nil)
		if m.Rcode == 0 {
			got = sort(m.Answer)
		}
		if extra := sort(m.Extra); got != c.want || extra != c.extra {
			t.Errorf("%s %s: %q with %q, want %q with %q", c.name, dns.TypeToString[c.typ], got, extra, c.want, c.extra)
		}
	}
}

// Names of what comes and goes are not to be cached for long, those of VIPs may.
func TestTimesToLive(t *testing.T) {
	z := zone()
	z.Add("box", false, netip.MustParseAddr("10.0.0.9"))
	z.Point(netip.MustParseAddr("10.0.0.9"), "box", false)
	_, ask := start(t, &View{Zones: []*Zone{z}})
	for _, c := range []struct {
		name string
		typ  uint16
		want uint32
	}{
		{"web", dns.TypeA, ttlStable},
		{"2.0.0.10.in-addr.arpa", dns.TypePTR, ttlStable},
		{"box", dns.TypeA, ttlEndpoint},
		{"9.0.0.10.in-addr.arpa", dns.TypePTR, ttlEndpoint},
		{"nosuch", dns.TypeA, ttlNegative},
		{"web", dns.TypeAAAA, ttlNegative},
		{"77.0.0.10.in-addr.arpa", dns.TypePTR, ttlNegative},
	} {
		m, err := ask("udp", c.name, c.typ)
		if err != nil {
			t.Fatal(err)
		}
		if rrs := append(m.Answer, m.Ns...); len(rrs) != 1 || rrs[0].Header().Ttl != c.want {
			t.Errorf("%s: %v, want a time to live of %d", c.name, rrs, c.want)
		}
	}
}

// What is no plain question is answered as the standards say, and never passed on.
func TestOddQueries(t *testing.T) {
	foreign, asked := upstream(t, answerWith("192.0.2.9"))
	s := NewServer(here, slog.New(slog.NewTextHandler(io.Discard, nil)))
	b := &box{}
	b.view.Store(&View{Zones: []*Zone{zone()}, Upstreams: ups(foreign)})
	for _, c := range []struct {
		what string
		edit func(*dns.Msg)
		want int
	}{
		{"an update", func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented},
		{"no question", func(m *dns.Msg) { m.Question = nil }, dns.RcodeFormatError},
		{"two questions", func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, dns.RcodeFormatError},
		{"EDNS 1", func(m *dns.Msg) { m.SetEdns0(4096, false); m.IsEdns0().SetVersion(1) }, dns.RcodeBadVers},
		{"class CH", func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }, dns.RcodeRefused},
		{"a zone transfer", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR }, dns.RcodeRefused},
	} {
		q := new(dns.Msg).SetQuestion("example.com.", dns.TypeA)
		c.edit(q)
		w := &recorder{}
		s.answer(b, w, q)
		if w.got == nil || w.got.Rcode != c.want || w.got.Id != q.Id {
			t.Errorf("%s: %v, want %s", c.what, w.got, dns.RcodeToString[c.want])
		}
	}
	if asked.Load() != 0 {
		t.Errorf("%d were passed on", asked.Load())
	}
}

// A question that is lost on its way is asked again, and an answer that nobody asked for is not taken.
func TestLossAndForgery(t *testing.T) {
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	go func() {
		buf := make([]byte, 4096)
		for i := 0; ; i++ {
			n, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			q := new(dns.Msg)
			if i == 0 || q.Unpack(buf[:n]) != nil { // the first is lost
				continue
			}
			send := func(edit func(*dns.Msg)) {
				m := answerWith("192.0.2.66")(q)
				edit(m)
				b, _ := m.Pack()
				_, _ = udp.WriteTo(b, from)
			}
			_, _ = udp.WriteTo([]byte("garbage"), from)
			send(func(m *dns.Msg) { m.Id++ })
			send(func(m *dns.Msg) { m.Question[0].Name = "example.org." })
			send(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeMX })
			send(func(m *dns.Msg) { m.Response = false })
			send(func(m *dns.Msg) { m.Answer[0].(*dns.A).A = net.ParseIP("192.0.2.9") })
		}
	}()
	_, ask := start(t, &View{Upstreams: ups(netip.MustParseAddrPort(udp.LocalAddr().String()))})
	begin := time.Now()
	if got := text(ask("udp", "example.com", dns.TypeA)); got != "192.0.2.9" || time.Since(begin) < resendAfter {
		t.Errorf("got %q after %s", got, time.Since(begin))
	}
}

// A container's own resolvers are asked where the container is, the node's where the node is.
func TestWhereUpstreamsAreAsked(t *testing.T) {
	good, _ := upstream(t, answerWith("192.0.2.9"))
	var inside, node atomic.Int64
	count := func(n *atomic.Int64) func(func() error) error {
		return func(f func() error) error { n.Add(1); return f() }
	}
	f := &forwarder{node: count(&node)}
	q := question{Msg: new(dns.Msg).SetQuestion("example.com.", dns.TypeA), inside: count(&inside)}
	for _, up := range []Upstream{{Addr: good}, {Addr: good, Node: true}} {
		if _, err := f.exchange(q, []Upstream{up}); err != nil {
			t.Fatal(err)
		}
	}
	if inside.Load() != 1 || node.Load() != 1 {
		t.Errorf("asked %d times from the container and %d from the node, want once each", inside.Load(), node.Load())
	}
}

// A container that floods gets SERVFAIL and takes nothing from others; the node's fair share holds however many flood.
func TestCaps(t *testing.T) {
	release := make(chan struct{})
	held, _ := upstream(t, func(q *dns.Msg) *dns.Msg { <-release; return answerWith("192.0.2.9")(q) })
	s, _ := start(t, &View{})
	flooder, other := &box{inside: here}, &box{inside: here}
	flooder.view.Store(&View{Upstreams: ups(held)})
	good, _ := upstream(t, answerWith("192.0.2.9"))
	other.view.Store(&View{Upstreams: ups(good)})
	send := func(b *box) string {
		w := &recorder{}
		s.answer(b, w, new(dns.Msg).SetQuestion("example.com.", dns.TypeA))
		return text(w.got, nil)
	}
	var wg sync.WaitGroup
	for range maxForwards {
		wg.Go(func() { send(flooder) })
	}
	for deadline := time.Now().Add(10 * time.Second); flooder.forwards.Load() < maxForwards && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if got := send(flooder); got != "SERVFAIL" {
		t.Errorf("beyond its cap: %s", got)
	}
	s.forwards.Add(busyForwards)
	if got := send(other); got != "192.0.2.9" {
		t.Errorf("another container while the node is busy: %s", got)
	}
	other.forwards.Add(fairForwards)
	if got := send(other); got != "SERVFAIL" {
		t.Errorf("beyond the fair share of a busy node: %s", got)
	}
	close(release)
	wg.Wait()
	if n := flooder.forwards.Load(); n != 0 {
		t.Errorf("%d are counted after all ended", n)
	}
}
