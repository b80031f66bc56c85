package allocator

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"strings"
)

// pool is a range of addresses of which single ones are handed out, lowest first. IPv6 addresses carry the same offset as the IPv4
// address, so one bit stands for both.
type pool struct {
	title   string // in errors: `network "web"`
	v4, v6  netip.Prefix
	first   uint32 // lowest and highest offset that may be handed out
	last    uint32
	used    []uint64 // one bit per offset, held or resting; grows with use
	low     int      // no clear usable bit in words before this one
	resting int
}

func newPool(title string, v4, v6 netip.Prefix) *pool {
	size := uint32(1)<<(32-v4.Bits()) - 1
	return &pool{title: title, v4: v4, v6: v6, first: 2, last: size - 1} // 0 network, 1 router or node, last broadcast
}

// capacity is the number of addresses that can be handed out.
func (p *pool) capacity() uint32 { return p.last - p.first + 1 }

// lowest returns the lowest free offset.
func (p *pool) lowest() (uint32, bool) {
	for w := p.low; ; w++ {
		var word uint64
		if w < len(p.used) {
			word = p.used[w]
		}
		if w == 0 {
			word |= 1<<p.first - 1
		}
		if word == ^uint64(0) {
			p.low = w + 1
			continue
		}
		off := uint32(w)*64 + uint32(bits.TrailingZeros64(^word))
		return off, off <= p.last
	}
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
	p.low = min(p.low, w)
}

// held is the number of addresses that are handed out and not at rest.
func (p *pool) held() int {
	n := -p.resting
	for _, word := range p.used {
		n += bits.OnesCount64(word)
	}
	return n
}

// take hands out the lowest free offset.
func (s *State) take(p *pool) (uint32, error) {
	off, ok := p.lowest()
	if !ok {
		return 0, exhausted("%s is full: all %d addresses of %s are taken or rest for %s after their release: "+
			"wait, run fewer tasks, or use a network with a larger subnet", p.title, p.capacity(), p.v4, AddressRest)
	}
	p.set(off)
	s.j.addTaken(p, off)
	return off, nil
}

// hold marks an address that a record names as taken.
func (s *State) hold(p *pool, addr netip.Addr) error {
	off, ok := offset(p.v4, addr)
	if !ok || off < p.first || off > p.last {
		return dataLoss("restore addresses: %s is not an address of %s (%s)", addr, p.title, p.v4)
	}
	if p.has(off) {
		return dataLoss("restore addresses: %s of %s is held twice", addr, p.title)
	}
	p.set(off)
	return nil
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
	if off, ok := offset(p.v4, addr); !ok || !p.has(off) {
		return
	}
	p.resting++
	s.rest.push(resting{pool: poolName, addr: addr.String(), until: now + int64(AddressRest)})
	s.j.Add(func() {
		p.resting--
		s.rest.unpush()
	})
}

// addr4 and addr6 give the addresses of an offset.
func (p *pool) addr4(off uint32) netip.Addr { return plus4(p.v4.Addr(), off) }

func (p *pool) addr6(off uint32) netip.Addr {
	if !p.v6.IsValid() {
		return netip.Addr{}
	}
	b := p.v6.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])+uint64(off))
	return netip.AddrFrom16(b)
}

func plus4(a netip.Addr, off uint32) netip.Addr {
	b := a.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+off)
	return netip.AddrFrom4(b)
}

func offset(p netip.Prefix, a netip.Addr) (uint32, bool) {
	if !a.Is4() || !p.Contains(a) {
		return 0, false
	}
	x, base := a.As4(), p.Addr().As4()
	return binary.BigEndian.Uint32(x[:]) - binary.BigEndian.Uint32(base[:]), true
}
