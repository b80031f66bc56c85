package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// router is one network's namespace on this node: containers hang on it by veths, other nodes by a VXLAN device, and every packet between
// them is routed, so that conntrack sees both directions of VIP translations.
type router struct {
	file string
	ns   *link.NS
	conn *link.Conn
	nft  *nft.Syncer
	vx   int
	mtu  int

	// What was last written; nil when unknown.
	routes map[link.RouteKey]link.Route
	neighs map[link.NeighKey]link.MAC
	fdb    map[link.FDBKey]netip.Addr
	// vips are the tables by family, 0 IPv4 and 1 IPv6; nil: not looked at yet.
	vips [2]*vipTable
	// applied is the network as it was last applied without error.
	applied *Network
}

type vipTable struct {
	*nft.Table
	gateway netip.Addr
	dealer  *dealer
}

func (r *router) close() {
	if r.nft != nil {
		r.nft.Close()
	}
	if r.conn != nil {
		r.conn.Close()
	}
	if r.ns != nil {
		r.ns.Close()
	}
}

// forget makes the next apply read the kernel.
func (r *router) forget() { r.routes, r.neighs, r.fdb, r.applied = nil, nil, nil, nil }

func openRouter(file string, create bool) (*router, error) {
	r := &router{file: file}
	var err error
	if create {
		r.ns, err = link.CreateNS(file)
	} else {
		r.ns, err = link.OpenNS(file)
	}
	if err == nil {
		r.conn, err = link.Dial(r.ns)
	}
	if err == nil {
		r.nft, err = nft.NewSyncer(r.ns)
	}
	if err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (d *Driver) applyNetwork(nw *Network, full bool) error {
	r := d.routers[nw.ID]
	if r != nil && full { // somebody may have removed the namespace file
		if cur, err := link.OpenNS(r.file); err != nil || !cur.Same(r.ns) {
			r.close()
			delete(d.routers, nw.ID)
			r = nil
		} else {
			cur.Close()
		}
	}
	if r == nil {
		var err error
		if r, err = openRouter(d.routerFile(nw.ID), true); err != nil {
			return fmt.Errorf("network %q: router: %w", nw.Name, err)
		}
		d.routers[nw.ID] = r
		full = true
	}
	if !full && r.applied != nil && !d.peersChanged && sameNetwork(r.applied, nw) {
		return nil
	}
	if full || r.applied == nil || r.applied.MTU != nw.MTU || r.applied.VNI != nw.VNI || d.peersChanged {
		r.forget()
		if err := d.setUpRouter(r, nw); err != nil {
			return fmt.Errorf("network %q: router: %w", nw.Name, err)
		}
	}
	if err := d.applyEntries(r, nw); err != nil {
		r.forget()
		return fmt.Errorf("network %q: %w", nw.Name, err)
	}
	if err := d.applyVIPs(r, nw, full); err != nil {
		r.forget()
		return fmt.Errorf("network %q: %w", nw.Name, err)
	}
	if err := r.endNetworkFlows(nw); err != nil {
		return fmt.Errorf("network %q: %w", nw.Name, err)
	}
	r.applied = nw
	return nil
}

// sameNetwork compares all that is written into the kernel or answered by DNS.
func sameNetwork(a, b *Network) bool {
	return a.ID == b.ID && a.Name == b.Name && a.VNI == b.VNI && a.Subnet4 == b.Subnet4 && a.Subnet6 == b.Subnet6 && a.MTU == b.MTU && a.Encrypted == b.Encrypted &&
		slices.Equal(a.More, b.More) && a.Router4 == b.Router4 && a.Router6 == b.Router6 &&
		slices.EqualFunc(a.Services, b.Services, func(a, b Service) bool {
			return a.ID == b.ID && a.VIP4 == b.VIP4 && a.VIP6 == b.VIP6 && a.DNSRR == b.DNSRR && slices.Equal(a.Names, b.Names) && slices.Equal(a.Ports, b.Ports)
		}) &&
		slices.EqualFunc(a.Endpoints, b.Endpoints, func(a, b Endpoint) bool {
			return a.ID == b.ID && a.ServiceID == b.ServiceID && a.Node == b.Node && a.Addr4 == b.Addr4 && a.Addr6 == b.Addr6 &&
				a.State == b.State && slices.Equal(a.Names, b.Names)
		})
}

// setUpRouter makes what does not change with endpoints: settings, the VXLAN device, the router's own address.
func (d *Driver) setUpRouter(r *router, nw *Network) error {
	err := r.ns.Sysctl(map[string]string{
		"ipv4/ip_forward":                    "1",
		"ipv4/conf/all/rp_filter":            "0",
		"ipv4/conf/default/rp_filter":        "1", // legs: a container sends from its own address only
		"ipv4/conf/all/send_redirects":       "0",
		"ipv4/conf/default/send_redirects":   "0",
		"ipv4/conf/default/proxy_arp":        "1", // containers believe that their subnet is one link
		"ipv6/conf/all/forwarding?":          "1",
		"ipv6/conf/default/accept_ra?":       "0",
		"netfilter/nf_conntrack_tcp_loose?":  "1",
		"ipv4/conf/default/accept_redirects": "0",
	})
	if err != nil {
		return err
	}
	ensure := func() (int, int, error) { return d.ensureVXLAN(r.conn, vxlanDevice, nw.VNI, nw.MTU) }
	if nw.Encrypted {
		ensure = func() (int, int, error) { return d.ensureTunnel(r, nw) }
	}
	vx, mtu, err := ensure()
	if err != nil {
		return err
	}
	r.vx, r.mtu = vx, mtu
	gw, gw6 := routerAddrs(nw)
	msgs := []link.Message{link.Up(loopback), link.AddAddr(loopback, host(gw))}
	if gw6.IsValid() {
		msgs = append(msgs, link.AddAddr(loopback, host(gw6)))
	}
	if err := r.conn.Do(msgs); err != nil {
		return fmt.Errorf("set router address: %w", err)
	}
	return nil
}

// routerAddrs are the router's addresses, the same on every node.
func routerAddrs(nw *Network) (v4, v6 netip.Addr) {
	v4 = nw.Subnet4.Masked().Addr().Next()
	if nw.Subnet6.IsValid() {
		v6 = nw.Subnet6.Masked().Addr().Next()
	}
	if nw.Router4.IsValid() {
		v4 = nw.Router4
	}
	if nw.Router6.IsValid() {
		v6 = nw.Router6
	}
	return v4, v6
}

// ensureVXLAN makes the device where to lives, or makes it anew when it is not as it should be. Its UDP socket is the node's.
func (d *Driver) ensureVXLAN(to *link.Conn, name string, vni uint32, mtu int) (index, gotMTU int, err error) {
	local := d.underlay()
	if mtu == 0 {
		if mtu, err = d.underlayMTU(local); err != nil {
			return 0, 0, err
		}
	}
	mtu = d.carried(d.fits(mtu, local))
	want := link.Link{Name: name, Kind: "vxlan", VNI: vni, Local: local, Port: d.cfg.DataPort, MAC: nodeMAC(vni, d.cfg.Self.Index), MTU: mtu, Up: true}
	have, err := to.Link(name)
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return 0, 0, err
	}
	exists := err == nil
	want.Index, want.Master, want.Alias = have.Index, have.Master, have.Alias
	noFilter := map[string]string{"ipv4/conf/" + name + "/rp_filter": "0"}
	if exists && have == want {
		return have.Index, mtu, to.NS.Sysctl(noFilter)
	}
	if same := want; exists {
		if same.MTU = have.MTU; have == same { // what hangs on it stays
			return have.Index, mtu, errors.Join(to.SetMTU(have.Index, mtu), to.NS.Sysctl(noFilter))
		}
		if err := to.DelLink(name); err != nil {
			return 0, 0, err
		}
	}
	err = d.conn.AddVXLAN(link.VXLAN{End: link.End{NS: to.NS, Name: name, MAC: want.MAC, MTU: mtu}, VNI: vni, Local: local, Port: d.cfg.DataPort})
	if err != nil {
		return 0, 0, err
	}
	if have, err = to.Link(name); err != nil {
		return 0, 0, err
	}
	return have.Index, mtu, to.NS.Sysctl(noFilter)
}

