package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"

	"github.com/miekg/dns"
)

const (
	udpSize = 4096
	// maxForwards bounds the foreign queries in flight per container; more are answered SERVFAIL. Each takes a descriptor or a few. While
	// the node has more than busyForwards, a container with fairForwards or more gets no further one, so that a few cannot use up what others need.
	maxForwards  = 256
	fairForwards = 16
	busyForwards = 2048
	// maxTCP bounds the open TCP connections per container.
	maxTCP = 64
)

// Server answers on the sockets of many containers. Safe for concurrent use.
type Server struct {
	log      *slog.Logger
	fwd      *forwarder
	forwards atomic.Int64 // in flight for all containers

	mu    sync.Mutex
	boxes map[string]*box
	wg    sync.WaitGroup
}

type box struct {
	view     atomic.Pointer[View]
	inside   func(func() error) error
	forwards atomic.Int64
	servers  []*dns.Server
}

// NewServer makes a server without sockets. node runs a function in the node's network namespace.
func NewServer(node func(func() error) error, log *slog.Logger) *Server {
	return &Server{log: log, fwd: &forwarder{node: node}, boxes: map[string]*box{}}
}

// Add begins to answer on the sockets, which the server then owns. inside runs a function in the container's network namespace.
func (s *Server) Add(id string, v *View, udp net.PacketConn, tcp net.Listener, inside func(func() error) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.boxes[id] != nil {
		return fmt.Errorf("serve DNS for %s: it is served already", id)
	}
	b := &box{inside: inside}
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
	opt := q.IsEdns0()
	if opt != nil {
		m.SetEdns0(udpSize, opt.Do())
	}
	switch {
	case q.Opcode != dns.OpcodeQuery:
		m.Rcode = dns.RcodeNotImplemented
	case len(q.Question) != 1:
		m.Rcode = dns.RcodeFormatError
	case opt != nil && opt.Version() != 0:
		m.Rcode = dns.RcodeBadVers
	case q.Question[0].Qclass != dns.ClassINET && q.Question[0].Qclass != dns.ClassANY, q.Question[0].Qtype == dns.TypeAXFR, q.Question[0].Qtype == dns.TypeIXFR:
		m.Rcode = dns.RcodeRefused // neither zones nor resolvers' versions are to be had here
	case !local(m, v, q.Question[0]):
		m.Authoritative = false
		s.forward(b, v, w, q, m)
		return
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

// forward passes q on; m is the answer if there is no other.
func (s *Server) forward(b *box, v *View, w dns.ResponseWriter, q, m *dns.Msg) {
	if len(v.Upstreams) == 0 {
		m.Rcode = dns.RcodeRefused
		write(w, q, m)
		return
	}
	own, all := b.forwards.Add(1), s.forwards.Add(1)
	defer b.forwards.Add(-1)
	defer s.forwards.Add(-1)
	if own > maxForwards || all > busyForwards && own > fairForwards {
		m.Rcode = dns.RcodeServerFailure
		write(w, q, m)
		return
	}
	r, err := s.fwd.exchange(question{q, w.RemoteAddr().Network() == "tcp", b.inside}, v.Upstreams)
	if err != nil {
		s.log.Debug("foreign name not resolved", "name", q.Question[0].Name, "error", err)
		m.Rcode = dns.RcodeServerFailure
		r = m
	}
	write(w, q, r)
}

// Socket is the socket on which a container's queries arrive; nil when it is not served. It must only be looked at, and lives until Remove.
func (s *Server) Socket(id string) net.PacketConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.boxes[id]; b != nil {
		for _, srv := range b.servers {
			if srv.PacketConn != nil {
				return srv.PacketConn
			}
		}
	}
	return nil
}
