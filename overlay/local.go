package overlay

import (
	"fmt"
	"net"
	"net/netip"

	"skein/overlay/link"
)

// Bridge is a single-host network: a bridge of this node, or with Macvlan a device of it that containers share.
type Bridge struct {
	ID      string
	Network string // the network's name, under which its containers' names are known too; empty: the device's
	Name    string // device name, at most 15 bytes
	// Subnet4 and Subnet6 with their gateways, which are this node's own addresses on the bridge; invalid: the family is off.
	Subnet4  netip.Prefix
	Gateway4 netip.Addr
	Subnet6  netip.Prefix
	Gateway6 netip.Addr
	// More subnets, whose names and addresses belong to the network; only with Macvlan.
	More     []netip.Prefix
	Internal bool // nothing goes in or out
	MTU      int  // 0: 1500, with Macvlan the parent's
	// External tells that the device may be somebody else's: it is used as it is and not deleted.
	External bool
	// Bare4 and Bare6 leave the gateway address of the family off the device.
	Bare4, Bare6 bool
	// Separate keeps the containers of the network from each other but for published ports.
	Separate bool
	// Plain turns the masquerading of what containers send out off.
	Plain bool
	// Host4 and Host6 are the source addresses of what containers send out; invalid: the outgoing device's.
	Host4, Host6 netip.Addr
	// Mode4 and Mode6 tell how the network is reached from outside.
	Mode4, Mode6 GatewayMode
	// Trusted lists devices of this node, separated by colons, from which all ports of the containers may be reached.
	Trusted string
	// Macvlan makes the network one whose containers have stations of their own on a device; Name is that device.
	Macvlan *Macvlan `json:",omitempty"`
}

// GatewayMode tells how the containers of a bridge are reached.
type GatewayMode string

// Modes of a gateway.
const (
	ModeNAT         GatewayMode = ""                // published ports of this node lead to the containers
	ModeRouted      GatewayMode = "routed"          // published ports are reached at the containers' own addresses; no translation
	ModeUnprotected GatewayMode = "nat-unprotected" // as ModeNAT, and all ports are reached at the containers' addresses
)

// Macvlan is what is special to such a network.
type Macvlan struct {
	Mode string // bridge, private, vepa, passthru
	// VLAN and On make the device, if it is missing, a VLAN of another device. The one who made it deletes it.
	VLAN uint16
	On   string
}

// BridgeLeg attaches a sandbox to a Bridge. At least one of the addresses is valid.
type BridgeLeg struct {
	BridgeID     string
	Addr4        netip.Prefix
	Addr6        netip.Prefix
	Gateway4     netip.Addr // the way out when it is not the bridge's gateway
	Gateway6     netip.Addr
	LinkLocal    []netip.Addr      `json:",omitempty"` // further addresses of the device
	MAC          string            `json:",omitempty"` // empty: made from the address
	Device       string            `json:",omitempty"` // its name in the container; empty: the next free one
	DevicePrefix string            `json:",omitempty"` // of the next free name; empty: eth
	Priority     int               `json:",omitempty"` // the greatest gives the default route, among equals the first by network name
	Sysctls      map[string]string `json:",omitempty"` // "ipv4/conf/%s/forwarding": value, %s being the device
	Ports        []HostPort
	Names        []string  // DNS names of the container on this network; answered to others on the same network
	Links        []DNSLink `json:",omitempty"`
}

// DNSLink is a name that only one container knows: another of the same network, by one of its names.
type DNSLink struct {
	Alias  string
	Target string
}

