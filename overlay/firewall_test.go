package overlay

import (
	"context"
	"encoding/binary"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// foreign makes somebody's chain of forwarded packets: with drop its policy is to drop, with reject its only rule drops everything.
func (l *lab) foreign(ns *link.NS, family byte, drop, reject bool) {
	l.t.Helper()
	s, err := link.OpenSocket(ns, unix.NETLINK_NETFILTER)
	l.must(err)
	defer s.Close()
	msg := func(op uint16, f func(*link.Attrs)) link.Message {
		var a link.Attrs
		f(&a)
		return link.Message{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | op, Flags: unix.NLM_F_CREATE, Body: append([]byte{family, 0, 0, 0}, a.Encoded()...)}
	}
	var policy uint32 = 1
	if drop {
		policy = 0
	}
	msgs := []link.Message{{Type: unix.NFNL_MSG_BATCH_BEGIN, Body: []byte{0, 0, 0, unix.NFNL_SUBSYS_NFTABLES}},
		msg(unix.NFT_MSG_NEWTABLE, func(a *link.Attrs) { a.Str(unix.NFTA_TABLE_NAME, "theirs") }),
		msg(unix.NFT_MSG_NEWCHAIN, func(a *link.Attrs) {
			a.Str(unix.NFTA_CHAIN_TABLE, "theirs")
			a.Str(unix.NFTA_CHAIN_NAME, "FORWARD")
			a.Nest(unix.NFTA_CHAIN_HOOK, nil, func(h *link.Attrs) {
				h.BE32(unix.NFTA_HOOK_HOOKNUM, unix.NF_INET_FORWARD)
				h.BE32(unix.NFTA_HOOK_PRIORITY, 0)
			})
			a.BE32(unix.NFTA_CHAIN_POLICY, policy)
			a.Str(unix.NFTA_CHAIN_TYPE, "filter")
		})}
	if reject {
		msgs = append(msgs, msg(unix.NFT_MSG_NEWRULE, func(a *link.Attrs) {
			a.Str(unix.NFTA_RULE_TABLE, "theirs")
			a.Str(unix.NFTA_RULE_CHAIN, "FORWARD")
			a.Nest(unix.NFTA_RULE_EXPRESSIONS, nil, func(l *link.Attrs) {
				l.Nest(unix.NFTA_LIST_ELEM, nil, func(e *link.Attrs) {
					e.Str(unix.NFTA_EXPR_NAME, "immediate")
					e.Nest(unix.NFTA_EXPR_DATA, nil, func(d *link.Attrs) {
						d.BE32(unix.NFTA_IMMEDIATE_DREG, 0)
						d.Nest(unix.NFTA_IMMEDIATE_DATA, nil, func(v *link.Attrs) {
							v.Nest(unix.NFTA_DATA_VERDICT, nil, func(c *link.Attrs) { c.BE32(unix.NFTA_VERDICT_CODE, 0) })
						})
					})
				})
			})
		}))
	}
	msgs = append(msgs, link.Message{Type: unix.NFNL_MSG_BATCH_END, Body: []byte{0, 0, 0, unix.NFNL_SUBSYS_NFTABLES}})
	l.must(s.Transact(msgs, len(msgs)-2))
}

// Somebody's firewall that drops what is forwarded, by its policy or by a last rule, lets containers' packets pass, and is as it was after
// leaving.
func TestForeignFirewalls(t *testing.T) {
	for name, c := range map[string]struct {
		family       byte
		drop, reject bool
	}{
		"policy":    {unix.NFPROTO_INET, true, false},
		"last rule": {unix.NFPROTO_INET, false, true},
		"iptables":  {unix.NFPROTO_IPV4, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			l, _ := webLab(t, 2)
			h, ctx := l.hosts[0], context.Background()
			l.foreign(h.ns, c.family, c.drop, c.reject)
			unreachable(t, l.cl, "192.0.2.1:8082") // or the foreign chain drops nothing
			r, err := h.Compare(ctx, false)
			l.must(err)
			if len(r.Findings) != 4 || r.Findings[0].Kind != "firewall rule" || !strings.Contains(r.Findings[0].Object, "theirs FORWARD") {
				t.Errorf("a dry comparison finds %v", r.Findings)
			}
			l.must(h.Check(ctx))
			l.spread(l.cl, "tcp4", "192.0.2.1:8082", 2, clientAddr)
			l.spread(l.cl, "tcp4", "192.0.2.1:8080", 20, clientAddr)
			if c.family == unix.NFPROTO_INET {
				l.spread(l.cl, "tcp6", "[2001:db8:1::1]:8080", 20, client6)
			}
			if r, err := h.Compare(ctx, false); err != nil || len(r.Findings) != 0 {
				t.Errorf("after that: %v, %v", r.Findings, err)
			}
			l.must(h.Leave(ctx))
			if changed, err := h.nft.PassForward(nil); err != nil || changed {
				t.Errorf("rules were left in the foreign chain after leaving (%v), %v", changed, err)
			}
		})
	}
}

// A firewall of the old kind is reported, unless it has rules for gateway legs.
func TestOldFirewalls(t *testing.T) {
	l := newLab(t, 1)
	h := l.hosts[0]
	l.setAll(nil, Mesh{})
	f := oldFamilies()[0]
	l.must(h.ns.Do(func() error {
		if err := setOldPolicy(f, verdictDrop); err != nil {
			t.Skipf("this kernel has no packet filter of the old kind: %v", err)
		}
		return nil
	}))
	r, err := h.Compare(t.Context(), false)
	l.must(err)
	if len(r.Findings) != 1 || !strings.Contains(r.Findings[0].String(), "iptables -I FORWARD") {
		t.Errorf("found: %v", r.Findings)
	}
	l.must(h.ns.Do(func() error { return setOldPolicy(f, -2) }))
	if r, err = h.Compare(t.Context(), false); err != nil || len(r.Findings) != 0 {
		t.Errorf("with the policy to accept: %v, %v", r.Findings, err)
	}
}

// setOldPolicy gives FORWARD another policy by writing the table back with one word changed.
func setOldPolicy(f oldFamily, verdict int32) error {
	fd, err := unix.Socket(f.family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	info := make([]byte, oldInfoLen)
	copy(info, "filter")
	if err := getsockopt(fd, f.level, oldGetInfo, info); err != nil {
		return err
	}
	size, count := binary.NativeEndian.Uint32(info[80:]), binary.NativeEndian.Uint32(info[76:])
	all := make([]byte, oldHeader+int(size))
	copy(all, "filter")
	binary.NativeEndian.PutUint32(all[oldNameLen:], size)
	if err := getsockopt(fd, f.level, oldGetEntries, all); err != nil {
		return err
	}
	entries := all[oldHeader:]
	policy := entries[binary.NativeEndian.Uint32(info[64:]):]
	binary.NativeEndian.PutUint32(policy[int(binary.NativeEndian.Uint16(policy[f.target:]))+verdictOffset:], uint32(verdict))
	counters := make([]byte, 16*count)
	b := make([]byte, 0, 96+len(entries)) // struct ipt_replace
	b = append(b, all[:oldNameLen]...)
	b = append(b, info[32:36]...)
	b = binary.NativeEndian.AppendUint32(b, count)
	b = binary.NativeEndian.AppendUint32(b, size)
	b = append(b, info[36:76]...)
	b = binary.NativeEndian.AppendUint32(b, count)
	b = binary.NativeEndian.AppendUint64(b, uint64(uintptr(unsafe.Pointer(&counters[0]))))
	b = append(b, entries...)
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(f.level), 64, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
