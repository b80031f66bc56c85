package dispatcher

import (
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

// noteCrypt records a node's new keys.
func (d *Dispatcher) noteCrypt(n *node, c *api.NodeCrypt) {
	if c != nil && validCrypt(c) {
		d.writer.said(n.id, &api.Hello{Crypt: c})
	}
}
