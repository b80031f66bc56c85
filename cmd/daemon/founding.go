package daemon

import (
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
	spec manager.InitSpec
}

// Pools to choose from when the user names none. The mesh needs a /10: a /22 for each of 4,096 nodes.
var (
	overlayPools = []string{manager.DefaultOverlayPool, "10.128.0.0/10", "172.24.0.0/13"}
	meshPools    = []string{manager.DefaultMeshPool, "100.64.0.0/10"}
)

// newFounding checks the request and makes root, certificate and identity. Nothing is written before everything was checked.
func newFounding(m *membership, s settings, req swarm.InitRequest) (*founding, error) {
	f := &founding{spec: manager.InitSpec{
		Spec: req.Spec, Hostname: m.cfg.Hostname, UnderlayAddr: s.Underlay, Availability: string(req.Availability),
		DataPort: req.DataPathPort,
	}}
	if len(req.DefaultAddrPool) > 1 {
		return nil, api.Errorf(errdefs.ErrNotImplemented, "several --default-addr-pool are not supported by this version of skein: name one that is large enough")
	}
	var err error
	if len(req.DefaultAddrPool) == 1 {
		f.spec.OverlayPool, f.spec.OverlayBits = req.DefaultAddrPool[0], req.SubnetSize // which without a pool is docker's default, not a wish
		err = checkRoutes(m.cfg.Hostname, f.spec.OverlayPool, "--default-addr-pool")
	} else {
		f.spec.OverlayPool, err = choosePool(m.cfg.Hostname, overlayPools)
	}
	if err != nil {
		return nil, err
	}
	if f.spec.MeshPool, err = choosePool(m.cfg.Hostname, meshPools); err != nil {
		return nil, err
	}
	r, err := identity.NewRequest()
	if err != nil {
		return nil, err
	}
	if f.spec.Seed, err = manager.NewSeed(r.CSRPEM); err != nil {
		return nil, err
	}
	if err := manager.CheckInit(f.spec); err != nil {
		return nil, err
	}
	f.id, err = identity.Install(m.identityDir(), r, f.spec.Seed.CertPEM, f.spec.Seed.GossipKey)
	return f, err
}

// choosePool returns the first pool that no route of this node overlaps.
func choosePool(hostname string, pools []string) (netip.Prefix, error) {
	var last error
	for _, s := range pools {
		p := netip.MustParsePrefix(s)
		if last = checkRoutes(hostname, p, "--default-addr-pool"); last == nil {
			return p, nil
		}
	}
	return netip.Prefix{}, last
}

// checkRoutes refuses a pool that is in use on this node.
func checkRoutes(hostname string, pool netip.Prefix, flag string) error {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP.To4())
		bits, _ := r.Dst.Mask.Size()
		if !ok || bits == 0 {
			continue
		}
		if dst := netip.PrefixFrom(a, bits); dst.Overlaps(pool) {
			return api.Errorf(errdefs.ErrInvalidArgument, "address pool %s overlaps with the route to %s of node %s: name another pool with %s", pool, dst, hostname, flag)
		}
	}
	return nil
}
