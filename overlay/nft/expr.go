package nft

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// part is a piece of a rule: expressions for one match or action. It depends on the family of the table.
type part func(f family) [][]byte

// family knows what differs between IPv4 and IPv6.
type family struct {
	proto              byte
	addrLen            uint32
	srcOff, dstOff     uint32
	icmp               byte
	portUnreachable    uint8
	addrType           Type
	loopback, metadata netip.Prefix
}

var (
	v4 = family{proto: IPv4, addrLen: 4, srcOff: 12, dstOff: 16, icmp: unix.IPPROTO_ICMP, portUnreachable: 3, addrType: TypeIPv4,
		loopback: netip.MustParsePrefix("127.0.0.0/8"), metadata: netip.MustParsePrefix("169.254.169.254/32")}
	v6 = family{proto: IPv6, addrLen: 16, srcOff: 8, dstOff: 24, icmp: unix.IPPROTO_ICMPV6, portUnreachable: 4, addrType: TypeIPv6,
		loopback: netip.MustParsePrefix("::1/128"), metadata: netip.MustParsePrefix("fd00:ec2::254/128")}
)

func (f family) rule(parts ...part) Rule {
	r := Rule{exprs: [][]byte{}}
	for _, p := range parts {
		r.exprs = append(r.exprs, p(f)...)
	}
	return r
}

// Registers: the four-byte ones 8… overlap the sixteen-byte ones 1…; concatenated keys lie in consecutive four-byte registers.
const reg0 = 8

// enc encodes expressions; they are ours and static, so one that cannot be encoded is a broken invariant.
func enc(f family, es ...expr.Any) [][]byte {
	var out [][]byte
	for _, e := range es {
		b, err := expr.Marshal(f.proto, e)
		if err != nil {
			panic(err)
		}
		out = append(out, b)
	}
	return out
}

func exprs(es ...expr.Any) part { return func(f family) [][]byte { return enc(f, es...) } }

func cmp(op expr.CmpOp, reg uint32, data []byte) expr.Any {
	return &expr.Cmp{Op: op, Register: reg, Data: data}
}

func ifname(key expr.MetaKey, op expr.CmpOp, name string) part {
	data := []byte(name)
	if n := len(name); name[n-1] == '*' {
		data = data[:n-1] // a shorter comparison matches the prefix
	} else {
		data = append(data, make([]byte, unix.IFNAMSIZ-n)...)
	}
	return exprs(&expr.Meta{Key: key, Register: reg0}, cmp(op, reg0, data))
}

// iif and oif match an interface's name, with * at its end a prefix; the others are their opposites.
func iif(name string) part    { return ifname(expr.MetaKeyIIFNAME, expr.CmpOpEq, name) }
func oif(name string) part    { return ifname(expr.MetaKeyOIFNAME, expr.CmpOpEq, name) }
func iifNot(name string) part { return ifname(expr.MetaKeyIIFNAME, expr.CmpOpNeq, name) }
func oifNot(name string) part { return ifname(expr.MetaKeyOIFNAME, expr.CmpOpNeq, name) }

// foreignSource matches IPv6 packets whose source is not reached through the device they came from; the kernel's own reverse path filter
// knows IPv4 only, where it does the same.
func foreignSource(f family) [][]byte {
	return enc(f, &expr.Fib{Register: reg0, FlagSADDR: true, FlagIIF: true, ResultOIF: true}, cmp(expr.CmpOpEq, reg0, native(0)))
}

func proto(p byte) part {
	return exprs(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0}, cmp(expr.CmpOpEq, reg0, []byte{p}))
}

func notICMP(f family) [][]byte {
	return enc(f, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0}, cmp(expr.CmpOpNeq, reg0, []byte{f.icmp}))
}

func dport(port uint16) part {
	return exprs(&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2, DestRegister: reg0},
		cmp(expr.CmpOpEq, reg0, binary.BigEndian.AppendUint16(nil, port)))
}

func load(reg, off uint32) part {
	return func(f family) [][]byte {
		return enc(f, &expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: f.addrLen, DestRegister: reg})
	}
}

func loadSrc(reg uint32) part { return func(f family) [][]byte { return load(reg, f.srcOff)(f) } }
func loadDst(reg uint32) part { return func(f family) [][]byte { return load(reg, f.dstOff)(f) } }

func loadProto(reg uint32) part { return exprs(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}) }

func loadDport(reg uint32) part {
	return exprs(&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2, DestRegister: reg})
}

func loadEtherSrc(reg uint32) part {
	return exprs(&expr.Payload{Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6, DestRegister: reg})
}

func loadRandom(reg, modulus uint32) part {
	return exprs(&expr.Numgen{Register: reg, Modulus: modulus, Type: unix.NFT_NG_RANDOM})
}

// addrIn matches an address against a prefix, or with op Neq its opposite.
func addrIn(off func(family) uint32, op expr.CmpOp, p netip.Prefix) part {
	return func(f family) [][]byte {
		mask := make([]byte, f.addrLen)
		for i := range p.Bits() {
			mask[i/8] |= 0x80 >> (i % 8)
		}
		return enc(f, &expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: off(f), Len: f.addrLen, DestRegister: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: f.addrLen, Mask: mask, Xor: make([]byte, f.addrLen)},
			cmp(op, 1, p.Masked().Addr().AsSlice()))
	}
}

func src(p netip.Prefix) part {
	return addrIn(func(f family) uint32 { return f.srcOff }, expr.CmpOpEq, p)
}

