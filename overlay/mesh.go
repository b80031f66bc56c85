package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// udpDrain is how long UDP flows stay with a backend that takes no new ones.
const udpDrain = 10 * time.Second

// mesh is what is remembered of the node's own namespace; nil maps are unknown.
type mesh struct {
	device int
	mtu    int
	routes map[link.RouteKey]link.Route
	neighs map[link.NeighKey]link.MAC
	fdb    map[link.FDBKey]netip.Addr
	rules  map[link.RuleKey]link.Rule
	// table is skein_mesh; nil before it was looked at or when this node's place in the cluster changed.
	table  *nft.Table
	params nft.MeshParams
	dealer *dealer
	// targets may be reached through the mesh. One stays as long as its gateway leg, since a packet may be under way to a backend that
	// has just been taken out.
	targets map[string]netip.Addr
	// backends are the addresses that published ports lead to; retired ones left at that time and their UDP flows are still there.
	backends map[netip.Addr]bool
	retired  map[netip.Addr]time.Time
	// gateways are the addresses of local gateway legs by the tag of their sandbox.
	gateways map[string]netip.Addr
	// gone are gateway addresses whose flows are still to be forgotten.
	gone []netip.Addr
	// left are backends that left with the change under way.
	left     []netip.Addr
	rpWarned bool
}

func (m *mesh) forget() { m.routes, m.neighs, m.fdb, m.rules = nil, nil, nil, nil }

// adoptGateways finds the gateway legs that exist.
func (d *Driver) adoptGateways() error {
	d.mesh.gateways = map[string]netip.Addr{}
	links, err := d.conn.Links()
	if err != nil {
		return err
	}
	legs := map[int]string{}
	for name, l := range links {
		if rest, ok := strings.CutPrefix(name, gatewayPrefix); ok {
			legs[l.Index] = rest
		}
	}
	routes, err := d.conn.Routes()
	if err != nil {
		return err
	}
	for k, r := range routes {
		if t, ok := legs[r.Dev]; ok && k.Dst.IsSingleIP() && k.Table == 0 {
			d.mesh.gateways[t] = k.Dst.Addr()
		}
	}
	return nil
}

func (d *Driver) applyMesh(full bool) error {
	m := &d.mesh
	if full || m.device == 0 || d.peersChanged {
		m.forget()
		if err := d.setUpMesh(); err != nil {
			return fmt.Errorf("mesh: %w", err)
		}
		full = true
	}
	err := d.applyMeshRules(full)
	if err == nil {
		err = d.applyPeers()
	}
	if err != nil {
		m.forget()
		return fmt.Errorf("mesh: %w", err)
	}
	return nil
}

// setUpMesh makes what depends on this node alone.
func (d *Driver) setUpMesh() error {
	if err := d.host.Sysctl(map[string]string{"ipv4/ip_forward": "1"}); err != nil {
		return err
	}
	if err := d.relaxReversePath(); err != nil {
		return err
	}
	dev, mtu, err := d.ensureVXLAN(d.conn, meshDevice, meshVNI, 0)
	if err != nil {
		return err
	}
	d.mesh.device, d.mesh.mtu = dev, mtu
	own := host(nodeAddr(d.cfg.MeshPool, d.cfg.Self.Index))
	if err := d.conn.Do([]link.Message{link.AddAddr(dev, own)}); err != nil {
		return fmt.Errorf("set the node's mesh address %s: %w", own, err)
	}
	return d.host.Sysctl(map[string]string{
		"ipv4/conf/" + meshDevice + "/rp_filter":      "0",
		"ipv4/conf/" + meshDevice + "/route_localnet": "1", // localhost:port on this node; table skein_mesh guards it
		"ipv4/conf/" + meshDevice + "/send_redirects": "0",
	})
}

// relaxReversePath: the kernel uses the greater of conf.all and the device's rp_filter, and clients' addresses arrive on the mesh device
// although their way back is another. So the value of conf.all moves to every other device, where it means the same.
func (d *Driver) relaxReversePath() error {
	all, err := d.host.ReadSysctl("ipv4/conf/all/rp_filter")
	if err != nil || all == "0" {
		return err
	}
	links, err := d.conn.Links()
	if err != nil {
		return err
	}
	set := map[string]string{"ipv4/conf/default/rp_filter": all}
	for name := range links {
		if name == meshDevice || strings.HasPrefix(name, gatewayPrefix) {
			continue
		}
		own, err := d.host.ReadSysctl("ipv4/conf/" + name + "/rp_filter")
		if err == nil && own < all { // one digit each
			set["ipv4/conf/"+name+"/rp_filter?"] = all
		}
	}
	if !d.mesh.rpWarned {
		d.mesh.rpWarned = true
		d.log.Warn("moved net.ipv4.conf.all.rp_filter to the single devices, because it would drop clients' packets on the mesh device", "value", all)
	}
	if err := d.host.Sysctl(set); err != nil {
		return err
	}
	return d.host.Sysctl(map[string]string{"ipv4/conf/all/rp_filter": "0"})
}

// applyPeers writes where the other nodes' blocks are and how answers find the entry node.
func (d *Driver) applyPeers() error {
	m := &d.mesh
	own := nodeAddr(d.cfg.MeshPool, d.cfg.Self.Index)
	routes := map[link.RouteKey]link.Route{}
	neighs := map[link.NeighKey]link.MAC{}
	fdb := map[link.FDBKey]netip.Addr{}
	rules := map[link.RuleKey]link.Rule{
		{Pref: rulePref, Mark: markBase, Mask: markMask, Not: true}: {Goto: ruleEnd},
		{Pref: ruleEnd}: {},
	}
	for _, p := range d.cfg.Peers {
		via, mac := nodeAddr(d.cfg.MeshPool, p.Index), nodeMAC(meshVNI, p.Index)
		neighs[link.NeighKey{Dev: m.device, IP: via}] = mac
		fdb[link.FDBKey{Dev: m.device, MAC: mac}] = p.Underlay
		routes[link.RouteKey{Dst: nodeBlock(d.cfg.MeshPool, p.Index)}] = link.Route{Dev: m.device, Via: via, Src: own}
		routes[link.RouteKey{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Table: tableBase + p.Index}] = link.Route{Dev: m.device, Via: via}
		rules[link.RuleKey{Pref: rulePref + 1, Mark: markBase + p.Index, Mask: 0xffffffff}] = link.Rule{Table: tableBase + p.Index}
	}
	if err := d.readPeers(); err != nil {
		return err
	}
	err := errors.Join(
		d.conn.Do(link.Diff(fdb, m.fdb, link.SetFDB, link.DelFDB), unix.ENOENT),
		d.conn.Do(link.Diff(neighs, m.neighs, link.SetNeigh, link.DelNeigh), unix.ENOENT),
		d.conn.Do(link.Diff(routes, m.routes, link.SetRoute, link.DelRoute), unix.ESRCH),
		d.conn.Do(link.Diff(rules, m.rules, link.SetRule, link.DelRule), unix.EEXIST, unix.ENOENT))
	if err != nil {
		return fmt.Errorf("write routes to peers: %w", err)
	}
	m.routes, m.neighs, m.fdb, m.rules = routes, neighs, fdb, rules
	return nil
}

func (d *Driver) readPeers() (err error) {
	m := &d.mesh
	if m.routes != nil {
		return nil
	}
	if m.routes, err = d.conn.Routes(); err != nil {
		return err
	}
	for k, r := range m.routes {
		if r.Dev != m.device {
			delete(m.routes, k)
		}
	}
	if m.neighs, err = d.conn.Neighs(m.device); err != nil {
		return err
	}
	if m.fdb, err = d.conn.FDB(m.device); err != nil {
		return err
	}
	m.rules, err = d.conn.Rules()
	return err
}

func (d *Driver) meshParams() nft.MeshParams {
	pool, self := d.cfg.MeshPool, d.cfg.Self.Index
	return nft.MeshParams{Device: meshDevice, Gateways: gatewayPrefix + "*", Node: nodeAddr(pool, self), Block: nodeBlock(pool, self),
		DataPort: d.cfg.DataPort, MarkBase: markBase, MarkMask: markMask}
}

// loadMesh starts the table from what an earlier driver left in the kernel.
func (d *Driver) loadMesh() error {
	m := &d.mesh
	params := d.meshParams()
	if m.table != nil && m.params == params {
		return nil
	}
	t := nft.MeshTable(false, params)
	if err := d.nft.Load(t); err != nil {
		return err
	}
	m.table, m.params, m.dealer = t, params, newDealer(t, "pubs")
	m.targets = map[string]netip.Addr{}
	for k := range t.Set("targets").All() {
		if a, ok := netip.AddrFromSlice([]byte(k[:4])); ok {
			m.targets[k] = a
		}
	}
	return nil
}

// applyMeshRules writes table skein_mesh.
func (d *Driver) applyMeshRules(full bool) error {
	if err := d.loadMesh(); err != nil {
		return err
	}
	t := d.mesh.table
	peerMark, peerZone := map[string]string{}, map[string]string{}
	nodes := map[string]string{}
	for _, p := range append([]Node{{Index: d.cfg.Self.Index, Underlay: d.underlay()}}, d.cfg.Peers...) {
		nodes[nft.AddrKey(p.Underlay)] = ""
		if p.Index != d.cfg.Self.Index {
			mac := nodeMAC(meshVNI, p.Index)
			peerMark[string(mac[:])] = nft.MarkValue(markBase + p.Index)
			peerZone[string(mac[:])] = nft.ZoneValue(uint16(p.Index))
		}
	}
	t.Set("peer_mark").Replace(peerMark)
	t.Set("peer_zone").Replace(peerZone)
	t.Set("nodes").Replace(nodes)
	d.fillPorts()
	d.fillGateways()
	if _, err := d.nft.Sync(t, full); err != nil {
		return err
	}
	// A client whose first packets met a backend that died would go on asking the dead until it gives up.
	_, err := d.nft.ForgetUnanswered(d.mesh.left...)
	d.mesh.left = nil
	return err
}

