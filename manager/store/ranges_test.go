package store_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// How networks with several ranges behave through Apply.

func networksCluster(t *testing.T, pools ...string) *cluster {
	c := newCluster(t)
	c.do(putCluster(&api.ClusterRecord{Id: "c1", OverlayPool: pools[0], OverlayPools: pools, MeshPool: "10.192.0.0/16", OverlayBits: 28,
		UlaPrefix: "fd12:3456:789a::/48", FeatureLevel: api.LevelNetworks}))
	c.do(putNode("n1", "host1"))
	return c
}

// fill places tasks of a service on network "net" and returns their addresses, IPv6 first.
func fill(t *testing.T, c *cluster, tasks int) []string {
	t.Helper()
	if c.service("s1") == nil {
		c.do(putService("s1", spec("app", on("net"))))
	}
	var out []string
	for slot := 1; slot <= tasks; slot++ {
		id := api.TaskID("s1", uint64(slot), "", 1)
		if c.task(id) == nil {
			c.do(createTask("s1", 1, uint64(slot), "", 1), place(id, "n1"))
		}
		a := c.task(id).Attachments[0]
		out = append(out, a.Addr6+" "+a.Addr4)
	}
	return out
}

func TestNetworkGrows(t *testing.T) {
	c := networksCluster(t, "10.0.0.0/26", "10.9.0.0/24")
	c.do(putNetwork(&api.NetworkRecord{Id: "net", Name: "small", Subnet4: "192.168.1.0/29", Avoid: []string{"10.0.0.16/30"}}))
	c.do(putNetwork(&api.NetworkRecord{Id: "other", Name: "other"})) // 10.0.0.0/28
	got := fill(t, c, 40)
	want := map[int]string{
		1:  "fd12:3456:789a:1::3/64 192.168.1.3/29",
		4:  "fd12:3456:789a:1::6/64 192.168.1.6/29",
		5:  "fd12:3456:789a:1::9/64 10.0.0.33/28", // 10.0.0.16/30 is to be avoided
		18: "fd12:3456:789a:1::16/64 10.0.0.46/28",
		19: "fd12:3456:789a:1::19/64 10.0.0.49/28",
		33: "fd12:3456:789a:1::29/64 10.9.0.1/28", // the next pool
	}
	for n, w := range want {
		if got[n-1] != w {
			t.Errorf("task %d has %s, want %s", n, got[n-1], w)
		}
	}
	n := c.network("net")
	if len(n.Ranges) != 4 || n.Ranges[0].Subnet4 != "192.168.1.0/29" || n.Ranges[0].Grown || !n.Ranges[1].Grown {
		t.Errorf("the record has %v", n.Ranges)
	}
	c.sameAfterRestore()
	seen := map[string]bool{}
	for _, a := range got {
		if seen[a] {
			t.Errorf("%s was given out twice", a)
		}
		seen[a] = true
	}
	c.do(report(api.TaskID("s1", 5, "", 1), "n1", api.TaskFailed))
	c.clock.advance(61 * 1e9)
	id := api.TaskID("s1", 5, "", 2)
	c.do(createTask("s1", 1, 5, "", 2), place(id, "n1"))
	if a := c.task(id).Attachments[0].Addr4; a != "10.0.0.33/28" {
		t.Errorf("an address of a further range was not given out again: %s", a)
	}
}

func TestNetworkThatMayNotGrow(t *testing.T) {
	c := networksCluster(t, "10.0.0.0/27")
	c.do(putNetwork(&api.NetworkRecord{Id: "net", Name: "small", Subnet4: "192.168.1.0/29", NoGrowth: true}))
	fill(t, c, 4)
	c.do(createTask("s1", 1, 5, "", 1))
	if err := c.try(place(api.TaskID("s1", 5, "", 1), "n1")); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "192.168.1.0/29") {
		t.Errorf("a full network that may not grow: %v", err)
	}
	c.do(putNetwork(&api.NetworkRecord{Id: "a", Name: "a"}), putNetwork(&api.NetworkRecord{Id: "b", Name: "b"}))
	c.refused(errdefs.IsResourceExhausted, []string{"10.0.0.0/27", "/28"}, putNetwork(&api.NetworkRecord{Id: "c", Name: "c"}))
}

