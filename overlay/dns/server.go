package dns

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/miekg/dns"
)

const (
	ttlStable   = 30 // seconds: VIPs and containers keep their address
	ttlEndpoint = 2  // tasks.NAME and round robin: caches must not pin the dead
	ttlNegative = 1
	udpSize     = 4096
	// maxForwards bounds the foreign queries in flight per container; more are answered SERVFAIL.
	maxForwards = 256
	// maxTCP bounds the open TCP connections per container.
	maxTCP = 64
)

// Server answers on the sockets of many containers. Safe for concurrent use.
type Server struct {
	log   *slog.Logger
	fwd   *forwarder
	mu    sync.Mutex
	boxes map[string]*box
	wg    sync.WaitGroup
}

type box struct {
	view     atomic.Pointer[View]
	forwards chan struct{}
	servers  []*dns.Server
}

// NewServer makes a server without sockets. do runs a function where foreign resolvers can be reached (the node's network namespace).
func NewServer(do func(func() error) error, log *slog.Logger) *Server {
	return &Server{log: log, fwd: &forwarder{do: do}, boxes: map[string]*box{}}
}

// Add begins to answer on the sockets, which the server then owns.
func (s *Server) Add(id string, v *View, udp net.PacketConn, tcp net.Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.boxes[id] != nil {
		return fmt.Errorf("serve DNS for %s: it is served already", id)
	}
	b := &box{forwards: make(chan struct{}, maxForwards)}
	b.view.Store(v)
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { s.answer(b, w, q) })
	b.servers = []*dns.Server{{PacketConn: udp, Handler: h, UDPSize: udpSize}, {Listener: &limited{Listener: tcp, slots: make(chan struct{}, maxTCP)}, Handler: h}}
	for _, srv := range b.servers {
		started := make(chan struct{})
		srv.NotifyStartedFunc = sync.OnceFunc(func() { close(started) })
		s.wg.Go(func() {
			defer srv.NotifyStartedFunc()
			if err := srv.ActivateAndServe(); err != nil {
				s.log.Error("DNS socket ended", "container", id, "error", err)
			}
		})
		<-started
	}
	s.boxes[id] = b
	return nil
}

// SetView replaces what a container sees; one that is not served is ignored.
func (s *Server) SetView(id string, v *View) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.boxes[id]; b != nil {
		b.view.Store(v)
	}
}

// Serves tells whether Add was called for the container.
func (s *Server) Serves(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.boxes[id] != nil
}

// Remove ends serving a container and closes its sockets.
func (s *Server) Remove(id string) {
	s.mu.Lock()
	b := s.boxes[id]
	delete(s.boxes, id)
	s.mu.Unlock()
	if b != nil {
		b.shutdown()
	}
}

// Close ends everything and waits for it.
func (s *Server) Close() {
	s.mu.Lock()
	boxes := s.boxes
	s.boxes = map[string]*box{}
	s.mu.Unlock()
	for _, b := range boxes {
		b.shutdown()
	}
	s.wg.Wait()
}

// shutdown closes the sockets. It does not wait for queries under way; Close does.
func (b *box) shutdown() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for _, srv := range b.servers {
		_ = srv.ShutdownContext(ctx)
	}
}

// limited bounds the connections that a listener hands out; more wait in the kernel's queue.
type limited struct {
	net.Listener
	slots chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	l.slots <- struct{}{}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: c, free: sync.OnceFunc(func() { <-l.slots })}, nil
}

type limitedConn struct {
	net.Conn
	free func()
}

func (c *limitedConn) Close() error {
	defer c.free()
	return c.Conn.Close()
}

func (s *Server) answer(b *box, w dns.ResponseWriter, q *dns.Msg) {
	v := b.view.Load()
	m := new(dns.Msg)
	m.SetReply(q)
	m.RecursionAvailable = true
	if len(q.Question) != 1 || q.Opcode != dns.OpcodeQuery {
		m.Rcode = dns.RcodeNotImplemented
		write(w, q, m)
		return
	}
	if !local(m, v, q.Question[0]) {
		s.forward(b, v, w, q, m)
		return
	}
	if q.IsEdns0() != nil {
		m.SetEdns0(udpSize, false)
	}
	write(w, q, m)
}

