package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// checkLab has every kind of object on its first host: an overlay network of both families, published ports, a bridge, containers on all.
func checkLab(t *testing.T) *lab {
	l := newLab(t, 2)
	nw := webNetwork(Ready, Ready)
	nw.Subnet6 = netip.MustParsePrefix("fd00:10::/64")
	nw.Services[0].VIP6 = addr("fd00:10::2")
	for i := range nw.Endpoints {
		nw.Endpoints[i].Addr6 = addr(fmt.Sprintf("fd00:10::1%d", i+1))
	}
	secret := secretNetwork(2)
	keys := l.keys()
	for i, h := range l.hosts {
		cfg := l.baseConfig(h)
		cfg.Networks, cfg.Mesh, cfg.Keys = []Network{nw, secret}, webMesh(1, 2), keys
		applied, err := h.Set(context.Background(), cfg)
		l.must(errors.Join(err, applied["mesh"], applied[nw.ID], applied[secret.ID]))
		l.must(h.SetBridges(context.Background(), []Bridge{testBridge()}))
		s := webSandbox(i + 1)
		s.Legs[0].Addr6 = netip.PrefixFrom(nw.Endpoints[i].Addr6, 64)
		s.Legs = append(s.Legs, Leg{NetworkID: secret.ID, Addr4: netip.PrefixFrom(secret.Endpoints[i].Addr4, 24), Addr6: netip.PrefixFrom(secret.Endpoints[i].Addr6, 64)})
		s.Bridges = []BridgeLeg{{BridgeID: testBridge().ID, Addr4: netip.MustParsePrefix("172.30.0.5/24"), Ports: []HostPort{{Published: 9000, Target: 80, Protocol: "tcp"}}}}
		l.sandbox(h, s)
	}
	return l
}

// compare returns what a comparison found.
func (l *lab) compare(h *labHost, repair bool) []link.Finding {
	l.t.Helper()
	r, err := h.Compare(context.Background(), repair)
	if err != nil {
		l.t.Errorf("compare (repair %v): %v", repair, err)
	}
	return r.Findings
}

func (l *lab) nothingFound(h *labHost, when string) {
	l.t.Helper()
	for _, f := range l.compare(h, false) {
		l.t.Errorf("%s: %v", when, f)
	}
}

// damage is one thing that somebody does to the kernel, and what a comparison should then find.
type damage struct {
	kind, object string
	do           func() error
}

// Everything that a node has in its kernel is found, whatever it is, when somebody deletes it; a dry comparison leaves it so, and a repairing
// one brings it back.
func TestEverythingIsCompared(t *testing.T) {
	l := checkLab(t)
	h := l.hosts[0]
	l.nothingFound(h, "before any damage")
	var all []damage
	all = append(all, l.entriesOf(h.ns)...)
	for id, r := range h.routers {
		gw, gw6 := addr("10.10.0.1"), addr("fd00:10::1")
		if id == "secret" {
			gw, gw6 = addr("10.77.0.1"), addr("fd77::1")
		}
		ns := openNS(t, r.file)
		all = append(all, l.entriesOf(ns)...)
		all = append(all, l.sysctlsOf(ns, map[string]string{"ipv4/ip_forward": "0", "ipv4/conf/all/rp_filter": "1", "ipv6/conf/all/forwarding": "0",
			"ipv4/conf/" + vxlanDevice + "/rp_filter": "1", "ipv4/conf/" + legPrefix + tag("task1") + "/proxy_arp": "0"})...)
		all = append(all, l.tablesOf(ns, nft.VIPTable(false, legPrefix+"*", gw), "vips", "slots", "self")...)
		if id != "secret" { // its VIP is of IPv4 alone
			all = append(all, l.tablesOf(ns, nft.VIPTable(true, legPrefix+"*", gw6), "vips", "slots", "self")...)
		}
	}
	all = append(all, l.sysctlsOf(h.ns, map[string]string{"ipv4/ip_forward": "0", forwarding6: "0", "ipv4/conf/" + meshDevice + "/route_localnet": "0",
		"ipv4/conf/" + gatewayPrefix + tag("task1") + "/rp_filter": "0", "ipv4/conf/all/rp_filter": "1"})...)
	all = append(all, l.tablesOf(h.ns, nft.MeshTable(false, h.meshParams(false)), "peer_mark", "peer_zone", "pubs", "slots", "published", "targets", "self", "nodes")...)
	all = append(all, l.tablesOf(h.ns, nft.MeshTable(true, h.meshParams(true)), "peer_mark", "peer_zone", "pubs", "slots", "published", "targets", "self", "nodes")...)
	all = append(all, l.tablesOf(h.ns, nft.BridgeTable(false, false, h.bridgeParams(false)), "ports")...)
	all = append(all, damage{"namespace", filepath.Base(h.routerFile("netwebidnetwebidnetwebid1")), func() error {
		return link.RemoveNS(h.routerFile("netwebidnetwebidnetwebid1"))
	}})
	all = append(all, damage{"namespace", "task1", func() error { return link.RemoveNS(h.sandboxFile("task1")) }})
	kinds := map[string]int{}
	for _, dm := range all {
		kinds[dm.kind]++
		t.Run(dm.kind+" "+dm.object, func(t *testing.T) { l.in(t).damaged(h, dm) })
	}
	for _, k := range []string{"route", "neighbour", "forwarding entry", "rule", "device", "address", "sysctl", "nft table", "nft element", "namespace"} {
		if kinds[k] == 0 {
			t.Errorf("no %s was damaged", k)
		}
	}
}

