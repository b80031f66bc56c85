package nft

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// An accept in one table does not keep another table from dropping the packet. So where somebody's firewall drops by default what is forwarded
// (ufw, firewalld, a chain written by hand), containers would be cut off. PassForward puts rules that accept our devices at the end of such a
// chain: what the firewall refuses by a rule of its own stays refused, only its default does not hold for containers, whose own tables say
// what may reach them. The rules carry a comment by which they are found again and taken out.

// passComment begins the comment of our rules in foreign chains.
const passComment = "skein forward "

// foreignChain is somebody else's base chain that sees forwarded packets.
type foreignChain struct {
	family      byte
	table, name string
	policyDrop  bool
	rules       []foreignRule
}

type foreignRule struct {
	handle   uint64
	ours     string // what of ours it does, empty: not ours
	terminal bool   // it drops or rejects whatever gets so far
}

func (c *foreignChain) String() string {
	return familyName(c.family) + " " + c.table + " " + c.name
}

// ownTables is how our tables' names begin.
const ownTables = "skein_"

// PassForward makes every foreign chain that drops forwarded packets by default accept what comes from or goes to the devices, which may be
// patterns ("skgw-*"), and takes our rules out of chains that do not. It tells whether anything changed.
func (s *Syncer) PassForward(devices []string) (changed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	chains, err := s.foreignChains()
	if err != nil {
		return false, fmt.Errorf("read foreign firewalls: %w", err)
	}
	want := map[string]Rule{}
	for _, d := range devices {
		want["iifname "+d] = passRule(expr.MetaKeyIIFNAME, d)
		want["oifname "+d] = passRule(expr.MetaKeyOIFNAME, d)
	}
	var errs []string
	for _, c := range chains {
		msgs := c.pass(want, s.audit)
		if len(msgs) == 0 || s.audit != nil && s.audit.Dry() {
			continue
		}
		changed = true
		if e := s.transact(msgs); e != nil {
			errs = append(errs, fmt.Sprintf("chain %s: %v", c, e))
		}
	}
	if errs != nil {
		return changed, fmt.Errorf("let containers pass foreign firewalls: %s", strings.Join(errs, "; "))
	}
	return changed, nil
}

func passRule(key expr.MetaKey, device string) Rule {
	data := []byte(device)
	if n := len(device); device[n-1] == '*' {
		data = data[:n-1]
	} else {
		data = append(data, make([]byte, unix.IFNAMSIZ-n)...)
	}
	// Register 1 and these expressions are what iptables writes by itself, so that it still understands its chain.
	return v4.rule(exprs(&expr.Meta{Key: key, Register: 1}, cmp(expr.CmpOpEq, 1, data)), accept)
}

// pass lists what makes a chain as it should be.
func (c *foreignChain) pass(want map[string]Rule, a *link.Audit) (msgs []link.Message) {
	end := slices.IndexFunc(c.rules, func(r foreignRule) bool { return r.terminal })
	if !c.policyDrop && end < 0 {
		want = nil
	}
	there := map[string]bool{}
	for i, r := range c.rules {
		if r.ours == "" {
			continue
		}
		if _, ok := want[r.ours]; ok && !there[r.ours] && (end < 0 || i < end) {
			there[r.ours] = true
			continue
		}
		if a != nil {
			a.Add("firewall rule", c.String()+" "+r.ours, "surplus")
		}
		msgs = append(msgs, message(unix.NFT_MSG_DELRULE, 0, c.family, func(at *link.Attrs) {
			at.Str(unix.NFTA_RULE_TABLE, c.table)
			at.Str(unix.NFTA_RULE_CHAIN, c.name)
			at.Bytes(unix.NFTA_RULE_HANDLE, binary.BigEndian.AppendUint64(nil, r.handle))
		}))
	}
	for _, what := range slices.Sorted(maps.Keys(want)) {
		if there[what] {
			continue
		}
		if a != nil {
			a.Add("firewall rule", c.String()+" "+what, "missing")
		}
		msgs = append(msgs, c.newRule(what, want[what], end))
	}
	return msgs
}

// newRule adds a rule before the end-th one, or behind all.
func (c *foreignChain) newRule(what string, r Rule, end int) link.Message {
	flags := uint16(unix.NLM_F_CREATE | unix.NLM_F_APPEND)
	if end >= 0 {
		flags = unix.NLM_F_CREATE // goes before the position
	}
	return message(unix.NFT_MSG_NEWRULE, flags, c.family, func(a *link.Attrs) {
		a.Str(unix.NFTA_RULE_TABLE, c.table)
		a.Str(unix.NFTA_RULE_CHAIN, c.name)
		if end >= 0 {
			a.Bytes(unix.NFTA_RULE_POSITION, binary.BigEndian.AppendUint64(nil, c.rules[end].handle))
		}
		a.Nest(unix.NFTA_RULE_EXPRESSIONS, nil, func(l *link.Attrs) {
			for _, e := range r.exprs {
				l.Bytes(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, e)
			}
		})
		comment := passComment + what + "\x00"
		a.Bytes(unix.NFTA_RULE_USERDATA, append([]byte{udataComment, byte(len(comment))}, comment...))
	})
}

