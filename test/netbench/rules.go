package netbench

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// Rules of what the product is compared with, in tables of the benchmark's own.

// snatMark marks connections to be masqueraded; it is none of the product's.
const snatMark = 0x77

// change carries out one transaction in a namespace.
func transaction(ns *link.NS, f func(c *nftables.Conn)) error {
	c, err := nftables.New(nftables.WithNetNSFd(ns.FD()))
	if err != nil {
		return err
	}
	f(c)
	return c.Flush()
}

func chain(c *nftables.Conn, t *nftables.Table, kind nftables.ChainType, hook *nftables.ChainHook, prio int) *nftables.Chain {
	name := string(kind) + string('a'+rune(*hook))
	return c.AddChain(&nftables.Chain{Name: name, Table: t, Type: kind, Hooknum: hook, Priority: nftables.ChainPriorityRef(nftables.ChainPriority(prio))})
}

// translate makes a port lead to a target with the node's own address as the source, before the product's rules see it.
func translate(ns *link.NS, port uint16, to netip.AddrPort, dev string) error {
	return transaction(ns, func(c *nftables.Conn) {
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "bench"})
		pre := chain(c, t, nftables.ChainTypeNAT, nftables.ChainHookPrerouting, -110)
		post := chain(c, t, nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 90)
		mark := binary.NativeEndian.AppendUint32(nil, snatMark)
		c.AddRule(&nftables.Rule{Table: t, Chain: pre, Exprs: append(portIs(port),
			&expr.Immediate{Register: 1, Data: mark}, &expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true},
			&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()}, &expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, to.Port())},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2, Specified: true})})
		c.AddRule(&nftables.Rule{Table: t, Chain: post, Exprs: append(outOf(dev),
			&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: mark}, &expr.Masq{})})
	})
}

// masquerade gives what leaves by a device the device's address.
func masquerade(ns *link.NS, dev string) error {
	return transaction(ns, func(c *nftables.Conn) {
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "bench"})
		post := chain(c, t, nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 90)
		c.AddRule(&nftables.Rule{Table: t, Chain: post, Exprs: append(outOf(dev), &expr.Masq{})})
	})
}

// untracked keeps connection tracking away from tunnel packets.
func untracked(ns *link.NS, port uint16) error {
	return transaction(ns, func(c *nftables.Conn) {
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "bench"})
		for _, hook := range []*nftables.ChainHook{nftables.ChainHookPrerouting, nftables.ChainHookOutput} {
			raw := chain(c, t, nftables.ChainTypeFilter, hook, -305)
			c.AddRule(&nftables.Rule{Table: t, Chain: raw, Exprs: append(append([]expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}}}, portIs(port)...), &expr.Notrack{})})
		}
	})
}

func portIs(port uint16) []expr.Any {
	return []expr.Any{&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2, DestRegister: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)}}
}

func outOf(dev string) []expr.Any {
	name := append([]byte(dev), make([]byte, unix.IFNAMSIZ-len(dev))...)
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name}}
}
