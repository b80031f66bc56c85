package crypt

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Key is a public key of a node.
type Key struct {
	Slot   uint8 // 0 or 1
	Public [32]byte
	Port   uint16 // UDP port on the node's underlay address
}

// Slots is how many keys a node may have: one, and its successor while that takes over.
const Slots = 2

// ownKey is a key of this node with its private half, as it rests in the store.
type ownKey struct {
	Slot    uint8
	Private []byte
	Created time.Time
}

func newKey(slot uint8, now time.Time) (ownKey, error) {
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return ownKey{}, fmt.Errorf("make a key: %w", err)
	}
	return ownKey{Slot: slot, Private: k.Bytes(), Created: now}, nil
}

func (k ownKey) public() ([32]byte, error) {
	var out [32]byte
	p, err := ecdh.X25519().NewPrivateKey(k.Private)
	if err != nil || k.Slot >= Slots {
		return out, fmt.Errorf("stored key is damaged: %w", err)
	}
	return [32]byte(p.PublicKey().Bytes()), nil
}

// maxKeys bounds what is read back from the store.
const maxKeys = 4096

// loadKeys reads the keys that an earlier daemon left in a memory file.
func loadKeys(fd int) ([]ownKey, error) {
	f := os.NewFile(uintptr(fd), "keys")
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxKeys))
	if err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	var keys []ownKey
	if err := json.Unmarshal(b, &keys); err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	if len(keys) == 0 || len(keys) > Slots || len(keys) == Slots && keys[0].Slot == keys[1].Slot {
		return nil, fmt.Errorf("read keys: %d of them are no set of this node", len(keys))
	}
	for _, k := range keys {
		if _, err := k.public(); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// storeKeys has the store keep the keys in memory.
func (t *Tunnel) storeKeys(ctx context.Context) error {
	if t.opts.Store == nil {
		return nil
	}
	b, err := json.Marshal(t.keys)
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("skein-crypt-keys", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("keep keys: %w", err)
	}
	f := os.NewFile(uintptr(fd), "keys")
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return fmt.Errorf("keep keys: %w", err)
	}
	if err := t.opts.Store.StoreFD(ctx, keysName, fd); err != nil {
		return fmt.Errorf("keep keys: %w", err)
	}
	return nil
}

// Keys are this node's public keys, the one in use first.
func (t *Tunnel) Keys() []Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Key, 0, len(t.keys))
	for _, k := range t.keys {
		p, err := k.public()
		if err != nil { // they were looked at when they were made or loaded
			panic(err)
		}
		out = append(out, Key{Slot: k.Slot, Public: p, Port: t.port(k.Slot)})
	}
	return out
}

func (t *Tunnel) port(slot uint8) uint16 { return t.opts.Port + uint16(slot) }

// ensureKeys makes the first key. The caller holds mu.
func (t *Tunnel) ensureKeys(ctx context.Context) error {
	if len(t.keys) > 0 {
		return nil
	}
	k, err := newKey(0, time.Now())
	if err != nil {
		return err
	}
	t.keys = []ownKey{k}
	if err := t.storeKeys(ctx); err != nil {
		t.keys = nil
		return err
	}
	return nil
}

func sameKeys(a, b []Key) bool { return slices.Equal(a, b) }
