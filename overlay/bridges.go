package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/overlay/dns"
	"skein/overlay/link"
	"skein/overlay/nft"
)

// bridgeAlias marks bridges that we made; an existing device of the same name without it is somebody else's.
const bridgeAlias = "skein bridge "

const defaultBridgeMTU = 1500

// bridgeTable is one family of skein_bridge; no table: there is no bridge with that family.
type bridgeTable struct {
	table    *nft.Table
	params   []nft.BridgeParams
	filtered bool
}

// filtersBridges tells that the kernel shows the frames on bridges to the tables of a family (br_netfilter). It may change at any time.
func (d *Driver) filtersBridges(six bool) bool {
	key := "bridge/bridge-nf-call-iptables"
	if six {
		key = "bridge/bridge-nf-call-ip6tables"
	}
	v, err := d.host.ReadSysctl(key)
	return err == nil && v == "1"
}

// SetBridges makes the node have exactly these single-host networks. Bridges of ours that are not listed are deleted.
func (d *Driver) SetBridges(ctx context.Context, bridges []Bridge) error {
	want := map[string]Bridge{}
	for _, b := range bridges {
		if err := b.validate(); err != nil {
			return fmt.Errorf("local network %s: %w: %w", b.ID, err, errdefs.ErrInvalidArgument)
		}
		want[b.ID] = b
	}
	// A bridge that goes may have legs on their way out. One that cannot be deleted is reported by Check, and is no obstacle.
	if err := d.awaitAllDeparted(ctx); err != nil && ctx.Err() != nil {
		return fmt.Errorf("bridge networks: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.setBridges(want, false)
}

func (b Bridge) validate() error {
	if b.Name == "" || len(b.Name) > 15 || strings.ContainsAny(b.Name, "/ :*%") {
		return fmt.Errorf("device name %q is not valid", b.Name)
	}
	if b.Macvlan != nil {
		return b.Macvlan.validate()
	}
	bad := func(p netip.Prefix, gw netip.Addr, is func(netip.Addr) bool) bool {
		return p.IsValid() && (!is(p.Addr()) || gw.IsValid() && !p.Contains(gw))
	}
	if !b.Subnet4.IsValid() && !b.Subnet6.IsValid() || bad(b.Subnet4, b.Gateway4, netip.Addr.Is4) || bad(b.Subnet6, b.Gateway6, netip.Addr.Is6) {
		return fmt.Errorf("subnets %s, %s or gateways %s, %s are not valid", b.Subnet4, b.Subnet6, b.Gateway4, b.Gateway6)
	}
	return nil
}

func (d *Driver) setBridges(want map[string]Bridge, full bool) error {
	links, err := d.conn.Links()
	if err != nil {
		return fmt.Errorf("bridge networks: %w", err)
	}
	keep := map[string]bool{}
	for _, b := range want {
		keep[b.Name] = true
	}
	for name, l := range links {
		if strings.HasPrefix(l.Alias, bridgeAlias) && !keep[name] {
			err = errors.Join(err, d.conn.DelLink(name))
		}
	}
	for id, b := range d.bridges {
		if _, stays := want[id]; !stays {
			err = errors.Join(err, d.unlend(links, b))
		}
	}
	d.bridges = want // before the rest: what fails is tried again by the next Check
	four := false
	for _, b := range want {
		if e := d.ensureLocal(links, b); e != nil {
			err = errors.Join(err, fmt.Errorf("local network %s (%s): %w", b.zoneName(), b.ID, e))
		}
		four = four || b.Macvlan == nil && b.Subnet4.IsValid()
	}
	if four {
		err = errors.Join(err, d.changeHost(map[string]string{forwarding4: "1"}))
	}
	if d.bridgesForward6() {
		err = errors.Join(err, d.forward6())
	}
	err = errors.Join(err, d.applyBridgeRules(full), d.passFirewalls(false))
	d.updateDNS()
	return err
}

// bridgesForward6 tells that a bridge needs this node to pass IPv6 packets on.
func (d *Driver) bridgesForward6() bool {
	for _, b := range d.bridges {
		if b.Macvlan == nil && b.Subnet6.IsValid() {
			return true
		}
	}
	return false
}

// unlend takes our addresses off a device that is somebody else's.
func (d *Driver) unlend(links map[string]link.Link, b Bridge) error {
	l, ok := links[b.Name]
	if !ok || b.Macvlan != nil || strings.HasPrefix(l.Alias, bridgeAlias) {
		return nil
	}
	var msgs []link.Message
	for _, a := range b.addresses() {
		msgs = append(msgs, link.DelAddr(l.Index, a))
	}
	if err := d.conn.Do(msgs, link.NoAddr); err != nil {
		return fmt.Errorf("take addresses off %s: %w", b.Name, err)
	}
	return nil
}

// addresses are this node's on the bridge.
func (b Bridge) addresses() []netip.Prefix {
	var out []netip.Prefix
	if b.Gateway4.IsValid() && !b.Bare4 {
		out = append(out, netip.PrefixFrom(b.Gateway4, b.Subnet4.Bits()))
	}
	if b.Gateway6.IsValid() && !b.Bare6 {
		out = append(out, netip.PrefixFrom(b.Gateway6, b.Subnet6.Bits()))
	}
	return out
}

func (d *Driver) ensureLocal(links map[string]link.Link, b Bridge) error {
	if b.Macvlan != nil {
		return d.ensureParent(links, b)
	}
	return d.ensureBridge(links, b)
}

func (d *Driver) ensureBridge(links map[string]link.Link, b Bridge) error {
	l, ok := links[b.Name]
	alias := bridgeAlias + b.ID
	lent := ok && l.Alias != alias && b.External && l.Kind == "bridge" && !strings.HasPrefix(l.Alias, bridgeAlias)
	if ok && l.Alias != alias && !lent {
		return fmt.Errorf("device %s exists and belongs to someone else: choose another name: %w", b.Name, errdefs.ErrAlreadyExists)
	}
	mtu := b.MTU
	if mtu == 0 {
		mtu = defaultBridgeMTU
	}
	if !ok {
		end := link.End{Name: b.Name, MTU: mtu}
		if b.Gateway4.IsValid() || b.Gateway6.IsValid() {
			end.MAC = BridgeLeg{Addr4: netip.PrefixFrom(b.Gateway4, 32), Addr6: netip.PrefixFrom(b.Gateway6, 128)}.mac()
		}
		if err := d.conn.AddBridge(end); err != nil {
			return err
		}
		var err error
		if l, err = d.conn.Link(b.Name); err != nil {
			return err
		}
	}
	if err := d.bridgeSysctls(b); err != nil {
		return err
	}
	msgs := []link.Message{link.Up(l.Index)}
	if !lent {
		msgs = append(msgs, link.SetAlias(l.Index, alias))
	}
	for _, a := range b.addresses() {
		msgs = append(msgs, link.AddAddr(l.Index, a))
	}
	if b.Subnet6.IsValid() {
		msgs = append(msgs, link.AddLoopback(l.Index))
	}
	if err := d.conn.Do(msgs, unix.EEXIST); err != nil {
		return fmt.Errorf("configure %s: %w", b.Name, err)
	}
	if ok && b.Separate {
		return d.separate(links, b)
	}
	return nil
}

// isolates tells that a bridge's ports are kept apart by the bridge itself. Where the kernel shows frames to our table, that does it; a bridge
// would then also keep back what the table sends on from a published port.
func (d *Driver) isolates(b Bridge) bool {
	return b.Separate && !((!b.Subnet4.IsValid() || d.filtersBridges(false)) && (!b.Subnet6.IsValid() || d.filtersBridges(true)))
}

// separate makes the ports of a bridge's containers so.
func (d *Driver) separate(links map[string]link.Link, b Bridge) error {
	var msgs []link.Message
	isolated := d.isolates(b)
	for id := range d.boxes {
		if l, ok := links[bridgeLegName(id, b.ID)]; ok && l.Master == links[b.Name].Index {
			msgs = append(msgs, link.SetIsolated(l.Index, isolated))
		}
	}
	return d.conn.Do(msgs)
}

func (d *Driver) bridgeSysctls(b Bridge) error {
	set := map[string]string{"ipv6/conf/" + b.Name + "/accept_ra?": "0"}
	if b.Subnet4.IsValid() {
		set["ipv4/conf/"+b.Name+"/route_localnet"] = "1"
	}
	if b.Subnet6.IsValid() {
		set["ipv6/conf/"+b.Name+"/disable_ipv6"] = "0"
	}
	return d.host.Sysctl(set)
}

func (d *Driver) bridgePlan(s Sandbox, l BridgeLeg) (plan, error) {
	b, ok := d.bridges[l.BridgeID]
	if !ok {
		return plan{}, fmt.Errorf("bridge network %s is not set up on this node: %w", l.BridgeID, errdefs.ErrNotFound)
	}
	br, err := d.conn.Link(b.Name)
	if err != nil {
		return plan{}, err
	}
	own := &ownLeg{alias: legAlias(l.BridgeID), leg: l}
	mtu := br.MTU
	if b.MTU != 0 {
		mtu = b.MTU
	}
	if b.Macvlan != nil {
		own.macvlan, own.parent = b.Macvlan, br.Index
	}
	return plan{outer: d.conn, outerName: bridgeLegName(s.ID, l.BridgeID), mac: l.mac(), mtu: mtu, own: own,
		inner: func(dev int) []link.Message { return d.bridgeInner(s, l, dev) },
		attach: func(dev int) error {
			if err := d.conn.SetMaster(dev, br.Index, true); err != nil {
				return err
			}
			return d.conn.Do([]link.Message{link.SetIsolated(dev, d.isolates(b))})
		}}, nil
}

// bridgeInner are the addresses and routes of a container on a single-host network. A gateway leg's default route goes before theirs.
func (d *Driver) bridgeInner(s Sandbox, l BridgeLeg, dev int) []link.Message {
	var msgs []link.Message
	b := d.bridges[l.BridgeID]
	for _, six := range []bool{false, true} {
		p, mesh := l.Addr4, s.Gateway4
		if six {
			p, mesh = l.Addr6, s.Gateway6
		}
		if !p.IsValid() {
			continue
		}
		msgs = append(msgs, link.AddAddr(dev, p))
		if i := d.wayOut(s.Bridges, six); i >= 0 && s.Bridges[i].BridgeID == l.BridgeID && !mesh.IsValid() {
			via := b.gateway(l, six)
			msgs = append(msgs, link.SetRoute(link.RouteKey{Dst: anywhere(six)}, link.Route{Dev: dev, Via: via, Src: p.Addr()}))
		}
	}
	for _, a := range l.LinkLocal {
		bits := 16
		if a.Is6() {
			bits = 64
		}
		msgs = append(msgs, link.AddAddr(dev, netip.PrefixFrom(a, bits)))
	}
	return msgs
}

func anywhere(six bool) netip.Prefix {
	if six {
		return anywhere6
	}
	return anywhere4
}

func bridgeLegName(sandbox, bridge string) string { return bridgePrefix + tag(sandbox+"@"+bridge) }

// bridgeLegs are a sandbox's legs on bridges, on all of them when it is not known.
func (d *Driver) bridgeLegs(id string, b *box) []outerLeg {
	var out []outerLeg
	if b == nil {
		for br := range d.bridges {
			out = append(out, outerLeg{d.conn, bridgeLegName(id, br)})
		}
		return out
	}
	for _, l := range b.spec.Bridges {
		out = append(out, outerLeg{d.conn, bridgeLegName(id, l.BridgeID)})
	}
	return out
}

// applyBridgeRules writes table skein_bridge of both families, or deletes it where there is no bridge.
func (d *Driver) applyBridgeRules(full bool) error {
	return errors.Join(d.applyBridgeTable(false, full), d.applyBridgeTable(true, full))
}

func (d *Driver) applyBridgeTable(six, full bool) error {
	params := d.bridgeParams(six)
	family, t := byte(nft.IPv4), &d.bridgeTables[btoi(six)]
	if six {
		family = nft.IPv6
	}
	if len(params) == 0 {
		if t.table == nil && !full {
			return nil
		}
		t.table = nil
		return d.nft.Delete(family, "skein_bridge")
	}
	filtered := six && d.filtersBridges(six)
	if t.table == nil || filtered != t.filtered || !slices.Equal(params, t.params) {
		if t.table != nil {
			d.nft.Forget(t.table)
		}
		t.table, t.params, t.filtered = nft.BridgeTable(six, filtered, params), params, filtered
	}
	d.fillBridgePorts(t.table, six)
	_, err := d.nft.Sync(t.table, full)
	return err
}

func (d *Driver) bridgeParams(six bool) []nft.BridgeParams {
	var out []nft.BridgeParams
	for _, b := range d.bridges {
		p := nft.BridgeParams{Device: b.Name, Subnet: b.Subnet4.Masked(), Internal: b.Internal, Separate: b.Separate, Plain: b.Plain,
			Source: b.Host4, Routed: b.Mode4 == ModeRouted, Unprotected: b.Mode4 == ModeUnprotected, Trusted: b.Trusted}
		if six {
			p.Subnet, p.Source, p.Routed, p.Unprotected = b.Subnet6.Masked(), b.Host6, b.Mode6 == ModeRouted, b.Mode6 == ModeUnprotected
		}
		if p.Subnet.IsValid() && b.Macvlan == nil {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b nft.BridgeParams) int { return strings.Compare(a.Device, b.Device) })
	return out
}

func (d *Driver) fillBridgePorts(t *nft.Table, six bool) {
	ports, hostPorts, targets := map[string]string{}, map[string]string{}, map[string]string{}
	for _, box := range d.boxes {
		for _, l := range box.spec.Bridges {
			b := d.bridges[l.BridgeID]
			routed := !six && b.Mode4 == ModeRouted || six && b.Mode6 == ModeRouted
			for _, p := range l.Ports {
				a := l.addr(six)
				if p.HostIP.Is6() != six || !a.IsValid() {
					continue
				}
				proto, _ := hostProtocol(p.Protocol)
				to := nft.AddrPort(a, p.Target)
				switch {
				case routed:
					targets[nft.TargetKey(a, proto, p.Target)] = ""
				case p.HostIP.IsValid() && !p.HostIP.IsUnspecified():
					hostPorts[nft.HostPortKey(p.HostIP, proto, p.Published)] = to
				default:
					ports[nft.PortKey(proto, p.Published)] = to
				}
			}
		}
	}
	t.Set("ports").Replace(ports)
	t.Set("host_ports").Replace(hostPorts)
	t.Set("targets").Replace(targets)
}

// bridgeZones adds the names of all single-host networks.
func (d *Driver) bridgeZones(out map[string]*dns.Zone) {
	for id, br := range d.bridges {
		z := dns.NewZone(br.zoneName())
		for _, p := range append([]netip.Prefix{br.Subnet4, br.Subnet6}, br.More...) {
			if p.IsValid() {
				z.Subnets = append(z.Subnets, p)
			}
		}
		out[id] = z
	}
	for _, b := range d.boxes {
		for _, l := range b.spec.Bridges {
			z := out[l.BridgeID]
			if z == nil || len(l.Names) == 0 {
				continue
			}
			for _, n := range unique(l.Names) {
				z.Add(n, false, l.Addr4.Addr(), l.Addr6.Addr())
			}
			z.Point(l.Addr4.Addr(), l.Names[0], false)
			z.Point(l.Addr6.Addr(), l.Names[0], false)
		}
	}
}

// linkZone is what a container calls others of a network by itself alone, nil without.
func (d *Driver) linkZone(leg BridgeLeg) *dns.Zone {
	if len(leg.Links) == 0 {
		return nil
	}
	z := dns.NewZone("")
	for _, b := range d.boxes {
		for _, other := range b.spec.Bridges {
			for _, k := range leg.Links {
				if other.BridgeID == leg.BridgeID && slices.Contains(other.Names, k.Target) {
					z.Add(k.Alias, false, other.Addr4.Addr(), other.Addr6.Addr())
				}
			}
		}
	}
	return z
}
