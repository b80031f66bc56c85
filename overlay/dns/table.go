// Package dns answers containers' name queries from given tables and passes foreign names on.
//
// A Server owns the sockets handed to it and their goroutines until Remove or Close. What a client sees is a View: an ordered list of
// zones, one per network of its container. Views and zones are immutable; a new one replaces the old at once and no query waits for it.
// Names of a zone are never passed on to foreign resolvers. Used by package overlay.
package dns

import (
	"net/netip"
	"strings"
)

// Zone holds the names of one network.
type Zone struct {
	Name    string // of the network; every name is also known as name.Name
	Subnets []netip.Prefix
	names   map[string]Record
	ptr     map[netip.Addr]string
}

// Record is what a name stands for.
type Record struct {
	Addrs []netip.Addr
	// Stable addresses (VIPs, containers) may be cached longer than those of endpoints that come and go.
	Stable bool
}

// NewZone makes an empty zone; it must not be changed after it has been given to a Server.
func NewZone(name string, subnets ...netip.Prefix) *Zone {
	return &Zone{Name: name, Subnets: subnets, names: map[string]Record{}, ptr: map[netip.Addr]string{}}
}

// Add gives a name addresses, beside those that it has. Invalid addresses are left out, but the name exists all the same.
func (z *Zone) Add(name string, stable bool, addrs ...netip.Addr) {
	name = canonical(name)
	if name == "" {
		return
	}
	r := z.names[name]
	r.Stable = stable && (r.Stable || len(r.Addrs) == 0)
	for _, a := range addrs {
		if a.IsValid() {
			r.Addrs = append(r.Addrs, a)
		}
	}
	z.names[name] = r
}

// Point sets the name that a reverse query for the address gets.
func (z *Zone) Point(a netip.Addr, name string) {
	if a.IsValid() && name != "" {
		z.ptr[a] = canonical(name) + "." + canonical(z.Name)
	}
}

func (z *Zone) lookup(name string) (Record, bool) {
	if r, ok := z.names[name]; ok {
		return r, true
	}
	if short, ok := strings.CutSuffix(name, "."+canonical(z.Name)); ok && z.Name != "" {
		r, ok := z.names[short]
		return r, ok
	}
	return Record{}, false
}

func (z *Zone) contains(a netip.Addr) bool {
	for _, p := range z.Subnets {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func canonical(name string) string { return strings.ToLower(strings.Trim(name, ".")) }

// View is what one container sees.
type View struct {
	Zones []*Zone
	// Search tells that the container has search domains: then an unknown name of one label may exist elsewhere.
	Search []string
	// Upstreams are asked for foreign names; empty: such queries are refused.
	Upstreams []netip.AddrPort
}

// Lookup finds a name in the first zone that has it.
func (v *View) Lookup(name string) (Record, bool) {
	name = canonical(name)
	for _, z := range v.Zones {
		if r, ok := z.lookup(name); ok {
			return r, true
		}
	}
	return Record{}, false
}

// reverse finds an address's name; local tells that the address belongs to one of the networks even if it has no name.
func (v *View) reverse(a netip.Addr) (name string, local bool) {
	for _, z := range v.Zones {
		if n, ok := z.ptr[a]; ok {
			return n, true
		}
		local = local || z.contains(a)
	}
	return "", local
}
