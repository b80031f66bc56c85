package netbench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"skein/overlay"
)

const (
	warmContainers = 60
	warmRest       = 60 * time.Millisecond // longer than the driver waits before it makes rooms ready
)

// oneNode is a node with a driver, cabled to another namespace so that it has an underlay.
func oneNode(w *world) (*overlay.Driver, overlay.Config, error) {
	var cfg overlay.Config
	h, err := w.namespace("h1")
	if err != nil {
		return nil, cfg, err
	}
	other, err := w.namespace("h2")
	if err != nil {
		return nil, cfg, err
	}
	if err := w.cable(h, "eth0", "192.0.2.1/24", other, "eth0", "192.0.2.2/24"); err != nil {
		return nil, cfg, err
	}
	cfg = overlay.Config{Self: overlay.Node{Index: 1, Hostname: "h1", Underlay: addr("192.0.2.1")}, DataPort: dataPort, MeshPool: meshPool, MeshPool6: meshPool6}
	d, err := w.driver("h1")
	return d, cfg, err
}

// boxOf is the n-th container of the set-up measurements: a leg on one network, a gateway leg, both in both families, names.
func boxOf(n int) overlay.Sandbox {
	return overlay.Sandbox{ID: fmt.Sprintf("box%d", n), DNS: true, Gateway4: meshAddr(1, n+2), Gateway6: meshAddr6(1, n+2),
		Legs: []overlay.Leg{{NetworkID: "setupnet", Addr4: netip.PrefixFrom(setupAddr(n), 16), Addr6: netip.PrefixFrom(setupAddr6(n), 64)}}}
}

func setupAddr(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 20, byte(1 + n>>8), byte(n)}) }

func setupAddr6(n int) netip.Addr {
	a := addr("fd00:20::").As16()
	a[13], a[14], a[15] = 1, byte(n>>8), byte(n)
	return netip.AddrFrom16(a)
}

// maxContainers is how many gateway addresses a node's block has.
const maxContainers = 1000

func setup(ctx context.Context, b *bench) (err error) {
	w := newWorld(b)
	defer func() { err = errors.Join(err, w.close()) }()
	d, cfg, err := oneNode(w)
	if err != nil {
		return err
	}
	nw := overlay.Network{ID: "setupnet", Name: "front", VNI: 4102, Subnet4: prefix("10.20.0.0/16"), Subnet6: prefix("fd00:20::/64"),
		Services: []overlay.Service{{ID: "s", Names: []string{"s"}, VIP4: addr("10.20.0.2"), VIP6: addr("fd00:20::2")}}}
	for i := range b.containers + warmContainers {
		nw.Endpoints = append(nw.Endpoints, overlay.Endpoint{ID: boxOf(i).ID, ServiceID: "s", Node: 1, Addr4: setupAddr(i), Addr6: setupAddr6(i), State: overlay.Ready, Names: []string{boxOf(i).ID}})
	}
	cfg.Networks = []overlay.Network{nw}
	if err := set(ctx, d, cfg); err != nil {
		return err
	}
	if err := setupWarm(ctx, d, b.containers); err != nil {
		return err
	}
	var took, gone []time.Duration
	step := max(1, b.containers/6)
	for i := range b.containers {
		s := boxOf(i)
		if i >= maxContainers {
			s.Gateway4, s.Gateway6 = netip.Addr{}, netip.Addr{} // the node's block is full; the network is not
		}
		if i%step == 0 && i > 0 {
			times(fmt.Sprintf("containers %d to %d, one after the other", i-step+1, i), took[i-step:], 0)
		}
		begun := time.Now()
		if _, err := d.AddSandbox(ctx, s); err != nil {
			return err
		}
		took = append(took, time.Since(begun))
	}
	times(fmt.Sprintf("all %d", b.containers), took, 0)
	for i := range b.containers {
		begun := time.Now()
		if err := d.RemoveSandbox(ctx, boxOf(i).ID); err != nil {
			return err
		}
		gone = append(gone, time.Since(begun))
	}
	times("removal, until nothing leads there", gone, 0)
	return nil
}

