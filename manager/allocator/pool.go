package allocator

import (
	"encoding/binary"
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"skein/manager/api"
)

// pool is what addresses are handed out of, lowest first: the ranges of a network one behind the other, or a node's block. An offset
// counts through all ranges; it stands for an IPv4 address and for the IPv6 address at the same distance from its base, so one bit is
// enough for both.
type pool struct {
	title   string // in errors: `network "web"`
	network string // id; empty: a node's blocks
	node    string // id, of a node's blocks
	grows   bool
	avoid   []netip.Prefix // that a further range must not overlap
	parts   []*part
	used    []uint64 // one bit per offset, held or resting; grows with use
	resting int
}

// part is one range of a pool.
type part struct {
	v4, v6      netip.Prefix
	base6       netip.Addr // of offset start
	start       uint32     // offset of the range's first address
	first, last uint32     // lowest and highest offset that is handed out unasked
	low         uint32     // nothing below it is free
	barred      map[uint32]bool
	taboo6      map[netip.Addr]bool // reserved ones, whether an offset stands for them or not
}

// newPool makes the pool of a node's block, of which the node itself has the first address.
func newPool(title string, v4, v6 netip.Prefix) *pool {
	p := &pool{title: title}
	r := newPart(v4, v6, v6.Addr())
	r.first = 2
	p.append(r)
	return p
}

// newPart is a range of which all is handed out but its ends.
func newPart(v4, v6 netip.Prefix, base6 netip.Addr) *part {
	return &part{v4: v4, v6: v6, base6: base6, first: 1, last: size4(v4) - 2, barred: map[uint32]bool{}, taboo6: map[netip.Addr]bool{}}
}

func size4(p netip.Prefix) uint32 { return uint32(1) << (32 - p.Bits()) }

// append adds a range; its offsets, counted from its first address until now, are counted through the pool from now on.
func (p *pool) append(r *part) {
	r.start = p.size()
	barred := make(map[uint32]bool, len(r.barred))
	for off := range r.barred {
		barred[r.start+off] = true
	}
	r.barred = barred
	r.first, r.last = r.first+r.start, r.last+r.start
	r.low = r.first
	p.parts = append(p.parts, r)
}

// size is the number of offsets.
func (p *pool) size() uint32 {
	if len(p.parts) == 0 {
		return 0
	}
	r := p.parts[len(p.parts)-1]
	return r.start + size4(r.v4)
}

// capacity is the number of addresses that can be handed out.
func (p *pool) capacity() (n uint32) {
	for _, r := range p.parts {
		n += r.last - r.first + 1
		for off := range r.barred {
			if off >= r.first && off <= r.last {
				n--
			}
		}
	}
	return n
}

// lowest returns the lowest free offset.
func (p *pool) lowest() (uint32, bool) {
	for _, r := range p.parts {
		if off, ok := p.lowestIn(r); ok {
			return off, true
		}
	}
	return 0, false
}

func (p *pool) lowestIn(r *part) (uint32, bool) {
	for off := max(r.first, r.low); off <= r.last; {
		w := int(off / 64)
		word := uint64(1)<<(off%64) - 1
		if w < len(p.used) {
			word |= p.used[w]
		}
		if word == ^uint64(0) {
			off = uint32(w+1) * 64
			r.low = off
			continue
		}
		off = uint32(w)*64 + uint32(bits.TrailingZeros64(^word))
		if off > r.last {
			break
		}
		if !r.barred[off] {
			r.low = off
			return off, true
		}
		off++
	}
	return 0, false
}

func (p *pool) has(off uint32) bool {
	w := int(off / 64)
	return w < len(p.used) && p.used[w]&(1<<(off%64)) != 0
}

func (p *pool) set(off uint32) {
	w := int(off / 64)
	for len(p.used) <= w {
		p.used = append(p.used, 0)
	}
	p.used[w] |= 1 << (off % 64)
}

func (p *pool) unset(off uint32) {
	w := int(off / 64)
	if w < len(p.used) {
		p.used[w] &^= 1 << (off % 64)
	}
	if r := p.part(off); r != nil {
		r.low = min(r.low, off)
	}
}

// held is the number of addresses that are handed out and not at rest.
func (p *pool) held() int {
	n := -p.resting
	for _, word := range p.used {
		n += bits.OnesCount64(word)
	}
	return n
}

// part is the range that an offset is in.
func (p *pool) part(off uint32) *part {
	for _, r := range p.parts {
		if off >= r.start && off-r.start < size4(r.v4) {
			return r
		}
	}
	return nil
}

// prefixes lists the IPv4 ranges.
func (p *pool) prefixes() string {
	all := make([]string, len(p.parts))
	for i, r := range p.parts {
		all[i] = r.v4.String()
	}
	return strings.Join(all, ", ")
}

// take hands out the lowest free offset. A network that is full gets a further range, a node a further block.
func (s *State) take(p *pool) (uint32, error) {
	off, ok := p.lowest()
	if !ok {
		if err := s.grow(p); err != nil {
			return 0, err
		}
		if off, ok = p.lowest(); !ok {
			return 0, exhausted("%s is full: all addresses of %s are taken", p.title, p.prefixes())
		}
	}
	p.set(off)
	s.j.addTaken(p, off)
	return off, nil
}

// hold marks an address that a record names as taken.
func (s *State) hold(p *pool, addr netip.Addr) error {
	off, ok := p.offset4(addr)
	if !ok || !p.usable(off) {
		return dataLoss("restore addresses: %s is not an address of %s (%s)", addr, p.title, p.prefixes())
	}
	if p.has(off) {
		return dataLoss("restore addresses: %s of %s is held twice", addr, p.title)
	}
	p.set(off)
	return nil
}

