package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"

	"golang.org/x/sys/unix"

	"skein/overlay/nft"
)

// namespace is where packets are sent from.
type namespace interface{ Do(func() error) error }

// maxResets bounds how many clients are told at one time; what is more finds out with its next packet.
const maxResets = 4096

// reset has clients of ended TCP flows learn that. What the connection's next bytes are is not known here, so nothing that a client would take
// for a reset can be made up. Instead it is sent an empty segment that cannot be of its connection: it answers with where it stands (RFC 9293,
// section 3.10.7.4), and its answer, whose flow is known no more, is refused by whoever it reaches now with a reset that fits.
func reset(ns namespace, flows []nft.Flow) error {
	var packets [2][]packet
	for _, f := range flows {
		if f.Protocol != unix.IPPROTO_TCP || !f.Open || !f.Dealt() || len(packets[0])+len(packets[1]) >= maxResets {
			continue
		}
		i := familyIndex(f.Client.Addr())
		packets[i] = append(packets[i], probe(f))
	}
	return errors.Join(sendRaw(ns, unix.AF_INET, packets[0]), sendRaw(ns, unix.AF_INET6, packets[1]))
}

// packet is a whole IP packet.
type packet struct {
	to   netip.Addr
	data []byte
}

// probe is a segment to a flow's client from the server that it knows.
func probe(f nft.Flow) packet {
	seg := make([]byte, 20)
	binary.BigEndian.PutUint16(seg[0:], f.Server.Port())
	binary.BigEndian.PutUint16(seg[2:], f.Client.Port())
	binary.BigEndian.PutUint32(seg[4:], rand.Uint32())
	binary.BigEndian.PutUint32(seg[8:], rand.Uint32())
	seg[12], seg[13] = 5<<4, 0x10 // five words of header, ACK
	src, dst := f.Server.Addr().AsSlice(), f.Client.Addr().AsSlice()
	binary.BigEndian.PutUint16(seg[16:], checksum(src, dst, seg))
	if len(src) == 4 {
		head := make([]byte, 20) // the kernel fills in length, id and checksum
		head[0], head[8], head[9] = 4<<4|5, 64, unix.IPPROTO_TCP
		copy(head[12:], src)
		copy(head[16:], dst)
		return packet{f.Client.Addr(), append(head, seg...)}
	}
	head := make([]byte, 40)
	head[0], head[6], head[7] = 6<<4, unix.IPPROTO_TCP, 64
	binary.BigEndian.PutUint16(head[4:], uint16(len(seg)))
	copy(head[8:], src)
	copy(head[24:], dst)
	return packet{f.Client.Addr(), append(head, seg...)}
}

// checksum is that of TCP, with the pseudo header.
func checksum(src, dst, seg []byte) uint16 {
	return internetSum(uint32(unix.IPPROTO_TCP)+uint32(len(seg)), src, dst, seg)
}

// internetSum is the checksum of the Internet's protocols over parts of even length.
func internetSum(sum uint32, parts ...[]byte) uint16 {
	for _, part := range parts {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(part[i])<<8 | uint32(part[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// sendRaw sends packets of one family. A client that cannot be reached is none that waits.
func sendRaw(ns namespace, family int, packets []packet) error {
	if len(packets) == 0 {
		return nil
	}
	return ns.Do(func() error {
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
		if err != nil {
			return fmt.Errorf("open raw socket: %w", err)
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, nft.ProbeMark); err != nil {
			return fmt.Errorf("mark raw socket: %w", err)
		}
		for _, p := range packets {
			var to unix.Sockaddr
			if family == unix.AF_INET {
				to = &unix.SockaddrInet4{Addr: p.to.As4()}
			} else {
				to = &unix.SockaddrInet6{Addr: p.to.As16()}
			}
			_ = unix.Sendto(fd, p.data, 0, to)
		}
		return nil
	})
}
