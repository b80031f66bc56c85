package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// recvTimeout bounds the wait for the kernel's answer; netlink answers within the call that asked, a longer wait means a lost message.
	recvTimeout = 10 * time.Second
	// sndBuf must hold one whole nft transaction (64,000 elements are about 5 MB).
	sndBuf = 32 << 20
	rcvBuf = 8 << 20
	// chunk bounds the requests per system call, so that their error reports fit into the receive buffer.
	chunk = 512
)

// Message is one netlink request without its header's length, sequence and port.
type Message struct {
	Type  uint16
	Flags uint16
	Body  []byte
}

// Socket is a netlink socket that lives in the namespace in which it was opened. Safe for concurrent use.
type Socket struct {
	mu  sync.Mutex
	fd  int
	seq uint32
	buf []byte
}

// OpenSocket opens a socket of the netlink protocol inside ns.
func OpenSocket(ns *NS, protocol int) (*Socket, error) {
	s := &Socket{fd: -1, buf: make([]byte, 64<<10)}
	err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return err
		}
		s.fd = fd
		return unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	})
	if err == nil {
		tv := unix.NsecToTimeval(int64(recvTimeout))
		err = unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	}
	if err != nil {
		if s.fd >= 0 {
			unix.Close(s.fd)
		}
		return nil, fmt.Errorf("open netlink socket (protocol %d): %w", protocol, err)
	}
	// Larger buffers are an optimisation that needs CAP_NET_ADMIN over the initial user namespace; the plain option is capped.
	if unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sndBuf) != nil {
		_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sndBuf)
	}
	if unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, rcvBuf) != nil {
		_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, rcvBuf)
	}
	_ = unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	_ = unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	return s, nil
}

// Close closes the socket.
func (s *Socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return nil
	}
	err := unix.Close(s.fd)
	s.fd = -1
	return err
}

// MessageError is the kernel's refusal of the Index-th request of a batch.
type MessageError struct {
	Index int
	Err   error
}

func (e *MessageError) Error() string { return fmt.Sprintf("request %d: %v", e.Index, e.Err) }

// Unwrap gives the errno.
func (e *MessageError) Unwrap() error { return e.Err }

// Do sends the requests, many per system call, and reports every refused one. Requests after a refused one are still carried out.
// An errno listed in ignore is not an error.
func (s *Socket) Do(msgs []Message, ignore ...unix.Errno) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for start := 0; start < len(msgs); start += chunk {
		part := msgs[start:min(start+chunk, len(msgs))]
		err := s.exchange(part, func(i int, errno unix.Errno) {
			for _, g := range ignore {
				if g == errno {
					return
				}
			}
			errs = append(errs, &MessageError{start + i, errno})
		})
		if err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

// Transact sends all messages in one system call and stops reading at the answer to the last one, or at a refusal of the first, which is
// how nfnetlink reports that a whole batch failed. The last message but one must be one that the kernel acknowledges.
func (s *Socket) Transact(msgs []Message, ackIndex int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	first := s.seq + 1
	if err := s.send(msgs, ackIndex); err != nil {
		return err
	}
	err := s.receive(func(h header, body []byte) (bool, error) {
		if h.Type != unix.NLMSG_ERROR || h.Seq < first {
			return false, nil
		}
		errno := errnoOf(body)
		i := int(h.Seq - first)
		if errno != 0 && len(errs) < 16 {
			errs = append(errs, &MessageError{i, errno})
		}
		return i == ackIndex || (i == 0 && errno != 0), nil
	})
	return errors.Join(append(errs, err)...)
}

// exchange sends msgs with an acknowledgement asked of the last only; refusals come in any case.
func (s *Socket) exchange(msgs []Message, refused func(int, unix.Errno)) error {
	first := s.seq + 1
	if err := s.send(msgs, len(msgs)-1); err != nil {
		return err
	}
	return s.receive(func(h header, body []byte) (bool, error) {
		if h.Type != unix.NLMSG_ERROR || h.Seq < first {
			return false, nil
		}
		i := int(h.Seq - first)
		if errno := errnoOf(body); errno != 0 {
			refused(i, errno)
		}
		return i == len(msgs)-1, nil
	})
}

// Dump asks for all objects and calls each with the type and body of every answer.
func (s *Socket) Dump(m Message, each func(typ uint16, body []byte) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m.Flags |= unix.NLM_F_DUMP
	want := s.seq + 1
	if err := s.send([]Message{m}, -1); err != nil {
		return err
	}
	var failed error
	err := s.receive(func(h header, body []byte) (bool, error) {
		if h.Seq != want {
			return false, nil
		}
		switch h.Type {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			return true, errnoOf(body)
		}
		if h.Flags&unix.NLM_F_DUMP_INTR != 0 {
			failed = unix.EINTR
		}
		if failed == nil {
			failed = each(h.Type, body)
		}
		return false, nil
	})
	return errors.Join(err, failed)
}

// Get asks for one object and returns the answer's type and body.
func (s *Socket) Get(m Message) (typ uint16, body []byte, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	want := s.seq + 1
	if err := s.send([]Message{m}, -1); err != nil {
		return 0, nil, err
	}
	err = s.receive(func(h header, b []byte) (bool, error) {
		if h.Seq != want {
			return false, nil
		}
		if h.Type == unix.NLMSG_ERROR {
			if errno := errnoOf(b); errno != 0 {
				return true, errno
			}
			return true, nil
		}
		typ, body = h.Type, append([]byte(nil), b...)
		return true, nil
	})
	return typ, body, err
}

type header struct {
	Len   uint32
	Type  uint16
	Flags uint16
	Seq   uint32
}

func (s *Socket) send(msgs []Message, ackIndex int) error {
	if s.fd < 0 {
		return errors.New("netlink socket is closed")
	}
	size := 0
	for _, m := range msgs {
		size += unix.NLMSG_HDRLEN + align(len(m.Body))
	}
	b := make([]byte, 0, size)
	for i, m := range msgs {
		s.seq++
		flags := m.Flags | unix.NLM_F_REQUEST
		if i == ackIndex {
			flags |= unix.NLM_F_ACK
		}
		b = binary.NativeEndian.AppendUint32(b, uint32(unix.NLMSG_HDRLEN+len(m.Body)))
		b = binary.NativeEndian.AppendUint16(b, m.Type)
		b = binary.NativeEndian.AppendUint16(b, flags)
		b = binary.NativeEndian.AppendUint32(b, s.seq)
		b = binary.NativeEndian.AppendUint32(b, 0)
		b = append(b, m.Body...)
		b = append(b, make([]byte, align(len(m.Body))-len(m.Body))...)
	}
	for {
		err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("send %d netlink requests (%d bytes): %w", len(msgs), len(b), err)
		}
		return nil
	}
}

