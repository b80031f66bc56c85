package overlay

import (
	"fmt"
	"net/netip"
)

// HostRoutes lists the prefixes that lead elsewhere from this node: those of others' routes, and the mesh's.
func (d *Driver) HostRoutes() ([]netip.Prefix, error) {
	links, err := d.conn.Links()
	if err != nil {
		return nil, err
	}
	routes, err := d.foreignRoutes(links)
	if err != nil {
		return nil, fmt.Errorf("routes of this node: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []netip.Prefix
	if d.have {
		out = append(out, d.cfg.MeshPool)
	}
	for _, r := range routes {
		out = append(out, r.Prefix)
	}
	return out, nil
}
