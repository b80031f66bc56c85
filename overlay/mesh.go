package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// mesh is what is remembered of the node's own namespace; nil maps are unknown.
type mesh struct {
	device int
	mtu    int
	routes map[link.RouteKey]link.Route
	neighs map[link.NeighKey]link.MAC
	fdb    map[link.FDBKey]netip.Addr
	rules  map[link.RuleKey]link.Rule
	// tables are skein_mesh by family, 0 IPv4 and 1 IPv6; nil: not looked at yet, or no IPv6.
	tables [2]*meshTable
	ends   endings
	// gateways are the addresses of local gateway legs by the tag of their sandbox.
	gateways map[string]gateway
	// gone are gateway addresses whose flows are still to be forgotten.
	gone     []netip.Addr
	rpWarned bool
}

// gateway is what a gateway leg has of each family.
type gateway struct{ v4, v6 netip.Addr }

// meshTable is skein_mesh of one family.
type meshTable struct {
	*nft.Table
	params nft.MeshParams
	dealer *dealer
	// targets may be reached through the mesh. One stays as long as its gateway leg, since a packet may be under way to a backend that
	// has just been taken out.
	targets map[string]netip.Addr
}

func (m *mesh) forget() { m.routes, m.neighs, m.fdb, m.rules = nil, nil, nil, nil }

// adoptGateways finds the gateway legs that exist.
func (d *Driver) adoptGateways() error {
	d.mesh.gateways = map[string]gateway{}
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
			g := d.mesh.gateways[t]
			if a := k.Dst.Addr(); a.Is4() {
				g.v4 = a
			} else {
				g.v6 = a
			}
			d.mesh.gateways[t] = g
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
	err := d.applyPeers() // first the ways to backends, then who is sent there
	if err == nil {
		err = d.applyMeshRules(full)
	}
	if err != nil {
		m.forget()
		return fmt.Errorf("mesh: %w", err)
	}
	return nil
}

