package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Hook priorities keep a distance of five from the standard ones, so that other tables' order relative to ours is defined.
const (
	prioRaw    = -300 - 5
	prioMangle = -150 - 5
	prioDNAT   = -100 - 5
	prioFilter = 0 - 5
	prioSNAT   = 100 - 5
)

// ProbeMark is the mark of packets that are sent in the name of a server and that must not be taken for the beginning of a connection.
const ProbeMark = 0x5cee0001

// SlotClasses are the sizes of slot maps; a service uses the first class that has enough slots for its endpoints.
func SlotClasses() []int { return []int{64, 256, 1024} }

// PickChain names the chain that draws one of n slots; it is a value of pubs and vips.
func PickChain(n int) string { return fmt.Sprintf("pick%d", n) }

// MeshParams are what the static rules of the routing mesh depend on.
type MeshParams struct {
	Device   string       // the mesh VXLAN device
	Gateways string       // pattern of gateway legs' host devices, "skgw-*"
	Node     netip.Addr   // this node's own mesh address
	Pool     netip.Prefix // of all nodes' blocks
	DataPort uint16       // VXLAN's UDP port
	MarkBase uint32       // connection mark of node i is MarkBase+i
	MarkMask uint32       // the bits that make MarkBase recognisable
}

// MeshTableName is the name of the mesh's table in both families.
const MeshTableName = "skein_mesh"

// MeshTable is the table "skein_mesh" without elements. Its sets:
//
//	peer_mark  peer's mesh MAC → mark        peer_zone  peer's mesh MAC → conntrack zone
//	pubs       proto . port → pick chain     slots      proto . port . slot → address . port
//	published  proto . port                  targets    address . proto . port that the mesh may reach here
//	self       address . address of each local gateway leg
//	nodes      underlay addresses of all nodes
//
// The entry node picks a backend and sends the packet over the mesh device unchanged but for its destination; the backend's node
// remembers in the connection mark from which peer it came and routes the answers back there, so that the entry node can undo its
// translation. The zone of the original direction is the peer too: two entry nodes may bring the same client tuple.
func MeshTable(v6family bool, p MeshParams) *Table {
	f := v4
	if v6family {
		f = v6
	}
	b := meshBuilder{f: f, p: p}
	t := &Table{Family: f.proto, Name: MeshTableName, Sets: []*Set{
		{Name: "peer_mark", Key: []Type{TypeEther}, Value: []Type{TypeMark}},
		{Name: "peer_zone", Key: []Type{TypeEther}, Value: []Type{TypeZone}},
		{Name: "pubs", Key: []Type{TypeProto, TypeService}, Verdicts: true},
		{Name: "slots", Key: []Type{TypeProto, TypeService, TypeMark}, Value: []Type{f.addrType, TypeService}},
		{Name: "published", Key: []Type{TypeProto, TypeService}},
		{Name: "targets", Key: []Type{f.addrType, TypeProto, TypeService}},
		{Name: "self", Key: []Type{f.addrType, f.addrType}},
		{Name: "nodes", Key: []Type{f.addrType}},
	}}
	for _, n := range SlotClasses() {
		t.Chains = append(t.Chains, &Chain{Name: PickChain(n), Rules: []Rule{f.rule(
			loadProto(reg0), loadDport(reg0+1), loadRandom(reg0+2, uint32(n)), lookup("slots", reg0, 1), dnat(true))}})
	}
	t.Chains = append(t.Chains, b.raw(), b.rawOut(), b.mark(), b.dnatIn(), b.dnatOut(), b.input(), b.clamp(), b.forward(), b.snat())
	return t
}

type meshBuilder struct {
	f family
	p MeshParams
}

// rules puts rules together. What nearly all packets fail stands first in each, and devices, whose names cost most to compare, come last:
// every packet of every published port passes all of this.
func (b meshBuilder) rules(rs ...[]part) []Rule {
	var out []Rule
	for _, r := range rs {
		out = append(out, b.f.rule(r...))
	}
	return out
}

