package netbench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"skein/overlay"
	"skein/overlay/link"
)

const (
	loopback = 1
	dataPort = 4797
)

var (
	meshPool  = netip.MustParsePrefix("10.192.0.0/10")
	meshPool6 = netip.MustParsePrefix("fd00:99::/48")
)

// world is namespaces, cables and drivers, which go with close.
type world struct {
	b     *bench
	undo  []func() error
	conns map[*link.NS]*link.Conn
}

func newWorld(b *bench) *world { return &world{b: b, conns: map[*link.NS]*link.Conn{}} }

func (w *world) close() error {
	var errs []error
	for i := len(w.undo) - 1; i >= 0; i-- {
		errs = append(errs, w.undo[i]())
	}
	return errors.Join(errs...)
}

func (w *world) later(f func() error) { w.undo = append(w.undo, f) }

func (w *world) namespace(name string) (*link.NS, error) {
	path := w.b.path(name)
	ns, err := link.CreateNS(path)
	if err != nil {
		return nil, err
	}
	w.later(func() error { return errors.Join(ns.Close(), link.RemoveNS(path)) })
	return ns, w.adopt(ns, true)
}

// adopt opens a connection into a namespace.
func (w *world) adopt(ns *link.NS, fresh bool) error {
	c, err := link.Dial(ns)
	if err != nil {
		return err
	}
	w.conns[ns] = c
	w.later(c.Close)
	if fresh {
		return errors.Join(c.SetUp(loopback, true), ns.Sysctl(map[string]string{"ipv4/ip_forward": "1", "ipv4/ip_local_port_range": "10000 65000",
			"ipv6/conf/all/accept_dad?": "0", "ipv6/conf/default/accept_dad?": "0"}))
	}
	return nil
}

// cable joins two namespaces: each end is name and prefix.
func (w *world) cable(a *link.NS, aName, aAddr string, b *link.NS, bName, bAddr string) error {
	if err := w.conns[a].AddVeth(link.End{Name: aName, MTU: 1500}, link.End{NS: b, Name: bName, MTU: 1500}); err != nil {
		return err
	}
	for _, e := range []struct {
		ns         *link.NS
		name, addr string
	}{{a, aName, aAddr}, {b, bName, bAddr}} {
		c := w.conns[e.ns]
		l, err := c.Link(e.name)
		if err != nil {
			return err
		}
		if err := c.SetUp(l.Index, true); err != nil {
			return err
		}
		if err := c.Do([]link.Message{link.AddAddr(l.Index, netip.MustParsePrefix(e.addr))}); err != nil {
			return err
		}
	}
	_, err := w.conns[a].AwaitActive(aName)
	return err
}

// route adds a route that is none of the driver's.
func (w *world) route(ns *link.NS, dst, dev, via string) error {
	l, err := w.conns[ns].Link(dev)
	if err != nil {
		return err
	}
	r := link.Route{Dev: l.Index}
	if via != "" {
		r.Via = netip.MustParseAddr(via)
	}
	m := link.SetRoute(link.RouteKey{Dst: netip.MustParsePrefix(dst)}, r)
	m.Body[5] = 4 // static
	return w.conns[ns].Do([]link.Message{m})
}

// driver runs the product in a node's namespace, which newNode made.
func (w *world) driver(node string) (*overlay.Driver, error) {
	d, err := overlay.New(overlay.Options{RunDir: w.b.path("run-" + node), NetNS: w.b.path(node), Logger: w.b.log})
	if err != nil {
		return nil, err
	}
	w.later(func() error { return errors.Join(d.Teardown(context.Background()), d.Close()) })
	return d, nil
}

// set gives a driver its config, all of it.
func set(ctx context.Context, d *overlay.Driver, cfg overlay.Config) error {
	applied, err := d.Set(ctx, cfg)
	if err != nil {
		return err
	}
	for table, err := range applied {
		if err != nil {
			return fmt.Errorf("%s: %w", table, err)
		}
	}
	return nil
}

// box makes a container's namespace.
func (w *world) box(ctx context.Context, d *overlay.Driver, s overlay.Sandbox) (*link.NS, error) {
	path, err := d.AddSandbox(ctx, s)
	if err != nil {
		return nil, err
	}
	ns, err := link.OpenNS(path)
	if err != nil {
		return nil, err
	}
	w.later(ns.Close)
	return ns, w.adopt(ns, false)
}

func (w *world) serve(ns *link.NS, port uint16) error {
	s, err := serve(ns, port)
	if err == nil {
		w.later(func() error { s.close(); return nil })
	}
	return err
}

// meshAddr is the n-th address of a node's block.
func meshAddr(node, n int) netip.Addr {
	b := meshPool.Addr().As4()
	return netip.AddrFrom4([4]byte{b[0], b[1] + byte(node>>6), byte(node<<2) + byte(n>>8), byte(n)})
}

// meshAddr6 is the same of the IPv6 pool.
func meshAddr6(node, n int) netip.Addr {
	b := meshPool6.Addr().As16()
	b[12], b[13], b[14], b[15] = byte(node>>8), byte(node), byte(n>>8), byte(n)
	return netip.AddrFrom16(b)
}

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }
