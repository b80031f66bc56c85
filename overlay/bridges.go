package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"skein/overlay/link"
	"skein/overlay/nft"
)

// bridgeAlias marks bridges that we made; an existing device of the same name without it is somebody else's.
const bridgeAlias = "skein bridge "

const defaultBridgeMTU = 1500

// SetBridges makes the node have exactly these single-host networks. Bridges of ours that are not listed are deleted.
func (d *Driver) SetBridges(ctx context.Context, bridges []Bridge) error {
	want := map[string]Bridge{}
	for _, b := range bridges {
		if b.Name == "" || len(b.Name) > 15 || strings.ContainsAny(b.Name, "/ :*") || !b.Subnet4.IsValid() || !b.Subnet4.Contains(b.Gateway4) {
			return fmt.Errorf("bridge network %s: device name %q, subnet %s or gateway %s is not valid: %w", b.ID, b.Name, b.Subnet4, b.Gateway4, errdefs.ErrInvalidArgument)
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
	for _, b := range want {
		if e := d.ensureBridge(links, b); e != nil {
			err = errors.Join(err, fmt.Errorf("bridge network %s: %w", b.ID, e))
		}
	}
	d.bridges = want
	if len(want) > 0 {
		err = errors.Join(err, d.host.Sysctl(map[string]string{"ipv4/ip_forward": "1"}))
	}
	err = errors.Join(err, d.applyBridgeRules(full))
	d.updateDNS()
	return err
}

func (d *Driver) ensureBridge(links map[string]link.Link, b Bridge) error {
	l, ok := links[b.Name]
	alias := bridgeAlias + b.ID
	if ok && l.Alias != alias {
		return fmt.Errorf("device %s exists and belongs to someone else: choose another name: %w", b.Name, errdefs.ErrAlreadyExists)
	}
	mtu := b.MTU
	if mtu == 0 {
		mtu = defaultBridgeMTU
	}
	if !ok {
		err := d.conn.AddBridge(link.End{Name: b.Name, MAC: legMAC(bridgeLeg, b.Gateway4), MTU: mtu})
		if err != nil {
			return err
		}
		if l, err = d.conn.Link(b.Name); err != nil {
			return err
		}
	}
	err := d.conn.Do([]link.Message{link.SetAlias(l.Index, alias), link.Up(l.Index),
		link.AddAddr(l.Index, netip.PrefixFrom(b.Gateway4, b.Subnet4.Bits()))})
	if err != nil {
		return fmt.Errorf("configure %s: %w", b.Name, err)
	}
	return d.host.Sysctl(map[string]string{"ipv4/conf/" + b.Name + "/route_localnet": "1", "ipv6/conf/" + b.Name + "/accept_ra?": "0"})
}

func (d *Driver) bridgePlan(s Sandbox, i int, l BridgeLeg) (plan, error) {
	b, ok := d.bridges[l.BridgeID]
	if !ok {
		return plan{}, fmt.Errorf("bridge network %s is not set up on this node: %w", l.BridgeID, errdefs.ErrNotFound)
	}
	br, err := d.conn.Link(b.Name)
	if err != nil {
		return plan{}, err
	}
	// The first bridge gives the default route, unless a gateway leg or an earlier one does.
	first := !b.Internal && !s.Gateway4.IsValid() && i == slices.IndexFunc(s.Bridges, func(l BridgeLeg) bool { return !d.bridges[l.BridgeID].Internal })
	return plan{outer: d.conn, outerName: bridgeLegName(s.ID, l.BridgeID), mac: legMAC(bridgeLeg, l.Addr4.Addr()), mtu: br.MTU,
		inner: func(dev int) []link.Message {
			msgs := []link.Message{link.AddAddr(dev, l.Addr4)}
			if first {
				msgs = append(msgs, link.SetRoute(link.RouteKey{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0)},
					link.Route{Dev: dev, Via: b.Gateway4, Src: l.Addr4.Addr()}))
			}
			return msgs
		},
		attach: func(dev int) error { return d.conn.SetMaster(dev, br.Index, true) }}, nil
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

// applyBridgeRules writes table skein_bridge, or deletes it when there is no bridge.
func (d *Driver) applyBridgeRules(full bool) error {
	var params []nft.BridgeParams
	for _, b := range d.bridges {
		params = append(params, nft.BridgeParams{Device: b.Name, Subnet: b.Subnet4.Masked(), Internal: b.Internal})
	}
	if len(params) == 0 {
		if d.bridgeTable == nil && !full {
			return nil
		}
		d.bridgeTable = nil
		return d.nft.Delete(nft.IPv4, "skein_bridge")
	}
	slices.SortFunc(params, func(a, b nft.BridgeParams) int { return strings.Compare(a.Device, b.Device) })
	if d.bridgeTable == nil || !slices.Equal(params, d.bridgeParams) {
		if d.bridgeTable != nil {
			d.nft.Forget(d.bridgeTable)
		}
		d.bridgeTable, d.bridgeParams = nft.BridgeTable(params), params
	}
	t := d.bridgeTable
	ports, hostPorts := map[string]string{}, map[string]string{}
	for _, b := range d.boxes {
		for _, l := range b.spec.Bridges {
			for _, p := range l.Ports {
				proto, _ := protocolNumber(p.Protocol)
				to := nft.AddrPort(l.Addr4.Addr(), p.Target)
				if p.HostIP.IsValid() && !p.HostIP.IsUnspecified() {
					hostPorts[nft.HostPortKey(p.HostIP, proto, p.Published)] = to
				} else {
					ports[nft.PortKey(proto, p.Published)] = to
				}
			}
		}
	}
	t.Set("ports").Replace(ports)
	t.Set("host_ports").Replace(hostPorts)
	_, err := d.nft.Sync(t, full)
	return err
}
