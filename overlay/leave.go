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
	err = errors.Join(err, d.nft.Delete(nft.IPv4, nft.MeshTableName))
	if d.six {
		err = errors.Join(err, d.nft.Delete(nft.IPv6, nft.MeshTableName))
		if !d.bridgesForward6() {
			err = errors.Join(err, d.unforward6())
		}
	}
	err = errors.Join(err, d.giveBackCluster(len(d.bridges)))
	for _, b := range d.boxes {
		b.spec.Legs, b.spec.Gateway4, b.spec.Gateway6 = nil, netip.Addr{}, netip.Addr{}
	}
	ctx, cancel := context.WithTimeout(context.Background(), storeBound)
	defer cancel()
	err = errors.Join(err, d.crypt.Forget(ctx), d.nft.Delete(nft.IPv4, nft.CryptTableName))
	if d.six {
		err = errors.Join(err, d.nft.Delete(nft.IPv6, nft.CryptTableName))
	}
	d.guards = [2]*nft.Table{}
	clear(d.waiting)
	clear(d.mesh.gateways)
	d.mesh.device, d.have, d.cfg = 0, false, Config{}
	d.held = held{}
	d.mesh.tables = [2]*meshTable{}
	err = errors.Join(err, d.passFirewalls(true))
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
// memory of what was made, so it also cleans up after a driver that died. Kernel settings of the node become what they were.
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
	d.bridges, d.bridgeTables = map[string]Bridge{}, [2]bridgeTable{}
	err = errors.Join(err, d.leave(), d.deleteLinks(func(name string, l link.Link) bool {
		return strings.HasPrefix(name, bridgePrefix) || strings.HasPrefix(l.Alias, bridgeAlias)
	}), d.nft.Delete(nft.IPv4, "skein_bridge"), d.nft.Delete(nft.IPv6, "skein_bridge"))
	clear(d.boxes)
	if err != nil {
		return fmt.Errorf("remove networks of this node: %w", err)
	}
	return nil
}
