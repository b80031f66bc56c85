package control

import (
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"

	"skein/manager/api"
	"skein/manager/store"
)

// Options of networks, as labels.
const (
	// optionGrow has a network that is full get a further range by itself, or not. Without it, it does unless an --ip-range says what to use.
	optionGrow = "skein.network.grow"
	// optionOverlap allows a subnet to which nodes have other routes: containers of the network do not reach what is there.
	optionOverlap = "skein.network.overlap"
)

// networkPools takes from a request which addresses a network is to have.
func networkPools(a at, req *network.CreateRequest, rec *api.NetworkRecord) error {
	rec.NoIpv6 = req.EnableIPv6 != nil && !*req.EnableIPv6
	rec.NoGrowth = req.Labels[optionGrow] == "off"
	if req.IPAM == nil {
		return nil
	}
	if d := req.IPAM.Driver; d != "" && d != "default" {
		return a.field("Driver").unbuilt(d, "IPAM drivers other than default")
	}
	if len(req.IPAM.Options) > 0 {
		return a.field("Options").unbuilt(req.IPAM.Options, "IPAM options")
	}
	var four, six []*api.NetworkRange
	for i, c := range req.IPAM.Config {
		a := a.field("Config").index(i)
		r, err := rangeOf(a, c)
		switch {
		case err != nil:
			return err
		case r == nil:
		case r.Subnet4 != "":
			four = append(four, r)
		case rec.NoIpv6:
			return a.field("Subnet").bad(c.Subnet, "the network is to have no IPv6 addresses")
		default:
			six = append(six, r)
		}
	}
	if len(six) > max(len(four), 1) {
		return a.field("Config").bad(req.IPAM.Config, "%d IPv6 subnets and %d IPv4 subnets: addresses are given out in pairs, so each IPv6 subnet needs an IPv4 subnet", len(six), len(four))
	}
	setRanges(rec, four, six)
	if req.Labels[optionGrow] == "" && slices.ContainsFunc(rec.Ranges, func(r *api.NetworkRange) bool { return r.Range4 != "" || r.Range6 != "" }) {
		rec.NoGrowth = true
	}
	return nil
}

// rangeOf reads one element; nil when it says nothing.
func rangeOf(a at, c network.IPAMConfig) (*api.NetworkRange, error) {
	if !c.Subnet.IsValid() {
		if c.IPRange.IsValid() || c.Gateway.IsValid() || len(c.AuxAddress) > 0 {
			return nil, a.field("Subnet").missing("an IP range, a gateway or auxiliary addresses need the subnet that they are of")
		}
		return nil, nil
	}
	inside := func(field string, x netip.Addr) error {
		if !c.Subnet.Contains(x) {
			return a.field(field).bad(x, "it is not in subnet %s", c.Subnet)
		}
		return nil
	}
	if c.Gateway.IsValid() {
		if err := inside("Gateway", c.Gateway); err != nil {
			return nil, err
		}
	}
	if c.IPRange.IsValid() {
		if err := inside("IPRange", c.IPRange.Addr()); err != nil || c.IPRange.Bits() < c.Subnet.Bits() {
			return nil, a.field("IPRange").bad(c.IPRange, "it is not within subnet %s", c.Subnet)
		}
	}
	aux := map[string]string{}
	for _, k := range sortedKeys(c.AuxAddress) {
		if err := inside("AuxiliaryAddresses["+k+"]", c.AuxAddress[k]); err != nil {
			return nil, err
		}
		aux[k] = c.AuxAddress[k].String()
	}
	text := func(x interface {
		IsValid() bool
		String() string
	}) string {
		if !x.IsValid() {
			return ""
		}
		return x.String()
	}
	if c.Subnet.Addr().Is4() {
		return &api.NetworkRange{Subnet4: c.Subnet.String(), Range4: text(c.IPRange.Masked()), Gateway4: text(c.Gateway), Aux4: aux}, nil
	}
	return &api.NetworkRange{Subnet6: c.Subnet.String(), Range6: text(c.IPRange.Masked()), Gateway6: text(c.Gateway), Aux6: aux}, nil
}