// raw: tunnel packets are not tracked; nothing reaches the host's loopback addresses through our devices (route_localnet is on there). A
// container sends from its own address only.
func (b meshBuilder) raw() *Chain {
	c := &Chain{Name: "raw", Type: "filter", Hook: unix.NF_INET_PRE_ROUTING, Priority: prioRaw}
	if b.f.proto == IPv6 {
		c.Rules = b.rules([]part{iif(b.p.Gateways), foreignSource, drop})
	}
	c.Rules = append(c.Rules, b.rules(
		[]part{proto(unix.IPPROTO_UDP), dport(b.p.DataPort), notrack},
		[]part{dstLoopback, iif(b.p.Gateways), drop},
		[]part{dstLoopback, iif(b.p.Device), drop},
		[]part{iif(b.p.Device), loadEtherSrc(1), lookup("peer_zone", 1, 1), setOriginalZone(1)},
	)...)
	return c
}

func (b meshBuilder) rawOut() *Chain {
	return &Chain{Name: "raw_out", Type: "filter", Hook: unix.NF_INET_LOCAL_OUT, Priority: prioRaw, Rules: b.rules(
		[]part{proto(unix.IPPROTO_UDP), dport(b.p.DataPort), notrack},
		[]part{markIs(ProbeMark), notrack},
	)}
}

func (b meshBuilder) mark() *Chain {
	return &Chain{Name: "mark", Type: "filter", Hook: unix.NF_INET_PRE_ROUTING, Priority: prioMangle, Rules: b.rules(
		[]part{ctNew, iif(b.p.Device), loadEtherSrc(1), lookup("peer_mark", 1, 1), setCtMark(1)},
		[]part{ctMarkIs(b.p.MarkBase, b.p.MarkMask), ctReply, iif(b.p.Gateways), setMark(2)},
	)}
}

func (b meshBuilder) dnatIn() *Chain {
	return &Chain{Name: "dnat", Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: prioDNAT, Rules: b.rules(
		[]part{iifNot(b.p.Device), localAddr(false), loadProto(reg0), loadDport(reg0 + 1), vmap("pubs", reg0)},
	)}
}

func (b meshBuilder) dnatOut() *Chain {
	return &Chain{Name: "dnat_out", Type: "nat", Hook: unix.NF_INET_LOCAL_OUT, Priority: prioDNAT, Rules: b.rules(
		[]part{localAddr(false), loadProto(reg0), loadDport(reg0 + 1), vmap("pubs", reg0)},
	)}
}

// input: tunnel packets come from nodes only; a published port without a backend refuses at once rather than fall through to a process.
func (b meshBuilder) input() *Chain {
	published := []part{ctNew, ctNotDNAT, loadProto(reg0), loadDport(reg0 + 1), in("published", reg0)}
	return &Chain{Name: "input", Type: "filter", Hook: unix.NF_INET_LOCAL_IN, Priority: prioFilter, Rules: b.rules(
		[]part{proto(unix.IPPROTO_UDP), dport(b.p.DataPort), loadSrc(1), notIn("nodes", 1), drop},
		append([]part{proto(unix.IPPROTO_TCP)}, append(published, resetTCP)...),
		append([]part{proto(unix.IPPROTO_UDP)}, append(published, unreachable)...),
		append([]part{proto(unix.IPPROTO_SCTP)}, append(published, unreachable)...),
	)}
}

// clamp: VXLAN looks its outer route up with the packet's mark, so a mark left on would lead the tunnel into itself.
func (b meshBuilder) clamp() *Chain {
	return &Chain{Name: "clamp", Type: "filter", Hook: unix.NF_INET_FORWARD, Priority: prioMangle, Rules: b.rules(
		[]part{isSYN, oif(b.p.Device), clampMSS},
		[]part{isSYN, iif(b.p.Device), clampMSS},
		[]part{marked, oif(b.p.Device), clearMark},
	)}
}

// forward: gateway legs are reached only through published ports, the mesh device is no back door.
func (b meshBuilder) forward() *Chain {
	w := b.f.addrLen / 4
	return &Chain{Name: "forward", Type: "filter", Hook: unix.NF_INET_FORWARD, Priority: prioFilter, Rules: b.rules(
		[]part{ctEstablished, accept},
		[]part{iif(b.p.Gateways), dstMetadata, drop},
		[]part{iif(b.p.Device), oif(b.p.Gateways), loadDst(reg0), loadProto(reg0 + w), loadDport(reg0 + w + 1), in("targets", reg0), accept},
		[]part{iif(b.p.Device), drop},
		[]part{oif(b.p.Gateways), ctNotDNAT, drop},
		[]part{oif(b.p.Device), ctNotDNAT, drop},
	)}
}

