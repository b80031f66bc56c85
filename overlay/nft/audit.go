package nft

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// Watch has an audit look at what Sync and Delete change, until Watch(nil); meanwhile Sync always reads the kernel.
func (s *Syncer) Watch(a *link.Audit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.audit = a
}

// Note tells the audit, if there is one, of a difference that is not ours to mend.
func (s *Syncer) Note(kind, object, state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.audit != nil {
		s.audit.Add(kind, object, state)
	}
}

// report tells the audit how a table differs from the kernel's, which is nil if there is none. Sets know already what changes.
func (s *Syncer) report(want, have *Table, replace bool) {
	name := familyName(want.Family) + " " + want.Name
	switch {
	case have == nil:
		s.audit.Add("nft table", name, "missing")
	case replace:
		s.audit.Add("nft table", name, "differs: "+shapeDifference(want, have))
	default:
		for _, set := range want.Sets {
			del, add := set.differences()
			for _, k := range sortedKeys(add) {
				state := "missing"
				if old, there := del[k]; there {
					state = "differs: is " + set.element(k, old)
				}
				s.audit.Add("nft element", name+" "+set.Name+" { "+set.element(k, add[k])+" }", state)
			}
			for _, k := range sortedKeys(del) {
				if _, changed := add[k]; !changed {
					s.audit.Add("nft element", name+" "+set.Name+" { "+set.element(k, del[k])+" }", "surplus")
				}
			}
		}
	}
}

// shapeDifference names the first thing by which two tables are not of the same shape.
func shapeDifference(want, have *Table) string {
	if have.flags != 0 {
		return fmt.Sprintf("its flags are %#x (1 is dormant)", have.flags)
	}
	chains := map[string]*Chain{}
	for _, c := range have.Chains {
		chains[c.Name] = c
	}
	for _, c := range want.Chains {
		o := chains[c.Name]
		switch {
		case o == nil:
			return "chain " + c.Name + " is missing"
		case o.drops:
			return "the policy of chain " + c.Name + " is not accept"
		case c.Type != o.Type || c.Type != "" && (c.Hook != o.Hook || c.Priority != o.Priority):
			return "chain " + c.Name + " hangs elsewhere"
		case len(c.Rules) != len(o.Rules):
			return fmt.Sprintf("chain %s has %d rules, want %d", c.Name, len(o.Rules), len(c.Rules))
		}
		for i := range c.Rules {
			if c.Rules[i].digest() != o.Rules[i].digest() {
				return fmt.Sprintf("rule %d of chain %s is another", i+1, c.Name)
			}
		}
	}
	for _, set := range want.Sets {
		if !slices.ContainsFunc(have.Sets, func(o *Set) bool { return o.Name == set.Name }) {
			return "set " + set.Name + " is missing"
		}
	}
	return fmt.Sprintf("it has %d chains and %d sets, want %d and %d", len(have.Chains), len(have.Sets), len(want.Chains), len(want.Sets))
}

func familyName(f byte) string {
	switch f {
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	case unix.NFPROTO_INET:
		return "inet"
	}
	return fmt.Sprintf("family %d", f)
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// element writes an element as nft lists it.
func (s *Set) element(key, value string) string {
	switch {
	case s.Verdicts:
		return readable(s.Key, key) + " : jump " + value
	case len(s.Value) > 0:
		return readable(s.Key, key) + " : " + readable(s.Value, value)
	}
	return readable(s.Key, key)
}

// readable writes the fields of an encoded key or value.
func readable(fields []Type, s string) string {
	var parts []string
	for _, f := range fields {
		if len(s) < f.Size {
			return hex.EncodeToString([]byte(s))
		}
		parts = append(parts, f.readable([]byte(s[:f.Size])))
		if len(fields) == 1 {
			break
		}
		s = s[min((f.Size+3)&^3, len(s)):]
	}
	return strings.Join(parts, " . ")
}

func (t Type) readable(b []byte) string {
	switch t {
	case TypeIPv4, TypeIPv6:
		if a, ok := netip.AddrFromSlice(b); ok {
			return a.String()
		}
	case TypeEther:
		return net.HardwareAddr(b).String()
	case TypeProto:
		return protoName(b[0])
	case TypeService:
		return fmt.Sprint(binary.BigEndian.Uint16(b))
	case TypeMark:
		return fmt.Sprintf("%#x", binary.NativeEndian.Uint32(b))
	case TypeZone:
		return fmt.Sprint(binary.NativeEndian.Uint16(b))
	case TypeIfname:
		return cString(b)
	}
	if len(b) == 4 && b[0] == 0 && b[1] == 0 { // numbers such as slots
		return fmt.Sprint(binary.BigEndian.Uint32(b))
	}
	return hex.EncodeToString(b)
}

func protoName(p byte) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_SCTP:
		return "sctp"
	}
	return fmt.Sprint(p)
}
