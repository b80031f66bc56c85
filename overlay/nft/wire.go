package nft

import (
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

const (
	subsystem = unix.NFNL_SUBSYS_NFTABLES << 8
	// elementsPerMessage keeps the nested list of elements below the 64 KiB that an attribute's length field can say.
	elementsPerMessage = 500
	verdictType        = 0xffffff00
	udataComment       = 0
	policyAccept       = 1
	setDescConcat      = 2
	setFlagConcat      = 0x80
)

func message(op uint16, flags uint16, family byte, f func(*link.Attrs)) link.Message {
	var a link.Attrs
	f(&a)
	body := append([]byte{family, unix.NFNETLINK_V0, 0, 0}, a.Encoded()...)
	return link.Message{Type: subsystem | op, Flags: flags, Body: body}
}

// transact sends one atomic batch.
func (s *Syncer) transact(msgs []link.Message) error {
	res := binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}, unix.NFNL_SUBSYS_NFTABLES)
	batch := make([]link.Message, 0, len(msgs)+2)
	batch = append(batch, link.Message{Type: unix.NFNL_MSG_BATCH_BEGIN, Body: res})
	batch = append(batch, msgs...)
	batch = append(batch, link.Message{Type: unix.NFNL_MSG_BATCH_END, Body: res})
	return s.sock.Transact(batch, len(msgs))
}

func newTable(t *Table) link.Message {
	return message(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, t.Family, func(a *link.Attrs) { a.Str(unix.NFTA_TABLE_NAME, t.Name) })
}

func delTable(t *Table) link.Message {
	return message(unix.NFT_MSG_DELTABLE, 0, t.Family, func(a *link.Attrs) { a.Str(unix.NFTA_TABLE_NAME, t.Name) })
}

// replaceTable builds the table anew, after deleting what there is. Without a deletion the kernel need not wait for readers (10 ms).
func replaceTable(t *Table, exists bool) []link.Message {
	var msgs []link.Message
	if exists {
		msgs = append(msgs, delTable(t))
	}
	msgs = append(msgs, newTable(t))
	for _, c := range t.Chains { // before sets: verdict maps name chains
		msgs = append(msgs, newChain(t, c))
	}
	for i, s := range t.Sets {
		msgs = append(msgs, newSet(t, s, uint32(i+1)))
	}
	for _, c := range t.Chains {
		for _, r := range c.Rules {
			msgs = append(msgs, newRule(t, c, r))
		}
	}
	for _, s := range t.Sets {
		msgs = append(msgs, elements(unix.NFT_MSG_NEWSETELEM, t, s, s.elems)...)
	}
	return msgs
}

// elementChanges sends what changed; deletions precede additions because a changed value is both.
func elementChanges(t *Table) []link.Message {
	var dels, adds []link.Message
	for _, s := range t.Sets {
		del, add := s.differences()
		dels = append(dels, elements(unix.NFT_MSG_DELSETELEM, t, s, del)...)
		adds = append(adds, elements(unix.NFT_MSG_NEWSETELEM, t, s, add)...)
	}
	return append(dels, adds...)
}

func newChain(t *Table, c *Chain) link.Message {
	return message(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, t.Family, func(a *link.Attrs) {
		a.Str(unix.NFTA_CHAIN_TABLE, t.Name)
		a.Str(unix.NFTA_CHAIN_NAME, c.Name)
		if c.Type == "" {
			return
		}
		a.Nest(unix.NFTA_CHAIN_HOOK, nil, func(h *link.Attrs) {
			h.BE32(unix.NFTA_HOOK_HOOKNUM, c.Hook)
			h.BE32(unix.NFTA_HOOK_PRIORITY, uint32(c.Priority))
		})
		a.BE32(unix.NFTA_CHAIN_POLICY, policyAccept)
		a.Str(unix.NFTA_CHAIN_TYPE, c.Type)
	})
}

