package nft

import (
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// DNSTable is the table "skein_dns" of a sandbox: the resolver seems to listen on port 53 of its loopback address but really has other
// ports, so that a container's own DNS server may bind port 53 of all addresses. Ports are rewritten without connection tracking, which
// would cost every packet of the container.
func DNSTable(resolver netip.Addr, udpPort, tcpPort uint16) *Table {
	const dnsPort = 53
	f := v4
	c := &Chain{Name: "ports", Type: "filter", Hook: unix.NF_INET_LOCAL_OUT, Priority: prioRaw}
	for _, p := range []struct {
		proto byte
		port  uint16
		csum  uint32
	}{{unix.IPPROTO_UDP, udpPort, 6}, {unix.IPPROTO_TCP, tcpPort, 16}} {
		c.Rules = append(c.Rules,
			f.rule(dst(host(resolver)), proto(p.proto), portIs(2, dnsPort), setPort(2, p.port, p.csum)),
			f.rule(src(host(resolver)), proto(p.proto), portIs(0, p.port), setPort(0, dnsPort, p.csum)))
	}
	return &Table{Family: f.proto, Name: "skein_dns", Chains: []*Chain{c}}
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func portIs(offset uint32, port uint16) part {
	return exprs(&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2, DestRegister: reg0}, cmp(expr.CmpOpEq, reg0, be16(port)))
}

func setPort(offset uint32, port uint16, csumOffset uint32) part {
	return exprs(&expr.Immediate{Register: 1, Data: be16(port)},
		&expr.Payload{OperationType: expr.PayloadWrite, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2, SourceRegister: 1,
			CsumType: expr.CsumTypeInet, CsumOffset: csumOffset})
}
