package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// Check compares everything with the kernel and mends what differs. Before the first Set it leaves networks alone.
func (d *Driver) Check(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	if d.have {
		for table, err := range d.apply(ctx, true) {
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", table, err))
			}
		}
	}
	if len(d.bridges) > 0 {
		errs = append(errs, d.setBridges(d.bridges, true))
	}
	damaged, err := d.damagedSandboxes()
	errs = append(errs, err)
	for _, id := range damaged {
		d.log.Warn("mending the network of a container", "container", id)
		if err := d.addSandbox(ctx, d.boxes[id].spec); err != nil {
			errs = append(errs, fmt.Errorf("network of container %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// outside is what one namespace has of legs: devices by name and the device of each route.
type outside struct {
	links  map[string]link.Link
	routes map[link.RouteKey]link.Route
}

func look(c *link.Conn) (o outside, err error) {
	if o.links, err = c.Links(); err == nil {
		o.routes, err = c.Routes()
	}
	return o, err
}

// leads tells that a device is up and that the route to the address, if one is given, leads to it.
func (o outside) leads(device string, a netip.Addr) bool {
	l, ok := o.links[device]
	return ok && l.Up && (!a.IsValid() || o.routes[link.RouteKey{Dst: host(a)}].Dev == l.Index)
}

// damagedSandboxes looks at the outer ends of all legs. The inner ends belong to the containers.
func (d *Driver) damagedSandboxes() ([]string, error) {
	node, err := look(d.conn)
	if err != nil {
		return nil, err
	}
	routers := map[string]outside{}
	for id, r := range d.routers {
		if routers[id], err = look(r.conn); err != nil {
			return nil, err
		}
	}
	var out []string
	for id, b := range d.boxes {
		ok := !b.spec.Gateway4.IsValid() || node.leads(gatewayPrefix+tag(id), b.spec.Gateway4)
		for _, l := range b.spec.Legs {
			ok = ok && routers[l.NetworkID].leads(legPrefix+tag(id), l.Addr4.Addr())
		}
		for _, l := range b.spec.Bridges {
			ok = ok && node.leads(bridgeLegName(id, l.BridgeID), netip.Addr{})
		}
		if !ok {
			out = append(out, id)
		}
	}
	return out, nil
}

// Teardown removes everything of ours from this node: sandboxes, networks, the mesh, bridges, rules and tables. It works without any
// memory of what was made, so it also cleans up after a driver that died. Kernel settings (ip_forward) stay.
func (d *Driver) Teardown(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	boxes, routers, err := d.netnsFiles()
	for _, id := range boxes {
		err = errors.Join(err, d.removeSandbox(ctx, id))
	}
	for id, r := range d.routers {
		if d.removeRouter(r, true) {
			delete(d.routers, id)
		}
	}
	for _, f := range routers {
		path := filepath.Join(d.netnsDir(), f)
		r, e := openRouter(path, false)
		if e != nil {
			err = errors.Join(err, link.RemoveNS(path))
		} else {
			d.removeRouter(r, true)
		}
	}
	links, e := d.conn.Links()
	err = errors.Join(err, e)
	for name, l := range links {
		if name == meshDevice || strings.HasPrefix(name, gatewayPrefix) || strings.HasPrefix(name, bridgePrefix) || strings.HasPrefix(l.Alias, bridgeAlias) {
			err = errors.Join(err, d.conn.DelLink(name))
		}
	}
	rules, e := d.conn.Rules()
	err = errors.Join(err, e, d.conn.Do(link.Diff(nil, rules, link.SetRule, link.DelRule)))
	routes, e := d.conn.Routes()
	err = errors.Join(err, e, d.conn.Do(link.Diff(nil, routes, link.SetRoute, link.DelRoute)))
	err = errors.Join(err, d.nft.Delete(nft.IPv4, "skein_mesh"), d.nft.Delete(nft.IPv4, "skein_bridge"))
	clear(d.boxes)
	clear(d.mesh.gateways)
	d.bridges = map[string]Bridge{}
	d.mesh.device, d.have, d.cfg = 0, false, Config{}
	d.mesh.table, d.bridgeTable = nil, nil
	d.mesh.forget()
	if err != nil {
		return fmt.Errorf("remove networks of this node: %w", err)
	}
	return nil
}
