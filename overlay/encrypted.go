package overlay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/crypt"
	"skein/overlay/link"
	"skein/overlay/nft"
)

// An encrypted network's router namespace has a TUN device where others have their VXLAN: all that leaves goes through overlay/crypt. Routes
// are the same; stations and neighbours are crypt's own.

// storeBound bounds how long the descriptor store may take.
const storeBound = 10 * time.Second

func (d *Driver) openTunnel() error {
	ctx, cancel := context.WithTimeout(context.Background(), storeBound)
	defer cancel()
	d.keysChanged = make(chan struct{}, 1)
	var store crypt.FDStore
	if d.opts.FDStore != nil {
		store = d.opts.FDStore
	}
	var err error
	d.crypt, err = crypt.New(ctx, crypt.Options{
		Do: d.host.Do, Store: store, Port: d.opts.CryptPort, RotateEvery: d.opts.RotateKeysEvery, Overlap: d.opts.KeyOverlap, Log: d.log,
		MAC: func(vni, node uint32) crypt.MAC { return crypt.MAC(nodeMAC(vni, node)) },
		KeysChanged: func() {
			select {
			case d.keysChanged <- struct{}{}:
			default: // it will be read once, after both
			}
		},
	})
	return err
}

// CryptKeys are this node's public keys for encrypted networks, or why it can carry none.
func (d *Driver) CryptKeys() ([]crypt.Key, error) {
	if err := d.crypt.Probe(); err != nil {
		return nil, err
	}
	return d.crypt.Keys(), nil
}

// CryptKeysChanged has a value when CryptKeys returns others than before.
func (d *Driver) CryptKeysChanged() <-chan struct{} { return d.keysChanged }

// applyTunnel tells the tunnel who takes part, and ends it when nothing here is encrypted any more.
func (d *Driver) applyTunnel() error {
	ctx, cancel := context.WithTimeout(context.Background(), storeBound)
	defer cancel()
	nodes, encrypted := map[uint32]bool{}, map[string]bool{}
	for i := range d.cfg.Networks {
		nw := &d.cfg.Networks[i]
		if !nw.Encrypted {
			continue
		}
		encrypted[nw.ID] = true
		for j := range nw.Endpoints {
			nodes[nw.Endpoints[j].Node] = true
		}
	}
	var err error
	for _, id := range d.crypt.Networks() {
		if d.routers[id] != nil {
			encrypted[id] = true // a container hangs on it
		}
		if !encrypted[id] {
			err = errors.Join(err, d.crypt.RemoveNetwork(ctx, id))
		}
	}
	if len(encrypted) == 0 {
		return errors.Join(err, d.crypt.Stop(ctx))
	}
	local := d.underlay()
	mtu, e := d.tunnelMTU(local)
	if e != nil {
		return errors.Join(err, e)
	}
	cfg := crypt.Config{Self: d.cfg.Self.Index, Underlay: local, DataPort: d.cfg.DataPort, MTU: mtu}
	for _, p := range d.cfg.Peers {
		if nodes[p.Index] {
			cfg.Nodes = append(cfg.Nodes, crypt.Node{Index: p.Index, Underlay: p.Underlay, Keys: d.cfg.Keys[p.Index]})
		}
	}
	e = d.crypt.Set(ctx, cfg)
	if errors.Is(e, unix.EADDRINUSE) {
		e = d.nameHolder(e)
	}
	return errors.Join(err, e)
}

// nameHolder adds to an error who has the tunnel's port.
func (d *Driver) nameHolder(e error) error {
	listeners, err := link.Listeners(d.host)
	if err != nil {
		return e
	}
	for _, l := range listeners {
		if l.Protocol != "udp" || l.Port < d.crypt.Port() || l.Port >= d.crypt.Port()+crypt.Slots {
			continue
		}
		if o := d.owners.of([]uint32{l.Inode})[l.Inode]; o.pid != os.Getpid() {
			e = fmt.Errorf("%w: UDP port %d is held by %s (pid %d): have it use another port", e, l.Port, cmp.Or(o.name, unseen), o.pid)
		}
	}
	return e
}