// TestNoGrowthInOldClusters: managers of older versions would not follow.
func TestNoGrowthInOldClusters(t *testing.T) {
	c := newCluster(t)
	old := &api.ClusterRecord{Id: "c1", OverlayPool: "10.0.0.0/18", MeshPool: "10.192.0.0/16", FeatureLevel: api.LevelNetworks - 1}
	c.do(putCluster(proto.Clone(old).(*api.ClusterRecord)), putNode("n1", "host1"))
	c.do(putNetwork(&api.NetworkRecord{Id: "net", Name: "small", Subnet4: "192.168.1.0/29", Ranges: []*api.NetworkRange{{Subnet4: "1.2.3.0/24"}}}))
	fill(t, c, 4)
	id := api.TaskID("s1", 5, "", 1)
	c.do(createTask("s1", 1, 5, "", 1))
	if err := c.try(place(id, "n1")); !errdefs.IsResourceExhausted(err) {
		t.Errorf("it grew: %v", err)
	}
	c.refused(errdefs.IsConflict, []string{"small"}, putNetwork(&api.NetworkRecord{Id: "twin", Name: "twin", Subnet4: "192.168.1.0/29"}))
	old.FeatureLevel = api.LevelNetworks
	c.do(putCluster(old), place(id, "n1"))
	if a := c.task(id).Attachments[0].Addr4; a != "10.0.0.1/20" {
		t.Errorf("after the upgrade it got %s", a)
	}
	c.sameAfterRestore()
}

func TestRangesAndOptions(t *testing.T) {
	c := networksCluster(t, "10.0.0.0/24")
	c.do(putNetwork(&api.NetworkRecord{Id: "net", Name: "net", Ranges: []*api.NetworkRange{
		{Subnet4: "172.20.0.0/24", Range4: "172.20.0.16/29", Gateway4: "172.20.0.18", Aux4: map[string]string{"printer": "172.20.0.17"},
			Subnet6: "fd00:5::/64", Range6: "fd00:5::100/120", Aux6: map[string]string{"printer": "fd00:5::103"}},
		{Subnet4: "172.21.0.0/29", Subnet6: "fd00:6::/64"},
	}}))
	got := fill(t, c, 11)
	// .16 is the VIP, .17 reserved, .18 the gateway; .19 would be fd00:5::103, which is reserved.
	want := []string{"fd00:5::104/64 172.20.0.20/24", "fd00:5::105/64 172.20.0.21/24", "fd00:5::106/64 172.20.0.22/24", "fd00:5::107/64 172.20.0.23/24",
		"fd00:6::1/64 172.21.0.1/29"}
	for i, w := range want {
		if got[i] != w {
			t.Errorf("task %d has %s, want %s", i+1, got[i], w)
		}
	}
	if v := c.service("s1").Vips[0]; v.Addr4 != "172.20.0.16" || v.Addr6 != "fd00:5::100" {
		t.Errorf("VIP %v", v)
	}
	if got[10] != "fd00:6::9/64 10.0.0.1/27" { // a further range goes on in the last IPv6 subnet
		t.Errorf("task 11 has %s", got[10])
	}
	c.sameAfterRestore()
}

func TestRangesRefused(t *testing.T) {
	c := networksCluster(t, "10.0.0.0/24")
	for i, k := range []struct {
		ranges []*api.NetworkRange
		parts  []string
	}{
		{[]*api.NetworkRange{{Subnet4: "172.20.0.0/24"}, {Subnet4: "172.20.0.0/16"}}, []string{"overlap"}},
		{[]*api.NetworkRange{{Subnet4: "172.20.0.0/24", Range4: "172.21.0.0/28"}}, []string{"172.21.0.0/28", "not within"}},
		{[]*api.NetworkRange{{Subnet4: "172.20.0.0/24", Gateway4: "172.21.0.1"}}, []string{"172.21.0.1", "not in subnet"}},
		{[]*api.NetworkRange{{Subnet4: "172.20.0.0/24", Gateway4: "172.20.0.255"}}, []string{"172.20.0.255", "last"}},
		{[]*api.NetworkRange{{Subnet4: "172.20.0.0/24", Aux4: map[string]string{"x": "1.1.1.1"}}}, []string{"1.1.1.1"}},
		{[]*api.NetworkRange{{Subnet4: "172.20.0.0/24", Subnet6: "fd00::/64", Range6: "fd01::/64"}}, []string{"fd01::/64", "not within"}},
		{[]*api.NetworkRange{{Subnet4: "172.20.0.0/24", Subnet6: "fd00::/64", Range6: "fd00::/124"}}, []string{"fewer addresses"}},
		{[]*api.NetworkRange{{Subnet4: "172.20.0.0/24", Subnet6: "fd00::/64", Gateway6: "fe00::1"}}, []string{"fe00::1"}},
		{[]*api.NetworkRange{{Subnet4: "172.20.0.0/24", Range4: "172.20.0.255/32"}}, []string{"no address"}},
	} {
		id := fmt.Sprint("r", i)
		c.refused(errdefs.IsInvalidArgument, k.parts, putNetwork(&api.NetworkRecord{Id: id, Name: id, Ranges: k.ranges}))
	}
}

