package netbench

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// What a client's first byte asks of a server.
const (
	wantEcho = 'e' // each byte is sent back until the client goes
	wantOnce = 'o' // it is sent back and the connection closed
	wantSink = 's' // all is thrown away
)

const (
	bulkBytes = 128 << 10
	// blocked bounds one wait in the kernel: Go stops all threads now and then, and cannot stop one that waits, while that which it waits for may
	// be a thread that is stopped (encryption is in this process).
	blocked = 2 * time.Millisecond
	// patience is how long a client waits for an answer.
	patience = 3 * time.Second
)

// server answers on TCP and UDP in a namespace.
type server struct {
	tcp, udp int
	stop     atomic.Bool
	wg       sync.WaitGroup
}

const serverThreads = 5

func serve(ns *link.NS, port uint16) (*server, error) {
	s := &server{}
	err := ns.Do(func() (err error) {
		if s.tcp, err = socket(unix.SOCK_STREAM); err != nil {
			return err
		}
		if s.udp, err = socket(unix.SOCK_DGRAM); err != nil {
			return err
		}
		at := &unix.SockaddrInet4{Port: int(port)}
		return errors.Join(unix.SetsockoptInt(s.tcp, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(s.tcp, at), unix.Listen(s.tcp, 1024), unix.Bind(s.udp, at))
	})
	if err != nil {
		return nil, fmt.Errorf("serve port %d: %w", port, err)
	}
	for range serverThreads {
		s.wg.Go(s.accept)
	}
	s.wg.Go(s.datagrams)
	return s, nil
}

func (s *server) close() {
	s.stop.Store(true)
	s.wg.Wait()
	unix.Close(s.tcp)
	unix.Close(s.udp)
}

func (s *server) accept() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for !s.stop.Load() {
		fd, _, err := unix.Accept4(s.tcp, unix.SOCK_CLOEXEC)
		if err != nil {
			continue // its time-out
		}
		if prepare(fd) == nil {
			s.connection(fd)
		}
		unix.Close(fd)
	}
}

func (s *server) connection(fd int) {
	buf := make([]byte, bulkBytes)
	n, err := s.read(fd, buf[:1])
	if err != nil || n == 0 {
		return
	}
	switch buf[0] {
	case wantOnce:
		_, _ = write(fd, buf[:1])
	case wantEcho:
		for {
			if n, err = s.read(fd, buf[:1]); err != nil || n == 0 {
				return
			}
			if _, err := write(fd, buf[:n]); err != nil {
				return
			}
		}
	case wantSink:
		for err == nil && n > 0 {
			n, err = s.read(fd, buf)
		}
	}
}

// read waits until something comes or the server stops.
func (s *server) read(fd int, b []byte) (int, error) {
	for {
		n, err := read(fd, b)
		if !again(err) || s.stop.Load() {
			return n, err
		}
	}
}

func (s *server) datagrams() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf := make([]byte, 2048)
	for !s.stop.Load() {
		n, from, err := unix.Recvfrom(s.udp, buf, 0)
		if err == nil {
			_ = unix.Sendto(s.udp, buf[:n], 0, from)
		}
	}
}

func socket(kind int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, prepare(fd)
}

func prepare(fd int) error {
	t := unix.NsecToTimeval(int64(blocked))
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // not for UDP
	return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &t), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &t))
}

// read and write do not tell Go's scheduler: a hand-over of the thread's P would be measured instead of the network.
func read(fd int, b []byte) (int, error)  { return transfer(unix.SYS_READ, fd, b) }
func write(fd int, b []byte) (int, error) { return transfer(unix.SYS_WRITE, fd, b) }

func transfer(call uintptr, fd int, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func again(err error) bool { return err == unix.EAGAIN || err == unix.EINTR }

// readWithin reads an answer.
func readWithin(fd int, b []byte) (int, error) {
	for end := time.Now().Add(patience); ; {
		n, err := read(fd, b)
		if !again(err) {
			return n, err
		}
		if time.Now().After(end) {
			return 0, errors.New("no answer")
		}
	}
}

func dial(kind int, to netip.AddrPort) (int, error) {
	fd, err := socket(kind)
	if err != nil {
		return -1, err
	}
	whole := unix.NsecToTimeval(int64(patience)) // the wait for a connection is no raw call: it may be long
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &whole),
		connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}), prepare(fd))
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to %s: %w", to, err)
	}
	return fd, nil
}

// connect waits on when a signal of this process interrupts it (connect(2)).
func connect(fd int, to unix.Sockaddr) error {
	for end := time.Now().Add(patience); ; {
		err := unix.Connect(fd, to)
		if errors.Is(err, unix.EISCONN) {
			return nil
		}
		if !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			return err
		}
	}
}

