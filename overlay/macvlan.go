package overlay

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// macvlanModes are the names of the modes.
func macvlanMode(name string) (uint32, bool) {
	switch name {
	case "", "bridge":
		return link.MacvlanBridge, true
	case "private":
		return link.MacvlanPrivate, true
	case "vepa":
		return link.MacvlanVEPA, true
	case "passthru":
		return link.MacvlanPassthru, true
	}
	return 0, false
}

func (m Macvlan) validate() error {
	if _, ok := macvlanMode(m.Mode); !ok {
		return fmt.Errorf("macvlan mode %q is none of bridge, private, vepa, passthru", m.Mode)
	}
	if m.VLAN > 4094 {
		return fmt.Errorf("VLAN %d is not in 1..4094", m.VLAN)
	}
	return nil
}

// ensureParent finds the device that carries a macvlan network, or makes it: a VLAN of another device, or, for a network that stays on this
// node, a bridge without ports. What it made bears our alias and is deleted with the network.
func (d *Driver) ensureParent(links map[string]link.Link, b Bridge) error {
	l, ok := links[b.Name]
	if !ok {
		if err := d.makeParent(links, b); err != nil {
			return err
		}
		var err error
		if l, err = d.conn.Link(b.Name); err != nil {
			return err
		}
		if err := d.conn.Do([]link.Message{link.SetAlias(l.Index, bridgeAlias+b.ID)}); err != nil {
			return fmt.Errorf("name %s: %w", b.Name, err)
		}
		if b.Macvlan.On == "" {
			return d.host.Sysctl(map[string]string{"ipv6/conf/" + b.Name + "/disable_ipv6?": "1"})
		}
	}
	if !l.Up {
		return d.conn.SetUp(l.Index, true)
	}
	return nil
}

func (d *Driver) makeParent(links map[string]link.Link, b Bridge) error {
	switch {
	case b.Macvlan.On != "":
		on, ok := links[b.Macvlan.On]
		if !ok {
			return fmt.Errorf("device %s, which VLAN %d is to be of, does not exist on this node: %w", b.Macvlan.On, b.Macvlan.VLAN, errdefs.ErrNotFound)
		}
		err := d.conn.AddVLAN(b.Name, on.Index, b.Macvlan.VLAN)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("this kernel has no VLAN devices (8021q): %w", errdefs.ErrNotImplemented)
		}
		return err
	case b.External:
		return fmt.Errorf("parent device %s does not exist on this node: %w", b.Name, errdefs.ErrNotFound)
	}
	mtu := b.MTU
	if mtu == 0 {
		mtu = defaultBridgeMTU
	}
	return d.conn.AddBridge(link.End{Name: b.Name, MTU: mtu})
}

// ensureMacvlan makes a container's station on the network's device unless it is there, and configures it.
func (p plan) ensureMacvlan(ns *link.NS, conn *link.Conn, links map[string]link.Link) error {
	inner, there := p.find(links)
	if !there {
		name, err := p.innerName(links)
		if err != nil {
			return err
		}
		mode, _ := macvlanMode(p.own.macvlan.Mode)
		e := link.End{NS: ns, Name: name, MAC: p.mac, MTU: p.mtu}
		if p.own.macvlan.Mode == "passthru" && p.own.leg.MAC == "" {
			e.MAC = link.MAC{} // it is the parent's
		}
		err = p.outer.AddMacvlan(e, p.own.parent, mode)
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			return fmt.Errorf("this kernel has no macvlan devices: %w", errdefs.ErrNotImplemented)
		case err != nil:
			return err
		}
		if inner, err = conn.Link(name); err != nil {
			return err
		}
		links[name] = inner
	}
	if err := p.ready(ns, conn, inner); err != nil {
		return err
	}
	if err := conn.Do(append([]link.Message{link.Up(inner.Index)}, p.inner(inner.Index)...)); err != nil {
		return fmt.Errorf("configure %s: %w", inner.Name, err)
	}
	return nil
}

// dropMacvlans deletes a sandbox's stations on devices of this node, which would answer on the wire until its namespace is gone.
func (d *Driver) dropMacvlans(id string, spec Sandbox) error {
	has := false
	for _, l := range spec.Bridges {
		has = has || d.bridges[l.BridgeID].Macvlan != nil
	}
	if !has {
		return nil
	}
	err := d.devicesOf(id, func(conn *link.Conn, links map[string]link.Link) (err error) {
		for name, l := range links {
			if l.Kind == "macvlan" && surplusOwn(l, nil) {
				err = errors.Join(err, conn.DelLink(name))
			}
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) { // gone already
		return nil
	}
	return err
}

// hasStations tells that a sandbox has its devices on macvlan networks. They have no outer end that could be looked at.
func (d *Driver) hasStations(id string, spec Sandbox) bool {
	want := 0
	for _, l := range spec.Bridges {
		want += btoi(d.bridges[l.BridgeID].Macvlan != nil)
	}
	if want == 0 {
		return true
	}
	err := d.devicesOf(id, func(_ *link.Conn, links map[string]link.Link) error {
		for _, l := range links {
			want -= btoi(l.Kind == "macvlan" && surplusOwn(l, nil))
		}
		return nil
	})
	return err == nil && want <= 0
}