// usable reports whether a container may have an address, if it asks for it: it is not one of a range's ends, and not reserved.
func (p *pool) usable(off uint32) bool {
	r := p.part(off)
	return r != nil && off != r.start && off-r.start != size4(r.v4)-1 && !r.barred[off] && (off >= r.first || p.network != "")
}

// poolOf finds a pool by the name that its resting addresses carry.
func (s *State) poolOf(name string) *pool {
	if node, mesh := strings.CutPrefix(name, meshPrefix); mesh {
		return s.meshes[node]
	}
	return s.pools[name]
}

// give puts a held address into quarantine.
func (s *State) give(p *pool, poolName string, addr netip.Addr, now int64) {
	if p == nil {
		return // the network or node is gone and all its addresses with it
	}
	if off, ok := p.offset4(addr); !ok || !p.has(off) {
		return
	}
	p.resting++
	s.rest.push(resting{pool: poolName, addr: addr.String(), until: now + int64(AddressRest)})
	s.j.Add(func() {
		p.resting--
		s.rest.unpush()
	})
}

// addr4 and addr6 give the addresses of an offset; addr6 is invalid where there is none.
func (p *pool) addr4(off uint32) netip.Addr { return p.prefix4(off).Addr() }

func (p *pool) addr6(off uint32) netip.Addr { return p.prefix6(off).Addr() }

// prefix4 and prefix6 are the addresses of an offset with the prefix length of their range.
func (p *pool) prefix4(off uint32) netip.Prefix {
	r := p.part(off)
	return netip.PrefixFrom(plus4(r.v4.Addr(), off-r.start), r.v4.Bits())
}

func (p *pool) prefix6(off uint32) netip.Prefix {
	r := p.part(off)
	if !r.v6.IsValid() {
		return netip.Prefix{}
	}
	a := plus6(r.base6, int64(off-r.start))
	if !r.v6.Contains(a) {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, r.v6.Bits())
}

// offset4 is the offset that stands for an address, if one does; so is offset6, if a container may have it.
func (p *pool) offset4(a netip.Addr) (uint32, bool) {
	for _, r := range p.parts {
		if off, ok := offset(r.v4, a); ok {
			return r.start + off, true
		}
	}
	return 0, false
}

func (p *pool) offset6(a netip.Addr) (uint32, bool) {
	for _, r := range p.parts {
		if !r.v6.IsValid() || !r.v6.Contains(a) {
			continue
		}
		if d, ok := distance6(r.base6, a); ok && d < uint64(size4(r.v4)) && p.usable(r.start+uint32(d)) {
			return r.start + uint32(d), true
		}
	}
	return 0, false
}

// subnet6 is the IPv6 range that an address is in, invalid if there is none.
func (p *pool) subnet6(a netip.Addr) netip.Prefix {
	for _, r := range p.parts {
		if r.v6.IsValid() && r.v6.Contains(a) {
			return r.v6
		}
	}
	return netip.Prefix{}
}

// prefixes6 lists the IPv6 ranges.
func (p *pool) prefixes6() string {
	var all []string
	for _, r := range p.parts {
		if text := r.v6.String(); r.v6.IsValid() && !slices.Contains(all, text) {
			all = append(all, text)
		}
	}
	return strings.Join(all, ", ")
}

// reserved6 reports whether an IPv6 address is nobody's: the first of a range, or one that was reserved.
func (p *pool) reserved6(a netip.Addr) bool {
	return slices.ContainsFunc(p.parts, func(r *part) bool { return r.v6.IsValid() && (a == r.v6.Addr() || r.taboo6[a]) })
}

func plus4(a netip.Addr, off uint32) netip.Addr {
	b := a.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+off)
	return netip.AddrFrom4(b)
}

// plus6 adds to the whole address.
func plus6(a netip.Addr, off int64) netip.Addr {
	b := a.As16()
	hi, lo := binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
	sum, carry := bits.Add64(lo, uint64(off), 0)
	hi += carry
	if off < 0 {
		hi--
	}
	binary.BigEndian.PutUint64(b[:8], hi)
	binary.BigEndian.PutUint64(b[8:], sum)
	return netip.AddrFrom16(b)
}

// distance6 is how far a is behind base; false when it is before it, or further than 64 bits.
func distance6(base, a netip.Addr) (uint64, bool) {
	x, y := base.As16(), a.As16()
	lo, borrow := bits.Sub64(binary.BigEndian.Uint64(y[8:]), binary.BigEndian.Uint64(x[8:]), 0)
	hi, _ := bits.Sub64(binary.BigEndian.Uint64(y[:8]), binary.BigEndian.Uint64(x[:8]), borrow)
	return lo, hi == 0
}

func offset(p netip.Prefix, a netip.Addr) (uint32, bool) {
	if !a.Is4() || !p.Contains(a) {
		return 0, false
	}
	x, base := a.As4(), p.Addr().As4()
	return binary.BigEndian.Uint32(x[:]) - binary.BigEndian.Uint32(base[:]), true
}

// maxOffsets bounds the addresses of one network.
const maxOffsets = math.MaxInt32

// rangesOf are the ranges of a record, as it says itself or, of one from before api.LevelNetworks, as its subnets say.
func rangesOf(n *api.NetworkRecord) []*api.NetworkRange {
	if len(n.Ranges) > 0 {
		return n.Ranges
	}
	return []*api.NetworkRange{{Subnet4: n.Subnet4, Subnet6: n.Subnet6}}
}