func (d *Driver) underlay() netip.Addr {
	if d.opts.Underlay.IsValid() {
		return d.opts.Underlay
	}
	return d.cfg.Self.Underlay
}

// minMTU6 is what every IPv6 link carries (RFC 8200 section 5): the kernel takes IPv6 off a device with less.
const minMTU6 = 1280

// carried is the MTU of a device whose packets should not be larger than so much. Where there is IPv6 it is never less than that needs: tunnel
// packets are cut on their way then.
func (d *Driver) carried(mtu int) int {
	if d.cfg.MeshPool6.IsValid() {
		return max(mtu, minMTU6)
	}
	return mtu
}

// underlayMTU is what fits into a tunnel packet: the MTU of the underlay's device, or what paths to other nodes carry, less the headers.
func (d *Driver) underlayMTU(local netip.Addr) (int, error) {
	mtu, err := d.deviceMTU(local)
	if err != nil || mtu <= tunnelHeaders(local)+576 {
		return 0, errors.Join(err, fmt.Errorf("no device of this node that can carry tunnels has the address %s: advertise an address that is local", local))
	}
	return d.carried(d.fits(min(mtu, 65535)-tunnelHeaders(local), local)), nil
}

// applyEntries writes where other nodes and their endpoints are.
func (d *Driver) applyEntries(r *router, nw *Network) error {
	routes := make(map[link.RouteKey]link.Route, 2*(len(nw.Endpoints)+len(nw.Services)))
	neighs := map[link.NeighKey]link.MAC{}
	fdb := map[link.FDBKey]netip.Addr{}
	nodes := make(map[uint32]netip.Addr, len(d.cfg.Peers))
	for _, p := range d.cfg.Peers {
		nodes[p.Index] = p.Underlay
	}
	for i := range nw.Endpoints {
		e := &nw.Endpoints[i]
		under, ok := nodes[e.Node]
		if !ok { // here, or on a node that is not known yet
			continue
		}
		mac := nodeMAC(nw.VNI, e.Node)
		if !nw.Encrypted {
			fdb[link.FDBKey{Dev: r.vx, MAC: mac}] = under
		}
		for _, a := range []netip.Addr{e.Addr4, e.Addr6} {
			if a.IsValid() {
				via := nodeVia(e.Node, a.Is6())
				if !nw.Encrypted {
					neighs[link.NeighKey{Dev: r.vx, IP: via}] = mac
				}
				routes[link.RouteKey{Dst: host(a)}] = link.Route{Dev: r.vx, Via: via}
			}
		}
	}
	for _, s := range nw.Services {
		for _, a := range []netip.Addr{s.VIP4, s.VIP6} {
			if a.IsValid() && !s.DNSRR {
				routes[link.RouteKey{Dst: host(a)}] = link.Route{Dev: loopback, Local: true}
			}
		}
	}
	if err := r.readEntries(); err != nil {
		return err
	}
	err := errors.Join(
		r.conn.Do(link.Diff(fdb, r.fdb, link.SetFDB, link.DelFDB), unix.ENOENT),
		r.conn.Do(link.Diff(neighs, r.neighs, link.SetNeigh, link.DelNeigh), unix.ENOENT),
		r.conn.Do(link.Diff(routes, r.routes, link.SetRoute, link.DelRoute), unix.ESRCH))
	if err != nil {
		return fmt.Errorf("write routes to other nodes: %w", err)
	}
	r.routes, r.neighs, r.fdb = routes, neighs, fdb
	d.setTunnelEndpoints(nw)
	return nil
}