func newRule(t *Table, c *Chain, r Rule) link.Message {
	return message(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, t.Family, func(a *link.Attrs) {
		a.Str(unix.NFTA_RULE_TABLE, t.Name)
		a.Str(unix.NFTA_RULE_CHAIN, c.Name)
		a.Nest(unix.NFTA_RULE_EXPRESSIONS, nil, func(l *link.Attrs) {
			for _, e := range r.exprs {
				l.Bytes(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, e)
			}
		})
		d := r.digest()
		a.Bytes(unix.NFTA_RULE_USERDATA, append([]byte{udataComment, byte(len(d) + 1)}, d+"\x00"...))
	})
}

func newSet(t *Table, s *Set, id uint32) link.Message {
	return message(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, t.Family, func(a *link.Attrs) {
		var flags uint32
		if len(s.Value) > 0 || s.Verdicts {
			flags |= unix.NFT_SET_MAP
		}
		if len(s.Key) > 1 {
			flags |= setFlagConcat
		}
		a.Str(unix.NFTA_SET_TABLE, t.Name)
		a.Str(unix.NFTA_SET_NAME, s.Name)
		a.BE32(unix.NFTA_SET_FLAGS, flags)
		a.BE32(unix.NFTA_SET_KEY_TYPE, magic(s.Key))
		a.BE32(unix.NFTA_SET_KEY_LEN, uint32(s.keyLen()))
		a.BE32(unix.NFTA_SET_ID, id)
		if s.Verdicts {
			a.BE32(unix.NFTA_SET_DATA_TYPE, verdictType)
			a.BE32(unix.NFTA_SET_DATA_LEN, 0)
		} else if len(s.Value) > 0 {
			a.BE32(unix.NFTA_SET_DATA_TYPE, magic(s.Value))
			a.BE32(unix.NFTA_SET_DATA_LEN, uint32(s.valueLen()))
		}
		if len(s.Key) > 1 {
			a.Nest(unix.NFTA_SET_DESC, nil, func(d *link.Attrs) {
				d.Nest(setDescConcat, nil, func(c *link.Attrs) {
					for _, k := range s.Key {
						c.Nest(unix.NFTA_LIST_ELEM, nil, func(f *link.Attrs) { f.BE32(1, uint32(k.Size)) })
					}
				})
			})
		}
	})
}

func magic(ts []Type) uint32 {
	var m uint32
	for _, t := range ts {
		m = m<<6 | t.Magic
	}
	return m
}

// elements splits a change of a set's elements into messages; the order is fixed so that equal changes look equal.
func elements(op uint16, t *Table, s *Set, elems map[string]string) []link.Message {
	keys := make([]string, 0, len(elems))
	for k := range elems {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var msgs []link.Message
	for part := range slices.Chunk(keys, elementsPerMessage) {
		msgs = append(msgs, message(op, unix.NLM_F_CREATE, t.Family, func(a *link.Attrs) {
			a.Str(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
			a.Str(unix.NFTA_SET_ELEM_LIST_SET, s.Name)
			a.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, nil, func(l *link.Attrs) {
				for _, k := range part {
					l.Nest(unix.NFTA_LIST_ELEM, nil, func(e *link.Attrs) { encodeElement(e, s, k, elems[k]) })
				}
			})
		}))
	}
	return msgs
}

func encodeElement(e *link.Attrs, s *Set, key, value string) {
	e.Nest(unix.NFTA_SET_ELEM_KEY, nil, func(d *link.Attrs) { d.Bytes(unix.NFTA_DATA_VALUE, []byte(key)) })
	switch {
	case s.Verdicts:
		e.Nest(unix.NFTA_SET_ELEM_DATA, nil, func(d *link.Attrs) {
			d.Nest(unix.NFTA_DATA_VERDICT, nil, func(v *link.Attrs) {
				jump := int32(unix.NFT_JUMP)
				v.BE32(unix.NFTA_VERDICT_CODE, uint32(jump))
				v.Str(unix.NFTA_VERDICT_CHAIN, value)
			})
		})
	case len(s.Value) > 0:
		e.Nest(unix.NFTA_SET_ELEM_DATA, nil, func(d *link.Attrs) { d.Bytes(unix.NFTA_DATA_VALUE, []byte(value)) })
	}
}
