package engine

import (
	"fmt"
	"net/netip"

	"skein/manager/api"
	"skein/overlay"
)

// networkRanges reads what a network's record says of ranges beside its subnets.
func networkRanges(rec *api.NetworkRecord, n *overlay.Network) error {
	for i, r := range rec.Ranges {
		if i == 0 {
			n.Router4, n.Router6 = addr(r.Gateway4), addr(r.Gateway6)
			continue
		}
		for _, text := range []string{r.Subnet4, r.Subnet6} {
			if text == "" {
				continue
			}
			p, err := netip.ParsePrefix(text)
			if err != nil {
				return fmt.Errorf("subnet %q: %w", text, err)
			}
			n.More = append(n.More, p)
		}
	}
	return nil
}