func dst(p netip.Prefix) part {
	return addrIn(func(f family) uint32 { return f.dstOff }, expr.CmpOpEq, p)
}

func dstLoopback(f family) [][]byte { return dst(f.loopback)(f) }
func srcLoopback(f family) [][]byte { return src(f.loopback)(f) }
func dstMetadata(f family) [][]byte { return dst(f.metadata)(f) }

// lookup maps the key at register key through a map into register out.
func lookup(set string, key, out uint32) part {
	return exprs(&expr.Lookup{SetName: set, SourceRegister: key, DestRegister: out, IsDestRegSet: true})
}

// vmap jumps to the chain that a verdict map has for the key.
func vmap(set string, key uint32) part { return lookup(set, key, 0) }

func in(set string, key uint32) part {
	return exprs(&expr.Lookup{SetName: set, SourceRegister: key})
}

func notIn(set string, key uint32) part {
	return exprs(&expr.Lookup{SetName: set, SourceRegister: key, Invert: true})
}

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func ctBits(key expr.CtKey, bits uint32) part {
	return exprs(&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(bits), Xor: native(0)},
		cmp(expr.CmpOpNeq, 1, native(0)))
}

const ctStatusDNAT = 1 << 5

func ctState(bits uint32) part { return ctBits(expr.CtKeySTATE, bits) }

var ctNew = ctState(expr.CtStateBitNEW)
var ctEstablished = ctState(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
var ctDNAT = ctBits(expr.CtKeySTATUS, ctStatusDNAT)
var ctNotDNAT = exprs(&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
	&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(ctStatusDNAT), Xor: native(0)},
	cmp(expr.CmpOpEq, 1, native(0)))
var ctReply = exprs(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: reg0}, cmp(expr.CmpOpEq, reg0, []byte{1}))

// ctMarkIs matches the connection mark under a mask and leaves the whole mark in register 2.
func ctMarkIs(value, mask uint32) part {
	return exprs(&expr.Ct{Key: expr.CtKeyMARK, Register: 2},
		&expr.Bitwise{SourceRegister: 2, DestRegister: 1, Len: 4, Mask: native(mask), Xor: native(0)},
		cmp(expr.CmpOpEq, 1, native(value)))
}

func setCtMark(reg uint32) part {
	return exprs(&expr.Ct{Key: expr.CtKeyMARK, Register: reg, SourceRegister: true})
}

func setMark(reg uint32) part {
	return exprs(&expr.Meta{Key: expr.MetaKeyMARK, Register: reg, SourceRegister: true})
}

func markIs(v uint32) part {
	return exprs(&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, cmp(expr.CmpOpEq, 1, native(v)))
}

var clearMark = exprs(&expr.Immediate{Register: 1, Data: native(0)}, &expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true})

// setOriginalZone writes the zone of the original direction only. google/nftables has no direction for this key.
func setOriginalZone(reg uint32) part {
	return func(family) [][]byte {
		var data, e link.Attrs
		data.BE32(unix.NFTA_CT_KEY, unix.NFT_CT_ZONE)
		data.BE32(unix.NFTA_CT_SREG, reg)
		data.U8(unix.NFTA_CT_DIRECTION, 0)
		e.Str(unix.NFTA_EXPR_NAME, "ct")
		e.Bytes(unix.NFTA_EXPR_DATA|unix.NLA_F_NESTED, data.Encoded())
		return [][]byte{e.Encoded()}
	}
}

// localAddr matches destinations (or sources) that are addresses of this namespace.
func localAddr(source bool) part {
	return exprs(&expr.Fib{Register: reg0, ResultADDRTYPE: true, FlagDADDR: !source, FlagSADDR: source},
		cmp(expr.CmpOpEq, reg0, native(unix.RTN_LOCAL)))
}

// isSYN matches the packets of TCP handshakes.
var isSYN = exprs(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0}, cmp(expr.CmpOpEq, reg0, []byte{unix.IPPROTO_TCP}),
	&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1, DestRegister: 1},
	&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x06}, Xor: []byte{0}},
	cmp(expr.CmpOpEq, 1, []byte{0x02}))

// marked matches packets that have a mark.
var marked = exprs(&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0}, cmp(expr.CmpOpNeq, reg0, native(0)))

// clampMSS lowers the MSS of handshakes, see isSYN, to what the route allows.
var clampMSS = exprs(&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
	&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
	&expr.Exthdr{SourceRegister: 1, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt})

func jump(chain string) part {
	return exprs(&expr.Verdict{Kind: expr.VerdictJump, Chain: chain})
}

var accept = exprs(&expr.Verdict{Kind: expr.VerdictAccept})
var drop = exprs(&expr.Verdict{Kind: expr.VerdictDrop})
var masquerade = exprs(&expr.Masq{})
var notrack = exprs(&expr.Notrack{})
var resetTCP = exprs(&expr.Reject{Type: unix.NFT_REJECT_TCP_RST})

func unreachable(f family) [][]byte {
	return enc(f, &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: f.portUnreachable})
}

// dnat goes to the address in register 1 and, with withPort, the port that follows it.
func dnat(withPort bool) part {
	return func(f family) [][]byte {
		n := &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.proto), RegAddrMin: 1, Specified: withPort}
		if withPort {
			n.RegProtoMin = reg0 + f.addrLen/4
		}
		return enc(f, n)
	}
}

func snat(to netip.Addr) part {
	return func(f family) [][]byte {
		return enc(f, &expr.Immediate{Register: 1, Data: to.AsSlice()},
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.proto), RegAddrMin: 1})
	}
}
