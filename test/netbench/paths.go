package netbench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"skein/overlay"
	"skein/overlay/crypt"
	"skein/overlay/link"
)

// way is from a client to a server.
type way struct {
	name string
	from *link.NS
	to   netip.AddrPort
}

// Names of ways that others are compared with.
const (
	rawNodes   = "node to node, raw"
	direct     = "container to container, other node"
	vip        = "container to VIP, backend on other node"
	encrypted  = "the same on an encrypted network"
	directHere = "container to container, same node"
	vipHere    = "container to VIP, backend on same node"
	process    = "client to a node's process"
	ownNode    = "client to published port, backend on that node"
	otherNode  = "client to published port, backend on other node"
	fullSNAT   = "the same with full SNAT, same nodes and rules"
	plainSNAT  = "full SNAT on plain nodes, nothing else there"
)

// compared are the ratios that have bars.
var compared = []struct{ what, to, bar string }{
	{direct, rawNodes, "0.75 for request/response"},
	{vip, direct, "0.93"},
	{encrypted, rawNodes, "0.15 for one stream"},
	{vipHere, directHere, "0.93"},
	{ownNode, process, ""},
	{otherNode, process, "0.45 for request/response"},
	{otherNode, fullSNAT, "0.85, then 0.95"},
	{otherNode, plainSNAT, "0.85, then 0.95"},
}

func paths(ctx context.Context, b *bench) (err error) {
	w := newWorld(b)
	defer func() { err = errors.Join(err, w.close()) }()
	ways, err := pathWorld(ctx, w)
	if err != nil {
		return err
	}
	ways = slices.DeleteFunc(ways, func(v way) bool { return !strings.Contains(v.name, b.ways) })
	for _, v := range ways {
		if err := reach(ctx, v); err != nil {
			return fmt.Errorf("%s: %w", v.name, err)
		}
	}
	for _, m := range metrics() {
		if !slices.Contains(strings.Split(b.metrics, ","), m.short) {
			continue
		}
		got := make(map[string][]sample, len(ways))
		for round := range b.rounds + 1 {
			for i := range ways {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				v := ways[(i+round)%len(ways)] // none is always the first
				s, err := m.run(v.from, v.to, b.slice)
				if err != nil {
					return fmt.Errorf("%s: %s: %w", m.name, v.name, err)
				}
				if round > 0 { // the first is warm-up
					got[v.name] = append(got[v.name], s)
				}
			}
		}
		printWays(m, ways, got)
	}
	return nil
}

