package manager

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"skein/manager/api"
)

// streams is Raft's way to the other managers over the nodes' port. Who is at the other end is checked in both directions.
type streams struct {
	m  *Manager
	ln net.Listener

	mu    sync.Mutex
	conns map[*stream]struct{} // accepted and open
}

func newStreams(m *Manager) *streams {
	return &streams{m: m, ln: m.cfg.RaftListener, conns: map[*stream]struct{}{}}
}

// stream is an accepted connection.
type stream struct {
	net.Conn
	peer string
	s    *streams
}

// Close closes the stream.
func (c *stream) Close() error {
	c.s.mu.Lock()
	delete(c.s.conns, c)
	c.s.mu.Unlock()
	return c.Conn.Close()
}

// cut closes the streams that a node opened: it takes no part in the group any more.
func (s *streams) cut(nodeID string) {
	s.mu.Lock()
	var out []*stream
	for c := range s.conns {
		if c.peer == nodeID {
			out = append(out, c)
		}
	}
	s.mu.Unlock()
	for _, c := range out {
		_ = c.Close()
	}
}

// Accept waits for a stream of a manager; others are cut off.
func (s *streams) Accept() (net.Conn, error) {
	for {
		c, err := s.ln.Accept()
		if err != nil {
			return nil, err
		}
		if err := s.m.admitRaft(peerOf(c)); err != nil {
			s.m.log.Warn("refused", "err", err, "addr", c.RemoteAddr())
			_ = c.Close()
			continue
		}
		st := &stream{Conn: c, peer: peerOf(c).NodeID, s: s}
		s.mu.Lock()
		s.conns[st] = struct{}{}
		s.mu.Unlock()
		return st, nil
	}
}

// Dial opens a stream to the manager at an address.
func (s *streams) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	c, err := s.m.cfg.DialRaft(ctx, string(addr))
	if err != nil {
		return nil, err
	}
	if err := s.m.admitRaft(peerOf(c)); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

func (s *streams) Close() error   { return s.ln.Close() }
func (s *streams) Addr() net.Addr { return s.ln.Addr() }

// peerOf is the verified identity at the other end, empty if the connection does not tell.
func peerOf(c net.Conn) api.NodeIdentity {
	if p, ok := c.(interface{ Peer() api.NodeIdentity }); ok {
		return p.Peer()
	}
	return api.NodeIdentity{}
}
