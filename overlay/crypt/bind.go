package crypt

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

const (
	maxSegments  = 64    // of one send, by the kernel's rule
	maxUDP       = 65507 // of one send, for either family
	readMessages = conn.IdealBatchSize / maxSegments
	socketBuffer = 4 << 20
	// plainFor is how long datagrams to a destination are sent one by one after the kernel found them too big to be sent as segments.
	plainFor = 10 * time.Minute
)

// bind is WireGuard's UDP socket: one that outlives the daemon. Datagrams to one destination are sent as segments of one message where the
// kernel can; when it finds them too big for the path, they are sent one by one, which lets it cut them. WireGuard's own bind loses them.
type bind struct {
	fd   int // ours, duplicated for each opening
	port uint16

	gso  atomic.Bool
	gro  bool
	msgs sync.Pool // *[]ipv6.Message

	mu    sync.Mutex
	conn  *net.UDPConn
	batch batchConn
	known map[netip.AddrPort]*endpoint
}

type batchConn interface {
	ReadBatch([]ipv6.Message, int) (int, error)
	WriteBatch([]ipv6.Message, int) (int, error)
}

// endpoint is a node's socket.
type endpoint struct {
	addr  netip.AddrPort
	udp   *net.UDPAddr
	plain atomic.Int64 // unix nanos until which datagrams are sent one by one
}

func newEndpoint(a netip.AddrPort) *endpoint {
	return &endpoint{addr: a, udp: net.UDPAddrFromAddrPort(a)}
}

func (e *endpoint) ClearSrc()           {}
func (e *endpoint) SrcToString() string { return "" }
func (e *endpoint) DstToString() string { return e.addr.String() }
func (e *endpoint) DstIP() netip.Addr   { return e.addr.Addr() }
func (e *endpoint) SrcIP() netip.Addr   { return netip.Addr{} }
func (e *endpoint) DstToBytes() []byte {
	b, _ := e.addr.MarshalBinary() // never fails
	return b
}

// openSocket opens the UDP socket in the calling thread's namespace.
func openSocket(at netip.AddrPort) (fd int, err error) {
	family, ip := unix.AF_INET, at.Addr().Unmap()
	var sa unix.Sockaddr
	if ip.Is4() {
		sa = &unix.SockaddrInet4{Port: int(at.Port()), Addr: ip.As4()}
	} else {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(at.Port()), Addr: ip.As16()}
	}
	fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("open socket: %w", err)
	}
	for _, opt := range []int{unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} { // without the right to it the system's size has to do
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, socketBuffer)
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1) // read back in newBind
	// Whoever finds a packet too big for its next link may cut it, here or on the way: a tunnel that loses large packets is worse.
	if family == unix.AF_INET {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
	} else {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DONT)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("let packets be cut: %w", err)
	}
	if err := unix.Bind(fd, sa); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("bind UDP %s: %w", at, err)
	}
	return fd, nil
}

// socketAt tells whether a stored socket is bound to the address.
func socketAt(fd int, at netip.AddrPort) bool {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return false
	}
	switch s := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port)) == at
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr), uint16(s.Port)) == at
	}
	return false
}

// newBind takes over the socket.
func newBind(fd int, port uint16) *bind {
	b := &bind{fd: fd, port: port, known: map[netip.AddrPort]*endpoint{}}
	_, err := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
	b.gso.Store(err == nil)
	on, err := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO)
	b.gro = err == nil && on == 1
	b.msgs.New = func() any {
		msgs := make([]ipv6.Message, conn.IdealBatchSize)
		for i := range msgs {
			msgs[i].Buffers = make([][]byte, 0, maxSegments)
			msgs[i].OOB = make([]byte, 0, unix.CmsgSpace(4))
		}
		return &msgs
	}
	return b
}

// Open is called by WireGuard when its device comes up.
func (b *bind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	fd, err := unix.FcntlInt(uintptr(b.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("duplicate socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "wireguard")
	defer f.Close()
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, 0, fmt.Errorf("use socket: %w", err)
	}
	u, ok := c.(*net.UDPConn)
	if !ok {
		c.Close()
		return nil, 0, errors.New("use socket: it is not UDP")
	}
	b.conn = u
	if u.LocalAddr().(*net.UDPAddr).IP.To4() != nil {
		b.batch = ipv4.NewPacketConn(u)
	} else {
		b.batch = ipv6.NewPacketConn(u)
	}
	return []conn.ReceiveFunc{b.receiver(b.batch)}, b.port, nil
}

// Close ends receiving; the socket itself stays until release.
func (b *bind) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn == nil {
		return nil
	}
	err := b.conn.Close()
	b.conn, b.batch = nil, nil
	return err
}

func (b *bind) release() { unix.Close(b.fd) }

// SetMark is not needed.
func (b *bind) SetMark(uint32) error { return nil }

// BatchSize is how many packets are sent or received at once.
func (b *bind) BatchSize() int { return conn.IdealBatchSize }

// ParseEndpoint is called with the configured addresses of nodes only. Those are remembered, so that what is learned of a path stays.
func (b *bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.known[a]
	if e == nil {
		e = newEndpoint(a)
		b.known[a] = e
	}
	return e, nil
}

// forget drops what is remembered of an address.
func (b *bind) forget(a netip.AddrPort) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.known, a)
}