// write sends an answer, cut to what the client can take.
func write(w dns.ResponseWriter, q, m *dns.Msg) {
	m.Compress = true
	if w.RemoteAddr().Network() == "udp" {
		size := dns.MinMsgSize
		if o := q.IsEdns0(); o != nil {
			size = max(size, int(o.UDPSize()))
		}
		m.Truncate(size)
	}
	_ = w.WriteMsg(m) // the client may have gone
}

func (s *Server) forward(b *box, v *View, w dns.ResponseWriter, q, m *dns.Msg) {
	if len(v.Upstreams) == 0 {
		m.Rcode = dns.RcodeRefused
		write(w, q, m)
		return
	}
	select {
	case b.forwards <- struct{}{}:
		defer func() { <-b.forwards }()
	default:
		m.Rcode = dns.RcodeServerFailure
		write(w, q, m)
		return
	}
	r, err := s.fwd.exchange(q, w.RemoteAddr().Network() == "tcp", v.Upstreams)
	if err != nil {
		s.log.Debug("foreign name not resolved", "name", q.Question[0].Name, "error", err)
		m.Rcode = dns.RcodeServerFailure
		r = m
	}
	r.Id = q.Id
	write(w, q, r)
}

// local answers m if the question is about names of the view; it tells whether it did.
func local(m *dns.Msg, v *View, q dns.Question) bool {
	m.Authoritative = true
	if a, ok := reverseAddr(q.Name); ok {
		name, known := v.reverse(a)
		if !known {
			return false
		}
		if name == "" {
			m.Rcode = dns.RcodeNameError
		} else if q.Qtype == dns.TypePTR || q.Qtype == dns.TypeANY {
			m.Answer = []dns.RR{&dns.PTR{Hdr: header(q.Name, dns.TypePTR, ttlStable), Ptr: dns.Fqdn(name)}}
		}
		return true
	}
	r, ok := v.Lookup(q.Name)
	if !ok {
		if strings.Contains(canonical(q.Name), ".") || len(v.Search) > 0 {
			return false
		}
		m.Rcode = dns.RcodeNameError
		m.Ns = negative(q.Name)
		return true
	}
	ttl := uint32(ttlEndpoint)
	if r.Stable {
		ttl = ttlStable
	}
	start := 0
	if n := len(r.Addrs); n > 1 {
		start = rand.IntN(n)
	}
	for i := range r.Addrs {
		a := r.Addrs[(start+i)%len(r.Addrs)]
		switch {
		case a.Is4() && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY):
			m.Answer = append(m.Answer, &dns.A{Hdr: header(q.Name, dns.TypeA, ttl), A: a.AsSlice()})
		case a.Is6() && (q.Qtype == dns.TypeAAAA || q.Qtype == dns.TypeANY):
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: header(q.Name, dns.TypeAAAA, ttl), AAAA: a.AsSlice()})
		}
	}
	if len(m.Answer) == 0 {
		m.Ns = negative(q.Name)
	}
	rand.Shuffle(len(m.Answer), func(i, j int) { m.Answer[i], m.Answer[j] = m.Answer[j], m.Answer[i] })
	return true
}

func header(name string, typ uint16, ttl uint32) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: typ, Class: dns.ClassINET, Ttl: ttl}
}

// negative is the SOA that lets caches forget a negative answer soon.
func negative(name string) []dns.RR {
	return []dns.RR{&dns.SOA{Hdr: header(name, dns.TypeSOA, ttlNegative), Ns: "skein.", Mbox: "skein.", Minttl: ttlNegative, Refresh: 60, Retry: 60, Expire: 60}}
}

// reverseAddr reads names under in-addr.arpa and ip6.arpa.
func reverseAddr(name string) (netip.Addr, bool) {
	name = canonical(name)
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		parts := strings.Split(rest, ".")
		if len(parts) != 4 {
			return netip.Addr{}, false
		}
		a, err := netip.ParseAddr(parts[3] + "." + parts[2] + "." + parts[1] + "." + parts[0])
		return a, err == nil
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa")
	parts := strings.Split(rest, ".")
	if !ok || len(parts) != 32 {
		return netip.Addr{}, false
	}
	var b [16]byte
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 16, 4)
		if err != nil {
			return netip.Addr{}, false
		}
		at := 31 - i
		b[at/2] |= byte(n) << (4 * (1 - at%2))
	}
	return netip.AddrFrom16(b), true
}
