package overlay

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

// told is what a container knows of a leg's network.
type told struct {
	ranges int // how many; they only become more
	mtu    int
}

// toTell is what a container should know of its legs.
func (d *Driver) toTell(s Sandbox) map[string]told {
	out := make(map[string]told, len(s.Legs)+1)
	for _, l := range s.Legs {
		nw, r := d.network(l.NetworkID), d.routers[l.NetworkID]
		if nw != nil && r != nil {
			out[l.NetworkID] = told{len(nw.subnets()), r.mtu}
		}
	}
	if s.Gateway4.IsValid() && d.mesh.device != 0 {
		out[meshLeg] = told{mtu: d.mesh.mtu}
	}
	return out
}

// meshLeg names the gateway leg among networks.
const meshLeg = "mesh"

// tellSandboxes leads running containers to ranges that their networks got since they were made, and has their legs carry what the networks do.
func (d *Driver) tellSandboxes(ctx context.Context) {
	for id, b := range d.boxes {
		if ctx.Err() != nil {
			return // the next Set or Check goes on
		}
		want := d.toTell(b.spec)
		if maps.Equal(want, b.told) {
			continue
		}
		if err := d.tellSandbox(id, b); err != nil {
			d.log.Warn("a running container was not told yet what its networks are now", "container", id, "error", err)
			continue
		}
		b.told = want
	}
}

func (d *Driver) tellSandbox(id string, b *box) error {
	return d.devicesOf(id, func(conn *link.Conn, links map[string]link.Link) error {
		var errs []error
		for _, l := range b.spec.Legs {
			inner, ok := byMAC(links, legMAC(overlayLeg, l.Addr4.Addr()))
			r := d.routers[l.NetworkID]
			if !ok || r == nil {
				errs = append(errs, fmt.Errorf("its leg on network %s is gone", l.NetworkID))
				continue
			}
			errs = append(errs, conn.Do(d.rangeRoutes(l, inner.Index)), fitLeg(conn, inner, r.conn, legPrefix+tag(id), r.mtu))
		}
		if inner, ok := byMAC(links, legMAC(gatewayLeg, b.spec.Gateway4)); ok && b.spec.Gateway4.IsValid() {
			errs = append(errs, fitLeg(conn, inner, d.conn, gatewayPrefix+tag(id), d.mesh.mtu))
		}
		return errors.Join(errs...)
	})
}

// devicesOf gives f the devices in a sandbox's namespace. One that is gone is fs.ErrNotExist.
func (d *Driver) devicesOf(id string, f func(conn *link.Conn, links map[string]link.Link) error) error {
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
	return f(conn, links)
}

// fitLeg has both ends of a leg carry no more than so much. What is less stays: the container may have wished so.
func fitLeg(conn *link.Conn, inner link.Link, outside *link.Conn, outerName string, mtu int) error {
	var errs []error
	if inner.MTU > mtu {
		errs = append(errs, conn.SetMTU(inner.Index, mtu))
	}
	if outer, err := outside.Link(outerName); err == nil && outer.MTU > mtu {
		errs = append(errs, outside.SetMTU(outer.Index, mtu))
	}
	return errors.Join(errs...)
}