// reach waits until a way is open: nodes may have to agree on keys first, and try again after seconds.
func reach(ctx context.Context, v way) error {
	for deadline := time.Now().Add(30 * time.Second); ; {
		err := v.from.Do(func() error { return once(v.to, make([]byte, 2)) })
		if err == nil || time.Now().After(deadline) {
			return err
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

func printWays(m metric, ways []way, got map[string][]sample) {
	fmt.Printf("  %s\n    %-50s %10s %10s %10s %10s %10s\n", m.name, "", "best "+m.unit, "median", "p50", "p99", "CPU")
	for _, v := range ways {
		l := got[v.name]
		fmt.Printf("    %-50s %10.4g %10.4g %10s %10s %10s\n", v.name, best(l)*m.scale, middle(l, func(s sample) float64 { return s.ops })*m.scale,
			us(middle(l, func(s sample) float64 { return float64(s.p50) })), us(middle(l, func(s sample) float64 { return float64(s.p99) })),
			us(middle(l, func(s sample) float64 { return float64(s.cpu) })))
	}
	fmt.Printf("    %-50s   %s\n", "ratios", "of bests, of least p50, median of rounds, of CPU (bar)")
	for _, c := range compared {
		a, base := got[c.what], got[c.to]
		if len(a) == 0 || len(base) == 0 {
			continue
		}
		var ratios []float64
		for i := range a {
			ratios = append(ratios, a[i].ops/base[i].ops)
		}
		slices.Sort(ratios)
		cpu := middle(base, func(s sample) float64 { return float64(s.cpu) }) / middle(a, func(s sample) float64 { return float64(s.cpu) })
		fmt.Printf("    %-50s   %.3f %.3f %.3f %.3f  (%s)\n    %50s\n", c.what, best(a)/best(base), least(base)/least(a), quantile(ratios, 0.5), cpu, c.bar, "against "+c.to)
	}
}

func best(l []sample) (b float64) {
	for _, s := range l {
		b = max(b, s.ops)
	}
	return b
}

// least is the lowest median latency of a slice, which other load disturbs least.
func least(l []sample) float64 {
	out := l[0].p50
	for _, s := range l {
		out = min(out, s.p50)
	}
	return float64(out)
}

func middle(l []sample, f func(sample) float64) float64 {
	var all []float64
	for _, s := range l {
		all = append(all, f(s))
	}
	slices.Sort(all)
	return quantile(all, 0.5)
}

func us(ns float64) string { return fmt.Sprintf("%.1f µs", ns/1e3) }

// pathWorld is two nodes of the product, two plain ones and a client, each pair that talks on a cable of its own.
func pathWorld(ctx context.Context, w *world) ([]way, error) {
	ns := map[string]*link.NS{}
	for _, name := range []string{"cl", "h1", "h2", "p1", "p2", "pc"} {
		var err error
		if ns[name], err = w.namespace(name); err != nil {
			return nil, err
		}
	}
	err := errors.Join(
		w.cable(ns["cl"], "h1", "198.51.100.7/24", ns["h1"], "cl", "198.51.100.1/24"),
		w.cable(ns["cl"], "h2", "198.51.101.7/24", ns["h2"], "cl", "198.51.101.1/24"),
		w.cable(ns["cl"], "p1", "198.51.102.7/24", ns["p1"], "cl", "198.51.102.1/24"),
		w.cable(ns["h1"], "eth0", "192.0.2.1/24", ns["h2"], "eth0", "192.0.2.2/24"),
		w.cable(ns["p1"], "eth0", "192.0.3.1/24", ns["p2"], "eth0", "192.0.3.2/24"),
		w.cable(ns["p2"], "leg", "10.99.2.1/24", ns["pc"], "eth0", "10.99.2.2/24"),
	)
	if err != nil {
		return nil, err
	}
	boxes, err := pathBoxes(ctx, w)
	if err != nil {
		return nil, err
	}
	err = errors.Join(w.plainNodes(ns), w.serve(ns["h1"], 90), w.serve(ns["h2"], 90), w.serve(ns["pc"], 80))
	for _, b := range boxes[1:] {
		err = errors.Join(err, w.serve(b, 80))
	}
	if err = errors.Join(err, translate(ns["h1"], 8090, netip.AddrPortFrom(meshAddr(2, 2), 80), "skein-mesh")); err != nil {
		return nil, err
	}
	at := netip.MustParseAddrPort
	return []way{
		{rawNodes, ns["h1"], at("192.0.2.2:90")},
		{direct, boxes[0], at("10.10.0.12:80")},
		{vip, boxes[0], at("10.10.0.2:80")},
		{encrypted, boxes[0], at("10.11.0.12:80")},
		{directHere, boxes[0], at("10.10.0.13:80")},
		{vipHere, boxes[0], at("10.10.0.3:80")},
		{process, ns["cl"], at("198.51.100.1:90")},
		{ownNode, ns["cl"], at("198.51.101.1:8080")},
		{otherNode, ns["cl"], at("198.51.100.1:8080")},
		{fullSNAT, ns["cl"], at("198.51.100.1:8090")},
		{plainSNAT, ns["cl"], at("198.51.102.1:8080")},
	}, nil
}

// pathBoxes sets the drivers of h1 and h2 up and returns the containers: the client and the server on h1, the server on h2.
func pathBoxes(ctx context.Context, w *world) ([]*link.NS, error) {
	nw := overlay.Network{ID: "benchfront", Name: "front", VNI: 4101, Subnet4: prefix("10.10.0.0/24"),
		Services: []overlay.Service{{ID: "far", Names: []string{"far"}, VIP4: addr("10.10.0.2")}, {ID: "near", Names: []string{"near"}, VIP4: addr("10.10.0.3")}},
		Endpoints: []overlay.Endpoint{
			{ID: "a", Node: 1, Addr4: addr("10.10.0.11"), State: overlay.Ready},
			{ID: "b", ServiceID: "far", Node: 2, Addr4: addr("10.10.0.12"), State: overlay.Ready},
			{ID: "c", ServiceID: "near", Node: 1, Addr4: addr("10.10.0.13"), State: overlay.Ready},
		}}
	var mesh overlay.Mesh
	for _, proto := range []string{"tcp", "udp"} {
		mesh.Ports = append(mesh.Ports, overlay.PublishedPort{ServiceID: "far", Protocol: proto, Published: 8080, Target: 80,
			Backends: []overlay.Backend{{EndpointID: "b", Node: 2, Addr4: meshAddr(2, 2)}}})
	}
	nodes := []overlay.Node{{Index: 1, Hostname: "h1", Underlay: addr("192.0.2.1")}, {Index: 2, Hostname: "h2", Underlay: addr("192.0.2.2")}}
	secret := overlay.Network{ID: "benchsecret", Name: "secret", VNI: 4103, Subnet4: prefix("10.11.0.0/24"), Encrypted: true, Endpoints: []overlay.Endpoint{
		{ID: "a", Node: 1, Addr4: addr("10.11.0.11"), State: overlay.Ready}, {ID: "b", Node: 2, Addr4: addr("10.11.0.12"), State: overlay.Ready}}}
	var drivers []*overlay.Driver
	keys := map[uint32][]crypt.Key{}
	for _, self := range nodes {
		d, err := w.driver(self.Hostname)
		if err != nil {
			return nil, err
		}
		drivers = append(drivers, d)
		if keys[self.Index], err = d.CryptKeys(); err != nil {
			return nil, err
		}
	}
	for i, d := range drivers {
		cfg := overlay.Config{Self: nodes[i], Peers: nodes[1-i : 2-i], Networks: []overlay.Network{nw, secret}, Mesh: mesh, DataPort: dataPort, MeshPool: meshPool, Keys: keys}
		if err := set(ctx, d, cfg); err != nil {
			return nil, err
		}
	}
	var out []*link.NS
	for _, s := range []struct {
		node, gateway int
		id, addr      string
	}{{0, 2, "a", "10.10.0.11/24"}, {0, 3, "c", "10.10.0.13/24"}, {1, 2, "b", "10.10.0.12/24"}} {
		legs := []overlay.Leg{{NetworkID: nw.ID, Addr4: prefix(s.addr)}}
		if s.id != "c" {
			legs = append(legs, overlay.Leg{NetworkID: secret.ID, Addr4: prefix(strings.Replace(s.addr, "10.10.", "10.11.", 1))})
		}
		box, err := w.box(ctx, drivers[s.node], overlay.Sandbox{ID: s.id, Gateway4: meshAddr(s.node+1, s.gateway), Legs: legs})
		if err != nil {
			return nil, err
		}
		out = append(out, box)
	}
	return out, nil
}

// plainNodes makes p1 and p2 what a node of a cluster with full SNAT is at least: a VXLAN between them, on p1 a translated and masqueraded
// port, on p2 connection tracking with its egress masqueraded, as every container host has. Tunnel packets are not tracked.
func (w *world) plainNodes(ns map[string]*link.NS) error {
	macs := []link.MAC{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}}
	for i, n := range []*link.NS{ns["p1"], ns["p2"]} {
		local, far := netip.AddrFrom4([4]byte{192, 0, 3, byte(1 + i)}), netip.AddrFrom4([4]byte{192, 0, 3, byte(2 - i)})
		own, other := netip.AddrFrom4([4]byte{10, 99, 0, byte(1 + i)}), netip.AddrFrom4([4]byte{10, 99, 0, byte(2 - i)})
		c := w.conns[n]
		if err := c.AddVXLAN(link.VXLAN{End: link.End{Name: "vx", MAC: macs[i], MTU: 1450}, VNI: 77, Local: local, Port: dataPort + 1}); err != nil {
			return err
		}
		l, err := c.Link("vx")
		if err != nil {
			return err
		}
		err = c.Do([]link.Message{link.AddAddr(l.Index, netip.PrefixFrom(own, 24)), link.SetFDB(link.FDBKey{Dev: l.Index, MAC: macs[1-i]}, far),
			link.SetNeigh(link.NeighKey{Dev: l.Index, IP: other}, macs[1-i])})
		if err != nil {
			return err
		}
	}
	return errors.Join(
		w.route(ns["p1"], "10.99.2.0/24", "vx", "10.99.0.2"),
		w.route(ns["p2"], "0.0.0.0/0", "eth0", "192.0.3.1"),
		w.route(ns["pc"], "0.0.0.0/0", "eth0", "10.99.2.1"),
		translate(ns["p1"], 8080, netip.MustParseAddrPort("10.99.2.2:80"), "vx"),
		masquerade(ns["p2"], "eth0"), untracked(ns["p1"], dataPort+1), untracked(ns["p2"], dataPort+1))
}

// pause waits unless ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
