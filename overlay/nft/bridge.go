package nft

import (
	"net/netip"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// BridgeParams is one family of a single-host network.
type BridgeParams struct {
	Device      string
	Subnet      netip.Prefix
	Internal    bool
	Separate    bool       // its containers do not reach each other but through published ports
	Plain       bool       // what they send out keeps its source
	Source      netip.Addr // or gets this one; invalid: the outgoing device's
	Routed      bool       // published ports are reached at their own addresses, nothing is translated
	Unprotected bool       // all ports are
	Trusted     string     // devices from which all ports are reached, separated by colons
}

// BridgeTable is the table "skein_bridge" of a family without elements. Its sets: host_ports: host address . proto . port → address . port,
// ports: proto . port → address . port on all addresses of the node, targets: address . proto . port of routed networks that may be reached.
// Bridges are isolated from each other and from outside but for published ports. With bridgeFilter the kernel shows frames on bridges to
// this table, too: then it would give an answer to ::1 that address before the bridge's own device sees it, which drops that, so what the
// node sends from ::1 is left to its own processes, and refused at once where there is none.
func BridgeTable(v6family, bridgeFilter bool, bridges []BridgeParams) *Table {
	f := v4
	if v6family {
		f = v6
	}
	w := f.addrLen / 4
	value := []Type{f.addrType, TypeService}
	t := &Table{Family: f.proto, Name: "skein_bridge", Sets: []*Set{
		{Name: "host_ports", Key: []Type{f.addrType, TypeProto, TypeService}, Value: value},
		{Name: "ports", Key: []Type{TypeProto, TypeService}, Value: value},
		{Name: "targets", Key: []Type{f.addrType, TypeProto, TypeService}},
	}}
	translate := []Rule{
		f.rule(localAddr(false), loadDst(reg0), loadProto(reg0+w), loadDport(reg0+w+1), lookup("host_ports", reg0, 1), dnat(true)),
		f.rule(localAddr(false), loadProto(reg0), loadDport(reg0+1), lookup("ports", reg0, 1), dnat(true)),
	}
	translateOut := translate
	if v6family && bridgeFilter {
		translateOut = append([]Rule{f.rule(srcLoopback, ret)}, translate...)
	}
	raw := &Chain{Name: "raw", Type: "filter", Hook: unix.NF_INET_PRE_ROUTING, Priority: prioRaw}
	snat := &Chain{Name: "snat", Type: "nat", Hook: unix.NF_INET_POST_ROUTING, Priority: prioSNAT + 1}
	for _, b := range bridges {
		raw.Rules = append(raw.Rules, f.rule(iif(b.Device), dstLoopback, drop))
		snat.Rules = append(snat.Rules, f.bridgeSNAT(b)...)
	}
	// After the mesh's chains: a port published in the cluster wins.
	t.Chains = []*Chain{raw, f.bridgeForward(bridges), snat,
		{Name: "dnat", Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: prioDNAT + 1, Rules: translate},
		{Name: "dnat_out", Type: "nat", Hook: unix.NF_INET_LOCAL_OUT, Priority: prioDNAT + 1, Rules: translateOut}}
	return t
}

func (f family) bridgeSNAT(b BridgeParams) []Rule {
	rules := []Rule{
		f.rule(oif(b.Device), srcLoopback, masquerade),           // localhost:port on this node
		f.rule(oif(b.Device), src(b.Subnet), ctDNAT, masquerade), // back to the same bridge through a published port
	}
	switch {
	case b.Plain || b.Routed:
	case b.Source.IsValid():
		rules = append(rules, f.rule(src(b.Subnet), oifNot(b.Device), snat(b.Source)))
	default:
		rules = append(rules, f.rule(src(b.Subnet), oifNot(b.Device), masquerade)) // egress
	}
	return rules
}

func (f family) bridgeForward(bridges []BridgeParams) *Chain {
	c := &Chain{Name: "forward", Type: "filter", Hook: unix.NF_INET_FORWARD, Priority: prioFilter}
	add := func(parts ...part) { c.Rules = append(c.Rules, f.rule(parts...)) }
	for _, b := range bridges {
		if b.Separate {
			add(iif(b.Device), oif(b.Device), ctDNAT, accept)
			add(iif(b.Device), oif(b.Device), ctEstablished, accept)
			add(iif(b.Device), oif(b.Device), drop)
		} else {
			add(iif(b.Device), oif(b.Device), accept)
		}
	}
	for _, b := range bridges {
		if b.Internal {
			add(iif(b.Device), drop)
			add(oif(b.Device), drop)
		}
	}
	add(ctEstablished, accept)
	for _, b := range bridges {
		for _, t := range strings.Split(b.Trusted, ":") {
			if t != "" {
				add(iif(t), oif(b.Device), accept)
			}
		}
		switch {
		case b.Unprotected:
			add(oif(b.Device), accept)
		case b.Routed:
			w := f.addrLen / 4
			add(oif(b.Device), proto(f.icmp), accept)
			add(oif(b.Device), loadDst(reg0), loadProto(reg0+w), loadDport(reg0+w+1), in("targets", reg0), accept)
		}
		add(oif(b.Device), ctNotDNAT, drop)
	}
	return c
}

var ret = exprs(&expr.Verdict{Kind: expr.VerdictReturn})

// HostPortKey is the key of host_ports.
func HostPortKey(a netip.Addr, protocol byte, port uint16) string {
	return Concat(a.AsSlice(), []byte{protocol}, be16(port))
}
