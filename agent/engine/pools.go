package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/network"
)

// pool is one subnet of a single-host network.
type pool struct {
	Subnet  netip.Prefix
	Range   netip.Prefix          `json:",omitzero"` // what containers that wish for no address get one of; invalid: the subnet
	Gateway netip.Addr            `json:",omitzero"`
	Aux     map[string]netip.Addr `json:",omitempty"` // addresses that others have
	Auto    bool                  `json:",omitempty"` // chosen by the engine, not by a user
}

// Names of auxiliary addresses that are the containers' gateway in place of the network's.
const (
	auxGateway4 = "DefaultGatewayIPv4"
	auxGateway6 = "DefaultGatewayIPv6"
)

func (p pool) six() bool { return p.Subnet.Addr().Is6() }

// wayOut is where the pool's containers send what is not for their subnet.
func (p pool) wayOut() netip.Addr {
	name := auxGateway4
	if p.six() {
		name = auxGateway6
	}
	if a := p.Aux[name]; a.IsValid() {
		return a
	}
	return p.Gateway
}

// span is the range of addresses that are given.
func (p pool) span() netip.Prefix {
	if p.Range.IsValid() {
		return p.Range
	}
	return p.Subnet
}

// last is the highest address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// special tells that an address stands for the subnet itself.
func (p pool) special(a netip.Addr) bool {
	return a == p.Subnet.Addr() || !p.six() && a == last(p.Subnet)
}

// reserved tells that no container gets the address.
func (p pool) reserved(a netip.Addr) bool {
	if p.special(a) || a == p.Gateway {
		return true
	}
	for _, aux := range p.Aux {
		if a == aux {
			return true
		}
	}
	return false
}

// next finds a free address after a given one, invalid if there is none.
func (p pool) next(after netip.Addr, used map[netip.Addr]string) netip.Addr {
	span := p.span()
	first, end := span.Addr(), last(span)
	a := first
	if after.IsValid() && span.Contains(after) && after != end {
		a = after.Next()
	}
	for begin, again := a, false; !again || a != begin; {
		if _, taken := used[a]; !taken && !p.reserved(a) {
			return a
		}
		if a == end {
			a, again = first, true
		} else {
			a = a.Next()
		}
	}
	return netip.Addr{}
}

// status counts a subnet's addresses.
func (p pool) status(used map[netip.Addr]string) network.SubnetStatus {
	busy, inSpan := uint64(0), uint64(0)
	count := func(a netip.Addr) {
		busy++
		if p.span().Contains(a) {
			inSpan++
		}
	}
	held := map[netip.Addr]bool{p.Subnet.Addr(): true, p.Gateway: true}
	if !p.six() {
		held[last(p.Subnet)] = true
	}
	for _, a := range p.Aux {
		held[a] = true
	}
	for a := range used {
		held[a] = true
	}
	for a := range held {
		if a.IsValid() && p.Subnet.Contains(a) {
			count(a)
		}
	}
	s := network.SubnetStatus{IPsInUse: busy, DynamicIPsAvailable: math.MaxUint64}
	if bits := p.span().Addr().BitLen() - p.span().Bits(); bits < 64 {
		s.DynamicIPsAvailable = uint64(1)<<bits - inSpan
	}
	return s
}

// checkPools refuses what makes no sense of what a user wrote, in docker's words.
func checkPools(configs []network.IPAMConfig, six bool) error {
	var errs []string
	for _, c := range configs {
		if !c.Subnet.IsValid() {
			if c.IPRange.IsValid() || c.Gateway.IsValid() || len(c.AuxAddress) > 0 {
				errs = append(errs, "ip-range, gateway and auxiliary addresses need a subnet")
			}
			continue
		}
		if c.Subnet.Addr().Is6() && !six {
			continue
		}
		if c.Subnet != c.Subnet.Masked() {
			errs = append(errs, fmt.Sprintf("invalid subnet %s: it should be %s", c.Subnet, c.Subnet.Masked()))
		}
		errs = append(errs, checkRange(c)...)
		if err := checkWithin(c.Gateway, c.Subnet); err != nil {
			errs = append(errs, fmt.Sprintf("invalid gateway %s: %v", c.Gateway, err))
		}
		for _, name := range sortedKeys(c.AuxAddress) {
			if err := checkWithin(c.AuxAddress[name], c.Subnet); err != nil {
				errs = append(errs, fmt.Sprintf("invalid auxiliary address %s: %v", name, err))
			}
		}
	}
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return invalid("invalid network config:\n%s", errs[0])
	}
	return invalid("invalid network config:\n* %s", strings.Join(errs, "\n* "))
}