// foreignChains lists base chains of others at the hook of forwarded packets, with their rules.
func (s *Syncer) foreignChains() ([]*foreignChain, error) {
	var out []*foreignChain
	err := s.sock.Dump(message(unix.NFT_MSG_GETCHAIN, 0, unix.NFPROTO_UNSPEC, func(*link.Attrs) {}), func(_ uint16, b []byte) error {
		c := &foreignChain{family: b[0]}
		hook, filter := uint32(0), false
		for typ, v := range link.Parse(b[4:]) {
			switch typ {
			case unix.NFTA_CHAIN_TABLE:
				c.table = cString(v)
			case unix.NFTA_CHAIN_NAME:
				c.name = cString(v)
			case unix.NFTA_CHAIN_TYPE:
				filter = cString(v) == "filter"
			case unix.NFTA_CHAIN_POLICY:
				c.policyDrop = be32(v) == 0
			case unix.NFTA_CHAIN_HOOK:
				for typ, v := range link.Parse(v) {
					if typ == unix.NFTA_HOOK_HOOKNUM {
						hook = be32(v)
					}
				}
			}
		}
		ip := c.family == unix.NFPROTO_IPV4 || c.family == unix.NFPROTO_IPV6 || c.family == unix.NFPROTO_INET
		if filter && ip && hook == unix.NF_INET_FORWARD && !strings.HasPrefix(c.table, ownTables) {
			out = append(out, c)
		}
		return nil
	})
	for _, c := range out {
		if err == nil {
			err = s.foreignRules(c)
		}
	}
	return out, err
}

func (s *Syncer) foreignRules(c *foreignChain) error {
	req := message(unix.NFT_MSG_GETRULE, 0, c.family, func(a *link.Attrs) {
		a.Str(unix.NFTA_RULE_TABLE, c.table)
		a.Str(unix.NFTA_RULE_CHAIN, c.name)
	})
	return s.sock.Dump(req, func(_ uint16, b []byte) error {
		r := foreignRule{}
		table, chain := "", ""
		for typ, v := range link.Parse(b[4:]) {
			switch typ {
			case unix.NFTA_RULE_TABLE:
				table = cString(v)
			case unix.NFTA_RULE_CHAIN:
				chain = cString(v)
			case unix.NFTA_RULE_HANDLE:
				if len(v) == 8 {
					r.handle = binary.BigEndian.Uint64(v)
				}
			case unix.NFTA_RULE_USERDATA:
				if len(v) > 2 && v[0] == udataComment {
					r.ours, _ = strings.CutPrefix(cString(v[2:]), passComment)
					if r.ours == cString(v[2:]) {
						r.ours = ""
					}
				}
			case unix.NFTA_RULE_EXPRESSIONS:
				r.terminal = terminal(v)
			}
		}
		if table == c.table && chain == c.name {
			c.rules = append(c.rules, r)
		}
		return nil
	})
}

// terminal tells that a rule drops or rejects every packet: it has no condition.
func terminal(list []byte) bool {
	ends := false
	for _, e := range link.Parse(list) {
		name, data := "", []byte(nil)
		for typ, v := range link.Parse(e) {
			switch typ {
			case unix.NFTA_EXPR_NAME:
				name = cString(v)
			case unix.NFTA_EXPR_DATA:
				data = v
			}
		}
		switch name {
		case "counter", "log":
		case "reject":
			ends = true
		case "immediate":
			ends = ends || drops(data)
		case "target": // of iptables
			for typ, v := range link.Parse(data) {
				ends = ends || typ == unix.NFTA_TARGET_NAME && cString(v) == "REJECT"
			}
		default:
			return false
		}
	}
	return ends
}

// drops tells that an immediate value is the verdict to drop.
func drops(data []byte) bool {
	for typ, v := range link.Parse(data) {
		if typ != unix.NFTA_IMMEDIATE_DATA {
			continue
		}
		for typ, v := range link.Parse(v) {
			if typ != unix.NFTA_DATA_VERDICT {
				continue
			}
			for typ, v := range link.Parse(v) {
				if typ == unix.NFTA_VERDICT_CODE {
					return be32(v) == 0
				}
			}
		}
	}
	return false
}
