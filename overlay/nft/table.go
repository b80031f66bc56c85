package nft

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"iter"
	"maps"
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
	flags  uint32 // of a table read from the kernel; ours have none
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

// Set is a set, or with Value a map, or with Verdicts a verdict map. Elements go from encoded key to encoded value: empty in a set, the
// name of a chain to jump to in a verdict map. It remembers what changed since the kernel was last known to agree, so that a small
// change of a large set is cheap.
type Set struct {
	Name     string
	Key      []Type
	Value    []Type
	Verdicts bool
	elems    map[string]string
	changed  map[string]element // keys that differ from the kernel, with what the kernel has
}

type element struct {
	value string
	there bool
}

// Get returns an element's value, empty if there is none.
func (s *Set) Get(key string) string { return s.elems[key] }

// Len is the number of elements.
func (s *Set) Len() int { return len(s.elems) }

// All walks the elements.
func (s *Set) All() iter.Seq2[string, string] { return maps.All(s.elems) }

// Put adds or changes an element.
func (s *Set) Put(key, value string) {
	if old, ok := s.elems[key]; ok && old == value {
		return
	}
	s.touch(key)
	if s.elems == nil {
		s.elems = map[string]string{}
	}
	s.elems[key] = value
}

// Delete removes an element.
func (s *Set) Delete(key string) {
	if _, ok := s.elems[key]; ok {
		s.touch(key)
		delete(s.elems, key)
	}
}

func (s *Set) touch(key string) {
	if _, ok := s.changed[key]; ok {
		return
	}
	if s.changed == nil {
		s.changed = map[string]element{}
	}
	v, ok := s.elems[key]
	s.changed[key] = element{v, ok}
}

// Replace makes the set have exactly these elements.
func (s *Set) Replace(elems map[string]string) {
	for k := range s.elems {
		if _, ok := elems[k]; !ok {
			s.Delete(k)
		}
	}
	for k, v := range elems {
		s.Put(k, v)
	}
}

// differences gives what to delete from the kernel and what to add, going by what changed.
func (s *Set) differences() (del, add map[string]string) {
	del, add = map[string]string{}, map[string]string{}
	for k, old := range s.changed {
		v, ok := s.elems[k]
		if old.there && (!ok || v != old.value) {
			del[k] = old.value
		}
		if ok && (!old.there || v != old.value) {
			add[k] = v
		}
	}
	return del, add
}

// compare sets what changed by looking at all that the kernel has.
func (s *Set) compare(kernel map[string]string) {
	s.changed = map[string]element{}
	for k, v := range s.elems {
		if old, ok := kernel[k]; !ok || old != v {
			s.changed[k] = element{old, ok}
		}
	}
	for k, v := range kernel {
		if _, ok := s.elems[k]; !ok {
			s.changed[k] = element{v, true}
		}
	}
}

// Chain is a base chain when Type is set ("filter", "nat", "route").
type Chain struct {
	Name     string
	Type     string
	Hook     uint32
	Priority int32
	Rules    []Rule
	drops    bool // of a chain read from the kernel: its policy is not accept, as ours is
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

// Syncer brings tables of one namespace to their desired content. Safe for concurrent use; a Table is not.
type Syncer struct {
	mu     sync.Mutex
	sock   *link.Socket
	synced map[*Table]bool // the kernel has the table but for what its sets remember as changed
	audit  *link.Audit     // nil: nobody watches
}

// NewSyncer opens a netfilter connection into ns.
func NewSyncer(ns *link.NS) (*Syncer, error) {
	s, err := link.OpenSocket(ns, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	return &Syncer{sock: s, synced: map[*Table]bool{}}, nil
}

// Close closes the connection; the tables stay.
func (s *Syncer) Close() error { return s.sock.Close() }

// Load fills a new table with the elements that the kernel's table of this name has, if that has the same rules and sets.
func (s *Syncer) Load(t *Table) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	have, err := s.dump(t)
	if err != nil {
		return fmt.Errorf("read nft table %s: %w", t.Name, err)
	}
	if have == nil || !sameShape(t, have) {
		return nil
	}
	for _, set := range have.Sets {
		t.Set(set.Name).elems = set.elems
		t.Set(set.Name).changed = nil
	}
	s.synced[t] = true
	return nil
}

// Sync makes the kernel's table equal to want. With full, or after an error, what the kernel has is read first; else only what changed
// since the last call is sent. It tells whether anything had to be changed.
func (s *Syncer) Sync(want *Table, full bool) (changed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	replace, exists := false, false
	var have *Table
	if full || !s.synced[want] || s.audit != nil {
		have, err = s.dump(want)
		if err != nil {
			return false, fmt.Errorf("read nft table %s: %w", want.Name, err)
		}
		exists = have != nil
		replace = !exists || !sameShape(want, have)
		if !replace {
			for _, set := range have.Sets {
				want.Set(set.Name).compare(set.elems)
			}
		}
	}
	delete(s.synced, want)
	var msgs []link.Message
	if replace {
		msgs = replaceTable(want, exists)
	} else {
		msgs = elementChanges(want)
	}
	if s.audit != nil && len(msgs) > 0 {
		s.report(want, have, replace)
		if s.audit.Dry() {
			return true, nil
		}
	}
	if len(msgs) > 0 {
		if err := s.transact(msgs); err != nil {
			return false, fmt.Errorf("change nft table %s: %w", want.Name, err)
		}
	}
	for _, set := range want.Sets {
		set.changed = nil
	}
	s.synced[want] = true
	return len(msgs) > 0, nil
}

// Forget drops what is remembered of a table that is no longer used.
func (s *Syncer) Forget(t *Table) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.synced, t)
}

// Delete removes a table; a missing one is not an error.
func (s *Syncer) Delete(family byte, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.synced {
		if t.Family == family && t.Name == name {
			delete(s.synced, t)
		}
	}
	t := &Table{Family: family, Name: name}
	if s.audit != nil {
		there, err := s.exists(t)
		if err != nil {
			return fmt.Errorf("look for nft table %s: %w", name, err)
		}
		if there {
			s.audit.Add("nft table", familyName(family)+" "+name, "surplus")
		}
		if !there || s.audit.Dry() {
			return nil
		}
	}
	// Creating first makes deletion of a missing table succeed in the same transaction.
	if err := s.transact([]link.Message{newTable(t), delTable(t)}); err != nil {
		return fmt.Errorf("delete nft table %s: %w", name, err)
	}
	return nil
}

// sameShape compares everything but elements.
func sameShape(a, b *Table) bool {
	if a.flags != b.flags || len(a.Sets) != len(b.Sets) || len(a.Chains) != len(b.Chains) {
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
		if o == nil || c.drops != o.drops || len(c.Rules) != len(o.Rules) || c.Type != o.Type || c.Type != "" && (c.Hook != o.Hook || c.Priority != o.Priority) {
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

// Set finds a set of the table; asking for one that the table's kind does not have is a programming error.
func (t *Table) Set(name string) *Set {
	for _, s := range t.Sets {
		if s.Name == name {
			return s
		}
	}
	panic("nft table " + t.Name + " has no set " + name)
}
