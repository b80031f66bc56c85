package transport

import (
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"

	"skein/manager/api"
)

// Conn is a connection whose handshake is done. Peer says whose it is.
type Conn struct {
	*tls.Conn
	proto   string
	peer    api.NodeIdentity
	onClose func()
	once    sync.Once
	left    atomic.Int64 // bytes that a stranger may still send
}

// errTalks ends the connection of a peer without certificate that sends more than joining takes: what it sends is kept until a request is
// whole, before anybody can ask who it is.
var errTalks = errors.New("a peer without certificate sends too much")

// Read reads, of a peer without certificate a bounded number of bytes in all.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.peer.NodeID == "" && c.onClose != nil && c.left.Add(-int64(n)) < 0 {
		return 0, errTalks
	}
	return n, err
}

// Peer is the verified identity of the other side, empty for a peer without certificate.
func (c *Conn) Peer() api.NodeIdentity { return c.peer }

// Close closes the connection and gives back what it counted against.
func (c *Conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		if c.onClose != nil {
			c.onClose()
		}
	})
	return err
}

// queue is the net.Listener of one protocol.
type queue struct {
	mux   *Mux
	conns chan net.Conn
	ended chan struct{}
	once  sync.Once
}

// Accept waits for the next connection of this protocol.
func (q *queue) Accept() (net.Conn, error) {
	select {
	case <-q.mux.done:
		return nil, net.ErrClosed
	case <-q.ended:
		return nil, net.ErrClosed
	case c := <-q.conns:
		return c, nil
	}
}

// Close ends this protocol's Accept; the port and the other protocols stay.
func (q *queue) Close() error {
	q.once.Do(func() { close(q.ended) })
	return nil
}

// Addr is the address of the port.
func (q *queue) Addr() net.Addr { return q.mux.Addr() }

// hostCount counts connections in all and by host, with a bound for both.
type hostCount struct {
	mu       sync.Mutex
	max, per int
	total    int
	hosts    map[string]int
}

func newHostCount(limit, perHost int) *hostCount {
	return &hostCount{max: limit, per: perHost, hosts: map[string]int{}}
}

func (h *hostCount) acquire(host string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.total >= h.max || h.hosts[host] >= h.per {
		return false
	}
	h.total++
	h.hosts[host]++
	return true
}

func (h *hostCount) release(host string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.total--
	if h.hosts[host]--; h.hosts[host] <= 0 {
		delete(h.hosts, host)
	}
}

// peerSet knows the accepted connections by node.
type peerSet struct {
	mu    sync.Mutex
	conns map[string]map[*Conn]struct{}
}

func newPeerSet() *peerSet { return &peerSet{conns: map[string]map[*Conn]struct{}{}} }

func (p *peerSet) add(c *Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	set := p.conns[c.peer.NodeID]
	if set == nil {
		set = map[*Conn]struct{}{}
		p.conns[c.peer.NodeID] = set
	}
	set[c] = struct{}{}
}

func (p *peerSet) remove(c *Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	set := p.conns[c.peer.NodeID]
	delete(set, c)
	if len(set) == 0 {
		delete(p.conns, c.peer.NodeID)
	}
}

func (p *peerSet) disconnect(nodeID string) {
	p.mu.Lock()
	var victims []*Conn
	for c := range p.conns[nodeID] {
		victims = append(victims, c)
	}
	p.mu.Unlock()
	for _, c := range victims {
		_ = c.Close()
	}
}

// hostOf is the address without its port.
func hostOf(a net.Addr) string {
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	return host
}
