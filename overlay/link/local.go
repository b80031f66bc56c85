package link

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// NoAddr is the kernel's word for an address that a device does not have.
const NoAddr = unix.EADDRNOTAVAIL

// DelAddr takes an address off a device.
func DelAddr(dev int, p netip.Prefix) Message {
	m := AddAddr(dev, p)
	return Message{Type: unix.RTM_DELADDR, Body: m.Body}
}

// SetIsolated is the request that keeps a bridge's port from other ports of that kind, or lets it reach them.
func SetIsolated(dev int, isolated bool) Message {
	body := Attrs{b: ifinfo(dev, 0, 0)}
	body.b[0] = unix.AF_BRIDGE
	var v uint8
	if isolated {
		v = 1
	}
	body.Nest(unix.IFLA_PROTINFO, nil, func(p *Attrs) { p.U8(unix.IFLA_BRPORT_ISOLATED, v) })
	return Message{Type: unix.RTM_SETLINK, Body: body.b}
}

// Modes of a macvlan device.
const (
	MacvlanPrivate  = 1
	MacvlanVEPA     = 2
	MacvlanBridge   = 4
	MacvlanPassthru = 8
)

// AddMacvlan makes a station of its own on the device parent of the connection's namespace. The end is born in e.NS and is down.
func (c *Conn) AddMacvlan(e End, parent int, mode uint32) error {
	body := Attrs{b: ifinfo(0, 0, 0)}
	e.attrs(&body)
	body.U32(unix.IFLA_LINK, uint32(parent))
	body.Nest(unix.IFLA_LINKINFO, nil, func(i *Attrs) {
		i.Str(unix.IFLA_INFO_KIND, "macvlan")
		i.Nest(unix.IFLA_INFO_DATA, nil, func(d *Attrs) { d.U32(unix.IFLA_MACVLAN_MODE, mode) })
	})
	err := c.Do([]Message{{Type: unix.RTM_NEWLINK, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Body: body.b}})
	if err != nil {
		return fmt.Errorf("create macvlan %s on device %d: %w", e.Name, parent, err)
	}
	return nil
}

// AddVLAN makes the VLAN id of the device parent, up.
func (c *Conn) AddVLAN(name string, parent int, id uint16) error {
	body := Attrs{b: ifinfo(0, unix.IFF_UP, unix.IFF_UP)}
	body.Str(unix.IFLA_IFNAME, name)
	body.U32(unix.IFLA_LINK, uint32(parent))
	body.Nest(unix.IFLA_LINKINFO, nil, func(i *Attrs) {
		i.Str(unix.IFLA_INFO_KIND, "vlan")
		i.Nest(unix.IFLA_INFO_DATA, nil, func(d *Attrs) {
			d.Bytes(unix.IFLA_VLAN_ID, binary.NativeEndian.AppendUint16(nil, id))
		})
	})
	err := c.Do([]Message{{Type: unix.RTM_NEWLINK, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Body: body.b}})
	if err != nil {
		return fmt.Errorf("create VLAN %d of device %d as %s: %w", id, parent, name, err)
	}
	return nil
}