// readEntries reads from the kernel what is not remembered. Routes of local legs belong to AddSandbox.
func (r *router) readEntries() (err error) {
	if r.routes != nil {
		return nil
	}
	if r.routes, err = r.conn.Routes(); err != nil {
		return err
	}
	for k, v := range r.routes {
		if v.Dev != r.vx && v.Dev != loopback {
			delete(r.routes, k)
		}
	}
	if r.neighs, err = r.conn.Neighs(r.vx); err != nil {
		return err
	}
	r.fdb, err = r.conn.FDB(r.vx)
	return err
}

// applyVIPs writes who answers for which VIP.
func (d *Driver) applyVIPs(r *router, nw *Network, full bool) error {
	gw, gw6 := routerAddrs(nw)
	for i, gw := range []netip.Addr{gw, gw6} {
		if !gw.IsValid() {
			continue
		}
		t := r.vips[i]
		if t == nil || t.gateway != gw {
			t = &vipTable{Table: nft.VIPTable(gw.Is6(), legPrefix+"*", gw), gateway: gw}
			t.dealer = newDealer(t.Table, "vips")
			if err := r.nft.Load(t.Table); err != nil {
				return err
			}
			r.vips[i] = t
		}
		d.fillVIPs(t, nw, gw.Is6())
		if _, err := r.nft.Sync(t.Table, full); err != nil {
			return err
		}
	}
	return nil
}

