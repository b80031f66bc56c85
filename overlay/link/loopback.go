package link

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// loopbackProtocol marks the routes of AddLoopback, of which there is one per device, while Protocol's have one per destination.
const loopbackProtocol = 0x5d

// AddLoopback is the request for a route of ::1 through a device of ours; one that exists is unix.EEXIST. The kernel takes an answer whose
// address translation gives it back to ::1 only if the route of ::1 is on the device that it came through. A packet that comes with that
// address is dropped long before.
func AddLoopback(dev int) Message {
	b := routeBody(RouteKey{Dst: netip.PrefixFrom(netip.IPv6Loopback(), 128)}, Route{Dev: dev, Local: true})
	b[5] = loopbackProtocol
	return Message{Type: unix.RTM_NEWROUTE, Flags: unix.NLM_F_CREATE, Body: b}
}
