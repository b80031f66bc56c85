package link

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Protocol marks every route and rule of ours (rtm_protocol); 0x5c is free in the kernel's list.
const Protocol = 0x5c

// RouteKey names a route; there is one of ours per key.
type RouteKey struct {
	Dst   netip.Prefix
	Table uint32 // 0: main, or local for local routes
}

// Route is the rest of a route.
type Route struct {
	Dev   int
	Via   netip.Addr // invalid: on the link itself
	Src   netip.Addr // preferred source, may be invalid
	Local bool       // the destination is this namespace
}

// Routes lists our routes of the namespace in all tables.
func (c *Conn) Routes() (map[RouteKey]Route, error) {
	out := map[RouteKey]Route{}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		body := make([]byte, unix.SizeofRtMsg)
		body[0] = family
		body[5] = Protocol
		err := c.Dump(Message{Type: unix.RTM_GETROUTE, Body: body}, func(t uint16, b []byte) error {
			if t == unix.RTM_NEWROUTE && len(b) >= unix.SizeofRtMsg && b[5] == Protocol {
				k, r := parseRoute(b)
				out[k] = r
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
	}
	return out, nil
}

func parseRoute(b []byte) (RouteKey, Route) {
	bits := int(b[1])
	zero := netip.IPv4Unspecified()
	if b[0] == unix.AF_INET6 {
		zero = netip.IPv6Unspecified()
	}
	k := RouteKey{Dst: netip.PrefixFrom(zero, bits), Table: uint32(b[4])}
	r := Route{Local: b[7] == unix.RTN_LOCAL}
	for t, v := range Parse(b[unix.SizeofRtMsg:]) {
		switch t {
		case unix.RTA_DST:
			if a, ok := netip.AddrFromSlice(v); ok {
				k.Dst = netip.PrefixFrom(a, bits)
			}
		case unix.RTA_TABLE:
			k.Table = u32(v)
		case unix.RTA_OIF:
			r.Dev = int(u32(v))
		case unix.RTA_GATEWAY:
			r.Via, _ = netip.AddrFromSlice(v)
		case unix.RTA_PREFSRC:
			r.Src, _ = netip.AddrFromSlice(v)
		}
	}
	if k.Table == unix.RT_TABLE_MAIN || k.Table == unix.RT_TABLE_LOCAL {
		k.Table = 0
	}
	return k, r
}

// SetRoute adds or replaces a route.
func SetRoute(k RouteKey, r Route) Message {
	return Message{Type: unix.RTM_NEWROUTE, Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, Body: routeBody(k, r)}
}

// DelRoute deletes our route with this key.
func DelRoute(k RouteKey, r Route) Message {
	return Message{Type: unix.RTM_DELROUTE, Body: routeBody(k, r)}
}

func routeBody(k RouteKey, r Route) []byte {
	a := Attrs{b: make([]byte, unix.SizeofRtMsg)}
	a.b[0] = family(k.Dst.Addr())
	a.b[1] = byte(k.Dst.Bits())
	a.b[5] = Protocol
	a.b[6] = unix.RT_SCOPE_UNIVERSE
	a.b[7] = unix.RTN_UNICAST
	table := k.Table
	switch {
	case r.Local:
		a.b[6], a.b[7] = unix.RT_SCOPE_HOST, unix.RTN_LOCAL
		if table == 0 {
			table = unix.RT_TABLE_LOCAL
		}
	case !r.Via.IsValid():
		a.b[6] = unix.RT_SCOPE_LINK
	default:
		binary.NativeEndian.PutUint32(a.b[8:], unix.RTNH_F_ONLINK)
	}
	if table == 0 {
		table = unix.RT_TABLE_MAIN
	}
	if table < 256 {
		a.b[4] = byte(table)
	}
	a.U32(unix.RTA_TABLE, table)
	if k.Dst.Bits() > 0 {
		a.Bytes(unix.RTA_DST, k.Dst.Addr().AsSlice())
	}
	a.U32(unix.RTA_OIF, uint32(r.Dev))
	if r.Via.IsValid() {
		a.Bytes(unix.RTA_GATEWAY, r.Via.AsSlice())
	}
	if r.Src.IsValid() {
		a.Bytes(unix.RTA_PREFSRC, r.Src.AsSlice())
	}
	return a.b
}

// NeighKey names a permanent neighbour entry.
type NeighKey struct {
	Dev int
	IP  netip.Addr
}

// Neighs lists the permanent neighbour entries of a device (0: of all).
func (c *Conn) Neighs(dev int) (map[NeighKey]MAC, error) {
	out := map[NeighKey]MAC{}
	err := c.neighs(unix.AF_UNSPEC, dev, func(index int, state uint16, attrs []byte) {
		var ip netip.Addr
		var mac MAC
		for t, v := range Parse(attrs) {
			switch t {
			case unix.NDA_DST:
				ip, _ = netip.AddrFromSlice(v)
			case unix.NDA_LLADDR:
				copy(mac[:], v)
			}
		}
		if state&unix.NUD_PERMANENT != 0 && ip.IsValid() && !ip.IsMulticast() {
			out[NeighKey{index, ip}] = mac
		}
	})
	return out, err
}

// FDBKey names a static forwarding entry of a VXLAN device.
type FDBKey struct {
	Dev int
	MAC MAC
}

// FDB lists the forwarding entries of a VXLAN device.
func (c *Conn) FDB(dev int) (map[FDBKey]netip.Addr, error) {
	out := map[FDBKey]netip.Addr{}
	err := c.neighs(unix.AF_BRIDGE, dev, func(index int, _ uint16, attrs []byte) {
		var ip netip.Addr
		var mac MAC
		for t, v := range Parse(attrs) {
			switch t {
			case unix.NDA_DST:
				ip, _ = netip.AddrFromSlice(v)
			case unix.NDA_LLADDR:
				copy(mac[:], v)
			}
		}
		if ip.IsValid() {
			out[FDBKey{index, mac}] = ip
		}
	})
	return out, err
}

const sizeofNdMsg = 12

func (c *Conn) neighs(family byte, dev int, each func(index int, state uint16, attrs []byte)) error {
	body := Attrs{b: make([]byte, sizeofNdMsg)}
	body.b[0] = family
	if family == unix.AF_BRIDGE {
		binary.NativeEndian.PutUint32(body.b[4:], uint32(dev))
	} else if dev != 0 {
		body.U32(unix.NDA_IFINDEX, uint32(dev))
	}
	err := c.Dump(Message{Type: unix.RTM_GETNEIGH, Body: body.b}, func(t uint16, b []byte) error {
		if t != unix.RTM_NEWNEIGH || len(b) < sizeofNdMsg {
			return nil
		}
		index := int(binary.NativeEndian.Uint32(b[4:]))
		if dev != 0 && index != dev {
			return nil
		}
		each(index, binary.NativeEndian.Uint16(b[8:]), b[sizeofNdMsg:])
		return nil
	})
	if err != nil {
		return fmt.Errorf("list neighbours of link %d: %w", dev, err)
	}
	return nil
}

// SetNeigh adds or replaces a permanent neighbour.
func SetNeigh(k NeighKey, mac MAC) Message {
	a := Attrs{b: ndmsg(family(k.IP), k.Dev, unix.NUD_PERMANENT, 0)}
	a.Bytes(unix.NDA_DST, k.IP.AsSlice())
	a.Bytes(unix.NDA_LLADDR, mac[:])
	return Message{Type: unix.RTM_NEWNEIGH, Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, Body: a.b}
}

// DelNeigh deletes a neighbour.
func DelNeigh(k NeighKey, _ MAC) Message {
	a := Attrs{b: ndmsg(family(k.IP), k.Dev, unix.NUD_PERMANENT, 0)}
	a.Bytes(unix.NDA_DST, k.IP.AsSlice())
	return Message{Type: unix.RTM_DELNEIGH, Body: a.b}
}

// SetFDB adds or replaces a static forwarding entry: frames to the MAC go to that node.
func SetFDB(k FDBKey, vtep netip.Addr) Message {
	return Message{Type: unix.RTM_NEWNEIGH, Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, Body: fdbBody(k, vtep)}
}

// DelFDB deletes a forwarding entry.
func DelFDB(k FDBKey, vtep netip.Addr) Message {
	return Message{Type: unix.RTM_DELNEIGH, Body: fdbBody(k, vtep)}
}

func fdbBody(k FDBKey, vtep netip.Addr) []byte {
	a := Attrs{b: ndmsg(unix.AF_BRIDGE, k.Dev, unix.NUD_PERMANENT|unix.NUD_NOARP, unix.NTF_SELF)}
	a.Bytes(unix.NDA_LLADDR, k.MAC[:])
	a.Bytes(unix.NDA_DST, vtep.AsSlice())
	return a.b
}

func ndmsg(family byte, dev int, state uint16, flags byte) []byte {
	b := make([]byte, sizeofNdMsg)
	b[0] = family
	binary.NativeEndian.PutUint32(b[4:], uint32(dev))
	binary.NativeEndian.PutUint16(b[8:], state)
	b[10] = flags
	return b
}

// AddAddr gives a device an address; an existing one is replaced.
func AddAddr(dev int, p netip.Prefix) Message {
	a := Attrs{b: make([]byte, unix.SizeofIfAddrmsg)}
	a.b[0] = family(p.Addr())
	a.b[1] = byte(p.Bits())
	binary.NativeEndian.PutUint32(a.b[4:], uint32(dev))
	a.Bytes(unix.IFA_LOCAL, p.Addr().AsSlice())
	a.Bytes(unix.IFA_ADDRESS, p.Addr().AsSlice())
	if p.Addr().Is6() {
		a.U32(unix.IFA_FLAGS, unix.IFA_F_NODAD|unix.IFA_F_PERMANENT)
	}
	return Message{Type: unix.RTM_NEWADDR, Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, Body: a.b}
}

// Addr is an address of a device.
type Addr struct {
	Dev    int
	Prefix netip.Prefix
}

// Addrs lists all addresses of the namespace.
func (c *Conn) Addrs() ([]Addr, error) {
	var out []Addr
	err := c.Dump(Message{Type: unix.RTM_GETADDR, Body: make([]byte, unix.SizeofIfAddrmsg)}, func(t uint16, b []byte) error {
		if t != unix.RTM_NEWADDR || len(b) < unix.SizeofIfAddrmsg {
			return nil
		}
		var local, addr netip.Addr
		for t, v := range Parse(b[unix.SizeofIfAddrmsg:]) {
			switch t {
			case unix.IFA_LOCAL:
				local, _ = netip.AddrFromSlice(v)
			case unix.IFA_ADDRESS:
				addr, _ = netip.AddrFromSlice(v)
			}
		}
		if !local.IsValid() {
			local = addr
		}
		if local.IsValid() {
			out = append(out, Addr{int(binary.NativeEndian.Uint32(b[4:])), netip.PrefixFrom(local, int(b[1]))})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	return out, nil
}

// RuleKey names a policy rule of ours.
type RuleKey struct {
	V6   bool
	Pref uint32
	Mark uint32
	Mask uint32
	Not  bool
}

// Rule is what a policy rule does: look up Table, or go on at the rule with preference Goto, or nothing.
type Rule struct {
	Table uint32
	Goto  uint32
}

// Rules lists our policy rules.
func (c *Conn) Rules() (map[RuleKey]Rule, error) {
	out := map[RuleKey]Rule{}
	for _, fam := range []byte{unix.AF_INET, unix.AF_INET6} {
		body := make([]byte, unix.SizeofRtMsg)
		body[0] = fam
		err := c.Dump(Message{Type: unix.RTM_GETRULE, Body: body}, func(t uint16, b []byte) error {
			if t != unix.RTM_NEWRULE || len(b) < unix.SizeofRtMsg {
				return nil
			}
			if k, r, ours := parseRule(b); ours {
				k.V6 = fam == unix.AF_INET6
				out[k] = r
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list policy rules: %w", err)
		}
	}
	return out, nil
}

func parseRule(b []byte) (k RuleKey, r Rule, ours bool) {
	k.Not = binary.NativeEndian.Uint32(b[8:])&unix.FIB_RULE_INVERT != 0
	toTable := b[7] == unix.FR_ACT_TO_TBL
	for t, v := range Parse(b[unix.SizeofRtMsg:]) {
		switch t {
		case unix.FRA_PRIORITY:
			k.Pref = u32(v)
		case unix.FRA_FWMARK:
			k.Mark = u32(v)
		case unix.FRA_FWMASK:
			k.Mask = u32(v)
		case unix.FRA_TABLE:
			if toTable {
				r.Table = u32(v)
			}
		case unix.FRA_GOTO:
			r.Goto = u32(v)
		case unix.FRA_PROTOCOL:
			ours = len(v) == 1 && v[0] == Protocol
		}
	}
	return k, r, ours
}

// SetRule adds a rule; one that exists is left alone.
func SetRule(k RuleKey, r Rule) Message {
	return Message{Type: unix.RTM_NEWRULE, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Body: ruleBody(k, r)}
}

// DelRule deletes a rule.
func DelRule(k RuleKey, r Rule) Message {
	return Message{Type: unix.RTM_DELRULE, Body: ruleBody(k, r)}
}

func ruleBody(k RuleKey, r Rule) []byte {
	a := Attrs{b: make([]byte, unix.SizeofRtMsg)}
	a.b[0] = unix.AF_INET
	if k.V6 {
		a.b[0] = unix.AF_INET6
	}
	a.b[7] = unix.FR_ACT_NOP
	if k.Not {
		binary.NativeEndian.PutUint32(a.b[8:], unix.FIB_RULE_INVERT)
	}
	if r.Table != 0 {
		a.b[7] = unix.FR_ACT_TO_TBL
		a.U32(unix.FRA_TABLE, r.Table)
	}
	if r.Goto != 0 {
		a.b[7] = unix.FR_ACT_GOTO
		a.U32(unix.FRA_GOTO, r.Goto)
	}
	a.U32(unix.FRA_PRIORITY, k.Pref)
	if k.Mask != 0 {
		a.U32(unix.FRA_FWMARK, k.Mark)
		a.U32(unix.FRA_FWMASK, k.Mask)
	}
	a.U8(unix.FRA_PROTOCOL, Protocol)
	return a.b
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// Diff gives the requests that turn have into want: first what is missing or different, then what is too much.
func Diff[K, V comparable](want, have map[K]V, set, del func(K, V) Message) []Message {
	var out []Message
	kept := 0
	for k, v := range want {
		old, ok := have[k]
		if ok {
			kept++
		}
		if !ok || old != v {
			out = append(out, set(k, v))
		}
	}
	if kept == len(have) {
		return out
	}
	for k, v := range have {
		if _, ok := want[k]; !ok {
			out = append(out, del(k, v))
		}
	}
	return out
}