// receive reads answers until each returns true or an error.
func (s *Socket) receive(each func(header, []byte) (bool, error)) error {
	for {
		n, _, err := unix.Recvfrom(s.fd, s.buf, unix.MSG_TRUNC|unix.MSG_PEEK)
		if err == nil && n > len(s.buf) {
			s.buf = make([]byte, n)
		}
		if err == nil {
			n, _, err = unix.Recvfrom(s.fd, s.buf, 0)
		}
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("receive netlink answer: %w", err)
		}
		for b := s.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			h := header{
				Len:   binary.NativeEndian.Uint32(b),
				Type:  binary.NativeEndian.Uint16(b[4:]),
				Flags: binary.NativeEndian.Uint16(b[6:]),
				Seq:   binary.NativeEndian.Uint32(b[8:]),
			}
			if int(h.Len) < unix.NLMSG_HDRLEN || int(h.Len) > len(b) {
				return fmt.Errorf("receive netlink answer: message length %d of %d", h.Len, len(b))
			}
			done, err := each(h, b[unix.NLMSG_HDRLEN:h.Len])
			if done || err != nil {
				return err
			}
			b = b[min(align(int(h.Len)), len(b)):]
		}
	}
}

func errnoOf(body []byte) unix.Errno {
	if len(body) < 4 {
		return unix.EBADMSG
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
}

// nlaTypeMask strips NLA_F_NESTED and NLA_F_NET_BYTEORDER.
const nlaTypeMask = 0x3fff

func align(n int) int { return (n + 3) &^ 3 }

// Attrs builds a list of netlink attributes.
type Attrs struct{ b []byte }

// Bytes appends an attribute with a copy of v.
func (a *Attrs) Bytes(t uint16, v []byte) {
	a.b = binary.NativeEndian.AppendUint16(a.b, uint16(4+len(v)))
	a.b = binary.NativeEndian.AppendUint16(a.b, t)
	a.b = append(a.b, v...)
	a.b = append(a.b, make([]byte, align(len(v))-len(v))...)
}

// Str appends a zero-terminated string.
func (a *Attrs) Str(t uint16, v string) { a.Bytes(t, append([]byte(v), 0)) }

// U8 appends a byte.
func (a *Attrs) U8(t uint16, v uint8) { a.Bytes(t, []byte{v}) }

// U32 appends a number in the machine's byte order.
func (a *Attrs) U32(t uint16, v uint32) { a.Bytes(t, binary.NativeEndian.AppendUint32(nil, v)) }

// BE16 appends a number in network byte order.
func (a *Attrs) BE16(t uint16, v uint16) { a.Bytes(t, binary.BigEndian.AppendUint16(nil, v)) }

// BE32 appends a number in network byte order.
func (a *Attrs) BE32(t uint16, v uint32) { a.Bytes(t, binary.BigEndian.AppendUint32(nil, v)) }

// Nest appends a nested list that f fills; prefix, if any, precedes the list.
func (a *Attrs) Nest(t uint16, prefix []byte, f func(*Attrs)) {
	in := Attrs{b: append([]byte(nil), prefix...)}
	f(&in)
	a.Bytes(t|unix.NLA_F_NESTED, in.b)
}

// Encoded is the list built so far.
func (a *Attrs) Encoded() []byte { return a.b }

// Parse walks a list of attributes; flags are stripped from the types. A damaged tail ends the walk.
func Parse(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= 4 {
			n := int(binary.NativeEndian.Uint16(b))
			t := binary.NativeEndian.Uint16(b[2:]) & nlaTypeMask
			if n < 4 || n > len(b) {
				return
			}
			if !yield(t, b[4:n]) {
				return
			}
			b = b[min(align(n), len(b)):]
		}
	}
}
