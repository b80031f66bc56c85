package overlay

import (
	"net/netip"
	"slices"
	"strings"
)

// NodeAddrs lists, sorted, the node's addresses that a process on it may have as a client of other nodes: all but those that stay inside.
func (d *Driver) NodeAddrs() ([]netip.Addr, error) {
	links, err := d.conn.Links()
	if err != nil {
		return nil, err
	}
	inside := map[int]bool{loopback: true}
	for name, l := range links {
		inside[l.Index] = inside[l.Index] || name == meshDevice || strings.HasPrefix(name, gatewayPrefix) || strings.HasPrefix(l.Alias, bridgeAlias)
	}
	addrs, err := d.conn.Addrs()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range addrs {
		if ip := a.Prefix.Addr(); !inside[a.Dev] && ip.IsGlobalUnicast() {
			out = append(out, ip)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}
