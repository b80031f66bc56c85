// Package transport is a node's one port towards other nodes: a TLS listener whose connections are told apart by ALPN.
//
//	"h2"           gRPC; a client without a certificate is let in (joining needs it), in small numbers and for a short time
//	"skein-raft"   Raft streams, only with a certificate
//	"skein-gossip" memberlist streams, only with a certificate
//
// It guarantees that a connection it hands out has finished its handshake, that unfinished handshakes and strangers are bounded in number
// and time, and that no connection waits for a protocol that nobody serves here. It does not decide what a peer may do: authz and the
// users of the streams look at the certificate. Who uses it: cmd/daemon gives its listeners to gRPC, the manager and liveness.
package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"skein/manager/api"
)

const (
	handshakeTimeout = 5 * time.Second
	maxHandshakes    = 256              // unfinished at a time; a join storm of that size takes some 0.3 s of CPU
	maxHandshakeHost = 128              // of them from one address
	maxStrangers     = 128              // connections without a client certificate at a time
	maxStrangersHost = 16               // of them from one address, so that one host cannot keep others from joining
	strangerLifetime = 30 * time.Second // a join takes two short calls
	strangerBytes    = 256 << 10        // that it may send; a request to join has some 2 KiB
	acceptWait       = 5 * time.Second  // how long a finished connection waits for its protocol's Accept
	acceptRetry      = 50 * time.Millisecond
	dialTimeout      = 10 * time.Second // when the caller's context has no deadline
	tcpKeepAlive     = 15 * time.Second
)

// Config of a Mux. Server and Client are asked for each connection, so that renewed certificates take effect at once.
type Config struct {
	// Addr is the TCP address to listen on, host:port.
	Addr string
	// Server is the TLS configuration of accepted connections, see identity.ServerTLS.
	Server *tls.Config
	// Client is the TLS configuration of Dial, see identity.ClientTLS. NextProtos is set by Dial.
	Client *tls.Config
	Logger *slog.Logger
}

// Mux is the listener. Listen opens it, Run serves it.
type Mux struct {
	ln     net.Listener
	server *tls.Config
	client *tls.Config
	log    *slog.Logger
	queues map[string]*queue
	done   chan struct{}
	close  sync.Once

	silent     *pending // have not said what they want
	handshakes *pending // have
	strangers  *hostCount
	peers      *peerSet
}

// Listen opens the port; nothing is accepted before Run.
func Listen(cfg Config) (*Mux, error) {
	if cfg.Server == nil || cfg.Client == nil {
		return nil, errors.New("listen for nodes: TLS configuration missing")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	lc := net.ListenConfig{KeepAlive: tcpKeepAlive}
	ln, err := lc.Listen(context.Background(), "tcp", cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("listen for nodes on %s: %w", cfg.Addr, err)
	}
	server := cfg.Server.Clone()
	server.NextProtos = []string{api.ALPNGRPC, api.ALPNRaft, api.ALPNGossip}
	m := &Mux{
		ln: ln, server: server, client: cfg.Client, log: cfg.Logger.With("component", "transport"),
		queues: map[string]*queue{}, done: make(chan struct{}),
		silent: newPending(maxHandshakes, maxHandshakeHost), handshakes: newPending(maxHandshakes, maxHandshakeHost), strangers: newHostCount(maxStrangers, maxStrangersHost), peers: newPeerSet(),
	}
	for _, p := range server.NextProtos {
		m.queues[p] = &queue{mux: m, conns: make(chan net.Conn), ended: make(chan struct{})}
	}
	return m, nil
}

// Addr is the address listened on.
func (m *Mux) Addr() net.Addr { return m.ln.Addr() }

// GRPC yields connections of ALPN "h2". Their TLS state reaches gRPC through ServerCredentials.
func (m *Mux) GRPC() net.Listener { return m.queues[api.ALPNGRPC] }

// Raft yields Raft streams of peers with a certificate of this cluster. Accept returns *Conn.
func (m *Mux) Raft() net.Listener { return m.queues[api.ALPNRaft] }

// Gossip yields memberlist streams of peers with a certificate of this cluster. Accept returns *Conn.
func (m *Mux) Gossip() net.Listener { return m.queues[api.ALPNGossip] }

// Run accepts connections until ctx is done or Close is called, then waits for the handshakes under way.
func (m *Mux) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = m.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		raw, err := m.ln.Accept()
		if err != nil {
			if m.closed() {
				return nil
			}
			m.log.Warn("accept connection", "err", err) // e.g. out of file descriptors: wait until some are back
			select {
			case <-time.After(acceptRetry):
				continue
			case <-m.done:
				return nil
			}
		}
		w := m.silent.add(raw)
		wg.Add(1)
		go func() {
			defer wg.Done()
			c, err := m.handshake(ctx, raw, w)
			if err != nil {
				m.log.Debug("refuse connection", "peer", raw.RemoteAddr(), "err", err)
				_ = raw.Close()
				return
			}
			m.deliver(c)
		}()
	}
}