// TestSameSubnet: networks are worlds of their own, but nothing can be on two that look alike.
func TestSameSubnet(t *testing.T) {
	c := networksCluster(t, "10.0.0.0/24")
	c.do(putNetwork(&api.NetworkRecord{Id: "a", Name: "left", Subnet4: "172.20.0.0/24"}), putNetwork(&api.NetworkRecord{Id: "b", Name: "right", Subnet4: "172.20.0.0/24"}))
	c.do(putService("s1", spec("one", on("a"))), putService("s2", spec("two", on("b"))))
	if a, b := c.service("s1").Vips[0].Addr4, c.service("s2").Vips[0].Addr4; a != "172.20.0.2" || b != a {
		t.Errorf("VIPs %s and %s", a, b)
	}
	c.refused(errdefs.IsInvalidArgument, []string{"both", "left", "right", "172.20.0.0/24"}, putService("s3", spec("both", on("a", "b"))))
	c.refused(errdefs.IsInvalidArgument, []string{"one", "left", "right"}, putService("s1", spec("one", on("a", "b"))))
	wish := &api.AttachmentWish{Id: "c1", NodeId: "n1", Name: "box", Networks: []*api.AttachedNetwork{{NetworkId: "d"}, {NetworkId: "e"}}}
	c.do(putNetwork(&api.NetworkRecord{Id: "d", Name: "up", Subnet4: "172.20.0.0/16", Attachable: true}), putNetwork(&api.NetworkRecord{Id: "e", Name: "down", Subnet4: "172.20.1.0/24", Attachable: true}))
	c.refused(errdefs.IsInvalidArgument, []string{"box", "up", "down"}, &api.Change{Kind: &api.Change_PutAttachment{PutAttachment: wish}})
	c.do(putNetwork(&api.NetworkRecord{Id: "f", Name: "free"})) // chosen ones are nobody else's
	if n := c.network("f"); n.Subnet4 != "10.0.0.0/28" {
		t.Errorf("subnet %s", n.Subnet4)
	}
	c.sameAfterRestore()
}

// TestAskedForAddresses: they may be outside the range that others are given from, but not reserved.
func TestAskedForAddresses(t *testing.T) {
	c := networksCluster(t, "10.0.0.0/24")
	c.do(putNetwork(&api.NetworkRecord{Id: "net", Name: "net", Attachable: true, Ranges: []*api.NetworkRange{
		{Subnet4: "172.20.0.0/24", Range4: "172.20.0.16/29", Aux4: map[string]string{"printer": "172.20.0.77"}, Aux6: map[string]string{"p": "fd00:5::abcd"}, Subnet6: "fd00:5::/64"},
		{Subnet4: "172.21.0.0/24"}}}))
	wish := func(id, a4, a6 string) *api.Change {
		return &api.Change{Kind: &api.Change_PutAttachment{PutAttachment: &api.AttachmentWish{Id: id, NodeId: "n1", Name: id,
			Networks: []*api.AttachedNetwork{{NetworkId: "net", Addr4: a4, Addr6: a6}}}}}
	}
	for i, k := range [][4]string{
		{"172.20.0.99", "", "172.20.0.99/24", "fd00:5::63/64"},
		{"172.21.0.7", "", "172.21.0.7/24", "fd00:5::107/64"},
		{"", "fd00:5::108", "172.21.0.8/24", "fd00:5::108/64"},
		{"", "fd00:5::f:1", "172.20.0.16/24", "fd00:5::f:1/64"},
	} {
		id := fmt.Sprint("c", i)
		c.do(wish(id, k[0], k[1]))
		var a *api.AttachedNetwork
		c.View(func(tx store.ReadTx) { a = tx.Attachment(id).Networks[0] })
		if a.Addr4 != k[2] || a.Addr6 != k[3] {
			t.Errorf("asked for %s %s, got %s %s", k[0], k[1], a.Addr4, a.Addr6)
		}
	}
	for _, k := range [][2]string{{"172.20.0.77", ""}, {"172.20.0.1", ""}, {"172.20.0.255", ""}, {"172.20.0.0", ""}, {"", "fd00:5::abcd"}, {"", "fd00:5::1"}, {"9.9.9.9", ""}} {
		c.refused(errdefs.IsInvalidArgument, nil, wish("no", k[0], k[1]))
	}
	c.sameAfterRestore()
}