// setupWarm makes containers with rests.
func setupWarm(ctx context.Context, d *overlay.Driver, from int) error {
	var took []time.Duration
	var cpu time.Duration
	for i := range warmContainers {
		if err := pause(ctx, warmRest); err != nil {
			return err
		}
		s := boxOf(from + i)
		s.Gateway4, s.Gateway6 = meshAddr(1, 2+i), meshAddr6(1, 2+i)
		was, begun := cpuTime(), time.Now()
		if _, err := d.AddSandbox(ctx, s); err != nil {
			return err
		}
		took, cpu = append(took, time.Since(begun)), cpu+cpuTime()-was
	}
	times("from the warm pool, 60 ms between", took, cpu)
	for i := range warmContainers {
		if err := d.RemoveSandbox(ctx, boxOf(from+i).ID); err != nil {
			return err
		}
	}
	return nil
}

// bigTables are a network of services with five endpoints each on ten nodes, all published.
func bigTables(endpoints int) (overlay.Network, overlay.Mesh) {
	nw := overlay.Network{ID: "bignetwork", Name: "big", VNI: 4100, Subnet4: prefix("10.20.0.0/16")}
	var mesh overlay.Mesh
	for s := range endpoints / 5 {
		id := fmt.Sprintf("svc%d", s)
		nw.Services = append(nw.Services, overlay.Service{ID: id, Names: []string{id}, VIP4: netip.AddrFrom4([4]byte{10, 20, byte(128 + s>>8), byte(s)})})
		port := overlay.PublishedPort{ServiceID: id, Protocol: "tcp", Published: uint16(10000 + s), Target: 80}
		for e := range 5 {
			n := s*5 + e
			node := 1 + n%10
			nw.Endpoints = append(nw.Endpoints, overlay.Endpoint{ID: fmt.Sprint(n), ServiceID: id, Node: uint32(node), Addr4: setupAddr(n), State: overlay.Ready, Names: []string{fmt.Sprintf("%s.%d", id, e)}})
			port.Backends = append(port.Backends, overlay.Backend{EndpointID: fmt.Sprint(n), Node: uint32(node), Addr4: meshAddr(node, 2+n/10)})
		}
		mesh.Ports = append(mesh.Ports, port)
	}
	return nw, mesh
}

// bigNode is a node that knows bigTables.
func bigNode(ctx context.Context, w *world, endpoints int) (*overlay.Driver, overlay.Config, error) {
	d, cfg, err := oneNode(w)
	if err != nil {
		return nil, cfg, err
	}
	for i := 2; i <= 10; i++ {
		cfg.Peers = append(cfg.Peers, overlay.Node{Index: uint32(i), Underlay: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})})
	}
	nw, mesh := bigTables(endpoints)
	cfg.Networks, cfg.Mesh = []overlay.Network{nw}, mesh
	begun, cpu := time.Now(), cpuTime()
	err = set(ctx, d, cfg)
	fmt.Printf("  first config of %d services and %d endpoints: %s, CPU %s\n", endpoints/5, endpoints, ms(time.Since(begun)), ms(cpuTime()-cpu))
	return d, cfg, err
}

func change(ctx context.Context, b *bench) (err error) {
	w := newWorld(b)
	defer func() { err = errors.Join(err, w.close()) }()
	d, cfg, err := bigNode(ctx, w, b.endpoints)
	if err != nil {
		return err
	}
	var took []time.Duration
	cpu := cpuTime()
	for i := range b.changes {
		n := (i * 7 / 2) % b.endpoints
		nw := cfg.Networks[0]
		nw.Endpoints = slices.Clone(nw.Endpoints)
		ports := slices.Clone(cfg.Mesh.Ports)
		p := &ports[n/5]
		if state := &nw.Endpoints[n].State; *state == overlay.Ready {
			*state = overlay.Draining
			p.Backends = slices.DeleteFunc(slices.Clone(p.Backends), func(o overlay.Backend) bool { return o.EndpointID == nw.Endpoints[n].ID })
		} else {
			*state = overlay.Ready
			p.Backends = append(slices.Clone(p.Backends), overlay.Backend{EndpointID: nw.Endpoints[n].ID, Node: nw.Endpoints[n].Node, Addr4: meshAddr(int(nw.Endpoints[n].Node), 2+n/10)})
		}
		cfg.Networks, cfg.Mesh.Ports = []overlay.Network{nw}, ports
		begun := time.Now()
		if err := set(ctx, d, cfg); err != nil {
			return err
		}
		took = append(took, time.Since(begun))
	}
	times("one endpoint leaves or comes back, in the kernel", took, cpuTime()-cpu)
	return nil
}
