package overlay

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// A node that the managers call down may be dead, cut off, or merely without a daemon while its containers go on. Established flows are ended only
// when it does not answer here: its kernel is asked by echo requests to its own mesh address, the way that packets to its containers take.

const (
	echoTries = 4
	echoWait  = 150 * time.Millisecond // after each try
	lostEvery = 2 * time.Second        // as long as there are lost endpoints
)

// watchLost ends flows to endpoints of dead nodes until ctx is done.
func (d *Driver) watchLost(ctx context.Context) {
	tick := time.NewTicker(lostEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-d.lostWake:
		}
		if err := d.endLost(ctx); err != nil && ctx.Err() == nil {
			d.log.Warn("end connections to containers of dead nodes", "error", err)
		}
	}
}

// pokeLost has watchLost look at once.
func (d *Driver) pokeLost() {
	select {
	case d.lostWake <- struct{}{}:
	default:
	}
}

// lostNodes are the nodes that have lost endpoints.
func (d *Driver) lostNodes() []uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []uint32
	for _, b := range d.cfg.Mesh.Lost {
		out = append(out, b.Node)
	}
	for _, n := range d.cfg.Networks {
		for i := range n.Endpoints {
			if n.Endpoints[i].State == Lost {
				out = append(out, n.Endpoints[i].Node)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// endLost asks the nodes that have lost endpoints, and ends the flows to those of the ones that do not answer.
func (d *Driver) endLost(ctx context.Context) error {
	nodes := d.lostNodes()
	if len(nodes) == 0 {
		return nil
	}
	d.mu.Lock()
	pool := d.cfg.MeshPool
	d.mu.Unlock()
	ask := map[netip.Addr]uint32{}
	for _, n := range nodes {
		ask[nodeAddr(pool, n)] = n
	}
	if err := d.echo(ctx, ask); err != nil {
		return err
	}
	dead := map[uint32]bool{}
	for _, n := range ask {
		dead[n] = true
	}
	return d.step(func() error { return d.endFlowsTo(dead) })
}

// endFlowsTo ends flows to what is still lost on the nodes. The caller holds mu.
func (d *Driver) endFlowsTo(dead map[uint32]bool) error {
	var addrs []netip.Addr
	for _, b := range d.cfg.Mesh.Lost {
		if dead[b.Node] {
			addrs = append(addrs, b.Addr4, b.Addr6)
		}
	}
	err := end(d.host, d.nft, addrs...)
	for i := range d.cfg.Networks {
		nw := &d.cfg.Networks[i]
		addrs = addrs[:0]
		for k := range nw.Endpoints {
			if e := &nw.Endpoints[k]; e.State == Lost && dead[e.Node] {
				addrs = append(addrs, e.Addr4, e.Addr6)
			}
		}
		if r := d.routers[nw.ID]; r != nil && r.nft != nil {
			err = errors.Join(err, end(r.ns, r.nft, addrs...))
		}
	}
	return err
}

// echo asks all addresses and takes those out that answer.
func (d *Driver) echo(ctx context.Context, ask map[netip.Addr]uint32) error {
	var c net.PacketConn
	err := d.host.Do(func() (err error) {
		c, err = (&net.ListenConfig{}).ListenPacket(ctx, "ip4:icmp", "0.0.0.0")
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	request := make([]byte, 8) // type 8, code 0
	request[0] = 8
	binary.BigEndian.PutUint16(request[4:], uint16(os.Getpid()))
	binary.BigEndian.PutUint16(request[2:], internetSum(0, request))
	answer := make([]byte, 1500)
	for range echoTries {
		for a := range ask {
			if _, err := c.WriteTo(request, &net.IPAddr{IP: a.AsSlice()}); err != nil && !noWay(err) {
				return err
			}
		}
		if err := c.SetReadDeadline(time.Now().Add(echoWait)); err != nil {
			return err
		}
		for len(ask) > 0 && ctx.Err() == nil {
			n, from, err := c.ReadFrom(answer)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return err
			}
			if a, ok := netip.AddrFromSlice(from.(*net.IPAddr).IP.To4()); ok && n > 0 && answer[0] == 0 { // an echo reply, whoever asked for it
				delete(ask, a)
			}
		}
		if len(ask) == 0 || ctx.Err() != nil {
			break
		}
	}
	return ctx.Err()
}

// noWay is an error of a node that is in no table any more, or whose neighbours know that it is gone.
func noWay(err error) bool {
	return errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTDOWN)
}
