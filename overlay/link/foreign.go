package link

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// ForeignRoute is somebody else's unicast route.
type ForeignRoute struct {
	Dst netip.Prefix
	Dev int // 0: several
}

// ForeignRoutes lists the routes of all tables but the local one that are not ours, without default routes and those of link-local and multicast
// addresses.
func (c *Conn) ForeignRoutes() ([]ForeignRoute, error) {
	var out []ForeignRoute
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		body := make([]byte, unix.SizeofRtMsg)
		body[0] = family
		err := c.Dump(Message{Type: unix.RTM_GETROUTE, Body: body}, func(t uint16, b []byte) error {
			if t != unix.RTM_NEWROUTE || len(b) < unix.SizeofRtMsg || b[1] == 0 || b[5] == Protocol || b[7] != unix.RTN_UNICAST || b[4] == unix.RT_TABLE_LOCAL {
				return nil
			}
			k, r := parseRoute(b)
			if a := k.Dst.Addr(); !a.IsLinkLocalUnicast() && !a.IsMulticast() && !a.IsLoopback() {
				out = append(out, ForeignRoute{Dst: k.Dst.Masked(), Dev: r.Dev})
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list routes of others: %w", err)
		}
	}
	return out, nil
}

// Listener is a socket that takes what comes to a port: a listening TCP socket, or a UDP socket without a peer.
type Listener struct {
	Protocol string // tcp, udp
	Addr     netip.Addr
	Port     uint16
	Inode    uint32 // 0: the kernel's own
}

const (
	sizeofDiagReq = 56
	sizeofDiagMsg = 72
	stateListen   = 10
	stateClose    = 7
)

// Listeners lists the listeners of a namespace.
func Listeners(ns *NS) ([]Listener, error) {
	s, err := OpenSocket(ns, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	var out []Listener
	for _, proto := range []struct {
		name   string
		number byte
		state  int
	}{{"tcp", unix.IPPROTO_TCP, stateListen}, {"udp", unix.IPPROTO_UDP, stateClose}} {
		for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
			body := make([]byte, sizeofDiagReq)
			body[0], body[1] = family, proto.number
			binary.NativeEndian.PutUint32(body[4:], 1<<proto.state)
			err := s.Dump(Message{Type: unix.SOCK_DIAG_BY_FAMILY, Body: body}, func(_ uint16, b []byte) error {
				if len(b) < sizeofDiagMsg || b[1] != byte(proto.state) {
					return nil
				}
				l := Listener{Protocol: proto.name, Port: binary.BigEndian.Uint16(b[4:]), Inode: binary.NativeEndian.Uint32(b[68:])}
				if family == unix.AF_INET {
					l.Addr = netip.AddrFrom4([4]byte(b[8:12]))
				} else {
					l.Addr = netip.AddrFrom16([16]byte(b[8:24]))
				}
				out = append(out, l)
				return nil
			})
			if err != nil {
				return nil, fmt.Errorf("list %s sockets: %w", proto.name, err)
			}
		}
	}
	return out, nil
}
