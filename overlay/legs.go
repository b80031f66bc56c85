package overlay

import "net"

// StationOfLeg tells the MAC address that a leg on an overlay network gets.
func StationOfLeg(l Leg) net.HardwareAddr {
	m := legMAC(overlayLeg, l.Addr4.Addr())
	return m[:]
}
