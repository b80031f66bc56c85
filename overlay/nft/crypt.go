package nft

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/google/nftables/expr"
)

// CryptTableName is the table that keeps plain packets of encrypted networks off the wire.
const CryptTableName = "skein_crypt"

// CryptTable is that table without elements. Its set: vnis, of the encrypted networks here. Nothing on the node makes or takes plain VXLAN packets of
// them; should anything do, they are dropped on their way in and out.
func CryptTable(family byte, dataPort uint16) *Table {
	f := v4
	if family == IPv6 {
		f = v6
	}
	plain := func() []Rule {
		return []Rule{f.rule(proto(unix.IPPROTO_UDP), dport(dataPort), loadVNI(reg0), in("vnis", reg0), drop)}
	}
	return &Table{Family: f.proto, Name: CryptTableName, Sets: []*Set{{Name: "vnis", Key: []Type{TypeMark}}}, Chains: []*Chain{
		{Name: "in", Type: "filter", Hook: unix.NF_INET_PRE_ROUTING, Priority: prioRaw, Rules: plain()},
		{Name: "out", Type: "filter", Hook: unix.NF_INET_LOCAL_OUT, Priority: prioRaw, Rules: plain()},
	}}
}

// loadVNI loads what follows the flags of a VXLAN header: the VNI and a byte that is zero.
func loadVNI(reg uint32) part {
	return exprs(&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 8 + 4, Len: 3, DestRegister: reg})
}

// VNIKey is the key of vnis.
func VNIKey(vni uint32) string { return string(binary.BigEndian.AppendUint32(nil, vni<<8)) }