// setRanges pairs the families. A network of one plain IPv4 subnet is as older versions know it.
func setRanges(rec *api.NetworkRecord, four, six []*api.NetworkRange) {
	if len(four) == 0 && len(six) == 0 {
		return
	}
	if len(four) == 0 {
		four = []*api.NetworkRange{{}}
	}
	for i, s := range six {
		r := four[i]
		r.Subnet6, r.Range6, r.Gateway6, r.Aux6 = s.Subnet6, s.Range6, s.Gateway6, s.Aux6
	}
	if r := four[0]; len(four) == 1 && len(six) == 0 && r.Range4+r.Gateway4 == "" && len(r.Aux4) == 0 {
		rec.Subnet4 = r.Subnet4
		return
	}
	rec.Ranges = four
}

// mayHave refuses what managers of older versions would not follow.
func mayHave(tx store.ReadTx, rec *api.NetworkRecord) error {
	if level := tx.Cluster().GetFeatureLevel(); level < api.LevelNetworks && (len(rec.Ranges) > 0 || rec.NoIpv6 || rec.NoGrowth) {
		return api.Errorf(errdefs.ErrFailedPrecondition, "network %s: IP ranges, gateways, auxiliary addresses, several subnets, IPv6 subnets and networks without IPv6 need feature level %d, the cluster has %d: upgrade all managers first",
			rec.Name, api.LevelNetworks, level)
	}
	return nil
}

// subnetsOf are the subnets that a record names, of both families.
func subnetsOf(rec *api.NetworkRecord) []netip.Prefix {
	var out []netip.Prefix
	add := func(text string) {
		if p, err := netip.ParsePrefix(text); err == nil && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	add(rec.Subnet4)
	add(rec.Subnet6)
	for _, r := range rec.Ranges {
		add(r.Subnet4)
		add(r.Subnet6)
	}
	return out
}

// ipamConfig shows a network's ranges.
func ipamConfig(n *store.Network) []network.IPAMConfig {
	ranges := n.Ranges
	if len(ranges) == 0 {
		ranges = []*api.NetworkRange{{Subnet4: n.Subnet4, Subnet6: n.Subnet6}}
	}
	var out []network.IPAMConfig
	add := func(first bool, subnet, part, gateway string, aux map[string]string) {
		p, err := netip.ParsePrefix(subnet)
		if err != nil || slices.ContainsFunc(out, func(c network.IPAMConfig) bool { return c.Subnet == p }) {
			return
		}
		c := network.IPAMConfig{Subnet: p}
		c.IPRange, _ = netip.ParsePrefix(part)
		if c.Gateway, _ = netip.ParseAddr(gateway); !c.Gateway.IsValid() && first {
			c.Gateway = p.Addr().Next()
		}
		for k, v := range aux {
			if a, err := netip.ParseAddr(v); err == nil {
				if c.AuxAddress == nil {
					c.AuxAddress = map[string]netip.Addr{}
				}
				c.AuxAddress[k] = a
			}
		}
		out = append(out, c)
	}
	for i, r := range ranges {
		add(i == 0, r.Subnet4, r.Range4, r.Gateway4, r.Aux4)
	}
	for i, r := range ranges {
		add(i == 0, r.Subnet6, r.Range6, r.Gateway6, r.Aux6)
	}
	return out
}

// prefixOn is an address of a network with the prefix length of its range.
func prefixOn(n *store.Network, a netip.Addr) netip.Prefix {
	bits := a.BitLen()
	if n != nil {
		for _, p := range subnetsOf(n) {
			if p.Contains(a) {
				bits = p.Bits()
			}
		}
	}
	return netip.PrefixFrom(a, bits)
}