func version(a netip.Addr) int {
	if a.Is6() {
		return 6
	}
	return 4
}

func checkRange(c network.IPAMConfig) []string {
	r := c.IPRange
	if !r.IsValid() {
		return nil
	}
	if v := version(c.Subnet.Addr()); version(r.Addr()) != v {
		return []string{fmt.Sprintf("invalid ip-range %s: parent subnet is an IPv%d block", r, v)}
	}
	var errs []string
	if r.Bits() < c.Subnet.Bits() {
		errs = append(errs, fmt.Sprintf("invalid ip-range %s: CIDR block is bigger than its parent subnet %s", r, c.Subnet))
	}
	if r != r.Masked() {
		errs = append(errs, fmt.Sprintf("invalid ip-range %s: it should be %s", r, r.Masked()))
	}
	if !c.Subnet.Overlaps(r) {
		errs = append(errs, fmt.Sprintf("invalid ip-range %s: parent subnet %s doesn't contain ip-range", r, c.Subnet))
	}
	return errs
}

func checkWithin(a netip.Addr, subnet netip.Prefix) error {
	switch {
	case !a.IsValid():
		return nil
	case version(a) != version(subnet.Addr()):
		return fmt.Errorf("parent subnet is an IPv%d block", version(subnet.Addr()))
	case !subnet.Contains(a):
		return fmt.Errorf("parent subnet %s doesn't contain this address", subnet)
	}
	return nil
}

var (
	errOverlap   = errf(errDenied, "invalid pool request: Pool overlaps with other one on this address space")
	errExhausted = errf(errDenied, "all predefined address pools have been fully subnetted")
)

// choosePools gives the network its subnets: those that were asked for, and one of its own choice for a family without. The caller holds mu.
func (n *localNetworks) choosePools(l *localNetwork, configs []network.IPAMConfig, outside []netip.Prefix) error {
	for _, c := range configs {
		switch six := c.Subnet.Addr().Is6(); {
		case !c.Subnet.IsValid() || six && !l.IPv6 || !six && l.NoIPv4:
			continue
		case !six && c.Subnet.Bits() > 30:
			return invalid("subnet %s of network %s: want an IPv4 prefix of at most 30 bits", c.Subnet, l.Name)
		case six && (c.Subnet.Bits() > 126 || c.Subnet.Addr().IsMulticast()):
			return invalid("subnet %s of network %s: want a unicast IPv6 prefix of at most 126 bits", c.Subnet, l.Name)
		}
		p := pool{Subnet: c.Subnet, Range: c.IPRange, Gateway: c.Gateway, Aux: c.AuxAddress}
		if o, s := n.overlaps(l, p.Subnet); o != nil {
			return errf(errDenied, "%v: %s overlaps with %s of network %s", errOverlap, p.Subnet, s, o.Name)
		}
		l.Pools = append(l.Pools, p)
	}
	for _, six := range []bool{false, true} {
		if six && !l.IPv6 || !six && l.NoIPv4 || slices.ContainsFunc(l.Pools, func(p pool) bool { return p.six() == six }) {
			continue
		}
		s, err := n.freeSubnet(l, six, outside)
		if err != nil {
			return err
		}
		l.Pools = append(l.Pools, pool{Subnet: s, Auto: true})
	}
	for i := range l.Pools {
		if p := &l.Pools[i]; !p.Gateway.IsValid() && l.wantsGateway(p.six()) {
			if p.Gateway = p.next(netip.Addr{}, nil); !p.Gateway.IsValid() {
				return conflict("network %s: no address of %s is left for the gateway", l.Name, p.span())
			}
		}
	}
	return nil
}

// overlaps finds a network, or the given one itself, that has addresses of the prefix.
func (n *localNetworks) overlaps(l *localNetwork, p netip.Prefix) (*localNetwork, netip.Prefix) {
	for _, o := range append(n.list(), l) {
		if o.ConfigOnly {
			continue
		}
		for _, q := range o.Pools {
			if q.Subnet.Overlaps(p) {
				return o, q.Subnet
			}
		}
	}
	return nil, netip.Prefix{}
}

// freeSubnet chooses one that neither a network nor a route of this node has: docker's predefined ones, and for IPv6 a /64 of a /48 that is
// this node's alone.
func (n *localNetworks) freeSubnet(l *localNetwork, six bool, outside []netip.Prefix) (netip.Prefix, error) {
	for _, p := range n.predefined(six) {
		if o, _ := n.overlaps(l, p); o == nil && !slices.ContainsFunc(outside, p.Overlaps) {
			return p, nil
		}
	}
	return netip.Prefix{}, errExhausted
}

