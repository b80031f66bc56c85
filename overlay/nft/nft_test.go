package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

func testSyncer(t *testing.T) (*link.NS, *Syncer) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ns")
	ns, err := link.CreateNS(path)
	if errors.Is(err, unix.EPERM) {
		t.Skip("needs CAP_SYS_ADMIN and CAP_NET_ADMIN")
	}
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSyncer(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		ns.Close()
		link.RemoveNS(path)
	})
	return ns, s
}

func meshTable(v6 bool) *Table {
	p := MeshParams{Device: "skein-mesh", Gateways: "skgw-*", Node: netip.MustParseAddr("10.192.4.1"), Pool: netip.MustParsePrefix("10.192.0.0/10"),
		DataPort: 4789, MarkBase: 0x5ce10000, MarkMask: 0xffff0000}
	if v6 {
		p.Node, p.Pool = netip.MustParseAddr("fd00::1"), netip.MustParsePrefix("fd00::/64")
	}
	return MeshTable(v6, p)
}

// Every table loads, and a comparison with what the kernel then has finds nothing to change.
func TestTablesLoadAndCompareEqual(t *testing.T) {
	_, s := testSyncer(t)
	a4, a6 := netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fd00::9")
	mac := string([]byte{2, 1, 2, 3, 4, 5})
	for _, v6 := range []bool{false, true} {
		a := a4
		if v6 {
			a = a6
		}
		mesh := meshTable(v6)
		mesh.Set("peer_mark").Put(mac, MarkValue(0x5ce10002))
		mesh.Set("peer_zone").Put(mac, ZoneValue(2))
		mesh.Set("pubs").Put(PortKey(6, 8080), PickChain(64))
		for i := range 1200 {
			mesh.Set("slots").Put(MeshSlotKey(6, 8080, i), AddrPort(a, 80))
		}
		mesh.Set("published").Put(PortKey(6, 8080), "")
		mesh.Set("targets").Put(TargetKey(a, 6, 80), "")
		mesh.Set("self").Put(SelfKey(a), "")
		mesh.Set("nodes").Put(AddrKey(a), "")
		vip := VIPTable(v6, "c-*", a)
		vip.Set("vips").Put(AddrKey(a), PickChain(256))
		vip.Set("slots").Put(VIPSlotKey(a, 3), AddrKey(a))
		vip.Set("self").Put(SelfKey(a), "")
		for _, table := range []*Table{mesh, vip} {
			for _, full := range []bool{false, true} {
				changed, err := s.Sync(table, full)
				if err != nil {
					t.Fatalf("%s v6=%v full=%v: %v", table.Name, v6, full, err)
				}
				if changed != !full {
					t.Errorf("%s v6=%v full=%v: changed=%v", table.Name, v6, full, changed)
				}
			}
		}
	}
}

