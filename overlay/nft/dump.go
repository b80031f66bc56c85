package nft

import (
	"encoding/binary"
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// Exists tells whether the kernel has a table of this name.
func (s *Syncer) Exists(t *Table) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exists(t)
}

func (s *Syncer) exists(t *Table) (bool, error) {
	get := message(unix.NFT_MSG_GETTABLE, 0, t.Family, func(a *link.Attrs) { a.Str(unix.NFTA_TABLE_NAME, t.Name) })
	_, _, err := s.sock.Get(get)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// dump reads the kernel's table named by want; nil when there is none. Rules come back as their digests only.
func (s *Syncer) dump(want *Table) (*Table, error) {
	t := &Table{Family: want.Family, Name: want.Name}
	get := message(unix.NFT_MSG_GETTABLE, 0, t.Family, func(a *link.Attrs) { a.Str(unix.NFTA_TABLE_NAME, t.Name) })
	_, b, err := s.sock.Get(get)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	for typ, v := range link.Parse(b[min(4, len(b)):]) {
		if typ == unix.NFTA_TABLE_FLAGS {
			t.flags = be32(v)
		}
	}
	if err := s.dumpChains(t); err != nil {
		return nil, err
	}
	if err := s.dumpRules(t); err != nil {
		return nil, err
	}
	if err := s.dumpSets(t); err != nil {
		return nil, err
	}
	if !sameShape(want, t) { // it will be replaced whatever its elements
		return t, nil
	}
	for _, set := range t.Sets {
		elems, err := s.dumpElements(t, set)
		if err != nil {
			return nil, err
		}
		set.elems = elems
	}
	return t, nil
}

func (s *Syncer) dumpChains(t *Table) error {
	req := message(unix.NFT_MSG_GETCHAIN, 0, t.Family, func(*link.Attrs) {})
	return s.sock.Dump(req, func(_ uint16, b []byte) error {
		c := &Chain{}
		table := ""
		for typ, v := range link.Parse(b[4:]) {
			switch typ {
			case unix.NFTA_CHAIN_TABLE:
				table = cString(v)
			case unix.NFTA_CHAIN_NAME:
				c.Name = cString(v)
			case unix.NFTA_CHAIN_TYPE:
				c.Type = cString(v)
			case unix.NFTA_CHAIN_POLICY:
				c.drops = be32(v) != policyAccept
			case unix.NFTA_CHAIN_HOOK:
				for typ, v := range link.Parse(v) {
					switch typ {
					case unix.NFTA_HOOK_HOOKNUM:
						c.Hook = be32(v)
					case unix.NFTA_HOOK_PRIORITY:
						c.Priority = int32(be32(v))
					}
				}
			}
		}
		if table == t.Name {
			t.Chains = append(t.Chains, c)
		}
		return nil
	})
}

func (s *Syncer) dumpRules(t *Table) error {
	chains := map[string]*Chain{}
	for _, c := range t.Chains {
		chains[c.Name] = c
	}
	req := message(unix.NFT_MSG_GETRULE, 0, t.Family, func(a *link.Attrs) { a.Str(unix.NFTA_RULE_TABLE, t.Name) })
	return s.sock.Dump(req, func(_ uint16, b []byte) error {
		var table, chain, digest string
		for typ, v := range link.Parse(b[4:]) {
			switch typ {
			case unix.NFTA_RULE_TABLE:
				table = cString(v)
			case unix.NFTA_RULE_CHAIN:
				chain = cString(v)
			case unix.NFTA_RULE_USERDATA:
				if len(v) > 2 && v[0] == udataComment {
					digest = cString(v[2:])
				}
			}
		}
		if c := chains[chain]; c != nil && table == t.Name {
			c.Rules = append(c.Rules, Rule{known: digest})
		}
		return nil
	})
}

func (s *Syncer) dumpSets(t *Table) error {
	req := message(unix.NFT_MSG_GETSET, 0, t.Family, func(a *link.Attrs) { a.Str(unix.NFTA_SET_TABLE, t.Name) })
	return s.sock.Dump(req, func(_ uint16, b []byte) error {
		set := &Set{}
		table := ""
		for typ, v := range link.Parse(b[4:]) {
			switch typ {
			case unix.NFTA_SET_TABLE:
				table = cString(v)
			case unix.NFTA_SET_NAME:
				set.Name = cString(v)
			case unix.NFTA_SET_KEY_LEN:
				set.Key = []Type{{Size: int(be32(v))}}
			case unix.NFTA_SET_DATA_TYPE:
				set.Verdicts = be32(v) == verdictType
			case unix.NFTA_SET_DATA_LEN:
				if n := int(be32(v)); n > 0 {
					set.Value = []Type{{Size: n}}
				}
			}
		}
		if set.Verdicts {
			set.Value = nil
		}
		if table == t.Name && !strings.HasPrefix(set.Name, "__") {
			t.Sets = append(t.Sets, set)
		}
		return nil
	})
}

func (s *Syncer) dumpElements(t *Table, set *Set) (map[string]string, error) {
	out := map[string]string{}
	req := message(unix.NFT_MSG_GETSETELEM, 0, t.Family, func(a *link.Attrs) {
		a.Str(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
		a.Str(unix.NFTA_SET_ELEM_LIST_SET, set.Name)
	})
	err := s.sock.Dump(req, func(_ uint16, b []byte) error {
		for typ, v := range link.Parse(b[4:]) {
			if typ != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				continue
			}
			for _, e := range link.Parse(v) {
				k, val := parseElement(e)
				out[k] = val
			}
		}
		return nil
	})
	return out, err
}

func parseElement(b []byte) (key, value string) {
	for typ, v := range link.Parse(b) {
		for inner, d := range link.Parse(v) {
			switch {
			case typ == unix.NFTA_SET_ELEM_KEY && inner == unix.NFTA_DATA_VALUE:
				key = string(d)
			case typ == unix.NFTA_SET_ELEM_DATA && inner == unix.NFTA_DATA_VALUE:
				value = string(d)
			case typ == unix.NFTA_SET_ELEM_DATA && inner == unix.NFTA_DATA_VERDICT:
				for typ, v := range link.Parse(d) {
					if typ == unix.NFTA_VERDICT_CHAIN {
						value = cString(v)
					}
				}
			}
		}
	}
	return key, value
}

func be32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func cString(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}
