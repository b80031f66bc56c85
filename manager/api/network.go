package api

// encryptionBytes is what WireGuard adds to a packet on an IPv4 underlay. Nodes know by themselves when theirs is IPv6.
const encryptionBytes = 60

// EffectiveMTU is what a network's containers and tunnels are to have: what was asked for, unless less fits between the nodes; 0 if neither is
// known.
//
// PathMtu is of plain tunnels for all networks; encryption needs its own bytes.
func (n *NetworkRecord) EffectiveMTU() int {
	path := n.GetPathMtu()
	if n.GetEncrypted() && path > encryptionBytes {
		path -= encryptionBytes
	}
	if n.GetMtu() != 0 && path != 0 {
		return int(min(n.Mtu, path))
	}
	return int(max(n.GetMtu(), path))
}
