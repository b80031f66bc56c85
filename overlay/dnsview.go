package overlay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/overlay/dns"
	"skein/overlay/link"
	"skein/overlay/nft"
)

const (
	dnsStorePrefix = "dns/"
	dnsResolver    = "127.0.0.11"
)

// serveDNS answers in the sandbox if it wants that. Sockets of an earlier daemon are taken from the store with what waits in them.
func (d *Driver) serveDNS(ctx context.Context, r *room, s Sandbox) error {
	if !s.DNS {
		return d.stopDNS(ctx, s.ID)
	}
	zones := d.zones()
	if d.dns.Serves(s.ID) {
		d.refreshViews(zones)
		return nil
	}
	udp, tcp, err := d.dnsSockets(ctx, r, s.ID)
	if err != nil {
		return fmt.Errorf("open DNS sockets: %w", err)
	}
	if err := d.dns.Add(s.ID, d.view(s, zones, d.resolvers()), udp, tcp, d.inside(s.ID)); err != nil {
		closeSockets(udp, tcp)
		return err
	}
	if len(s.Bridges) > 0 { // others on the bridge learn its names
		d.refreshViews(zones)
	}
	return nil
}

func (d *Driver) dnsSockets(ctx context.Context, r *room, id string) (net.PacketConn, net.Listener, error) {
	if udp, tcp, ok := d.storedSockets(id); ok {
		return udp, tcp, nil
	}
	udp, tcp := r.udp, r.tcp
	r.udp, r.tcp = nil, nil
	if udp == nil {
		var err error
		if udp, tcp, err = openDNS(r.ns); err != nil {
			return nil, nil, err
		}
	}
	if err := d.storeSockets(ctx, id, udp, tcp); err != nil {
		closeSockets(udp, tcp)
		return nil, nil, err
	}
	return udp, tcp, nil
}

