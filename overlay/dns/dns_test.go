package dns

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func here(f func() error) error { return f() }

// start serves a view on loopback ports and returns a function that asks it.
func start(t *testing.T, v *View) (*Server, func(network, name string, typ uint16) (*dns.Msg, error)) {
	t.Helper()
	s := NewServer(here, slog.New(slog.NewTextHandler(io.Discard, nil)))
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp4", udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Add("box", v, udp, tcp); err != nil {
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
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp4", udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
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
	z.Point(netip.MustParseAddr("10.0.0.2"), "web")
	return z
}

func TestLocalNames(t *testing.T) {
	foreign, asked := upstream(t, answerWith("192.0.2.9"))
	second := NewZone("back", netip.MustParsePrefix("10.1.0.0/24"))
	second.Add("web", true, netip.MustParseAddr("10.1.0.2"))
	second.Add("db", true, netip.MustParseAddr("10.1.0.3"))
	second.Add("six", true, netip.MustParseAddr("fd00::3"))
	second.Point(netip.MustParseAddr("fd00::3"), "six")
	_, ask := start(t, &View{Zones: []*Zone{zone(), second}, Upstreams: []netip.AddrPort{foreign}})
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
	s.SetView("box", &View{Zones: []*Zone{z}, Search: []string{"example.com"}})
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
		upstreams []netip.AddrPort
		network   string
		want      string
		within    time.Duration
	}{
		{"first answers", []netip.AddrPort{good, silent}, "udp", "192.0.2.9", 250 * time.Millisecond},
		{"first is silent", []netip.AddrPort{silent, good}, "udp", "192.0.2.9", time.Second},
		{"first refuses connections", []netip.AddrPort{dead, good}, "udp", "192.0.2.9", 250 * time.Millisecond},
		{"first fails", []netip.AddrPort{broken, good}, "udp", "192.0.2.9", 250 * time.Millisecond},
		{"all fail", []netip.AddrPort{broken, dead}, "udp", "SERVFAIL", time.Second},
		{"all are silent", []netip.AddrPort{silent}, "udp", "SERVFAIL", 3 * time.Second},
		{"large by TCP", []netip.AddrPort{large}, "tcp", strings.Join(many, " "), time.Second},
	} {
		s.SetView("box", &View{Upstreams: c.upstreams})
		begin := time.Now()
		if got := text(ask(c.network, "example.com", dns.TypeA)); got != c.want || time.Since(begin) > c.within {
			t.Errorf("%s: %q after %s, want %q within %s", c.name, got, time.Since(begin), c.want, c.within)
		}
	}
	s.SetView("box", &View{Upstreams: []netip.AddrPort{large}})
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
}
