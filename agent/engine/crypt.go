package engine

import (
	"fmt"

	"skein/manager/api"
	"skein/overlay/crypt"
)

// CryptKeys is what this node encrypts networks with, for the managers.
func (e *Engine) CryptKeys() *api.NodeCrypt {
	keys, err := e.cfg.Network.CryptKeys()
	if err != nil {
		return &api.NodeCrypt{Err: err.Error()}
	}
	out := &api.NodeCrypt{}
	for _, k := range keys {
		out.Keys = append(out.Keys, &api.CryptKey{Slot: uint32(k.Slot), PublicKey: k.Public[:], Port: uint32(k.Port)})
	}
	return out
}

// CryptKeysChanged has a value when CryptKeys returns others than before.
func (e *Engine) CryptKeysChanged() <-chan struct{} { return e.cfg.Network.CryptKeysChanged() }

// cryptKeys reads another node's keys. One that makes no sense is left out: nothing is sent to it then.
func cryptKeys(in []*api.CryptKey) []crypt.Key {
	var out []crypt.Key
	for _, k := range in {
		if k.Slot < crypt.Slots && len(k.PublicKey) == 32 && k.Port > 0 && k.Port <= 65535 {
			out = append(out, crypt.Key{Slot: uint8(k.Slot), Public: [32]byte(k.PublicKey), Port: uint16(k.Port)})
		}
	}
	return out
}

// rejectUnencrypted refuses a task that needs encryption on a node that has none.
func (e *Engine) rejectUnencrypted(networks []*api.NetworkRecord) error {
	for _, n := range networks {
		if !n.GetEncrypted() {
			continue
		}
		if _, err := e.cfg.Network.CryptKeys(); err != nil {
			return fmt.Errorf("network %s is encrypted: %w", n.GetName(), err)
		}
	}
	return nil
}

// attached are the networks of a task.
func (t *taskController) attached() []*api.NetworkRecord {
	var out []*api.NetworkRecord
	for _, a := range t.a.Attachments {
		out = append(out, t.nets[a.NetworkId])
	}
	return out
}
