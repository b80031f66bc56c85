package link

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// MAC is a hardware address that can be compared.
type MAC [6]byte

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// Conn is an rtnetlink connection into one namespace.
//
// Whoever shares one while it is watched (see Audit) must hold the lock under which that happens.
type Conn struct {
	*Socket
	NS    *NS
	watch atomic.Pointer[watch]
}

// Dial opens a connection into ns; ns must stay open as long as the connection is used.
func Dial(ns *NS) (*Conn, error) {
	s, err := OpenSocket(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	return &Conn{Socket: s, NS: ns}, nil
}

// Link is a network device as the kernel reports it.
type Link struct {
	Index  int
	Name   string
	Kind   string // veth, vxlan, bridge, …; empty for hardware and loopback
	MAC    MAC
	MTU    int
	Master int
	Up     bool
	Alias  string
	VNI    uint32     // vxlan only
	Local  netip.Addr // vxlan only
	Port   uint16     // vxlan only
}

// Links lists all devices of the namespace by name.
func (c *Conn) Links() (map[string]Link, error) {
	out := map[string]Link{}
	err := c.Dump(Message{Type: unix.RTM_GETLINK, Body: ifinfo(0, 0, 0)}, func(t uint16, b []byte) error {
		if t == unix.RTM_NEWLINK {
			l := parseLink(b)
			out[l.Name] = l
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	return out, nil
}

// Link finds one device by name; a missing one is unix.ENODEV.
func (c *Conn) Link(name string) (Link, error) {
	b := Attrs{b: ifinfo(0, 0, 0)}
	b.Str(unix.IFLA_IFNAME, name)
	_, body, err := c.Get(Message{Type: unix.RTM_GETLINK, Body: b.b})
	if err != nil {
		return Link{}, fmt.Errorf("find link %s: %w", name, err)
	}
	return parseLink(body), nil
}

func parseLink(b []byte) Link {
	var l Link
	if len(b) < unix.SizeofIfInfomsg {
		return l
	}
	l.Index = int(binary.NativeEndian.Uint32(b[4:]))
	l.Up = binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP != 0
	for t, v := range Parse(b[unix.SizeofIfInfomsg:]) {
		switch t {
		case unix.IFLA_IFNAME:
			l.Name = cString(v)
		case unix.IFLA_ADDRESS:
			copy(l.MAC[:], v)
		case unix.IFLA_MTU:
			l.MTU = int(u32(v))
		case unix.IFLA_IFALIAS:
			l.Alias = cString(v)
		case unix.IFLA_MASTER:
			l.Master = int(u32(v))
		case unix.IFLA_LINKINFO:
			parseLinkInfo(&l, v)
		}
	}
	return l
}

func parseLinkInfo(l *Link, b []byte) {
	var data []byte
	for t, v := range Parse(b) {
		switch t {
		case unix.IFLA_INFO_KIND:
			l.Kind = cString(v)
		case unix.IFLA_INFO_DATA:
			data = v
		}
	}
	if l.Kind != "vxlan" {
		return
	}
	for t, v := range Parse(data) {
		switch t {
		case unix.IFLA_VXLAN_ID:
			l.VNI = u32(v)
		case unix.IFLA_VXLAN_LOCAL, unix.IFLA_VXLAN_LOCAL6:
			l.Local, _ = netip.AddrFromSlice(v)
		case unix.IFLA_VXLAN_PORT:
			if len(v) >= 2 {
				l.Port = binary.BigEndian.Uint16(v)
			}
		}
	}
}

// End is one end of a veth pair.
type End struct {
	NS   *NS // nil: the connection's namespace
	Name string
	MAC  MAC
	MTU  int
}

// AddVeth makes a pair whose ends are born and named in their namespaces. The end a is up; b must be set up by a connection into its
// namespace, because the kernel refuses to open the peer before the pair is tied (ENOTCONN).
func (c *Conn) AddVeth(a, b End) error {
	body := Attrs{b: ifinfo(0, unix.IFF_UP, unix.IFF_UP)}
	a.attrs(&body)
	body.Nest(unix.IFLA_LINKINFO, nil, func(i *Attrs) {
		i.Str(unix.IFLA_INFO_KIND, "veth")
		i.Nest(unix.IFLA_INFO_DATA, nil, func(d *Attrs) {
			d.Nest(vethInfoPeer, ifinfo(0, 0, 0), b.attrs)
		})
	})
	err := c.Do([]Message{{Type: unix.RTM_NEWLINK, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Body: body.b}})
	if err != nil {
		return fmt.Errorf("create veth %s: %w", a.Name, err)
	}
	return nil
}

const vethInfoPeer = 1

func (e End) attrs(a *Attrs) {
	a.Str(unix.IFLA_IFNAME, e.Name)
	if e.MAC != (MAC{}) {
		a.Bytes(unix.IFLA_ADDRESS, e.MAC[:])
	}
	if e.MTU > 0 {
		a.U32(unix.IFLA_MTU, uint32(e.MTU))
	}
	if e.NS != nil {
		a.U32(unix.IFLA_NET_NS_FD, uint32(e.NS.FD()))
	}
}

// VXLAN describes a device without learning: peers and stations are static entries.
type VXLAN struct {
	End
	VNI   uint32
	Local netip.Addr // underlay address of this node
	Port  uint16
}

// AddVXLAN makes the device in v.NS; its UDP socket lives in the connection's namespace.
func (c *Conn) AddVXLAN(v VXLAN) error {
	body := Attrs{b: ifinfo(0, unix.IFF_UP, unix.IFF_UP)}
	v.attrs(&body)
	body.Nest(unix.IFLA_LINKINFO, nil, func(i *Attrs) {
		i.Str(unix.IFLA_INFO_KIND, "vxlan")
		i.Nest(unix.IFLA_INFO_DATA, nil, func(d *Attrs) {
			d.U32(unix.IFLA_VXLAN_ID, v.VNI)
			if v.Local.Is4() {
				d.Bytes(unix.IFLA_VXLAN_LOCAL, v.Local.AsSlice())
			} else if v.Local.IsValid() {
				d.Bytes(unix.IFLA_VXLAN_LOCAL6, v.Local.AsSlice())
			}
			d.BE16(unix.IFLA_VXLAN_PORT, v.Port)
			d.U8(unix.IFLA_VXLAN_LEARNING, 0)
		})
	})
	err := c.Do([]Message{{Type: unix.RTM_NEWLINK, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Body: body.b}})
	if err != nil {
		return fmt.Errorf("create vxlan %s (vni %d, local %s, port %d): %w", v.Name, v.VNI, v.Local, v.Port, err)
	}
	return nil
}

// AddBridge makes a bridge without spanning tree that is up.
func (c *Conn) AddBridge(e End) error {
	body := Attrs{b: ifinfo(0, unix.IFF_UP, unix.IFF_UP)}
	e.attrs(&body)
	body.Nest(unix.IFLA_LINKINFO, nil, func(i *Attrs) { i.Str(unix.IFLA_INFO_KIND, "bridge") })
	err := c.Do([]Message{{Type: unix.RTM_NEWLINK, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Body: body.b}})
	if err != nil {
		return fmt.Errorf("create bridge %s: %w", e.Name, err)
	}
	return nil
}

// SetMaster enslaves a device to a bridge; hairpin lets the port send back what it received.
func (c *Conn) SetMaster(index, master int, hairpin bool) error {
	body := Attrs{b: ifinfo(index, 0, 0)}
	body.U32(unix.IFLA_MASTER, uint32(master))
	msgs := []Message{{Type: unix.RTM_NEWLINK, Body: body.b}}
	if hairpin {
		port := Attrs{b: ifinfo(index, 0, 0)}
		port.b[0] = unix.AF_BRIDGE
		port.Nest(unix.IFLA_PROTINFO, nil, func(p *Attrs) { p.U8(unix.IFLA_BRPORT_MODE, 1) })
		msgs = append(msgs, Message{Type: unix.RTM_SETLINK, Body: port.b})
	}
	if err := c.Do(msgs); err != nil {
		return fmt.Errorf("attach link %d to bridge %d: %w", index, master, err)
	}
	return nil
}

// SetUp brings a device up or down.
func (c *Conn) SetUp(index int, up bool) error {
	var flags uint32
	if up {
		flags = unix.IFF_UP
	}
	if err := c.Do([]Message{{Type: unix.RTM_NEWLINK, Body: ifinfo(index, flags, unix.IFF_UP)}}); err != nil {
		return fmt.Errorf("set link %d up=%v: %w", index, up, err)
	}
	return nil
}

// Up is the request that brings a device up.
func Up(index int) Message {
	return Message{Type: unix.RTM_NEWLINK, Body: ifinfo(index, unix.IFF_UP, unix.IFF_UP)}
}

// SetAlias is the request that gives a device a description.
func SetAlias(index int, alias string) Message {
	body := Attrs{b: ifinfo(index, 0, 0)}
	body.Bytes(unix.IFLA_IFALIAS, []byte(alias))
	return Message{Type: unix.RTM_NEWLINK, Body: body.b}
}

// SetMTU changes a device's MTU.
func (c *Conn) SetMTU(index, mtu int) error {
	body := Attrs{b: ifinfo(index, 0, 0)}
	body.U32(unix.IFLA_MTU, uint32(mtu))
	if err := c.Do([]Message{{Type: unix.RTM_NEWLINK, Body: body.b}}); err != nil {
		return fmt.Errorf("set mtu %d of link %d: %w", mtu, index, err)
	}
	return nil
}

// DelLink deletes a device by name; a missing one is not an error.
func (c *Conn) DelLink(name string) error { return deleteLink(c.Do, name) }

func (s *Socket) delLink(name string) error { return deleteLink(s.Do, name) }

func deleteLink(do func([]Message, ...unix.Errno) error, name string) error {
	body := Attrs{b: ifinfo(0, 0, 0)}
	body.Str(unix.IFLA_IFNAME, name)
	if err := do([]Message{{Type: unix.RTM_DELLINK, Body: body.b}}, unix.ENODEV); err != nil {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// DelLinks deletes devices by name in one go, which costs hardly more than one; missing ones are not an error. It marks them by a device
// group that must be used for nothing else. It may run beside an audit of the connection, which does not see it.
func (c *Conn) DelLinks(names []string, group uint32) error {
	if len(names) < 2 {
		for _, n := range names {
			return c.Socket.delLink(n)
		}
		return nil
	}
	msgs := make([]Message, 0, len(names))
	for _, n := range names {
		body := Attrs{b: ifinfo(0, 0, 0)}
		body.Str(unix.IFLA_IFNAME, n)
		body.U32(unix.IFLA_GROUP, group)
		msgs = append(msgs, Message{Type: unix.RTM_SETLINK, Body: body.b})
	}
	if err := c.Socket.Do(msgs, unix.ENODEV); err != nil {
		return fmt.Errorf("mark links for deletion: %w", err)
	}
	body := Attrs{b: ifinfo(0, 0, 0)}
	body.U32(unix.IFLA_GROUP, group)
	if err := c.Socket.Do([]Message{{Type: unix.RTM_DELLINK, Body: body.b}}, unix.ENODEV); err != nil {
		return fmt.Errorf("delete %d links: %w", len(names), err)
	}
	return nil
}

func ifinfo(index int, flags, change uint32) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	binary.NativeEndian.PutUint32(b[8:], flags)
	binary.NativeEndian.PutUint32(b[12:], change)
	return b
}

func u32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

func cString(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}
