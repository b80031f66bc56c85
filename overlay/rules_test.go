package overlay

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// walk does what the kernel does with rules, and counts how many it tries.
func walk(rules map[link.RuleKey]link.Rule, mark uint32) (table uint32, tried int) {
	keys := slices.SortedFunc(maps.Keys(rules), func(a, b link.RuleKey) int { return cmp.Or(cmp.Compare(a.Pref, b.Pref), cmp.Compare(a.Mark, b.Mark)) })
	for i := 0; i < len(keys); i++ {
		k := keys[i]
		tried++
		if (mark&k.Mask == k.Mark) == k.Not {
			continue
		}
		r := rules[k]
		if r.Table != 0 {
			return r.Table, tried
		}
		if r.Goto != 0 {
			i = slices.IndexFunc(keys, func(k link.RuleKey) bool { return k.Pref == r.Goto }) - 1
		}
	}
	return 0, tried
}

// However many nodes there are, a packet tries few rules, and an unmarked one three.
func TestPeerRules(t *testing.T) {
	rules := commonRules()
	if treeEnd >= 32766 {
		t.Fatal("the tree comes after the main table")
	}
	for i := uint32(1); i <= 4096; i++ {
		addPeerRule(rules, i)
	}
	addPeerRule(rules, maxNode)
	for _, node := range []uint32{1, 15, 16, 255, 256, 1000, 4095, 4096, maxNode} {
		if table, tried := walk(rules, markBase+node); table != tableBase+node || tried > 55 {
			t.Errorf("node %d: table %#x after %d rules", node, table, tried)
		}
	}
	for _, mark := range []uint32{0, 1, 0x5ce20001} {
		if table, tried := walk(rules, mark); table != 0 || tried != 3 {
			t.Errorf("mark %#x: table %#x after %d rules", mark, table, tried)
		}
	}
}

// The kernel walks the tree as meant, in both families, with many nodes, and again after most have gone.
func TestManyPeers(t *testing.T) {
	l := newLab(t, 1)
	h := l.hosts[0]
	cfg := l.baseConfig(h)
	for i := uint32(2); i <= 400; i++ {
		cfg.Peers = append(cfg.Peers, Node{Index: i, Hostname: fmt.Sprintf("p%d", i), Underlay: netip.AddrFrom4([4]byte{192, 0, byte(2 + i/256), byte(i)})})
	}
	set := func() {
		t.Helper()
		applied, err := h.Set(t.Context(), cfg)
		l.must(err)
		l.must(applied["mesh"])
	}
	set()
	c := l.conn(h.ns)
	to := func(node uint32) {
		t.Helper()
		for _, dst := range []netip.Addr{addr(clientAddr), addr(client6)} {
			if via, want := routeOf(t, c, dst, markBase+node), pick(dst.Is6(), nodeAddr(labPool, node), nodeVia(node, true)); via != want {
				t.Errorf("%s marked for node %d goes via %s, want %s", dst, node, via, want)
			}
			if via, want := routeOf(t, c, dst, 0), pick(dst.Is6(), addr("192.0.2.254"), addr("2001:db8:1::fe")); via != want {
				t.Errorf("%s unmarked goes via %s, want %s", dst, via, want)
			}
		}
	}
	for _, node := range []uint32{2, 15, 16, 17, 255, 256, 300, 400} {
		to(node)
	}
	cfg.Peers = cfg.Peers[297:300]
	set()
	to(300)
	if rules, err := c.Rules(); err != nil || len(rules) > 2*(3+3*3) {
		t.Errorf("%d rules are left, %v", len(rules), err)
	}
}

// routeOf is the next hop of a marked packet.
func routeOf(t *testing.T, c *link.Conn, dst netip.Addr, mark uint32) netip.Addr {
	t.Helper()
	var a link.Attrs
	a.Bytes(unix.RTA_DST, dst.AsSlice())
	a.U32(unix.RTA_MARK, mark)
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[1] = unix.AF_INET, byte(dst.BitLen())
	if dst.Is6() {
		body[0] = unix.AF_INET6
	}
	_, b, err := c.Get(link.Message{Type: unix.RTM_GETROUTE, Body: append(body, a.Encoded()...)})
	if err != nil {
		t.Fatal(err)
	}
	for typ, v := range link.Parse(b[unix.SizeofRtMsg:]) {
		if typ == unix.RTA_GATEWAY {
			via, _ := netip.AddrFromSlice(v)
			return via
		}
	}
	return netip.Addr{}
}
