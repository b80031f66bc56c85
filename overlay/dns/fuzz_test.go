package dns

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/miekg/dns"
)

// recorder is a client that keeps the answer.
type recorder struct {
	dns.ResponseWriter
	tcp bool
	got *dns.Msg
}

func (r *recorder) WriteMsg(m *dns.Msg) error {
	r.got = m
	return nil
}

func (r *recorder) RemoteAddr() net.Addr {
	if r.tcp {
		return &net.TCPAddr{}
	}
	return &net.UDPAddr{}
}

// FuzzAnswer: every message that is a message gets one answer, which can be sent and fits what the client takes.
func FuzzAnswer(f *testing.F) {
	for _, name := range []string{"web.", "tasks.web.", "WEB.", "4.3.2.10.in-addr.arpa.", "_http._tcp.web.", "_80._udp.tasks.many.", "x.ip6.arpa.", ".", "a.b.c.example.com."} {
		for _, typ := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypePTR, dns.TypeANY, dns.TypeMX, dns.TypeSRV} {
			m := new(dns.Msg)
			m.SetQuestion(name, typ)
			m.SetEdns0(100, true)
			b, err := m.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b, typ%2 == 0)
		}
	}
	z := zone()
	for i := range 200 {
		z.Add("many", false, netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}))
		z.Add("tasks.many", false, netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}))
	}
	s := NewServer(here, slog.New(slog.NewTextHandler(io.Discard, nil)))
	b := &box{}
	b.view.Store(&View{Zones: []*Zone{z}, Bare: true})
	f.Fuzz(func(t *testing.T, raw []byte, tcp bool) {
		q := new(dns.Msg)
		if q.Unpack(raw) != nil {
			return
		}
		w := &recorder{tcp: tcp}
		s.answer(b, w, q)
		if w.got == nil {
			t.Fatal("no answer")
		}
		out, err := w.got.Pack()
		if err != nil {
			return // a question that cannot be said again
		}
		size := dns.MinMsgSize
		if o := q.IsEdns0(); o != nil {
			size = max(size, int(o.UDPSize()))
		}
		if !tcp && len(out) > size && len(w.got.Answer) > 0 {
			t.Errorf("%d bytes for a client that takes %d", len(out), size)
		}
	})
}

// FuzzConf: any resolv.conf is read without harm, and what is read of it can be written.
func FuzzConf(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nnameserver fe80::1%eth0\nsearch a b\noptions ndots:2 edns0\ndomain x\n"))
	f.Add([]byte("nameserver\nsearch\noptions\n\x00 # ;"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := ParseConf(b)
		again := ParseConf(c.Text())
		if !slices.Equal(c.Nameservers, again.Nameservers) || !slices.Equal(c.Search, again.Search) || !slices.Equal(c.Options, again.Options) {
			t.Errorf("%+v became %+v", c, again)
		}
	})
}