func (l BridgeLeg) validate() error {
	switch {
	case l.Addr4.IsValid() && !l.Addr4.Addr().Is4(), l.Addr6.IsValid() && !l.Addr6.Addr().Is6(), !l.Addr4.IsValid() && !l.Addr6.IsValid():
		return fmt.Errorf("leg on bridge %s has no address or one of the wrong family: %s, %s", l.BridgeID, l.Addr4, l.Addr6)
	}
	if l.MAC != "" {
		if m, err := net.ParseMAC(l.MAC); err != nil || len(m) != 6 {
			return fmt.Errorf("leg on bridge %s: MAC address %q is not one of Ethernet", l.BridgeID, l.MAC)
		}
	}
	if len(l.Device) > 15 || len(l.DevicePrefix) > 11 {
		return fmt.Errorf("leg on bridge %s: device name %q is too long", l.BridgeID, l.Device+l.DevicePrefix)
	}
	for _, p := range l.Ports {
		if _, ok := hostProtocol(p.Protocol); !ok {
			return fmt.Errorf("published port %d: protocol %q is not built yet", p.Published, p.Protocol)
		}
		if p.HostIP.Is6() && !l.Addr6.IsValid() || !p.HostIP.Is6() && !l.Addr4.IsValid() {
			return fmt.Errorf("published port %d on %s: the container has no address of that family", p.Published, p.HostIP)
		}
	}
	return nil
}

// keys are the addresses that must be free before the leg is made.
func (l BridgeLeg) keys() []legKey {
	var out []legKey
	for _, p := range []netip.Prefix{l.Addr4, l.Addr6} {
		if p.IsValid() {
			out = append(out, legKey{l.BridgeID, p.Addr()})
		}
	}
	return out
}

// mac is the station address of the container's end.
func (l BridgeLeg) mac() link.MAC {
	if m, err := net.ParseMAC(l.MAC); err == nil && len(m) == 6 {
		return link.MAC(m)
	}
	if l.Addr4.IsValid() {
		return legMAC(bridgeLeg, l.Addr4.Addr())
	}
	return legMAC(bridgeLeg, l.Addr6.Addr())
}

// SandboxPath is the file of a sandbox's namespace.
func (d *Driver) SandboxPath(id string) string { return d.sandboxFile(id) }

// StationOf tells the MAC address that a leg gets.
func StationOf(l BridgeLeg) net.HardwareAddr {
	m := l.mac()
	return m[:]
}

// addr is the leg's address of one family.
func (l BridgeLeg) addr(six bool) netip.Addr {
	if six {
		return l.Addr6.Addr()
	}
	return l.Addr4.Addr()
}

// gateway is the next hop of what a leg's container sends out; invalid: it sends nothing out in that family.
func (b Bridge) gateway(l BridgeLeg, six bool) netip.Addr {
	own, shared, has := l.Gateway4, b.Gateway4, l.Addr4
	if six {
		own, shared, has = l.Gateway6, b.Gateway6, l.Addr6
	}
	switch {
	case b.Internal || !has.IsValid():
		return netip.Addr{}
	case own.IsValid():
		return own
	}
	return shared
}

// WayOut finds the leg that gives the default route of a family, -1 if none does.
func WayOut(bridges map[string]Bridge, legs []BridgeLeg, six bool) int {
	best := -1
	for i, l := range legs {
		if bridges[l.BridgeID].gateway(l, six).IsValid() && (best < 0 || before(bridges, l, legs[best])) {
			best = i
		}
	}
	return best
}

func (d *Driver) wayOut(legs []BridgeLeg, six bool) int { return WayOut(d.bridges, legs, six) }

// before is docker's order of gateways: the higher priority, then more families, then the network's name.
func before(bridges map[string]Bridge, a, b BridgeLeg) bool {
	x, y := bridges[a.BridgeID], bridges[b.BridgeID]
	families := func(n Bridge, l BridgeLeg) int {
		return btoi(n.gateway(l, false).IsValid()) + btoi(n.gateway(l, true).IsValid())
	}
	switch {
	case a.Priority != b.Priority:
		return a.Priority > b.Priority
	case families(x, a) != families(y, b):
		return families(x, a) > families(y, b)
	}
	return x.zoneName() < y.zoneName()
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (b Bridge) zoneName() string {
	if b.Network != "" {
		return b.Network
	}
	return b.Name
}
