package store

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"skein/manager/allocator"
	"skein/manager/api"
)

// A form is what addresses or host ports of many tasks have in common: a task keeps its number and, of an address, the offset. The
// offset within IPv4 and IPv6 is the same.
type form struct {
	network      string // empty: a gateway, or ports
	base4        [4]byte
	base6        [16]byte
	bits4, bits6 uint8
	has6         bool
	aliases      string // the one, or all with their lengths
	aliasCount   int
	ports        string // marshaled
}

// formEntry is a form and what is decoded of it. Immutable.
type formEntry struct {
	form
	aliasList []string
	portList  []*api.PortConfig
}

type formTable struct {
	number map[form]uint32
	list   []*formEntry // from 1
	free   []uint32
	limit  int
}

// firstForms is how many forms there may be before it is looked for the first time whether they are all in use.
const firstForms = 4096

func newFormTable() *formTable {
	return &formTable{number: map[form]uint32{}, list: make([]*formEntry, 1), limit: firstForms}
}

func (x *formTable) of(f form, entry func() *formEntry) uint32 {
	if n := x.number[f]; n != 0 {
		return n
	}
	e := entry()
	e.form = f
	var n uint32
	if k := len(x.free); k > 0 {
		n, x.free = x.free[k-1], x.free[:k-1]
		x.list[n] = e
	} else {
		n = uint32(len(x.list))
		x.list = append(x.list, e)
	}
	x.number[f] = n
	return n
}

func (x *formTable) full() bool { return len(x.number) > x.limit }

// sweepForms frees the forms that no task has any more.
func (t *taskTable) sweepForms() {
	x := t.forms
	used := make([]bool, len(x.list))
	t.each(func(_ rowID, p *taskPage, r *taskRow) {
		readSide(p.arena[r.side : r.side+r.sideLen]).forms(func(n uint32) { used[n] = true })
	})
	for f, n := range x.number {
		if !used[n] {
			delete(x.number, f)
			x.list[n] = nil
		}
	}
	x.free = x.free[:0]
	for n := len(x.list) - 1; n > 0; n-- {
		if x.list[n] == nil {
			x.free = append(x.free, uint32(n))
		}
	}
	x.limit = max(firstForms, 2*len(x.number))
}

// address makes an address compact.
func (x *formTable) address(a *allocator.Address) (n, off uint32) {
	f := form{network: a.NetworkID, bits4: uint8(a.V4.Bits())}
	f.base4 = a.V4.Masked().Addr().As4()
	v4 := a.V4.Addr().As4()
	off = binary.BigEndian.Uint32(v4[:]) - binary.BigEndian.Uint32(f.base4[:])
	if a.V6.IsValid() {
		f.has6, f.bits6, f.base6 = true, uint8(a.V6.Bits()), shift6(a.V6.Addr(), -uint64(off))
	}
	f.setAliases(a.Aliases)
	return x.of(f, func() *formEntry { return &formEntry{aliasList: a.Aliases} }), off
}

func (f *form) setAliases(list []string) {
	switch f.aliasCount = len(list); f.aliasCount {
	case 0:
	case 1:
		f.aliases = list[0]
	default:
		var b []byte
		for _, s := range list {
			b = appendText(b, s)
		}
		f.aliases = string(b)
	}
}

// gateway makes the addresses of a gateway compact.
func (x *formTable) gateway(v4, v6 netip.Addr) (n, off uint32) {
	var f form
	if v4.IsValid() {
		f.bits4, f.base4 = 32, v4.As4()
		whole := binary.BigEndian.Uint32(f.base4[:])
		off = whole & 1023
		binary.BigEndian.PutUint32(f.base4[:], whole-off)
	}
	if v6.IsValid() {
		f.has6, f.base6 = true, shift6(v6, -uint64(off))
	}
	return x.of(f, func() *formEntry { return &formEntry{} }), off
}

func (x *formTable) hostPorts(ports []*api.PortConfig) uint32 {
	b := marshalPorts(nil, ports)
	return x.of(form{ports: string(b)}, func() *formEntry { return &formEntry{portList: slices.Clone(ports)} })
}

func marshalPorts(b []byte, ports []*api.PortConfig) []byte {
	for _, p := range ports {
		m, err := proto.MarshalOptions{Deterministic: true}.Marshal(p)
		if err != nil {
			panic(err) // its strings were decoded from the log, which takes valid ones only
		}
		b = protowire.AppendBytes(b, m)
	}
	return b
}

func (f *form) v4(off uint32) netip.Addr {
	b := f.base4
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+off)
	return netip.AddrFrom4(b)
}

func (f *form) v6(off uint32) netip.Addr {
	return netip.AddrFrom16(shift6(netip.AddrFrom16(f.base6), uint64(off)))
}

func shift6(a netip.Addr, by uint64) [16]byte {
	b := a.As16()
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])+by)
	return b
}

// of a network: its address with the prefix length.
func (e *formEntry) address(off uint32) allocator.Address {
	a := allocator.Address{NetworkID: e.network, V4: netip.PrefixFrom(e.v4(off), int(e.bits4)), Aliases: e.aliasList}
	if e.has6 {
		a.V6 = netip.PrefixFrom(e.v6(off), int(e.bits6))
	}
	return a
}

// of a gateway: its addresses.
func (e *formEntry) gateway(off uint32) (v4, v6 netip.Addr) {
	if e.bits4 != 0 {
		v4 = e.v4(off)
	}
	if e.has6 {
		v6 = e.v6(off)
	}
	return v4, v6
}