// fillPorts fills what follows from published ports.
func (d *Driver) fillPorts() {
	m := &d.mesh
	current := map[string]netip.Addr{}
	live := map[netip.Addr]bool{}
	published := make(map[string]string, len(d.cfg.Mesh.Ports))
	want := make(map[string]share, len(d.cfg.Mesh.Ports))
	for _, p := range d.portsByPrecedence() {
		proto, ok := protocolNumber(p.Protocol)
		if !ok {
			d.log.Error("published port not served: protocol is not built", "port", p.Published, "protocol", p.Protocol)
			continue
		}
		key := nft.PortKey(proto, p.Published)
		if _, taken := published[key]; taken || p.Local && !d.hasBackendHere(p) {
			continue
		}
		published[key] = ""
		var backends []string
		for _, b := range p.Backends {
			if !b.Addr4.IsValid() || p.Local && b.Node != d.cfg.Self.Index {
				continue
			}
			backends = append(backends, nft.AddrPort(b.Addr4, p.Target))
			live[b.Addr4] = true
			if b.Node == d.cfg.Self.Index {
				current[nft.TargetKey(b.Addr4, proto, p.Target)] = b.Addr4
			}
		}
		for _, b := range p.Soon {
			if b.Addr4.IsValid() && b.Node == d.cfg.Self.Index {
				current[nft.TargetKey(b.Addr4, proto, p.Target)] = b.Addr4
			}
		}
		if len(backends) > 0 {
			want[key] = share{backends, func(i int) string { return nft.MeshSlotKey(proto, p.Published, i) }}
		}
	}
	m.retire(live)
	m.dealer.update(want)
	m.table.Set("published").Replace(published)
	for k, a := range m.targets { // see mesh.targets
		if _, ok := current[k]; !ok && d.isLocalGateway(a) {
			current[k] = a
		}
	}
	m.targets = current
}

// retire notes which backends have just left.
func (m *mesh) retire(live map[netip.Addr]bool) {
	if m.retired == nil {
		m.retired = map[netip.Addr]time.Time{}
	}
	for a := range m.backends {
		if !live[a] {
			m.retired[a] = time.Now()
			m.left = append(m.left, a)
		}
	}
	for a := range live {
		delete(m.retired, a)
	}
	m.backends = live
}

// forgetRetired deletes the UDP flows of backends that left udpDrain ago. A UDP flow lives as long as its client sends, so it would stay
// with the dead for ever; TCP flows end by themselves.
func (d *Driver) forgetRetired(now time.Time) error {
	var gone []netip.Addr
	for a, left := range d.mesh.retired {
		if now.Sub(left) >= udpDrain {
			gone = append(gone, a)
			delete(d.mesh.retired, a)
		}
	}
	_, err := d.nft.ForgetFlows(unix.IPPROTO_UDP, gone...)
	return err
}

func (d *Driver) hasBackendHere(p PublishedPort) bool {
	return slices.ContainsFunc(p.Backends, func(b Backend) bool { return b.Node == d.cfg.Self.Index })
}

func (d *Driver) isLocalGateway(a netip.Addr) bool {
	for _, g := range d.mesh.gateways {
		if g == a {
			return true
		}
	}
	return false
}

// fillGateways fills what follows from local gateway legs.
func (d *Driver) fillGateways() {
	m := &d.mesh
	self, targets := map[string]string{}, make(map[string]string, len(m.targets))
	for _, a := range m.gateways {
		self[nft.SelfKey(a)] = ""
	}
	for k := range m.targets {
		targets[k] = ""
	}
	m.table.Set("self").Replace(self)
	m.table.Set("targets").Replace(targets)
}

// portsByPrecedence puts ports of this node alone before the cluster's, so that they win.
func (d *Driver) portsByPrecedence() []PublishedPort {
	ports := slices.Clone(d.cfg.Mesh.Ports)
	slices.SortStableFunc(ports, func(a, b PublishedPort) int {
		switch {
		case a.Local == b.Local:
			return 0
		case a.Local:
			return -1
		}
		return 1
	})
	return ports
}

func protocolNumber(name string) (byte, bool) {
	switch name {
	case "tcp", "":
		return unix.IPPROTO_TCP, true
	case "udp":
		return unix.IPPROTO_UDP, true
	}
	return 0, false
}
