package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// Check compares everything with the kernel and mends what differs. Before the first Set it leaves networks alone. It works table by table,
// so that a change has to wait for one table only.
func (d *Driver) Check(ctx context.Context) error {
	errs := []error{d.awaitAllDeparted(ctx), d.step(func() error { return d.forgetRetired(time.Now()) }), d.step(d.checkMesh)}
	d.mu.Lock()
	networks := slices.Clone(d.cfg.Networks)
	d.mu.Unlock()
	for i := range networks {
		if ctx.Err() != nil {
			return errors.Join(append(errs, ctx.Err())...)
		}
		errs = append(errs, d.step(func() error { return d.checkNetwork(networks[i].ID) }))
	}
	errs = append(errs, d.step(func() error {
		if len(d.bridges) == 0 {
			return nil
		}
		return d.setBridges(d.bridges, true)
	}), d.step(func() error { return d.checkSandboxes(ctx) }))
	return errors.Join(errs...)
}

func (d *Driver) step(f func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return f()
}

func (d *Driver) checkMesh() error {
	if !d.have {
		return nil
	}
	d.removeRouters(true)
	return d.applyMesh(true)
}

func (d *Driver) checkNetwork(id string) error {
	for i := range d.cfg.Networks {
		if d.cfg.Networks[i].ID == id {
			return d.applyNetwork(&d.cfg.Networks[i], true)
		}
	}
	return nil // it went meanwhile
}

func (d *Driver) checkSandboxes(ctx context.Context) error {
	if d.have {
		d.takeWaiting(ctx)
	}
	damaged, err := d.damagedSandboxes()
	for _, id := range damaged {
		d.log.Warn("mending the network of a container", "container", id)
		if e := d.mendSandbox(ctx, d.boxes[id].spec); e != nil {
			err = errors.Join(err, fmt.Errorf("network of container %s: %w", id, e))
		}
	}
	return err
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

// Leave removes what belongs to the cluster: overlay networks, the mesh, its rules and table. Sandboxes lose those legs; bridges stay.
func (d *Driver) Leave(ctx context.Context) error {
	err := d.awaitAllDeparted(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := errors.Join(err, d.leave()); err != nil {
		return fmt.Errorf("remove the cluster's networks from this node: %w", err)
	}
	return nil
}

func (d *Driver) leave() error {
	for id, r := range d.routers {
		if d.removeRouter(r, true) {
			delete(d.routers, id)
		}
	}
	_, routers, err := d.netnsFiles()
	for _, f := range routers {
		path := filepath.Join(d.netnsDir(), f)
		if r, e := openRouter(path, false); e != nil {
			err = errors.Join(err, link.RemoveNS(path))
		} else {
			d.removeRouter(r, true)
		}
	}
	err = errors.Join(err, d.deleteLinks(func(name string, _ link.Link) bool {
		return name == meshDevice || strings.HasPrefix(name, gatewayPrefix)
	}))
	rules, e := d.conn.Rules()
	err = errors.Join(err, e, d.conn.Do(link.Diff(nil, rules, link.SetRule, link.DelRule)))
	routes, e := d.conn.Routes()
	err = errors.Join(err, e, d.conn.Do(link.Diff(nil, routes, link.SetRoute, link.DelRoute)))
	err = errors.Join(err, d.nft.Delete(nft.IPv4, "skein_mesh"))
	for _, b := range d.boxes {
		b.spec.Legs, b.spec.Gateway4, b.spec.Gateway6 = nil, netip.Addr{}, netip.Addr{}
	}
	clear(d.waiting)
	clear(d.mesh.gateways)
	d.mesh.device, d.have, d.cfg = 0, false, Config{}
	d.mesh.table = nil
	d.mesh.forget()
	d.updateDNS()
	return err
}

func (d *Driver) deleteLinks(ours func(string, link.Link) bool) error {
	links, err := d.conn.Links()
	for name, l := range links {
		if ours(name, l) {
			err = errors.Join(err, d.conn.DelLink(name))
		}
	}
	return err
}

// Teardown removes everything of ours from this node: sandboxes, networks, the mesh, bridges, rules and tables. It works without any
// memory of what was made, so it also cleans up after a driver that died. Kernel settings (ip_forward) stay.
func (d *Driver) Teardown(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	boxes, _, err := d.netnsFiles()
	var all []*departure
	for _, id := range boxes {
		p, e := d.dismiss(ctx, id)
		err = errors.Join(err, e)
		all = append(all, p)
	}
	_, e := d.finish(all)
	err = errors.Join(err, e)
	err = errors.Join(err, d.leave(), d.deleteLinks(func(name string, l link.Link) bool {
		return strings.HasPrefix(name, bridgePrefix) || strings.HasPrefix(l.Alias, bridgeAlias)
	}), d.nft.Delete(nft.IPv4, "skein_bridge"))
	clear(d.boxes)
	d.bridges, d.bridgeTable = map[string]Bridge{}, nil
	if err != nil {
		return fmt.Errorf("remove networks of this node: %w", err)
	}
	return nil
}