func (l *lab) damaged(h *labHost, dm damage) {
	l.t.Helper()
	l.must(dm.do())
	names := func(list []link.Finding) bool {
		return slices.ContainsFunc(list, func(f link.Finding) bool {
			return f.Kind == dm.kind && strings.Contains(f.Object, dm.object) && f.Err == ""
		})
	}
	for _, when := range []string{"first", "second"} { // a dry comparison changes nothing
		if found := l.compare(h, false); !names(found) {
			l.t.Errorf("the %s comparison does not name it: %v", when, found)
		}
	}
	if found := l.compare(h, true); !names(found) {
		l.t.Errorf("the repair does not name it: %v", found)
	}
	l.nothingFound(h, "after the repair")
}

// entriesOf lists the deletion of everything of ours that rtnetlink knows in a namespace.
func (l *lab) entriesOf(ns *link.NS) (out []damage) {
	l.t.Helper()
	c := l.conn(ns)
	links, err := c.Links()
	l.must(err)
	ours := map[int]string{}
	for name, k := range links {
		if name != "eth0" && name != "lo" {
			ours[k.Index] = name
			out = append(out, damage{"device", name, func() error { return c.DelLink(name) }})
			if k.Kind != "veth" {
				continue
			}
			out = append(out, damage{"device", name, func() error { // made anew by the repairs before
				i, err := c.Link(name)
				l.must(err)
				return c.SetUp(i.Index, false)
			}})
		}
	}
	index := func(name string) int { return mustLink(l.t, c, name) }
	routes, err := c.Routes()
	l.must(err)
	for k := range routes {
		out = append(out, damage{"route", k.Dst.String(), func() error {
			now, err := c.Routes()
			l.must(err)
			return c.Do([]link.Message{link.DelRoute(k, now[k])})
		}})
	}
	rules, err := c.Rules()
	l.must(err)
	for k, r := range rules {
		out = append(out, damage{"rule", fmt.Sprintf("%d:", k.Pref), func() error { return c.Do([]link.Message{link.DelRule(k, r)}) }})
	}
	for dev, name := range ours {
		neighs, err := c.Neighs(dev)
		l.must(err)
		for k, mac := range neighs {
			out = append(out, damage{"neighbour", k.IP.String(), func() error {
				return c.Do([]link.Message{link.DelNeigh(link.NeighKey{Dev: index(name), IP: k.IP}, mac)})
			}})
		}
		if links[name].Kind != "vxlan" {
			continue
		}
		fdb, err := c.FDB(dev)
		l.must(err)
		for k, to := range fdb {
			out = append(out, damage{"forwarding entry", k.MAC.String(), func() error {
				return c.Do([]link.Message{link.DelFDB(link.FDBKey{Dev: index(name), MAC: k.MAC}, to)})
			}}, damage{"forwarding entry", k.MAC.String(), func() error {
				return c.Do([]link.Message{link.SetFDB(link.FDBKey{Dev: index(name), MAC: k.MAC}, addr("192.0.2.77"))})
			}})
		}
	}
	addrs, err := c.Addrs()
	l.must(err)
	for _, a := range addrs {
		if name := ours[a.Dev]; (name != "" || a.Dev == loopback) && !a.Prefix.Addr().IsLoopback() && !a.Prefix.Addr().IsLinkLocalUnicast() {
			if name == "" {
				name = "lo"
			}
			out = append(out, damage{"address", a.Prefix.Addr().String(), func() error {
				m := link.AddAddr(index(name), a.Prefix)
				return c.Do([]link.Message{{Type: unix.RTM_DELADDR, Body: m.Body}})
			}})
		}
	}
	return out
}

