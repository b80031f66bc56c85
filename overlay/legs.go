package overlay

import (
	"net"

	"skein/overlay/link"
)

// StationOfLeg tells the MAC address that a leg on an overlay network gets.
func StationOfLeg(l Leg) net.HardwareAddr {
	m := legMAC(overlayLeg, l.Addr4.Addr())
	return m[:]
}

// missing reports whether the container has no end of the leg yet.
func (p plan) missing(links map[string]link.Link) bool {
	_, there := p.find(links)
	return !there
}
