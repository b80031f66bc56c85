package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"skein/overlay/link"
)

// A network may have several ranges, and gets more while containers run on it. To a container each is the link that its leg is on; the routers
// know each address for itself and need no ranges.

// subnets are all ranges of a network.
func (nw *Network) subnets() []netip.Prefix {
	out := make([]netip.Prefix, 0, 2+len(nw.More))
	for _, p := range append([]netip.Prefix{nw.Subnet4, nw.Subnet6}, nw.More...) {
		if p.IsValid() && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

// network is one of the config's networks, nil if there is none.
func (d *Driver) network(id string) *Network {
	i := slices.IndexFunc(d.cfg.Networks, func(nw Network) bool { return nw.ID == id })
	if i < 0 {
		return nil
	}
	return &d.cfg.Networks[i]
}

// rangeRoutes lead from a container to the ranges of a network that its own addresses are not in.
func (d *Driver) rangeRoutes(l Leg, dev int) []link.Message {
	nw := d.network(l.NetworkID)
	if nw == nil {
		return nil
	}
	var out []link.Message
	for _, p := range nw.subnets() {
		switch {
		case p == l.Addr4.Masked(), p == l.Addr6.Masked():
		case p.Addr().Is4():
			out = append(out, link.SetRoute(link.RouteKey{Dst: p}, link.Route{Dev: dev, Src: l.Addr4.Addr()}))
		case l.Addr6.IsValid():
			out = append(out, link.SetRoute(link.RouteKey{Dst: p}, link.Route{Dev: dev, Via: routerVia6}))
		}
	}
	return out
}

// noteRanges remembers how many ranges of its networks a sandbox was told of. They only become more.
func (d *Driver) noteRanges(b *box) {
	b.ranges = map[string]int{}
	for _, l := range b.spec.Legs {
		if nw := d.network(l.NetworkID); nw != nil {
			b.ranges[l.NetworkID] = len(nw.subnets())
		}
	}
}

// tellRanges leads running containers to ranges that their networks got since they were made.
func (d *Driver) tellRanges(ctx context.Context) {
	count := make(map[string]int, len(d.cfg.Networks))
	for i := range d.cfg.Networks {
		if nw := &d.cfg.Networks[i]; len(nw.More) > 0 {
			count[nw.ID] = len(nw.subnets())
		}
	}
	if len(count) == 0 {
		return
	}
	for id, b := range d.boxes {
		if ctx.Err() != nil {
			return // the next Set or Check goes on
		}
		stale := slices.ContainsFunc(b.spec.Legs, func(l Leg) bool { return count[l.NetworkID] > b.ranges[l.NetworkID] })
		if !stale {
			continue
		}
		if err := d.tellSandbox(id, b); err != nil {
			d.log.Warn("a running container was not told of its network's new range yet", "container", id, "error", err)
		}
	}
}

func (d *Driver) tellSandbox(id string, b *box) error {
	ns, err := link.OpenNS(d.sandboxFile(id))
	if err != nil {
		return err
	}
	defer ns.Close()
	conn, err := link.Dial(ns)
	if err != nil {
		return err
	}
	defer conn.Close()
	links, err := conn.Links()
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range b.spec.Legs {
		inner, ok := byMAC(links, legMAC(overlayLeg, l.Addr4.Addr()))
		if !ok {
			errs = append(errs, fmt.Errorf("its leg on network %s is gone", l.NetworkID))
			continue
		}
		errs = append(errs, conn.Do(d.rangeRoutes(l, inner.Index)))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	d.noteRanges(b)
	return nil
}