// sample is what a slice gave.
type sample struct {
	ops  float64 // per second; of a stream, bits
	p50  time.Duration
	p99  time.Duration
	cpu  time.Duration // per operation; of a stream, per MiB
	wall time.Duration
}

type metric struct {
	short      string
	name, unit string
	scale      float64
	run        func(ns *link.NS, to netip.AddrPort, d time.Duration) (sample, error)
}

func metrics() []metric {
	return []metric{
		{"rr", "TCP request/response, one connection", "/s", 1, func(ns *link.NS, to netip.AddrPort, d time.Duration) (sample, error) {
			return pingPong(ns, unix.SOCK_STREAM, to, d)
		}},
		{"udp", "UDP request/response, one socket", "/s", 1, func(ns *link.NS, to netip.AddrPort, d time.Duration) (sample, error) {
			return pingPong(ns, unix.SOCK_DGRAM, to, d)
		}},
		{"conn", "new TCP connections with a request each, 4 clients", "/s", 1, connections},
		{"stream", "TCP, one stream", "Gb/s", 1e-9, stream},
	}
}

// pingPong sends a byte and waits for it, again and again.
func pingPong(ns *link.NS, kind int, to netip.AddrPort, d time.Duration) (s sample, err error) {
	var took []time.Duration
	err = ns.Do(func() error {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		fd, err := dial(kind, to)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		b := []byte{wantEcho}
		if kind == unix.SOCK_STREAM {
			if _, err := write(fd, b); err != nil {
				return err
			}
		}
		took = make([]time.Duration, 0, int(d/(8*time.Microsecond)))
		for range 50 { // warm
			if _, err = echo(fd, b); err != nil {
				return err
			}
		}
		cpu, begun := cpuTime(), time.Now()
		for last := begun; last.Sub(begun) < d; {
			if last, err = echo(fd, b); err != nil {
				return err
			}
			took = append(took, last.Sub(begun))
		}
		s.wall, s.cpu = time.Since(begun), (cpuTime()-cpu)/time.Duration(len(took))
		return nil
	})
	if err != nil {
		return s, fmt.Errorf("ping-pong with %s: %w", to, err)
	}
	s.ops = float64(len(took)) / s.wall.Seconds()
	for i := len(took) - 1; i > 0; i-- {
		took[i] -= took[i-1]
	}
	slices.Sort(took)
	s.p50, s.p99 = quantile(took, 0.5), quantile(took, 0.99)
	return s, nil
}

func echo(fd int, b []byte) (time.Time, error) {
	if _, err := write(fd, b); err != nil {
		return time.Time{}, err
	}
	n, err := readWithin(fd, b)
	if err == nil && n == 0 {
		err = errors.New("closed")
	}
	return time.Now(), err
}

// connections makes connections, asks once over each and waits for the server to close it.
func connections(ns *link.NS, to netip.AddrPort, d time.Duration) (s sample, err error) {
	var wg sync.WaitGroup
	var n atomic.Int64
	errs := make([]error, 4)
	cpu, begun := cpuTime(), time.Now()
	for i := range errs {
		wg.Go(func() {
			errs[i] = ns.Do(func() error {
				b := make([]byte, 2)
				for time.Since(begun) < d {
					if err := once(to, b); err != nil {
						return err
					}
					n.Add(1)
				}
				return nil
			})
		})
	}
	wg.Wait()
	s.wall = time.Since(begun)
	if err := errors.Join(errs...); err != nil {
		return s, err
	}
	s.ops, s.cpu = float64(n.Load())/s.wall.Seconds(), (cpuTime()-cpu)/time.Duration(n.Load())
	s.p50 = time.Duration(4 / s.ops * 1e9)
	return s, nil
}

func once(to netip.AddrPort, b []byte) error {
	fd, err := dial(unix.SOCK_STREAM, to)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b[0] = wantOnce
	if _, err := write(fd, b[:1]); err != nil {
		return err
	}
	for n := 1; n > 0; {
		if n, err = readWithin(fd, b); err != nil {
			return fmt.Errorf("one request to %s: %w", to, err)
		}
	}
	return nil
}

// stream sends as much as there is room for.
func stream(ns *link.NS, to netip.AddrPort, d time.Duration) (s sample, err error) {
	err = ns.Do(func() error {
		fd, err := dial(unix.SOCK_STREAM, to)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		b := make([]byte, bulkBytes)
		b[0] = wantSink
		var sent int64
		cpu, begun := cpuTime(), time.Now()
		for time.Since(begun) < d {
			n, err := write(fd, b)
			if err != nil && !again(err) {
				return err
			}
			sent += int64(n)
		}
		s.wall = time.Since(begun)
		s.ops, s.cpu = float64(sent)*8/s.wall.Seconds(), time.Duration(float64(cpuTime()-cpu)/(float64(sent)/(1<<20)))
		return nil
	})
	return s, err
}