// openDNS makes sockets in a namespace and lets the resolver's port lead to them.
func openDNS(ns *link.NS) (udp net.PacketConn, tcp net.Listener, err error) {
	err = ns.Do(func() (err error) {
		if udp, err = net.ListenPacket("udp4", dnsResolver+":0"); err != nil {
			return err
		}
		if tcp, err = net.Listen("tcp4", dnsResolver+":0"); err != nil {
			udp.Close()
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	if err = redirectDNS(ns, udp, tcp); err != nil {
		closeSockets(udp, tcp)
		return nil, nil, err
	}
	return udp, tcp, nil
}

func closeSockets(udp net.PacketConn, tcp net.Listener) {
	udp.Close()
	tcp.Close()
}

// redirectDNS makes port 53 of the resolver's address lead to the sockets.
func redirectDNS(ns *link.NS, udp net.PacketConn, tcp net.Listener) error {
	sync, err := nft.NewSyncer(ns)
	if err != nil {
		return err
	}
	defer sync.Close()
	up, tp := udp.LocalAddr().(*net.UDPAddr).Port, tcp.Addr().(*net.TCPAddr).Port
	_, err = sync.Sync(nft.DNSTable(netip.MustParseAddr(dnsResolver), uint16(up), uint16(tp)), true)
	return err
}

func (d *Driver) storeSockets(ctx context.Context, id string, udp net.PacketConn, tcp net.Listener) error {
	if d.opts.FDStore == nil {
		return nil
	}
	for name, c := range map[string]any{"udp": udp, "tcp": tcp} {
		raw, err := c.(syscall.Conn).SyscallConn()
		if err != nil {
			return err
		}
		var stored error
		if err := raw.Control(func(fd uintptr) { stored = d.opts.FDStore.StoreFD(ctx, dnsStorePrefix+id+"/"+name, int(fd)) }); err != nil {
			return err
		}
		if stored != nil {
			return fmt.Errorf("keep DNS socket: %w", stored)
		}
	}
	return nil
}

// storedSockets takes a sandbox's sockets from those loaded at start, if both are there.
func (d *Driver) storedSockets(id string) (net.PacketConn, net.Listener, bool) {
	take := func(proto string) *os.File {
		name := dnsStorePrefix + id + "/" + proto
		fd, ok := d.stored[name]
		if !ok {
			return nil
		}
		delete(d.stored, name)
		return os.NewFile(uintptr(fd), name)
	}
	fu, ft := take("udp"), take("tcp")
	defer fu.Close()
	defer ft.Close()
	if fu == nil || ft == nil {
		return nil, nil, false
	}
	udp, err := net.FilePacketConn(fu)
	if err != nil {
		d.log.Warn("stored DNS socket not usable", "container", id, "error", err)
		return nil, nil, false
	}
	tcp, err := net.FileListener(ft)
	if err != nil {
		udp.Close()
		d.log.Warn("stored DNS socket not usable", "container", id, "error", err)
		return nil, nil, false
	}
	return udp, tcp, true
}

func (d *Driver) stopDNS(ctx context.Context, id string) error {
	served := d.dns.Serves(id)
	d.dns.Remove(id)
	var err error
	for _, proto := range []string{"udp", "tcp"} {
		name := dnsStorePrefix + id + "/" + proto
		fd, stored := d.stored[name]
		if stored {
			unix.Close(fd)
			delete(d.stored, name)
		}
		if d.opts.FDStore != nil && (stored || served) {
			// Not found: the supervisor that kept it died.
			if e := d.opts.FDStore.ReleaseFD(ctx, name); !errdefs.IsNotFound(e) {
				err = errors.Join(err, e)
			}
		}
	}
	return err
}

func closeFDs(fds map[string]int) {
	for name, fd := range fds {
		unix.Close(fd)
		delete(fds, name)
	}
}

// updateDNS gives every served sandbox the names of the present config.
func (d *Driver) updateDNS() { d.refreshViews(d.zones()) }

func (d *Driver) refreshViews(zones map[string]*dns.Zone) {
	resolvers := d.resolvers()
	for id, b := range d.boxes {
		if b.spec.DNS {
			d.dns.SetView(id, d.view(b.spec, zones, resolvers))
		}
	}
}

// inside runs functions in the namespace of a sandbox. It holds nothing open, because descriptors are few.
func (d *Driver) inside(id string) func(func() error) error {
	return func(f func() error) error {
		ns, err := link.OpenNS(d.sandboxFile(id))
		if err != nil {
			return err
		}
		defer ns.Close()
		return ns.Do(f)
	}
}

// view is what a sandbox resolves.
func (d *Driver) view(s Sandbox, zones map[string]*dns.Zone, resolvers []netip.AddrPort) *dns.View {
	v := &dns.View{Bare: slices.ContainsFunc(s.SearchDNS, func(n string) bool { return n != "." }) || len(s.Upstreams) > 0, Upstreams: d.upstreams(s, resolvers)}
	for _, l := range s.Legs {
		if z := zones[l.NetworkID]; z != nil {
			v.Zones = append(v.Zones, z)
		}
	}
	for _, b := range s.Bridges {
		if z := d.linkZone(b); z != nil {
			v.Zones = append(v.Zones, z)
		}
		if z := zones[b.BridgeID]; z != nil {
			v.Zones = append(v.Zones, z)
		}
	}
	return v
}

// upstreams are whom to ask for foreign names, and from where: from the container's namespace what it can reach itself, the rest from the
// node's. The node never asks for a container that is on internal networks only: its questions would carry out what the network keeps in.
// Such a container has only those resolvers of its own choice that it reaches itself.
func (d *Driver) upstreams(s Sandbox, resolvers []netip.AddrPort) []dns.Upstream {
	shut := d.internal(s)
	four, six := d.egress(s)
	var out []dns.Upstream
	for _, a := range s.Upstreams {
		reached := four && a.Addr().Is4() || six && a.Addr().Is6()
		out = append(out, dns.Upstream{Addr: a, Node: !shut && !reached && !a.Addr().IsLoopback()})
	}
	if shut || len(out) > 0 {
		return out
	}
	for _, a := range resolvers {
		reached := four && a.Addr().Is4() || six && a.Addr().Is6()
		// Loopback is the node's; link-local addresses mean what they do where they were written down.
		out = append(out, dns.Upstream{Addr: a, Node: !reached || a.Addr().IsLoopback() || a.Addr().IsLinkLocalUnicast()})
	}
	return out
}

// egress tells in which families a sandbox has a way out.
func (d *Driver) egress(s Sandbox) (four, six bool) {
	four, six = s.Gateway4.IsValid(), s.Gateway6.IsValid()
	return four || d.wayOut(s.Bridges, false) >= 0, six || d.wayOut(s.Bridges, true) >= 0
}

// internal tells that a sandbox has no way out of this cluster's networks.
func (d *Driver) internal(s Sandbox) bool {
	if s.Gateway4.IsValid() || s.Gateway6.IsValid() {
		return false
	}
	for _, l := range s.Legs {
		if slices.ContainsFunc(d.cfg.Networks, func(nw Network) bool { return nw.ID == l.NetworkID && !nw.Internal }) {
			return false
		}
	}
	return !slices.ContainsFunc(s.Bridges, func(l BridgeLeg) bool { return !d.bridges[l.BridgeID].Internal })
}

// cachedZone spares building the names of a network that did not change.
type cachedZone struct {
	of   *Network
	zone *dns.Zone
}

// zones builds the names of all networks and bridges.
func (d *Driver) zones() map[string]*dns.Zone {
	out := map[string]*dns.Zone{}
	old := d.zoneCache
	d.zoneCache = make(map[string]cachedZone, len(d.cfg.Networks))
	for i := range d.cfg.Networks {
		nw := &d.cfg.Networks[i]
		c := old[nw.ID]
		if c.zone == nil || c.of != nw && !sameNetwork(c.of, nw) {
			c = cachedZone{of: nw, zone: networkZone(nw)}
		}
		d.zoneCache[nw.ID] = c
		out[nw.ID] = c.zone
	}
	d.bridgeZones(out)
	return out
}

func networkZone(nw *Network) *dns.Zone {
	z := dns.NewZone(nw.Name, nw.subnets()...)
	z.Expect(3*len(nw.Services)+2*len(nw.Endpoints), 2*(len(nw.Services)+len(nw.Endpoints)))
	services := make(map[string]*Service, len(nw.Services))
	for i := range nw.Services {
		s := &nw.Services[i]
		services[s.ID] = s
		for _, n := range unique(s.Names) {
			z.Add("tasks."+n, false)
			if s.DNSRR {
				z.Add(n, false)
			} else {
				z.Add(n, true, s.VIP4, s.VIP6)
			}
			z.Serve(n, s.Ports)
			z.Serve("tasks."+n, s.Ports)
		}
		if len(s.Names) > 0 && !s.DNSRR {
			z.Point(s.VIP4, s.Names[0], true)
			z.Point(s.VIP6, s.Names[0], true)
		}
	}
	for i := range nw.Endpoints {
		e := &nw.Endpoints[i]
		if len(e.Names) > 0 { // a reverse name helps the logs of others even while the endpoint starts or drains
			z.Point(e.Addr4, e.Names[0], false)
			z.Point(e.Addr6, e.Names[0], false)
		}
		if e.State != Ready {
			continue
		}
		for _, n := range unique(e.Names) {
			z.Add(n, false, e.Addr4, e.Addr6)
		}
		s := services[e.ServiceID]
		if s == nil {
			continue
		}
		for _, n := range unique(s.Names) {
			z.Add("tasks."+n, false, e.Addr4, e.Addr6)
			if s.DNSRR {
				z.Add(n, false, e.Addr4, e.Addr6)
			}
		}
	}
	return z
}

// unique drops names that were listed before: a service may be its own alias, a container have its host name as its name.
func unique(names []string) []string {
	for i, n := range names {
		if slices.Contains(names[:i], n) {
			out := slices.Clone(names[:i])
			for _, n := range names[i:] {
				if !slices.Contains(out, n) {
					out = append(out, n)
				}
			}
			return out
		}
	}
	return names
}