// setUpMesh makes what depends on this node alone.
func (d *Driver) setUpMesh() error {
	if err := d.changeHost(map[string]string{forwarding4: "1"}); err != nil {
		return err
	}
	if err := d.relaxReversePath(); err != nil {
		return err
	}
	dev, mtu, err := d.ensureVXLAN(d.conn, meshDevice, meshVNI, d.cfg.Mesh.MTU)
	if err != nil {
		return err
	}
	d.mesh.device, d.mesh.mtu = dev, mtu
	own := host(nodeAddr(d.cfg.MeshPool, d.cfg.Self.Index))
	if err := d.conn.Do([]link.Message{link.AddAddr(dev, own)}); err != nil {
		return fmt.Errorf("set the node's mesh address %s: %w", own, err)
	}
	if err := d.setUpMesh6(dev); err != nil {
		return err
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
	if err := d.changeHost(set); err != nil {
		return err
	}
	return d.changeHost(map[string]string{"ipv4/conf/all/rp_filter": "0"})
}

// applyPeers writes where the other nodes' blocks are and how answers find the entry node.
func (d *Driver) applyPeers() error {
	m := &d.mesh
	own := nodeAddr(d.cfg.MeshPool, d.cfg.Self.Index)
	routes := map[link.RouteKey]link.Route{}
	neighs := map[link.NeighKey]link.MAC{}
	fdb := map[link.FDBKey]netip.Addr{}
	rules := commonRules()
	for _, p := range d.cfg.Peers {
		via, mac := nodeAddr(d.cfg.MeshPool, p.Index), nodeMAC(meshVNI, p.Index)
		neighs[link.NeighKey{Dev: m.device, IP: via}] = mac
		fdb[link.FDBKey{Dev: m.device, MAC: mac}] = p.Underlay
		routes[link.RouteKey{Dst: nodeBlock(d.cfg.MeshPool, p.Index)}] = link.Route{Dev: m.device, Via: via, Src: own}
		routes[link.RouteKey{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Table: tableBase + p.Index}] = link.Route{Dev: m.device, Via: via}
		addPeerRule(rules, p.Index)
	}
	d.addPeers6(routes, neighs, rules)
	d.addFurther(routes)
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

// addFurther adds the ways to other nodes' backends that are not in the block of their node, because that was full.
func (d *Driver) addFurther(routes map[link.RouteKey]link.Route) {
	peers := make(map[uint32]bool, len(d.cfg.Peers))
	for _, p := range d.cfg.Peers {
		peers[p.Index] = true
	}
	pool, pool6, self := d.cfg.MeshPool, d.cfg.MeshPool6, d.cfg.Self.Index
	add := func(all []Backend) {
		for _, b := range all {
			if !peers[b.Node] {
				continue
			}
			if b.Addr4.IsValid() && !nodeBlock(pool, b.Node).Contains(b.Addr4) {
				routes[link.RouteKey{Dst: host(b.Addr4)}] = link.Route{Dev: d.mesh.device, Via: nodeAddr(pool, b.Node), Src: nodeAddr(pool, self)}
			}
			if b.Addr6.IsValid() && pool6.IsValid() && !nodeBlock6(pool6, b.Node).Contains(b.Addr6) {
				routes[link.RouteKey{Dst: host(b.Addr6)}] = link.Route{Dev: d.mesh.device, Via: nodeVia(b.Node, true), Src: nodeAddr6(pool6, self)}
			}
		}
	}
	for _, p := range d.cfg.Mesh.Ports {
		add(p.Backends)
	}
	add(d.cfg.Mesh.Leaving)
	add(d.cfg.Mesh.Lost)
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

func (d *Driver) meshParams(v6 bool) nft.MeshParams {
	self := d.cfg.Self.Index
	p := nft.MeshParams{Device: meshDevice, Gateways: gatewayPrefix + "*", DataPort: d.cfg.DataPort, MarkBase: markBase, MarkMask: markMask}
	if v6 {
		p.Node, p.Pool = nodeAddr6(d.cfg.MeshPool6, self), nodesPool6(d.cfg.MeshPool6)
	} else {
		p.Node, p.Pool = nodeAddr(d.cfg.MeshPool, self), d.cfg.MeshPool.Masked()
	}
	return p
}

// loadMesh starts the tables from what an earlier driver left in the kernel.
func (d *Driver) loadMesh() error {
	for i, v6 := range []bool{false, true} {
		if v6 && !d.cfg.MeshPool6.IsValid() {
			if d.mesh.tables[i] != nil {
				d.mesh.tables[i] = nil
				return d.nft.Delete(nft.IPv6, nft.MeshTableName)
			}
			continue
		}
		params := d.meshParams(v6)
		if t := d.mesh.tables[i]; t != nil && t.params == params {
			continue
		}
		t := &meshTable{Table: nft.MeshTable(v6, params), params: params, targets: map[string]netip.Addr{}}
		if err := d.nft.Load(t.Table); err != nil {
			return err
		}
		t.dealer = newDealer(t.Table, "pubs")
		for k := range t.Set("targets").All() {
			if a, ok := netip.AddrFromSlice([]byte(k[:params.Node.BitLen()/8])); ok {
				t.targets[k] = a
			}
		}
		d.mesh.tables[i] = t
	}
	return nil
}

// applyMeshRules writes table skein_mesh.
func (d *Driver) applyMeshRules(full bool) error {
	if err := d.loadMesh(); err != nil {
		return err
	}
	if err := d.findHeld(); err != nil {
		return err
	}
	peerMark, peerZone := map[string]string{}, map[string]string{}
	nodes := [2]map[string]string{{}, {}}
	for _, p := range append([]Node{{Index: d.cfg.Self.Index, Underlay: d.underlay()}}, d.cfg.Peers...) {
		nodes[familyIndex(p.Underlay)][nft.AddrKey(p.Underlay)] = ""
		if p.Index != d.cfg.Self.Index {
			mac := nodeMAC(meshVNI, p.Index)
			peerMark[string(mac[:])] = nft.MarkValue(markBase + p.Index)
			peerZone[string(mac[:])] = nft.ZoneValue(uint16(p.Index))
		}
	}
	for _, a := range d.cfg.NodeAddrs {
		nodes[familyIndex(a)][nft.AddrKey(a)] = ""
	}
	for i, t := range d.mesh.tables {
		if t == nil {
			continue
		}
		t.Set("peer_mark").Replace(peerMark)
		t.Set("peer_zone").Replace(peerZone)
		t.Set("nodes").Replace(nodes[i])
	}
	d.fillPorts()
	d.fillGateways()
	if err := d.syncMesh(full); err != nil {
		return err
	}
	return d.endMeshFlows()
}

// syncMesh writes what changed of the tables.
func (d *Driver) syncMesh(full bool) error {
	var errs []error
	for _, t := range d.mesh.tables {
		if t != nil {
			_, err := d.nft.Sync(t.Table, full)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// fillPorts fills what follows from published ports.
func (d *Driver) fillPorts() {
	live := map[netip.Addr]bool{}
	for i, t := range d.mesh.tables {
		if t != nil {
			d.fillPortsOf(t, i == 1, live)
		}
	}
	d.mesh.ends.backends = live
}

// fillPortsOf does so for one family, and adds its backends to live.
func (d *Driver) fillPortsOf(t *meshTable, v6 bool, live map[netip.Addr]bool) {
	current := map[string]netip.Addr{}
	published := make(map[string]string, len(d.cfg.Mesh.Ports))
	want := make(map[string]share, len(d.cfg.Mesh.Ports))
	for _, p := range d.portsByPrecedence() {
		proto, ok := hostProtocol(p.Protocol)
		if !ok || proto == unix.IPPROTO_SCTP && !d.SCTP() {
			d.log.Error("published port not served: this node's kernel cannot", "port", p.Published, "protocol", p.Protocol)
			continue
		}
		key := nft.PortKey(proto, p.Published)
		if _, taken := published[key]; taken || p.Local && !d.hasBackendHere(p) {
			continue
		}
		published[key] = ""
		var backends []string
		for _, b := range p.Backends {
			a := pick(v6, b.Addr4, b.Addr6)
			if !a.IsValid() || p.Local && b.Node != d.cfg.Self.Index {
				continue
			}
			backends = append(backends, nft.AddrPort(a, p.Target))
			live[a] = true
			if b.Node == d.cfg.Self.Index {
				current[nft.TargetKey(a, proto, p.Target)] = a
			}
		}
		for _, b := range p.Soon {
			if a := pick(v6, b.Addr4, b.Addr6); a.IsValid() && b.Node == d.cfg.Self.Index {
				current[nft.TargetKey(a, proto, p.Target)] = a
			}
		}
		if len(backends) > 0 {
			want[key] = share{backends, func(i int) string { return nft.MeshSlotKey(proto, p.Published, i) }}
		}
	}
	t.dealer.update(want)
	t.Set("published").Replace(published)
	for k, a := range t.targets { // see meshTable.targets
		if _, ok := current[k]; !ok && d.isLocalGateway(a) {
			current[k] = a
		}
	}
	t.targets = current
}

func (d *Driver) hasBackendHere(p PublishedPort) bool {
	return slices.ContainsFunc(p.Backends, func(b Backend) bool { return b.Node == d.cfg.Self.Index })
}

func (d *Driver) isLocalGateway(a netip.Addr) bool {
	for _, g := range d.mesh.gateways {
		if g.v4 == a || g.v6 == a {
			return true
		}
	}
	return false
}

// fillGateways fills what follows from local gateway legs.
func (d *Driver) fillGateways() {
	for i, t := range d.mesh.tables {
		if t == nil {
			continue
		}
		self, targets := map[string]string{}, make(map[string]string, len(t.targets))
		for _, g := range d.mesh.gateways {
			if a := pick(i == 1, g.v4, g.v6); a.IsValid() {
				self[nft.SelfKey(a)] = ""
			}
		}
		for k := range t.targets {
			targets[k] = ""
		}
		t.Set("self").Replace(self)
		t.Set("targets").Replace(targets)
	}
}

// portsByPrecedence puts ports of this node alone before the cluster's, so that they win. Those that somebody here had before are left out.
func (d *Driver) portsByPrecedence() []PublishedPort {
	ports := d.notHeld(d.cfg.Mesh.Ports)
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