func (b meshBuilder) snat() *Chain {
	return &Chain{Name: "snat", Type: "nat", Hook: unix.NF_INET_POST_ROUTING, Priority: prioSNAT, Rules: b.rules(
		// a container that reaches itself through a published port
		[]part{loadSrc(reg0), loadDst(reg0 + b.f.addrLen/4), in("self", reg0), snat(b.p.Node)},
		// a client on a node: its address may be local where the backend runs
		[]part{oif(b.p.Device), loadSrc(1), in("nodes", 1), masquerade},
		[]part{oif(b.p.Device), localAddr(true), masquerade},
		// localhost on this node
		[]part{oif(b.p.Gateways), srcLoopback, snat(b.p.Node)},
		[]part{oif(b.p.Device), srcLoopback, snat(b.p.Node)},
		// egress
		[]part{src(b.p.Pool), oifNot(b.p.Gateways), oifNot(b.p.Device), oifNot("lo"), masquerade},
	)}
}

// Element encodings of the mesh table.

// PortKey is the key of pubs and published.
func PortKey(protocol byte, port uint16) string { return Concat([]byte{protocol}, be16(port)) }

// MeshSlotKey is the key of the mesh's slots.
func MeshSlotKey(protocol byte, port uint16, slot int) string {
	return Concat([]byte{protocol}, be16(port), native(uint32(slot)))
}

// AddrPort is the value of the mesh's slots.
func AddrPort(a netip.Addr, port uint16) string { return Concat(a.AsSlice(), be16(port)) }

// TargetKey is the key of targets.
func TargetKey(a netip.Addr, protocol byte, port uint16) string {
	return Concat(a.AsSlice(), []byte{protocol}, be16(port))
}

// SelfKey is the key of self.
func SelfKey(a netip.Addr) string { return Concat(a.AsSlice(), a.AsSlice()) }

// AddrKey is the key of nodes and vips.
func AddrKey(a netip.Addr) string { return string(a.AsSlice()) }

// MarkValue is a value of peer_mark.
func MarkValue(mark uint32) string { return string(native(mark)) }

// ZoneValue is a value of peer_zone.
func ZoneValue(zone uint16) string { return string(binary.NativeEndian.AppendUint16(nil, zone)) }

// VIPSlotKey is the key of a network's slots.
func VIPSlotKey(vip netip.Addr, slot int) string { return Concat(vip.AsSlice(), native(uint32(slot))) }

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

// VIPTable is the table "skein_vip" of a network's router namespace without elements. Its sets: vips: address → pick chain, slots: address .
// slot → backend, self: address . address of local endpoints; legs is the pattern of the containers' devices. A VIP is also a local route there: it answers pings, and a service
// without a ready endpoint refuses at once, because the namespace has no listener.
func VIPTable(v6family bool, legs string, gateway netip.Addr) *Table {
	f := v4
	if v6family {
		f = v6
	}
	w := f.addrLen / 4
	t := &Table{Family: f.proto, Name: "skein_vip", Sets: []*Set{
		{Name: "vips", Key: []Type{f.addrType}, Verdicts: true},
		{Name: "slots", Key: []Type{f.addrType, TypeMark}, Value: []Type{f.addrType}},
		{Name: "self", Key: []Type{f.addrType, f.addrType}},
	}}
	for _, n := range SlotClasses() {
		t.Chains = append(t.Chains, &Chain{Name: PickChain(n), Rules: []Rule{
			f.rule(loadDst(reg0), loadRandom(reg0+w, uint32(n)), lookup("slots", reg0, 1), dnat(false))}})
	}
	if v6family {
		t.Chains = append(t.Chains, &Chain{Name: "raw", Type: "filter", Hook: unix.NF_INET_PRE_ROUTING, Priority: prioRaw, Rules: []Rule{
			f.rule(iif(legs), foreignSource, drop)}}) // a container sends from its own address only
	}
	t.Chains = append(t.Chains,
		&Chain{Name: "raw_out", Type: "filter", Hook: unix.NF_INET_LOCAL_OUT, Priority: prioRaw, Rules: []Rule{f.rule(markIs(ProbeMark), notrack)}},
		&Chain{Name: "dnat", Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: prioDNAT, Rules: []Rule{
			f.rule(notICMP, loadDst(1), vmap("vips", 1))}},
		&Chain{Name: "snat", Type: "nat", Hook: unix.NF_INET_POST_ROUTING, Priority: prioSNAT, Rules: []Rule{
			f.rule(loadSrc(reg0), loadDst(reg0+w), in("self", reg0), snat(gateway))}})
	return t
}
