package nft

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// Families of tables.
const (
	IPv4 = unix.NFPROTO_IPV4
	IPv6 = unix.NFPROTO_IPV6
)

// Table is the whole desired content of one table.
type Table struct {
	Family byte
	Name   string
	Sets   []*Set
	Chains []*Chain
}

// Type is the type of a set's key field or value: its size, and nft's number for it, which only matters to people who list the table.
type Type struct {
	Size  int
	Magic uint32
}

// Types of fields. Mark and Zone are in the machine's byte order, the others in network order.
var (
	TypeIPv4    = Type{4, 7}
	TypeIPv6    = Type{16, 8}
	TypeEther   = Type{6, 9}
	TypeProto   = Type{1, 12}
	TypeService = Type{2, 13}
	TypeMark    = Type{4, 19}
	TypeZone    = Type{2, 4}
	TypeIfname  = Type{16, 41}
)

// Set is a set, or with Value a map, or with Verdicts a verdict map. Elements go from encoded key (Key) to encoded value: empty in a
// set, the name of a chain to jump to in a verdict map.
type Set struct {
	Name     string
	Key      []Type
	Value    []Type
	Verdicts bool
	Elems    map[string]string
}

// Chain is a base chain when Type is set ("filter", "nat", "route").
type Chain struct {
	Name     string
	Type     string
	Hook     uint32
	Priority int32
	Rules    []Rule
}

// Rule is a list of encoded expressions.
type Rule struct {
	exprs [][]byte
	known string // digest of a rule read from the kernel
}

// digest identifies a rule; it is kept as the rule's comment in the kernel, so that a dump tells whether a rule is the one we mean.
func (r Rule) digest() string {
	if r.exprs == nil {
		return r.known
	}
	h := sha256.New()
	for _, e := range r.exprs {
		h.Write(e)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// Syncer brings tables of one namespace to their desired content. Safe for concurrent use.
type Syncer struct {
	mu    sync.Mutex
	sock  *link.Socket
	known map[tableID]*Table // what the kernel has, as far as we know; absent: must be looked up
}

type tableID struct {
	family byte
	name   string
}

// NewSyncer opens a netfilter connection into ns.
func NewSyncer(ns *link.NS) (*Syncer, error) {
	s, err := link.OpenSocket(ns, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	return &Syncer{sock: s, known: map[tableID]*Table{}}, nil
}

// Close closes the connection; the tables stay.
func (s *Syncer) Close() error { return s.sock.Close() }

// Sync makes the kernel's table equal to want. With full, or after an error, what the kernel has is read first; else what was last
// written is trusted. It tells whether anything had to be changed.
func (s *Syncer) Sync(want *Table, full bool) (changed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := tableID{want.Family, want.Name}
	have := s.known[id]
	if full || have == nil {
		if have, err = s.dump(want); err != nil {
			return false, fmt.Errorf("read nft table %s: %w", want.Name, err)
		}
	}
	delete(s.known, id)
	var msgs []link.Message
	if have == nil || !sameShape(want, have) {
		msgs = replaceTable(want)
	} else {
		msgs = elementChanges(want, have)
	}
	if len(msgs) > 0 {
		if err := s.transact(msgs); err != nil {
			return false, fmt.Errorf("change nft table %s: %w", want.Name, err)
		}
	}
	s.known[id] = want.clone()
	return len(msgs) > 0, nil
}

// Delete removes a table; a missing one is not an error.
func (s *Syncer) Delete(family byte, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.known, tableID{family, name})
	t := &Table{Family: family, Name: name}
	// Creating first makes deletion of a missing table succeed in the same transaction.
	if err := s.transact([]link.Message{newTable(t), delTable(t)}); err != nil {
		return fmt.Errorf("delete nft table %s: %w", name, err)
	}
	return nil
}

// Elements reads the elements of one set as the kernel has them; a missing table or set has none.
func (s *Syncer) Elements(t *Table, set string) (map[string]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range t.Sets {
		if x.Name == set {
			elems, err := s.dumpElements(t, x)
			if errors.Is(err, unix.ENOENT) {
				return nil, nil
			}
			return elems, err
		}
	}
	return nil, fmt.Errorf("nft table %s has no set %s", t.Name, set)
}

func (t *Table) clone() *Table {
	c := *t
	c.Sets = nil
	for _, s := range t.Sets {
		n := *s
		n.Elems = maps.Clone(s.Elems)
		c.Sets = append(c.Sets, &n)
	}
	c.Chains = nil
	for _, ch := range t.Chains {
		n := *ch
		n.Rules = slices.Clone(ch.Rules)
		c.Chains = append(c.Chains, &n)
	}
	return &c
}

// sameShape compares everything but elements.
func sameShape(a, b *Table) bool {
	if len(a.Sets) != len(b.Sets) || len(a.Chains) != len(b.Chains) {
		return false
	}
	sets := map[string]*Set{}
	for _, s := range b.Sets {
		sets[s.Name] = s
	}
	for _, s := range a.Sets {
		o := sets[s.Name]
		if o == nil || s.keyLen() != o.keyLen() || s.valueLen() != o.valueLen() || s.Verdicts != o.Verdicts {
			return false
		}
	}
	chains := map[string]*Chain{}
	for _, c := range b.Chains {
		chains[c.Name] = c
	}
	for _, c := range a.Chains {
		o := chains[c.Name]
		if o == nil || len(c.Rules) != len(o.Rules) || c.Type != o.Type || c.Type != "" && (c.Hook != o.Hook || c.Priority != o.Priority) {
			return false
		}
		for i := range c.Rules {
			if c.Rules[i].digest() != o.Rules[i].digest() {
				return false
			}
		}
	}
	return true
}

func (s *Set) keyLen() int   { return fieldsLen(s.Key) }
func (s *Set) valueLen() int { return fieldsLen(s.Value) }

// fieldsLen pads the fields of a concatenation to registers of four bytes; a single field keeps its size.
func fieldsLen(ts []Type) int {
	if len(ts) == 1 {
		return ts[0].Size
	}
	n := 0
	for _, t := range ts {
		n += (t.Size + 3) &^ 3
	}
	return n
}

// Concat encodes fields as one key or value.
func Concat(fields ...[]byte) string {
	if len(fields) == 1 {
		return string(fields[0])
	}
	var b []byte
	for _, f := range fields {
		b = append(b, f...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return string(b)
}

// Fill sets the elements of one of the table's sets.
func (t *Table) Fill(set string, elems map[string]string) {
	for _, s := range t.Sets {
		if s.Name == set {
			s.Elems = elems
			return
		}
	}
	panic("nft table " + t.Name + " has no set " + set)
}