// guardEncrypted has the node drop plain packets of encrypted networks, whoever made them.
func (d *Driver) guardEncrypted(full bool) error {
	vnis := map[string]string{}
	for i := range d.cfg.Networks {
		if nw := &d.cfg.Networks[i]; nw.Encrypted {
			vnis[nft.VNIKey(nw.VNI)] = ""
		}
	}
	var err error
	for i, family := range []byte{nft.IPv4, nft.IPv6} {
		if family == nft.IPv6 && !d.six {
			continue
		}
		if len(vnis) == 0 {
			if full || d.guards[i] != nil {
				err = errors.Join(err, d.nft.Delete(family, nft.CryptTableName))
			}
			d.guards[i] = nil
			continue
		}
		if d.guards[i] == nil || d.guardPort != d.cfg.DataPort {
			d.guards[i] = nft.CryptTable(family, d.cfg.DataPort)
			err = errors.Join(err, d.nft.Load(d.guards[i]))
		}
		d.guards[i].Set("vnis").Replace(vnis)
		_, e := d.nft.Sync(d.guards[i], full)
		err = errors.Join(err, e)
	}
	d.guardPort = d.cfg.DataPort
	return err
}

// tunnelMTU is what fits into an encrypted packet.
func (d *Driver) tunnelMTU(local netip.Addr) (int, error) {
	plain, err := d.underlayMTU(local)
	if err != nil {
		return 0, err
	}
	headers := 50
	if local.Is6() {
		headers = 70
	}
	return d.carried(plain+headers-crypt.Overhead(local)-crypt.InnerOverhead) + crypt.InnerOverhead, nil
}

// ensureTunnel makes an encrypted network's device. One that is no tunnel has no place there.
func (d *Driver) ensureTunnel(r *router, nw *Network) (index, mtu int, err error) {
	if d.tunnelErr != nil {
		return 0, 0, d.tunnelErr
	}
	if mtu, err = d.tunnelMTU(d.underlay()); err != nil {
		return 0, 0, err
	}
	mtu -= crypt.InnerOverhead
	if nw.MTU > 0 {
		mtu = min(mtu, nw.MTU)
	}
	have, err := r.conn.Link(vxlanDevice)
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return 0, 0, err
	}
	if err == nil && have.Kind != tunKind {
		if err := r.conn.DelLink(vxlanDevice); err != nil {
			return 0, 0, err
		}
	}
	if d.auditing != nil && d.auditing.Dry() && have.Kind != tunKind {
		d.auditing.Add("device", vxlanDevice, "missing")
		return 0, 0, fmt.Errorf("its tunnel device is missing")
	}
	ctx, cancel := context.WithTimeout(context.Background(), storeBound)
	defer cancel()
	if err := d.crypt.AddNetwork(ctx, nw.ID, vxlanDevice, nw.VNI, r.ns.Do); err != nil {
		return 0, 0, err
	}
	now, err := r.conn.Link(vxlanDevice)
	if err != nil {
		return 0, 0, err
	}
	if d.auditing != nil && now.Index != have.Index {
		d.auditing.Add("device", vxlanDevice, "missing")
	}
	if now.MTU != mtu {
		if err := r.conn.SetMTU(now.Index, mtu); err != nil {
			return 0, 0, err
		}
	}
	if err := r.conn.Do([]link.Message{link.Up(now.Index)}); err != nil {
		return 0, 0, err
	}
	return now.Index, mtu, r.ns.Sysctl(map[string]string{"ipv4/conf/" + vxlanDevice + "/rp_filter": "0"})
}

// tunKind is the kernel's name of the kind of an encrypted network's device.
const tunKind = "tun"

// setTunnelEndpoints tells the tunnel where a network's endpoints are.
func (d *Driver) setTunnelEndpoints(nw *Network) {
	if !nw.Encrypted {
		return
	}
	where := make(map[netip.Addr]uint32, len(nw.Endpoints))
	for i := range nw.Endpoints {
		e := &nw.Endpoints[i]
		for _, a := range []netip.Addr{e.Addr4, e.Addr6} {
			if a.IsValid() && e.Node != d.cfg.Self.Index {
				where[a] = e.Node
			}
		}
	}
	d.crypt.SetEndpoints(nw.ID, where)
}
