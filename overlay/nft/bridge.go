package nft

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// BridgeParams is one single-host network.
type BridgeParams struct {
	Device   string
	Subnet   netip.Prefix
	Internal bool
}

// BridgeTable is the table "skein_bridge" without elements. Its maps: host_ports: host address . proto . port → address . port, ports: proto .
// port → address . port on all addresses of the node. Bridges are isolated from each other and from outside but for published ports.
func BridgeTable(bridges []BridgeParams) *Table {
	f := v4
	value := []Type{TypeIPv4, TypeService}
	t := &Table{Family: f.proto, Name: "skein_bridge", Sets: []*Set{
		{Name: "host_ports", Key: []Type{TypeIPv4, TypeProto, TypeService}, Value: value},
		{Name: "ports", Key: []Type{TypeProto, TypeService}, Value: value},
	}}
	translate := []Rule{
		f.rule(localAddr(false), loadDst(reg0), loadProto(reg0+1), loadDport(reg0+2), lookup("host_ports", reg0, 1), dnat(true)),
		f.rule(localAddr(false), loadProto(reg0), loadDport(reg0+1), lookup("ports", reg0, 1), dnat(true)),
	}
	raw := &Chain{Name: "raw", Type: "filter", Hook: unix.NF_INET_PRE_ROUTING, Priority: prioRaw}
	forward := &Chain{Name: "forward", Type: "filter", Hook: unix.NF_INET_FORWARD, Priority: prioFilter}
	snat := &Chain{Name: "snat", Type: "nat", Hook: unix.NF_INET_POST_ROUTING, Priority: prioSNAT + 1}
	for _, b := range bridges {
		raw.Rules = append(raw.Rules, f.rule(iif(b.Device), dstLoopback, drop))
		forward.Rules = append(forward.Rules, f.rule(iif(b.Device), oif(b.Device), accept))
		snat.Rules = append(snat.Rules,
			f.rule(oif(b.Device), srcLoopback, masquerade),           // localhost:port on this node
			f.rule(oif(b.Device), src(b.Subnet), ctDNAT, masquerade), // back to the same bridge through a published port
			f.rule(src(b.Subnet), oifNot(b.Device), masquerade))      // egress
	}
	for _, b := range bridges {
		if b.Internal {
			forward.Rules = append(forward.Rules, f.rule(iif(b.Device), drop), f.rule(oif(b.Device), drop))
		}
	}
	forward.Rules = append(forward.Rules, f.rule(ctEstablished, accept))
	for _, b := range bridges {
		forward.Rules = append(forward.Rules, f.rule(oif(b.Device), ctNotDNAT, drop))
	}
	// After the mesh's chains: a port published in the cluster wins.
	t.Chains = []*Chain{raw, forward, snat,
		{Name: "dnat", Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: prioDNAT + 1, Rules: translate},
		{Name: "dnat_out", Type: "nat", Hook: unix.NF_INET_LOCAL_OUT, Priority: prioDNAT + 1, Rules: translate}}
	return t
}

// HostPortKey is the key of host_ports.
func HostPortKey(a netip.Addr, protocol byte, port uint16) string {
	return Concat(a.AsSlice(), []byte{protocol}, be16(port))
}
