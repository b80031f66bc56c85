package crypt

import (
	"encoding/binary"
	"net/netip"
)

// A packet of a network travels inside WireGuard as the VXLAN packet that the kernel of another node would make of it: IPv4, UDP, VXLAN and
// Ethernet headers before the packet itself. So nodes whose kernel has WireGuard and those that have it from us understand each other.
const (
	ipv4Len      = 20
	udpLen       = 8
	vxlanLen     = 8
	etherLen     = 14
	headerLen    = ipv4Len + udpLen + vxlanLen + etherLen
	sourcePort   = 49152 // within the tunnel it distinguishes nothing
	vxlanHasVNI  = 0x08
	protocolUDP  = 17
	etherIPv4    = 0x0800
	etherIPv6    = 0x86dd
	minInnerIPv4 = 20
	minInnerIPv6 = 40
)

// InnerOverhead is what the tunnel adds to a packet of a network before encryption.
const InnerOverhead = headerLen

// Overhead is what WireGuard adds to a packet on an underlay of that family: its header and tag, UDP and IP.
func Overhead(underlay netip.Addr) int {
	if underlay.Is6() && !underlay.Is4In6() {
		return 16 + 16 + 8 + 40
	}
	return 16 + 16 + 8 + 20
}

// NodeAddr is a node's address inside the tunnel for the key of that slot: 169.254.64.0/18 for slot 0 and 169.254.192.0/18 for 1. Such addresses are never routed, and
// with these nothing leaves a node but through the tunnel.
func NodeAddr(slot uint8, node uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{169, 254, 0x40 | slot<<7 | byte(node>>8)&0x3f, byte(node)})
}

// nodeOf is the inverse of NodeAddr.
func nodeOf(a [4]byte) (slot uint8, node uint32, ok bool) {
	if a[0] != 169 || a[1] != 254 || a[2]&0x40 == 0 {
		return 0, 0, false
	}
	return a[2] >> 7, uint32(a[2]&0x3f)<<8 | uint32(a[3]), true
}

// MAC is a station's address on a VXLAN.
type MAC = [6]byte

// seal writes the headers before a packet that lies in b[headerLen:].
func seal(b []byte, from, to netip.Addr, port uint16, vni uint32, src, dst MAC) {
	h := b[:headerLen]
	clear(h)
	h[0], h[8], h[9] = 0x45, 64, protocolUDP
	binary.BigEndian.PutUint16(h[2:], uint16(len(b)))
	h[6] = 0x40 // do not fragment
	f, t := from.As4(), to.As4()
	copy(h[12:], f[:])
	copy(h[16:], t[:])
	binary.BigEndian.PutUint16(h[10:], ipChecksum(h[:ipv4Len]))
	binary.BigEndian.PutUint16(h[20:], sourcePort)
	binary.BigEndian.PutUint16(h[22:], port)
	binary.BigEndian.PutUint16(h[24:], uint16(len(b)-ipv4Len)) // a checksum of zero is none
	h[28] = vxlanHasVNI
	binary.BigEndian.PutUint32(h[32:], vni<<8)
	copy(h[36:], dst[:])
	copy(h[42:], src[:])
	ether := uint16(etherIPv4)
	if b[headerLen]>>4 == 6 {
		ether = etherIPv6
	}
	binary.BigEndian.PutUint16(h[48:], ether)
}

// open checks a packet that came out of the tunnel for this node and says which network it is of; its content lies in b[headerLen:].
func open(b []byte, port uint16) (vni uint32, slot uint8, node uint32, ok bool) {
	if len(b) < headerLen+minInnerIPv4 || b[0] != 0x45 || b[9] != protocolUDP || b[6]&0x3f|b[7] != 0 {
		return 0, 0, 0, false
	}
	if binary.BigEndian.Uint16(b[22:]) != port || b[28] != vxlanHasVNI {
		return 0, 0, 0, false
	}
	slot, node, ok = nodeOf([4]byte(b[16:20]))
	if !ok {
		return 0, 0, 0, false
	}
	inner := b[headerLen:]
	switch binary.BigEndian.Uint16(b[48:]) {
	case etherIPv4:
		ok = inner[0]>>4 == 4
	case etherIPv6:
		ok = inner[0]>>4 == 6 && len(inner) >= minInnerIPv6
	default:
		ok = false
	}
	return binary.BigEndian.Uint32(b[32:]) >> 8, slot, node, ok
}

// destination is where an inner packet is addressed to.
func destination(b []byte) (netip.Addr, bool) {
	switch {
	case len(b) >= minInnerIPv4 && b[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(b[16:20])), true
	case len(b) >= minInnerIPv6 && b[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(b[24:40])), true
	}
	return netip.Addr{}, false
}

func ipChecksum(h []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(h); i += 2 {
		sum += uint32(h[i])<<8 | uint32(h[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
