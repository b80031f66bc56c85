package overlay

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"net/netip"
	"strings"

	"skein/overlay/link"
)

// Names of devices and files. All that Skein makes in a node's namespace starts with "sk", except bridges, which their users name.
const (
	meshDevice    = "skein-mesh"
	gatewayPrefix = "skgw-" // host end of a gateway leg
	bridgePrefix  = "skbp-" // host end of a bridge leg
	legPrefix     = "c-"    // router end of an overlay leg; lives in a router namespace
	vxlanDevice   = "vx"    // in a router namespace
	routerPrefix  = "net-"  // files of router namespaces
	meshVNI       = 4090
	loopback      = 1 // index of lo in every namespace
)

// Marks and tables of the mesh: both are base + node index. Tables lie far above what people number by hand.
const (
	markBase  = 0x5ce10000
	markMask  = 0xffff0000
	tableBase = 0x5ce10000
)

var (
	// outerMAC is the MAC of the outer end of every leg; legs are point to point, so it need not be unique, and answers stay right when
	// a leg is made anew.
	outerMAC   = link.MAC{0x02, 0x5c, 0, 0, 0, 1}
	gatewayVia = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	routerVia6 = netip.MustParseAddr("fe80::5c:1")
)

// tag shortens an id to ten characters for device names: four readable ones and 30 bits of its hash.
func tag(id string) string {
	head := make([]byte, 0, 4)
	for i := 0; i < len(id) && len(head) < cap(head); i++ {
		if c := id[i]; c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' {
			head = append(head, c)
		}
	}
	sum := sha256.Sum256([]byte(id))
	hash := strings.ToLower(base32.StdEncoding.EncodeToString(sum[:10]))
	return string(head) + hash[:10-len(head)]
}

// maxNode is the highest index that addresses, MACs, marks and zones have room for.
const maxNode = 1<<14 - 2

// nodeMAC is a node's station address on a VXLAN: 14 bits of index, 24 bits of VNI. Its second byte is 0x50..0x5f for the first 4,096
// nodes and 0x90..0xbf for the others, which no leg's is.
func nodeMAC(vni, node uint32) link.MAC {
	high := byte(node>>8) & 0x3f
	if high < 0x10 {
		high |= 0x50
	} else {
		high |= 0x80
	}
	return link.MAC{0x02, high, byte(node), byte(vni >> 16), byte(vni >> 8), byte(vni)}
}

// Kinds of legs, told apart by the second byte of the container end's MAC.
const (
	overlayLeg = 0x42
	gatewayLeg = 0x43
	bridgeLeg  = 0x44
)

func legMAC(kind byte, a netip.Addr) link.MAC {
	b := a.As16()
	return link.MAC{0x02, kind, b[12], b[13], b[14], b[15]}
}

// nodeVia is the next hop that stands for a node inside a router namespace; a permanent neighbour entry gives its MAC.
func nodeVia(node uint32, v6 bool) netip.Addr {
	if v6 {
		b := netip.MustParseAddr("fe80::5d:0").As16()
		binary.BigEndian.PutUint16(b[14:], uint16(node))
		return netip.AddrFrom16(b)
	}
	return netip.AddrFrom4([4]byte{169, 254, 64 | byte(node>>8)&0x3f, byte(node)})
}

// nodeBlock is a node's /22 of the mesh pool, nodeAddr the node's own address, which is the first usable of it.
func nodeBlock(pool netip.Prefix, node uint32) netip.Prefix {
	b := pool.Masked().Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+node<<10)
	return netip.PrefixFrom(netip.AddrFrom4(b), 22)
}

func nodeAddr(pool netip.Prefix, node uint32) netip.Addr { return nodeBlock(pool, node).Addr().Next() }

// nodeBlock6 is a node's /112 of the cluster's IPv6 prefix, nodeAddr6 the node's own address, which is the first of it.
func nodeBlock6(pool netip.Prefix, node uint32) netip.Prefix {
	b := pool.Masked().Addr().As16()
	binary.BigEndian.PutUint16(b[12:], uint16(node))
	return netip.PrefixFrom(netip.AddrFrom16(b), 112)
}

// nodesPool6 holds all nodes' blocks.
func nodesPool6(pool netip.Prefix) netip.Prefix { return netip.PrefixFrom(pool.Masked().Addr(), 96) }

func nodeAddr6(pool netip.Prefix, node uint32) netip.Addr {
	return nodeBlock6(pool, node).Addr().Next()
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