func (l *lab) sysctlsOf(ns *link.NS, wrong map[string]string) (out []damage) {
	for k, v := range wrong {
		out = append(out, damage{"sysctl", "net/" + k, func() error { return ns.Sysctl(map[string]string{k: v}) }})
	}
	return out
}

// tablesOf lists what can be done to a table: delete it, empty its first chain, put it to sleep, change elements of its sets.
func (l *lab) tablesOf(ns *link.NS, t *nft.Table, sets ...string) (out []damage) {
	l.t.Helper()
	s, err := nft.NewSyncer(ns)
	l.must(err)
	l.t.Cleanup(func() { s.Close() })
	out = append(out, damage{"nft table", t.Name, func() error { return s.Delete(t.Family, t.Name) }},
		damage{"nft table", t.Name, func() error {
			return nftRequest(ns, unix.NFT_MSG_DELRULE, t, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, t.Chains[len(t.Chains)-1].Name)
		}},
		damage{"nft table", t.Name, func() error { return nftRequest(ns, unix.NFT_MSG_NEWTABLE, t, unix.NFTA_TABLE_NAME, 0, "") }})
	for _, name := range sets {
		out = append(out, damage{"nft element", t.Name + " " + name, func() error {
			now := &nft.Table{Family: t.Family, Name: t.Name, Sets: t.Sets, Chains: t.Chains}
			l.must(s.Load(now))
			for k := range now.Set(name).All() {
				now.Set(name).Delete(k)
				_, err := s.Sync(now, false)
				return err
			}
			return fmt.Errorf("set %s has no element", name)
		}})
	}
	return out
}

// nftRequest sends one request about a table, or about a chain of it; a table is put to sleep.
func nftRequest(ns *link.NS, op uint16, t *nft.Table, tableAttr, chainAttr uint16, chain string) error {
	s, err := link.OpenSocket(ns, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer s.Close()
	var a link.Attrs
	a.Str(tableAttr, t.Name)
	if chain != "" {
		a.Str(chainAttr, chain)
	} else {
		a.BE32(unix.NFTA_TABLE_FLAGS, 1)
	}
	res := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	return s.Transact([]link.Message{{Type: unix.NFNL_MSG_BATCH_BEGIN, Body: res},
		{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | op, Body: append([]byte{t.Family, unix.NFNETLINK_V0, 0, 0}, a.Encoded()...)},
		{Type: unix.NFNL_MSG_BATCH_END, Body: res}}, 1)
}

// What is deleted comes back by itself.
func TestRunMends(t *testing.T) {
	l := checkLab(t)
	h := l.hosts[0]
	h.opts.CheckEvery = 50 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	defer func() { cancel(); <-done }()
	l.must(h.step(func() error { return h.conn.DelLink(meshDevice) }))
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		found := l.compare(h, false)
		if len(found) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not mended: %v", found)
		}
	}
}
