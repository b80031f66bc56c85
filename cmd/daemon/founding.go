package daemon

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"github.com/vishvananda/netlink"

	"skein/agent/identity"
	"skein/manager"
	"skein/manager/api"
)

// founding is a new cluster in the making: its seed, and the first node's identity.
type founding struct {
	id   *identity.Identity
	req  *identity.Request
	spec manager.InitSpec
}

// Pools to choose from when the user names none. The mesh needs a /10: a /22 for each of 4,096 nodes.
var (
	overlayPools = []string{manager.DefaultOverlayPool, "10.128.0.0/10", "172.24.0.0/13"}
	meshPools    = []string{manager.DefaultMeshPool, "100.64.0.0/10"}
)

// newFounding checks the request and makes root and certificate. Nothing is written.
func newFounding(ctx context.Context, m *membership, s settings, req swarm.InitRequest) (*founding, error) {
	f := &founding{spec: manager.InitSpec{
		Spec: req.Spec, Hostname: m.cfg.Hostname, UnderlayAddr: s.Underlay, Availability: string(req.Availability),
		DataPort: req.DataPathPort,
	}}
	if err := f.pools(m.cfg.Hostname, req); err != nil {
		return nil, err
	}
	if err := checkInit(req); err != nil {
		return nil, err
	}
	var err error
	if f.req, err = identity.NewRequest(); err != nil {
		return nil, err
	}
	if f.spec.Seed, err = manager.NewSeed(ctx, f.req.CSRPEM, req.Spec.CAConfig); err != nil {
		return nil, err
	}
	return f, manager.CheckInit(f.spec)
}

// install makes the node a member of its new cluster.
func (f *founding) install(m *membership) (err error) {
	f.id, err = identity.Install(m.identityDir(), f.req, f.spec.Seed.CertPEM, f.spec.Seed.GossipKey)
	return err
}

// Bounds that docker has, too.
const (
	minDataPort, maxDataPort = 1024, 49151
	maxSubnetBits            = 29
	clientSubnetBits         = 24 // what docker's command line sends when the user says nothing
)

func checkInit(req swarm.InitRequest) error {
	if p := req.DataPathPort; p != 0 && (p < minDataPort || p > maxDataPort) {
		return api.Errorf(errdefs.ErrInvalidArgument, "invalid value for --data-path-port: %d: the port number must be between %d and %d", p, minDataPort, maxDataPort)
	}
	switch req.Availability {
	case "", swarm.NodeAvailabilityActive, swarm.NodeAvailabilityPause, swarm.NodeAvailabilityDrain:
		return nil
	}
	return api.Errorf(errdefs.ErrInvalidArgument, "invalid Availability: %q: want active, pause or drain", req.Availability)
}

// pools chooses the cluster's address pools: the user's, else the first that no route of this node overlaps.
func (f *founding) pools(hostname string, req swarm.InitRequest) error {
	busy, err := routes()
	if err != nil {
		return err
	}
	bits := req.SubnetSize
	pools := req.DefaultAddrPool
	if len(pools) == 0 {
		if bits == clientSubnetBits {
			bits = 0 // docker's default, not a wish
		}
		p, err := busy.choose(hostname, overlayPools)
		if err != nil {
			return err
		}
		pools = []netip.Prefix{p}
	} else if err := checkPools(pools, hostname, busy); err != nil {
		return err
	}
	f.spec.OverlayPools = pools
	for _, p := range pools {
		if bits != 0 && (bits < uint32(p.Bits()) || bits > maxSubnetBits) {
			return api.Errorf(errdefs.ErrInvalidArgument, "--default-addr-pool-mask-length %d: networks cut from the pool %s need a mask length from %d to %d", bits, p, p.Bits(), maxSubnetBits)
		}
		if bits == 0 && p.Bits() >= manager.DefaultOverlayBits {
			f.spec.OverlayBits = max(f.spec.OverlayBits, uint32(min(p.Bits()+4, maxSubnetBits)))
		}
		busy = append(busy, route{p, "the cluster's own --default-addr-pool"})
	}
	if bits != 0 {
		f.spec.OverlayBits = bits
	}
	f.spec.MeshPool, err = busy.choose(hostname, meshPools)
	return err
}

// maxPools bounds the pools of a cluster.
const maxPools = 64

// checkPools refuses pools that the user cannot mean.
func checkPools(pools []netip.Prefix, hostname string, busy busyRoutes) error {
	if len(pools) > maxPools {
		return api.Errorf(errdefs.ErrInvalidArgument, "--default-addr-pool is given %d times, %d pools are possible", len(pools), maxPools)
	}
	for i, p := range pools {
		if err := checkPool(p); err != nil {
			return err
		}
		if err := busy.check(hostname, p); err != nil {
			return err
		}
		for _, q := range pools[:i] {
			if p.Overlaps(q) {
				return api.Errorf(errdefs.ErrInvalidArgument, "--default-addr-pool %s overlaps with --default-addr-pool %s: name separate ranges", p, q)
			}
		}
	}
	return nil
}

func checkPool(p netip.Prefix) error {
	switch {
	case !p.IsValid() || !p.Addr().Is4():
		return api.Errorf(errdefs.ErrInvalidArgument, "--default-addr-pool %s: want an IPv4 prefix, as 10.20.0.0/16", p)
	case p != p.Masked():
		return api.Errorf(errdefs.ErrInvalidArgument, "--default-addr-pool %s: bits are set behind the prefix length: did you mean %s?", p, p.Masked())
	case p.Bits() < 8 || p.Bits() > 24:
		return api.Errorf(errdefs.ErrInvalidArgument, "--default-addr-pool %s: want a prefix length from 8 to 24", p)
	case !p.Addr().IsGlobalUnicast() || p.Addr().IsLoopback():
		return api.Errorf(errdefs.ErrInvalidArgument, "--default-addr-pool %s: these are no addresses for containers", p)
	}
	return nil
}

// route is a prefix that is in use, and by what.
type route struct {
	prefix netip.Prefix
	what   string
}

type busyRoutes []route

// routes lists what this node has routes to.
func routes() (busyRoutes, error) {
	list, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out busyRoutes
	for _, r := range list {
		if r.Dst == nil {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP.To4())
		if bits, _ := r.Dst.Mask.Size(); ok && bits != 0 {
			p := netip.PrefixFrom(a, bits)
			out = append(out, route{p, "the route to " + p.String()})
		}
	}
	return out, nil
}

// choose returns the first pool that is free.
func (b busyRoutes) choose(hostname string, pools []string) (netip.Prefix, error) {
	var last error
	for _, s := range pools {
		p := netip.MustParsePrefix(s)
		if last = b.check(hostname, p); last == nil {
			return p, nil
		}
	}
	return netip.Prefix{}, last
}

// check refuses a pool that is in use on this node.
func (b busyRoutes) check(hostname string, pool netip.Prefix) error {
	for _, r := range b {
		if r.prefix.Overlaps(pool) {
			return api.Errorf(errdefs.ErrInvalidArgument, "address pool %s overlaps with %s of node %s: name another pool with --default-addr-pool", pool, r.what, hostname)
		}
	}
	return nil
}
