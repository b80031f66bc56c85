package dispatcher

import (
	"fmt"

	"skein/manager/api"
)

// Bounds of what a node may say of how it encrypts; it is kept in the log and told to others.
const (
	maxCryptKeys = 2
	maxCryptErr  = 1 << 10
)

func validCrypt(c *api.NodeCrypt) bool {
	if len(c.GetKeys()) > maxCryptKeys || len(c.GetErr()) > maxCryptErr {
		return false
	}
	for i, k := range c.GetKeys() {
		if k.Slot >= maxCryptKeys || len(k.PublicKey) != 32 || k.Port < 1 || k.Port > 65535 || i > 0 && k.Slot == c.Keys[0].Slot {
			return false
		}
	}
	return true
}

// maxUnencrypted bounds how many nodes are named.
const maxUnencrypted = 5

// unencrypted names the nodes that a node shares encrypted networks with and has no session with.
func (d *Dispatcher) unencrypted(n *node) []string {
	var out []string
	for i, index := range n.facts.GetNoSession() {
		other := d.spread.nodes[index]
		switch {
		case i == maxUnencrypted:
			return append(out, fmt.Sprintf("encrypted networks: no session with %d more nodes", len(n.facts.NoSession)-i))
		case other == nil:
		case len(other.Keys) == 0:
			out = append(out, fmt.Sprintf("encrypted networks: node %s has no key", other.Hostname))
		default:
			out = append(out, fmt.Sprintf("encrypted networks: no session with node %s: nothing reaches it; is it up, and UDP port %d open between %s and %s?",
				other.Hostname, other.Keys[0].Port, n.rec.UnderlayAddr, other.UnderlayAddr))
		}
	}
	return out
}

// noteCrypt records a node's new keys.
func (d *Dispatcher) noteCrypt(n *node, c *api.NodeCrypt) {
	if c != nil && validCrypt(c) {
		d.writer.said(n.id, &api.Hello{Crypt: c})
	}
}