// handshake turns an accepted connection into one of a known protocol and peer.
func (m *Mux) handshake(ctx context.Context, raw net.Conn, silent *waiting) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	defer m.silent.done(silent)
	conf, inner := m.server.Clone(), m.server.GetConfigForClient
	var speaks *waiting
	conf.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		m.silent.done(silent)
		speaks = m.handshakes.add(raw)
		if inner == nil {
			return nil, nil
		}
		return inner(hello)
	}
	tc := tls.Server(raw, conf)
	err := tc.HandshakeContext(ctx)
	if speaks != nil {
		m.handshakes.done(speaks)
	}
	if err != nil {
		return nil, err
	}
	state := tc.ConnectionState()
	proto := state.NegotiatedProtocol
	if m.queues[proto] == nil {
		return nil, fmt.Errorf("unknown protocol %q", proto)
	}
	c := &Conn{Conn: tc, proto: proto}
	if len(state.PeerCertificates) > 0 {
		if len(state.VerifiedChains) == 0 {
			return nil, errors.New("client certificate was not verified") // the server configuration is wrong: fail closed
		}
		id, err := api.IdentityOf(state.PeerCertificates[0])
		if err != nil {
			return nil, err
		}
		c.peer = id
		m.peers.add(c)
		c.onClose = func() { m.peers.remove(c) }
		return c, nil
	}
	if proto != api.ALPNGRPC {
		return nil, fmt.Errorf("protocol %q needs a certificate", proto)
	}
	host := hostOf(raw.RemoteAddr())
	if !m.strangers.acquire(host) {
		return nil, errors.New("too many connections without a certificate")
	}
	c.left.Store(strangerBytes)
	timer := time.AfterFunc(strangerLifetime, func() { _ = c.Close() })
	c.onClose = func() { timer.Stop(); m.strangers.release(host) }
	return c, nil
}

func (m *Mux) deliver(c *Conn) {
	q := m.queues[c.proto]
	timer := time.NewTimer(acceptWait)
	defer timer.Stop()
	select {
	case q.conns <- c:
	case <-q.ended:
		_ = c.Close()
	case <-timer.C:
		m.log.Debug("refuse connection", "peer", c.RemoteAddr(), "err", "nobody serves "+c.proto)
		_ = c.Close()
	case <-m.done:
		_ = c.Close()
	}
}

// Dial opens a connection of one protocol to another node's port.
func (m *Mux) Dial(ctx context.Context, addr, alpn string) (net.Conn, error) {
	return Dial(ctx, addr, alpn, m.client)
}

// Dial opens a TLS connection of one protocol. conf decides whom to trust.
func Dial(ctx context.Context, addr, alpn string, conf *tls.Config) (net.Conn, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, dialTimeout)
		defer cancel()
	}
	d := net.Dialer{KeepAlive: tcpKeepAlive}
	raw, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	conf = conf.Clone()
	conf.NextProtos = []string{alpn}
	tc := tls.Client(raw, conf)
	if err := tc.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("%s: %w", addr, err)
	}
	if got := tc.ConnectionState().NegotiatedProtocol; got != alpn {
		_ = tc.Close()
		return nil, fmt.Errorf("%s: speaks protocol %q, not %q", addr, got, alpn)
	}
	c := &Conn{Conn: tc, proto: alpn}
	if pc := tc.ConnectionState().PeerCertificates; len(pc) > 0 {
		c.peer, _ = api.IdentityOf(pc[0]) // conf has verified it if it wants to; otherwise it stays empty
	}
	return c, nil
}

// Disconnect closes all accepted connections of a node: it was removed from the cluster or lost its role.
func (m *Mux) Disconnect(nodeID string) { m.peers.disconnect(nodeID) }

// Close ends the listener and its queues; connections handed out live on.
func (m *Mux) Close() error {
	var err error
	m.close.Do(func() {
		close(m.done)
		err = m.ln.Close()
	})
	return err
}

func (m *Mux) closed() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}
