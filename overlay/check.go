package overlay

import (
	"context"
	"errors"
	"fmt"
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
	for id, b := range d.boxes {
		if err := d.addSandbox(ctx, b.spec); err != nil {
			errs = append(errs, fmt.Errorf("network of container %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
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
	d.mesh.targets = nil
	d.mesh.forget()
	if err != nil {
		return fmt.Errorf("remove networks of this node: %w", err)
	}
	return nil
}