func (b *bind) endpointOf(a netip.AddrPort) *endpoint {
	a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.known[a]; e != nil {
		return e
	}
	return newEndpoint(a)
}

// receiver reads messages, each of which may be many datagrams of one sender.
func (b *bind) receiver(c batchConn) conn.ReceiveFunc {
	var scratch [readMessages][]byte
	msgs := make([]ipv6.Message, readMessages)
	for i := range msgs {
		scratch[i] = make([]byte, 1<<16)
		msgs[i].Buffers = [][]byte{scratch[i]}
		msgs[i].OOB = make([]byte, unix.CmsgSpace(4))
	}
	return func(packets [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		read, err := c.ReadBatch(msgs, 0)
		if err != nil {
			return 0, err
		}
		n := 0
		for i := range msgs[:read] {
			m := &msgs[i]
			size := m.N
			if b.gro {
				if s := segmentSize(m.OOB[:m.NN]); s > 0 {
					size = s
				}
			}
			ep := b.endpointOf(m.Addr.(*net.UDPAddr).AddrPort())
			for rest := scratch[i][:m.N]; len(rest) > 0 && n < len(packets); n++ {
				k := min(size, len(rest))
				sizes[n], eps[n] = copy(packets[n], rest[:k]), ep
				rest = rest[k:]
			}
		}
		return n, nil
	}
}

// segmentSize is the size of the datagrams that the kernel joined, 0 if it did not.
func segmentSize(control []byte) int {
	for len(control) > unix.SizeofCmsghdr {
		h, data, rest, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			return 0
		}
		if h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO && len(data) >= 4 {
			return int(*(*int32)(unsafe.Pointer(&data[0])))
		}
		control = rest
	}
	return 0
}

// Send sends datagrams to one node.
func (b *bind) Send(bufs [][]byte, to conn.Endpoint) error {
	e, ok := to.(*endpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	b.mu.Lock()
	c := b.batch
	b.mu.Unlock()
	if c == nil {
		return net.ErrClosed
	}
	pooled := b.msgs.Get().(*[]ipv6.Message)
	defer b.msgs.Put(pooled)
	msgs := *pooled
	joined := b.gso.Load() && time.Now().UnixNano() >= e.plain.Load()
	n := gather(msgs, bufs, e.udp, joined)
	defer func() {
		for i := range msgs[:n] {
			clear(msgs[i].Buffers)
			msgs[i].Buffers, msgs[i].Addr = msgs[i].Buffers[:0], nil
		}
	}()
	for start := 0; start < n; {
		sent, err := c.WriteBatch(msgs[start:n], 0)
		start += max(sent, 0)
		if err == nil {
			continue
		}
		if start >= n || len(msgs[start].Buffers) < 2 {
			if errors.Is(err, unix.EMSGSIZE) && start < n { // too big even to be cut: it is lost, those after it are not
				start++
				continue
			}
			return err
		}
		switch {
		case errors.Is(err, unix.EMSGSIZE), errors.Is(err, unix.EINVAL):
			e.plain.Store(time.Now().Add(plainFor).UnixNano())
		case errors.Is(err, unix.EIO): // the device cannot checksum
			b.gso.Store(false)
		default:
			return err
		}
		if err := b.sendApart(c, msgs[start].Buffers, e); err != nil {
			return err
		}
		start++
	}
	return nil
}

// sendApart sends datagrams one by one.
func (b *bind) sendApart(c batchConn, bufs [][]byte, e *endpoint) error {
	one := []ipv6.Message{{Addr: e.udp}}
	for _, buf := range bufs {
		one[0].Buffers = [][]byte{buf}
		if _, err := c.WriteBatch(one, 0); err != nil && !errors.Is(err, unix.EMSGSIZE) {
			return err
		}
	}
	return nil
}

// gather makes messages of datagrams: with join, those that follow each other with the same size, and a shorter one after them, are one.
func gather(msgs []ipv6.Message, bufs [][]byte, to net.Addr, join bool) int {
	n, total, open := 0, 0, false
	for _, buf := range bufs {
		if open {
			m := &msgs[n-1]
			size := len(m.Buffers[0])
			if len(buf) <= size && total+len(buf) <= maxUDP && len(m.Buffers) < maxSegments {
				m.Buffers = append(m.Buffers, buf)
				m.OOB = segmentControl(m.OOB, size)
				total += len(buf)
				open = len(buf) == size
				continue
			}
		}
		m := &msgs[n]
		m.Buffers, m.OOB, m.Addr = append(m.Buffers[:0], buf), m.OOB[:0], to
		total, open = len(buf), join
		n++
	}
	return n
}

// segmentControl is the control message that tells the kernel to cut a message into datagrams of that size.
func segmentControl(oob []byte, size int) []byte {
	oob = oob[:unix.CmsgSpace(2)]
	clear(oob)
	h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
	h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	*(*uint16)(unsafe.Pointer(&oob[unix.CmsgLen(0)])) = uint16(size)
	return oob
}
