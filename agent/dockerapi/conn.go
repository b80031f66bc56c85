package dockerapi

import (
	"context"
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// limitListener accepts no more than a number of connections at a time; the others wait in the kernel's queue. Unlike x/net/netutil's its
// connections can still be closed half.
type limitListener struct {
	net.Listener
	free   chan struct{}
	closed chan struct{}
	once   sync.Once
}

func limit(l net.Listener, n int) net.Listener {
	return &limitListener{Listener: l, free: make(chan struct{}, n), closed: make(chan struct{})}
}

func (l *limitListener) Accept() (net.Conn, error) {
	select {
	case l.free <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.free
		return nil, err
	}
	return &limitConn{Conn: c, release: sync.OnceFunc(func() { <-l.free })}, nil
}

func (l *limitListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type limitConn struct {
	net.Conn
	release func()
}

func (c *limitConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// CloseWrite tells the client that nothing follows.
func (c *limitConn) CloseWrite() error {
	if cw, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return errors.ErrUnsupported
}

// SyscallConn gives access to the descriptor.
func (c *limitConn) SyscallConn() (syscall.RawConn, error) {
	if sc, ok := c.Conn.(syscall.Conn); ok {
		return sc.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

// hangupEvery is how often a hijacked connection, whose input may wait for the process to read it, is looked at for a client that is gone.
const hangupEvery = 5 * time.Second

// watchHangup cancels when the client has gone altogether. net/http no longer looks after a hijacked connection; the end of its input alone
// means little (echo x | docker run -i), and a write that would fail may not come for days. While somebody reads the input, that one sees its
// end; from then on, or at once when nobody does, the kernel tells. It runs until ctx is done and the connection closed.
func watchHangup(ctx context.Context, c *hijacked, reading bool, cancel context.CancelFunc) {
	sc, ok := c.conn.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return
	}
	tick := time.NewTicker(hangupEvery)
	defer tick.Stop()
	for reading {
		select {
		case <-ctx.Done():
			return
		case <-c.ended:
			reading = false
			continue
		case <-tick.C:
		}
		gone := false
		if err := raw.Control(func(fd uintptr) { gone = hungUp(fd) }); gone || err != nil {
			cancel()
			return
		}
	}
	_ = raw.Read(hungUp) // ends with the connection too
	cancel()
}

// hungUp tells whether both directions of a connection are closed by the other side. Hang-up and error are always reported.
func hungUp(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
}