func (d *Driver) fillVIPs(t *vipTable, nw *Network, v6 bool) {
	backends := make(map[string][]string, len(nw.Services))
	self := map[string]string{}
	for i := range nw.Endpoints {
		e := &nw.Endpoints[i]
		a := pick(v6, e.Addr4, e.Addr6)
		if !a.IsValid() {
			continue
		}
		if e.State == Ready && e.ServiceID != "" {
			backends[e.ServiceID] = append(backends[e.ServiceID], nft.AddrKey(a))
		}
		if e.Node == d.cfg.Self.Index {
			self[nft.SelfKey(a)] = ""
		}
	}
	want := make(map[string]share, len(nw.Services))
	for _, s := range nw.Services {
		vip := pick(v6, s.VIP4, s.VIP6)
		if !s.DNSRR && vip.IsValid() && len(backends[s.ID]) > 0 {
			want[nft.AddrKey(vip)] = share{backends[s.ID], func(i int) string { return nft.VIPSlotKey(vip, i) }}
		}
	}
	t.dealer.update(want)
	t.Set("self").Replace(self)
}

// removeRouters deletes the namespaces of networks that the config has no more, unless a container still hangs on one.
func (d *Driver) removeRouters(full bool) {
	want := map[string]bool{}
	for i := range d.cfg.Networks {
		want[filepath.Base(d.routerFile(d.cfg.Networks[i].ID))] = true
	}
	for id, r := range d.routers {
		if !want[filepath.Base(r.file)] && d.removeRouter(r, false) {
			delete(d.routers, id)
		}
	}
	if !full {
		return
	}
	_, files, err := d.netnsFiles()
	if err != nil {
		d.log.Error("look for left-over router namespaces", "error", err)
		return
	}
	for _, f := range files {
		if want[f] || d.routerOfFile(f) != nil {
			continue
		}
		path := filepath.Join(d.netnsDir(), f)
		r, err := openRouter(path, false)
		if err != nil { // a file without a namespace
			err = link.RemoveNS(path)
		} else {
			d.removeRouter(r, false)
			r.close()
		}
		if err != nil {
			d.log.Error("remove left-over router namespace", "file", path, "error", err)
		}
	}
}

func (d *Driver) routerOfFile(name string) *router {
	for _, r := range d.routers {
		if filepath.Base(r.file) == name {
			return r
		}
	}
	return nil
}

// removeRouter deletes the VXLAN device at once, because the kernel tears the namespace down later and the VNI must be free now.
func (d *Driver) removeRouter(r *router, force bool) bool {
	links, err := r.conn.Links()
	if err == nil && !force {
		for name := range links {
			if len(name) > len(legPrefix) && name[:len(legPrefix)] == legPrefix {
				return false
			}
		}
	}
	for name, l := range links {
		if l.Kind == "vxlan" || l.Kind == tunKind || l.Kind == "veth" {
			err = errors.Join(err, r.conn.DelLink(name))
		}
	}
	err = errors.Join(err, link.RemoveNS(r.file))
	if err != nil {
		d.log.Error("remove router namespace", "file", r.file, "error", err)
		return false
	}
	r.close()
	return true
}

func pick(v6 bool, a4, a6 netip.Addr) netip.Addr {
	if v6 {
		return a6
	}
	return a4
}
