package link

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func testNS(t *testing.T) (*NS, *Conn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ns")
	ns, err := CreateNS(path)
	if errors.Is(err, unix.EPERM) {
		t.Skip("needs CAP_SYS_ADMIN and CAP_NET_ADMIN")
	}
	if err != nil {
		t.Fatal(err)
	}
	c, err := Dial(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		ns.Close()
		if err := RemoveNS(path); err != nil {
			t.Error(err)
		}
	})
	return ns, c
}

func TestNSFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ns")
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenNS(path); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("OpenNS of a plain file: %v, want os.ErrNotExist", err)
	}
	a, err := CreateNS(path)
	if errors.Is(err, unix.EPERM) {
		t.Skip("needs CAP_SYS_ADMIN")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := CreateNS(path)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if !a.Same(b) {
		t.Error("a second CreateNS made another namespace")
	}
	me, _ := Current()
	defer me.Close()
	if a.Same(me) {
		t.Error("CreateNS returned the current namespace")
	}
	for range 2 {
		if err := RemoveNS(path); err != nil {
			t.Error(err)
		}
	}
}

// Everything that is written comes back from the dump as it was written, and a second write changes nothing.
func TestEntriesRoundTrip(t *testing.T) {
	ns, c := testNS(t)
	peer, pc := testNS(t)
	mac := MAC{2, 0x42, 10, 0, 0, 1}
	if err := c.AddVeth(End{Name: "a0", MTU: 1450}, End{NS: peer, Name: "b0", MAC: mac, MTU: 1450}); err != nil {
		t.Fatal(err)
	}
	b0, err := pc.Link("b0")
	if err == nil {
		err = pc.Do([]Message{Up(b0.Index)})
	}
	if err != nil || b0.MAC != mac || b0.MTU != 1450 || b0.Kind != "veth" {
		t.Fatalf("peer %+v, %v", b0, err)
	}
	if err := c.AddVXLAN(VXLAN{End: End{Name: "vx0", MAC: MAC{2, 1, 1, 1, 1, 1}, NS: peer}, VNI: 7, Port: 4789, Local: netip.MustParseAddr("127.0.0.1")}); err != nil {
		t.Fatal(err)
	}
	vx, err := pc.Link("vx0")
	if err != nil || vx.VNI != 7 || vx.Port != 4789 || vx.Local != netip.MustParseAddr("127.0.0.1") {
		t.Fatalf("vxlan %+v, %v", vx, err)
	}
	if _, err := c.Link("vx0"); !errors.Is(err, unix.ENODEV) {
		t.Fatalf("missing link: %v", err)
	}
	a0, _ := c.Link("a0")
	via := netip.MustParseAddr("169.254.1.1")
	routes := map[RouteKey]Route{
		{Dst: netip.MustParsePrefix("10.9.0.1/32")}:             {Dev: a0.Index},
		{Dst: netip.MustParsePrefix("10.9.0.2/32")}:             {Dev: a0.Index, Via: via},
		{Dst: netip.MustParsePrefix("0.0.0.0/0"), Table: 70000}: {Dev: a0.Index, Via: via},
		{Dst: netip.MustParsePrefix("10.9.0.3/32")}:             {Dev: 1, Local: true},
		{Dst: netip.MustParsePrefix("fd00::1/128")}:             {Dev: a0.Index},
	}
	neighs := map[NeighKey]MAC{{a0.Index, via}: mac, {a0.Index, netip.MustParseAddr("fe80::1")}: mac}
	rules := map[RuleKey]Rule{
		{Pref: 90, Mark: 0x10000, Mask: 0xffff0000, Not: true}: {Goto: 99},
		{Pref: 91, Mark: 0x10001, Mask: 0xffffffff}:            {Table: 70001},
		{Pref: 99}: {},
	}
	fdb := map[FDBKey]netip.Addr{{vx.Index, MAC{2, 2, 2, 2, 2, 2}}: netip.MustParseAddr("192.0.2.1")}
	_ = c.SetUp(1, true)
	apply := func(msgs []Message, to *Conn) {
		t.Helper()
		if err := to.Do(msgs); err != nil {
			t.Fatal(err)
		}
	}
	check := func(what string, n int, err error) {
		t.Helper()
		if err != nil || n != 0 {
			t.Errorf("%s: %d differences after applying, %v", what, n, err)
		}
	}
	apply(Diff(neighs, nil, SetNeigh, DelNeigh), c)
	apply(Diff(routes, nil, SetRoute, DelRoute), c)
	apply(Diff(rules, nil, SetRule, DelRule), c)
	apply(Diff(fdb, nil, SetFDB, DelFDB), pc)
	haveR, err := c.Routes()
	check("routes", len(Diff(routes, haveR, SetRoute, DelRoute)), err)
	haveN, err := c.Neighs(a0.Index)
	check("neighbours", len(Diff(neighs, haveN, SetNeigh, DelNeigh)), err)
	haveL, err := c.Rules()
	check("rules", len(Diff(rules, haveL, SetRule, DelRule)), err)
	haveF, err := pc.FDB(vx.Index)
	check("fdb", len(Diff(fdb, haveF, SetFDB, DelFDB)), err)
	if t.Failed() {
		t.Logf("routes %v\nneighs %v\nrules %v\nfdb %v", haveR, haveN, haveL, haveF)
	}
	apply(Diff(nil, haveR, SetRoute, DelRoute), c)
	apply(Diff(nil, haveL, SetRule, DelRule), c)
	haveR, _ = c.Routes()
	haveL, _ = c.Rules()
	if len(haveR)+len(haveL) != 0 {
		t.Errorf("left over: %v %v", haveR, haveL)
	}
	if err := ns.Sysctl(map[string]string{"ipv4/ip_forward": "1", "ipv4/no_such?": "1"}); err != nil {
		t.Error(err)
	}
	if v, err := ns.ReadSysctl("ipv4/ip_forward"); v != "1" || err != nil {
		t.Errorf("ip_forward %q, %v", v, err)
	}
}

// A refused request in a batch is named and does not stop the others.
func TestBatchErrors(t *testing.T) {
	_, c := testNS(t)
	msgs := []Message{AddAddr(1, netip.MustParsePrefix("10.1.0.1/32")), AddAddr(999, netip.MustParsePrefix("10.1.0.2/32")), AddAddr(1, netip.MustParsePrefix("10.1.0.3/32"))}
	err := c.Do(msgs)
	var me *MessageError
	if !errors.As(err, &me) || me.Index != 1 || !errors.Is(err, unix.ENODEV) {
		t.Fatalf("got %v, want ENODEV for request 1", err)
	}
	addrs, err := c.Addrs()
	if err != nil || len(addrs) < 2 {
		t.Errorf("addresses %v, %v", addrs, err)
	}
	var many []Message
	for i := range 3000 {
		many = append(many, AddAddr(1, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)}), 32)))
	}
	if err := c.Do(many); err != nil {
		t.Fatal(err)
	}
}
