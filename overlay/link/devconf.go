package link

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Conf4 is a setting of a device for IPv4, net.ipv4.conf.DEVICE.…, by its number in the kernel's interface.
type Conf4 uint16

// Settings of a device for IPv4.
const (
	ProxyARP      Conf4 = 3
	SendRedirects Conf4 = 6
	RPFilter      Conf4 = 8
	RouteLocalnet Conf4 = 26
)

// Key is the setting's name for Sysctl.
func (c Conf4) Key(device string) string {
	names := map[Conf4]string{ProxyARP: "proxy_arp", SendRedirects: "send_redirects", RPFilter: "rp_filter", RouteLocalnet: "route_localnet"}
	return "ipv4/conf/" + device + "/" + names[c]
}

const inetConf = 1 // IFLA_INET_CONF

// SetConf4 is the request that changes settings of a device. It costs a hundredth of writing the files under /proc, whose directory the
// kernel makes when it is first looked at. Audits compare the files only.
func SetConf4(dev int, conf map[Conf4]uint32) Message {
	body := Attrs{b: ifinfo(dev, 0, 0)}
	body.Nest(unix.IFLA_AF_SPEC, nil, func(f *Attrs) {
		f.Nest(unix.AF_INET, nil, func(i *Attrs) {
			i.Nest(inetConf, nil, func(a *Attrs) {
				for c, v := range conf {
					a.U32(uint16(c), v)
				}
			})
		})
	})
	return Message{Type: unix.RTM_NEWLINK, Body: body.b}
}

// Attributes of neighbour tables.
const (
	neighTableName   = 1
	neighTableParms  = 6
	neighParmsDevice = 1
	neighParmsProxy  = 13
)

// ProxyDelayKey is the name for Sysctl of what SetProxyDelay changes.
func ProxyDelayKey(device string) string { return "ipv4/neigh/" + device + "/proxy_delay" }

// SetProxyDelay is the request that has a device answer for others' addresses after so many milliseconds at most; the kernel's default is 800.
func SetProxyDelay(dev int, ms uint64) Message {
	body := Attrs{b: []byte{unix.AF_INET, 0, 0, 0}}
	body.Str(neighTableName, "arp_cache")
	body.Nest(neighTableParms, nil, func(a *Attrs) {
		a.U32(neighParmsDevice, uint32(dev))
		a.Bytes(neighParmsProxy, binary.NativeEndian.AppendUint64(nil, ms))
	})
	return Message{Type: unix.RTM_SETNEIGHTBL, Body: body.b}
}
