package api

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"math/big"
)

// idLength is the length of object IDs: 25 characters of [0-9a-z], as Docker's swarm objects have.
const idLength = 25

// NewID returns a random object ID. It is called by proposers, never while a log entry is applied.
func NewID() string {
	var b [17]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err) // the kernel's random source does not fail (getrandom(2))
	}
	return idFrom(b[:])
}

// TaskID derives a task's ID from its service, slot (replicated) or node (global) and generation, so that it need not be stored.
func TaskID(serviceID string, slot uint64, nodeID string, generation uint32) string {
	h := sha256.New()
	h.Write([]byte(serviceID))
	var b [12]byte
	binary.BigEndian.PutUint64(b[:], slot)
	binary.BigEndian.PutUint32(b[8:], generation)
	h.Write(b[:])
	h.Write([]byte(nodeID))
	return idFrom(h.Sum(nil)[:17])
}

func idFrom(b []byte) string {
	s := new(big.Int).SetBytes(b).Text(36)
	for len(s) < idLength {
		s = "0" + s
	}
	return s[len(s)-idLength:]
}
