package engine

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/moby/moby/api/types/network"
)

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

func sortedPorts(m network.PortMap) []network.Port {
	return slices.SortedFunc(maps.Keys(m), func(a, b network.Port) int {
		if c := cmp.Compare(a.Num(), b.Num()); c != 0 {
			return c
		}
		return cmp.Compare(a.Proto(), b.Proto())
	})
}

// hostIP is how the API writes "all addresses" of IPv4, which older records leave out.
func hostIP(a netip.Addr) netip.Addr {
	if !a.IsValid() {
		return netip.IPv4Unspecified()
	}
	return a
}
