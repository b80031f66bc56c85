package api

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"math/bits"
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
	return TaskIDOf(serviceID, slot, nodeID, generation).String()
}

// TaskIDOf is TaskID in compact form.
func TaskIDOf(serviceID string, slot uint64, nodeID string, generation uint32) ID {
	b := make([]byte, 0, 160)
	b = append(b, serviceID...)
	b = binary.BigEndian.AppendUint64(b, slot)
	b = binary.BigEndian.AppendUint32(b, generation)
	b = append(b, nodeID...)
	sum := sha256.Sum256(b)
	return idOf(sum[:17])
}

// half is how many values twelve digits have.
const half = 4738381338321616896 // 36^12

// ID is an object ID in compact form: its first digit, the next twelve and the last twelve. The order of IDs is that of their texts.
type ID struct {
	Top    uint8
	Hi, Lo uint64
}

// idOf takes the last 25 digits of a number of 17 bytes.
func idOf(b []byte) ID {
	v1, v0 := binary.BigEndian.Uint64(b[1:]), binary.BigEndian.Uint64(b[9:])
	var id ID
	var q1, q0, rest uint64
	q1, rest = bits.Div64(uint64(b[0]), v1, half)
	q0, id.Lo = bits.Div64(rest, v0, half)
	q0, id.Hi = bits.Div64(q1, q0, half)
	id.Top = uint8(q0 % 36)
	return id
}

func idFrom(b []byte) string { return idOf(b).String() }

// ParseID reads an ID's text.
func ParseID(s string) (ID, bool) {
	if len(s) != idLength {
		return ID{}, false
	}
	top, ok0 := digits(s[:1])
	hi, ok1 := digits(s[1:13])
	lo, ok2 := digits(s[13:])
	return ID{uint8(top), hi, lo}, ok0 && ok1 && ok2
}

func digits(s string) (v uint64, ok bool) {
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'z':
			c -= 'a' - 10
		default:
			return 0, false
		}
		v = v*36 + uint64(c)
	}
	return v, true
}

// Append appends the ID's text.
func (v ID) Append(b []byte) []byte {
	const alphabet = "0123456789abcdefghijklmnopqrstuvwxyz"
	var t [idLength]byte
	t[0] = alphabet[v.Top%36]
	hi, lo := v.Hi, v.Lo
	for i := range 12 {
		t[12-i], t[24-i] = alphabet[hi%36], alphabet[lo%36]
		hi, lo = hi/36, lo/36
	}
	return append(b, t[:]...)
}

// String is the ID's text.
func (v ID) String() string { return string(v.Append(make([]byte, 0, idLength))) }

// Compare orders IDs as their texts.
func (v ID) Compare(o ID) int {
	switch {
	case v == o:
		return 0
	case v.Top < o.Top || (v.Top == o.Top && (v.Hi < o.Hi || (v.Hi == o.Hi && v.Lo < o.Lo))):
		return -1
	}
	return 1
}

// Rank maps the ID to the whole range of 64 bits, evenly and keeping the order.
func (v ID) Rank() uint64 {
	const most = 10661358011223638016 // 36^13 / 16
	hi, lo := bits.Mul64(uint64(v.Top), half)
	lo, carry := bits.Add64(lo, v.Hi, 0)
	x := (hi+carry)<<60 | lo>>4
	rank, _ := bits.Div64(min(x, most-1), 0, most)
	return rank
}