func TestMending(t *testing.T) {
	ns, s := testSyncer(t)
	other, err := NewSyncer(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	table := meshTable(false)
	a := netip.MustParseAddr("10.0.0.9")
	slots := table.Set("slots")
	for i := range 8 {
		slots.Put(MeshSlotKey(6, 80, i), AddrPort(a, 80))
	}
	mustSync := func(full, want bool) {
		t.Helper()
		changed, err := s.Sync(table, full)
		if err != nil || changed != want {
			t.Fatalf("changed=%v, %v; want %v", changed, err, want)
		}
	}
	mustSync(false, true)
	foreign := meshTable(false)
	if err := other.Load(foreign); err != nil || foreign.Set("slots").Len() != 8 {
		t.Fatal(err, foreign.Set("slots").Len())
	}
	foreign.Set("slots").Delete(MeshSlotKey(6, 80, 3))
	foreign.Set("slots").Put(MeshSlotKey(6, 80, 4), AddrPort(a, 81))
	if _, err := other.Sync(foreign, false); err != nil {
		t.Fatal(err)
	}
	mustSync(false, false) // not seen without looking
	mustSync(true, true)
	again := meshTable(false)
	if err := other.Load(again); err != nil || again.Set("slots").Len() != 8 || again.Set("slots").Get(MeshSlotKey(6, 80, 4)) != AddrPort(a, 80) {
		t.Fatal(err, again.Set("slots").elems)
	}
	foreign.Chains = foreign.Chains[:len(foreign.Chains)-1] // a chain went away
	if _, err := other.Sync(foreign, true); err != nil {
		t.Fatal(err)
	}
	mustSync(true, true)
	mustSync(true, false)
	if err := other.Delete(IPv4, "skein_mesh"); err != nil {
		t.Fatal(err)
	}
	mustSync(true, true)
	slots.Replace(map[string]string{MeshSlotKey(6, 80, 0): AddrPort(a, 82)})
	mustSync(false, true)
	mustSync(true, false)
	for range 2 {
		if err := s.Delete(IPv4, "skein_mesh"); err != nil {
			t.Fatal(err)
		}
	}
	// A refused change leaves the old content and is tried again from the kernel's state.
	bad := meshTable(false)
	bad.Chains[0].Rules = append(bad.Chains[0].Rules, v4.rule(jump("nowhere")))
	if _, err := s.Sync(bad, false); err == nil {
		t.Fatal("a jump to a missing chain was accepted")
	}
	mustSync(false, true)
}

func TestManyElements(t *testing.T) {
	_, s := testSyncer(t)
	table := meshTable(false)
	slots := table.Set("slots")
	a := netip.MustParseAddr("10.0.0.9")
	for p := range 1000 {
		for i := range 64 {
			slots.Put(MeshSlotKey(6, uint16(p), i), AddrPort(a, 80))
		}
	}
	for _, full := range []bool{false, true} {
		if _, err := s.Sync(table, full); err != nil {
			t.Fatal(err)
		}
	}
	slots.Put(MeshSlotKey(6, 3, 3), AddrPort(a, 81))
	if changed, err := s.Sync(table, false); err != nil || !changed {
		t.Fatal(changed, err)
	}
}

// TestForgetFlows makes flows on the loopback device and forgets those of some addresses.
func TestForgetFlows(t *testing.T) {
	ns, s := testSyncer(t)
	mesh := meshTable(false) // its rules look at connections, which turns tracking on
	if _, err := s.Sync(mesh, false); err != nil {
		t.Fatal(err)
	}
	if n, err := s.ForgetFlows(0, netip.MustParseAddr("127.0.0.2")); n != 0 || err != nil {
		t.Errorf("empty namespace: forgot %d, %v", n, err)
	}
	dial := func(last int) {
		t.Helper()
		err := ns.Do(func() error {
			c, err := net.Dial("udp", fmt.Sprintf("127.0.0.%d:999", last))
			if err == nil {
				_, err = c.Write([]byte("x"))
				c.Close()
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	loopback(t, ns)
	for last := 2; last < 8; last++ {
		dial(last)
	}
	addr := func(last byte) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, last}) }
	for _, c := range []struct {
		protocol byte
		addrs    []netip.Addr
		want     int
	}{
		{unix.IPPROTO_TCP, []netip.Addr{addr(2)}, 0},
		{0, []netip.Addr{addr(2)}, 1},
		{0, []netip.Addr{addr(2)}, 0},
		{0, nil, 0},
		{0, []netip.Addr{addr(3), addr(4), addr(99), netip.MustParseAddr("fd00::1")}, 2},
		{unix.IPPROTO_UDP, []netip.Addr{addr(5), addr(6), addr(7)}, 3},
	} {
		if n, err := s.ForgetFlows(c.protocol, c.addrs...); n != c.want || err != nil {
			t.Errorf("forget protocol %d of %v: %d, %v; want %d", c.protocol, c.addrs, n, err, c.want)
		}
	}
}

func loopback(t *testing.T, ns *link.NS) {
	t.Helper()
	err := ns.Do(func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		ifr, err := unix.NewIfreq("lo")
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_UP)
		return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
	})
	if err != nil {
		t.Fatal(err)
	}
}