func (n *localNetworks) predefined(six bool) []netip.Prefix {
	var out []netip.Prefix
	if six {
		b := n.ula.Addr().As16()
		for i := range 1 << 16 {
			binary.BigEndian.PutUint16(b[6:], uint16(i))
			out = append(out, netip.PrefixFrom(netip.AddrFrom16(b), 64))
		}
		return out
	}
	for i := firstBridgeNet; i < 32; i++ {
		out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(i), 0, 0}), 16))
	}
	for i := 0; i < 256; i += 16 {
		out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(i), 0}), 20))
	}
	return out
}

// taken is what a container got of a network.
type taken struct {
	addr4, addr6 netip.Prefix
	via4, via6   netip.Addr
}

// take reserves addresses for the container: the wished ones where valid, else the next free ones after those that were given last, so that
// what leaves has time to go.
func (n *localNetworks) take(l *localNetwork, containerID string, want4, want6 netip.Addr) (taken, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var t taken
	if n.byID[l.ID] == nil {
		return t, notFound("network %s not found", l.Name)
	}
	used := n.used[l.ID]
	if used == nil {
		used = map[netip.Addr]string{}
		n.used[l.ID] = used
	}
	var got []netip.Addr
	for _, six := range []bool{false, true} {
		want := want4
		if six {
			want = want6
		}
		a, p, err := n.takeOne(l, containerID, want, six, used)
		if err != nil {
			for _, a := range got {
				delete(used, a)
			}
			return t, err
		}
		if !a.IsValid() {
			continue
		}
		if used[a] == "" {
			got = append(got, a)
		}
		used[a] = containerID
		if six {
			t.addr6, t.via6 = netip.PrefixFrom(a, p.Subnet.Bits()), p.wayOut()
		} else {
			t.addr4, t.via4 = netip.PrefixFrom(a, p.Subnet.Bits()), p.wayOut()
		}
	}
	return t, nil
}

// retake reserves the addresses that a running container has.
func (n *localNetworks) retake(l *localNetwork, containerID string, addrs ...netip.Addr) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.used[l.ID] == nil {
		n.used[l.ID] = map[netip.Addr]string{}
	}
	for _, a := range addrs {
		if holder, held := n.used[l.ID][a]; held && holder != containerID {
			return conflict("address %s of network %s is already in use by container %s", a, l.Name, holder)
		}
		if a.IsValid() {
			n.used[l.ID][a] = containerID
		}
	}
	return nil
}

// takeOne finds an address of one family; invalid: the network has none.
func (n *localNetworks) takeOne(l *localNetwork, containerID string, want netip.Addr, six bool, used map[netip.Addr]string) (netip.Addr, pool, error) {
	pools := slices.DeleteFunc(slices.Clone(l.Pools), func(p pool) bool { return p.six() != six })
	if want.IsValid() {
		i := slices.IndexFunc(pools, func(p pool) bool { return p.Subnet.Contains(want) })
		if i < 0 || pools[i].special(want) {
			return want, pool{}, invalid("invalid address %s: it is not an address for containers in a subnet of network %s", want, l.Name)
		}
		if holder, held := used[want]; held && holder != containerID || pools[i].reserved(want) {
			return want, pool{}, errf(errDenied, "Address already in use: %s of network %s", want, l.Name)
		}
		return want, pools[i], nil
	}
	key := lastKey{l.ID, six}
	for _, p := range pools {
		if a := p.next(n.last[key], used); a.IsValid() {
			n.last[key] = a
			return a, p, nil
		}
	}
	if len(pools) == 0 {
		return netip.Addr{}, pool{}, nil
	}
	return netip.Addr{}, pool{}, conflict("no available IPv%d addresses on this network's address pools: %s (%s): remove containers or create a larger network",
		version(pools[0].Subnet.Addr()), l.Name, l.ID)
}

// lastKey names a family of a network.
type lastKey struct {
	network string
	six     bool
}

// outsideRoutes are the prefixes that lead elsewhere from this node; without an answer there are none to avoid.
func (e *Engine) outsideRoutes() []netip.Prefix {
	routes, err := e.cfg.Network.HostRoutes()
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		e.log.Warn("the node's routes cannot be read, so a new network may overlap with them", "err", err)
	}
	return routes
}
