package overlay

import (
	"fmt"
	"net/netip"

	"skein/overlay/link"
)

// HostRoutes lists the prefixes that this node has a route for in its main table, but default routes.
func (d *Driver) HostRoutes() ([]netip.Prefix, error) {
	out, err := link.MainRoutes(d.conn)
	if err != nil {
		return nil, fmt.Errorf("routes of this node: %w", err)
	}
	return out, nil
}
