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
	Subnets []netip.Prefix
	name    string // canonical; every name of the zone is also known as NAME.name
	suffix  string
	names   map[string]Record
	ptr     map[netip.Addr]pointer
}

// Record is what a name stands for.
type Record struct {
	Addrs []netip.Addr
	// Stable addresses (VIPs) may be cached longer than those of containers that come and go.
	Stable bool
	// Ports are those that a service names, for SRV queries.
	Ports []Port
}

// Port is a port with a name.
type Port struct {
	Name     string
	Protocol string // tcp, udp, sctp
	Number   uint16
}

type pointer struct {
	name   string // full
	stable bool
}

// NewZone makes an empty zone; it must not be changed after it has been given to a Server.
func NewZone(name string, subnets ...netip.Prefix) *Zone {
	z := &Zone{Subnets: subnets, name: canonical(name), names: map[string]Record{}, ptr: map[netip.Addr]pointer{}}
	if z.name != "" {
		z.suffix = "." + z.name
	}
	return z
}

// Expect makes room for so many names and addresses before the first is added.
func (z *Zone) Expect(names, addrs int) {
	if len(z.names)+len(z.ptr) == 0 {
		z.names, z.ptr = make(map[string]Record, names), make(map[netip.Addr]pointer, addrs)
	}
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

// Serve tells which ports a name that was added has, for SRV queries.
func (z *Zone) Serve(name string, ports []Port) {
	name = canonical(name)
	if r, ok := z.names[name]; ok && len(ports) > 0 {
		r.Ports = ports
		z.names[name] = r
	}
}

// Point sets the name that a reverse query for the address gets. Stable is like a Record's.
func (z *Zone) Point(a netip.Addr, name string, stable bool) {
	if name = canonical(name); a.IsValid() && name != "" {
		z.ptr[a] = pointer{name + z.suffix, stable}
	}
}

// lookup finds a canonical name.
func (z *Zone) lookup(name string) (Record, bool) {
	if r, ok := z.names[name]; ok {
		return r, true
	}
	if short, ok := strings.CutSuffix(name, z.suffix); ok && z.suffix != "" {
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
	// Bare tells that an unknown name of one label may be a foreign one: the container has search domains or resolvers of its own.
	Bare bool
	// Upstreams are asked for foreign names; empty: such queries are refused.
	Upstreams []Upstream
}

// Upstream is a foreign resolver.
type Upstream struct {
	Addr netip.AddrPort
	// Node: it is asked from the node's network instead of the container's.
	Node bool
}

// Lookup finds a name in the first zone that has it.
func (v *View) Lookup(name string) (Record, bool) {
	_, r, ok := v.find(canonical(name))
	return r, ok
}

func (v *View) find(name string) (*Zone, Record, bool) {
	for _, z := range v.Zones {
		if r, ok := z.lookup(name); ok {
			return z, r, true
		}
	}
	return nil, Record{}, false
}

// reverse finds an address's name; local tells that the address belongs to one of the networks even if it has no name.
func (v *View) reverse(a netip.Addr) (p pointer, local bool) {
	for _, z := range v.Zones {
		if p, ok := z.ptr[a]; ok {
			return p, true
		}
		local = local || z.contains(a)
	}
	return pointer{}, local
}
