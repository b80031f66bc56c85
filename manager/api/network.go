package api

// EffectiveMTU is what a network's containers and tunnels are to have: what was asked for, unless less fits between the nodes; 0 if neither is
// known.
func (n *NetworkRecord) EffectiveMTU() int {
	if n.GetMtu() != 0 && n.GetPathMtu() != 0 {
		return int(min(n.Mtu, n.PathMtu))
	}
	return int(max(n.GetMtu(), n.GetPathMtu()))
}
