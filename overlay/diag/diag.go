// Package diag asks the kernel which TCP and UDP sockets there are in a process's network namespace: by sock_diag, or where the kernel was built
// without it by /proc. It changes nothing. Used by agent/engine to tell when a container listens, and when the last of its clients is gone.
package diag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// States of TCP sockets (include/net/tcp_states.h); unconnected UDP sockets are Closed.
const (
	Established = 1
	SynSent     = 2
	FinWait1    = 4
	FinWait2    = 5
	TimeWait    = 6
	Closed      = 7
	CloseWait   = 8
	LastAck     = 9
	Listen      = 10
	Closing     = 11
)

// Socket is one socket. Times and queues are of TCP connections only; without sock_diag the times are zero.
type Socket struct {
	Local, Remote netip.AddrPort // IPv4 addresses are plain, also those of dual-stack sockets
	State         byte
	Received      time.Duration // since the last data came in
	Sent          time.Duration // since the last data went out
	Unread        uint32        // bytes that came in and were not read; of a listener, connections not accepted yet
	Unsent        uint32        // bytes written that the peer has not confirmed, its end included
}

// Namespace asks one namespace. Safe for concurrent use.
type Namespace struct {
	pid  int
	sock *link.Socket // nil: the kernel has no sock_diag
}

// Of opens the namespace of a process.
func Of(pid int) (*Namespace, error) {
	ns, err := link.OpenNS(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	sock, err := link.OpenSocket(ns, unix.NETLINK_SOCK_DIAG)
	if err != nil && !errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, err
	}
	return &Namespace{pid, sock}, nil
}

// Close releases the namespace.
func (n *Namespace) Close() error {
	if n.sock == nil {
		return nil
	}
	return n.sock.Close()
}

// TCP lists the sockets in one of the states.
func (n *Namespace) TCP(states ...byte) ([]Socket, error) { return n.list(unix.IPPROTO_TCP, states) }

// UDP lists the sockets in one of the states.
func (n *Namespace) UDP(states ...byte) ([]Socket, error) { return n.list(unix.IPPROTO_UDP, states) }

// Of linux/sock_diag.h and linux/inet_diag.h.
const (
	sockDiagByFamily = 20
	requestLen       = 56
	answerLen        = 72
	infoAttr         = 2 // INET_DIAG_INFO: struct tcp_info
	infoSent         = 44
	infoReceived     = 52
)

func (n *Namespace) list(protocol byte, states []byte) ([]Socket, error) {
	if n.sock == nil {
		return n.listProc(protocol, states)
	}
	var out []Socket
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		req := make([]byte, requestLen)
		req[0], req[1], req[2] = family, protocol, 1<<(infoAttr-1)
		var mask uint32
		for _, s := range states {
			mask |= 1 << s
		}
		binary.NativeEndian.PutUint32(req[4:], mask)
		err := n.sock.Dump(link.Message{Type: sockDiagByFamily, Body: req}, func(_ uint16, b []byte) error {
			s, err := parse(b)
			if err == nil {
				out = append(out, s)
			}
			return err
		})
		if errors.Is(err, unix.EINTR) { // sockets came and went meanwhile; each that was there all the time was told
			err = nil
		}
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) { // the module for this protocol is missing
			return n.listProc(protocol, states)
		}
		if err != nil {
			return nil, fmt.Errorf("list sockets (family %d, protocol %d): %w", family, protocol, err)
		}
	}
	return out, nil
}

// parse reads one struct inet_diag_msg and its attributes.
func parse(b []byte) (Socket, error) {
	if len(b) < answerLen {
		return Socket{}, fmt.Errorf("sock_diag: message of %d bytes, want %d", len(b), answerLen)
	}
	s := Socket{State: b[1], Unread: binary.NativeEndian.Uint32(b[56:]), Unsent: binary.NativeEndian.Uint32(b[60:])}
	addr := func(a []byte, port []byte) netip.AddrPort {
		var ip netip.Addr
		if b[0] == unix.AF_INET {
			ip = netip.AddrFrom4([4]byte(a[:4]))
		} else {
			ip = netip.AddrFrom16([16]byte(a[:16])).Unmap()
		}
		return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(port))
	}
	s.Local, s.Remote = addr(b[8:], b[4:]), addr(b[24:], b[6:])
	for typ, v := range link.Parse(b[answerLen:]) {
		if typ == infoAttr && len(v) >= infoReceived+4 {
			s.Sent = time.Duration(binary.NativeEndian.Uint32(v[infoSent:])) * time.Millisecond
			s.Received = time.Duration(binary.NativeEndian.Uint32(v[infoReceived:])) * time.Millisecond
		}
	}
	return s, nil
}
