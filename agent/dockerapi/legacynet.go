package dockerapi

import (
	"net/netip"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// endpointsMinor is the first API version whose inspection says what a container has of a network under that network only. Before, what it has
// of the default bridge stood beside, and scripts still read it there.
const endpointsMinor = 52

// legacyInspect is the inspection for clients of older versions.
type legacyInspect struct {
	container.InspectResponse
	NetworkSettings *legacyNetwork
}

type legacyNetwork struct {
	Bridge                 string
	SandboxID              string
	SandboxKey             string
	Ports                  network.PortMap
	HairpinMode            bool
	LinkLocalIPv6Address   string
	LinkLocalIPv6PrefixLen int
	SecondaryIPAddresses   []string
	SecondaryIPv6Addresses []string
	EndpointID             string
	Gateway                netip.Addr
	GlobalIPv6Address      netip.Addr
	GlobalIPv6PrefixLen    int
	IPAddress              netip.Addr
	IPPrefixLen            int
	IPv6Gateway            netip.Addr
	MacAddress             network.HardwareAddr
	Networks               map[string]*network.EndpointSettings
}

func toLegacy(c container.InspectResponse) any {
	n := c.NetworkSettings
	if n == nil {
		return c
	}
	l := &legacyNetwork{SandboxID: n.SandboxID, SandboxKey: n.SandboxKey, Ports: n.Ports, Networks: n.Networks}
	if e := n.Networks[network.NetworkBridge]; e != nil {
		l.EndpointID, l.Gateway, l.IPAddress, l.IPPrefixLen, l.MacAddress = e.EndpointID, e.Gateway, e.IPAddress, e.IPPrefixLen, e.MacAddress
		l.IPv6Gateway, l.GlobalIPv6Address, l.GlobalIPv6PrefixLen = e.IPv6Gateway, e.GlobalIPv6Address, e.GlobalIPv6PrefixLen
	}
	return legacyInspect{c, l}
}
