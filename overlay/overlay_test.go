package overlay

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// webNetwork: service web (VIP 10.10.0.2) with one endpoint per host, 10.10.0.1<host>.
func webNetwork(states ...EndpointState) Network {
	nw := Network{ID: "netwebidnetwebidnetwebid1", Name: "front", VNI: 4097, Subnet4: netip.MustParsePrefix("10.10.0.0/24"),
		Subnet6: netip.MustParsePrefix("fd12:3456:789a:1::/64"), Services: []Service{
			{ID: "svcweb", Names: []string{"web"}, VIP4: addr("10.10.0.2"), VIP6: addr("fd12:3456:789a:1::2")},
			{ID: "svcrr", Names: []string{"rr"}, DNSRR: true},
			{ID: "svcempty", Names: []string{"empty"}, VIP4: addr("10.10.0.3"), VIP6: addr("fd12:3456:789a:1::3")},
		}}
	for i, s := range states {
		nw.Endpoints = append(nw.Endpoints, Endpoint{ID: fmt.Sprintf("task%d", i+1), ServiceID: "svcweb", Node: uint32(i + 1), State: s,
			Addr4: netip.AddrFrom4([4]byte{10, 10, 0, byte(11 + i)}), Addr6: addr(fmt.Sprintf("fd12:3456:789a:1::1%d", i+1)), Names: []string{fmt.Sprintf("web.%d", i+1)}})
	}
	return nw
}

func gatewayOf(node int) netip.Addr {
	b := nodeBlock(labPool, uint32(node)).Addr().As4()
	b[3] = 2
	return netip.AddrFrom4(b)
}

func gateway6Of(node int) netip.Addr { return nodeAddr6(labPool6, uint32(node)).Next() }

// webPort publishes 8080 → 80 on the given hosts' tasks.
func webMesh(hosts ...int) Mesh {
	var b []Backend
	for _, h := range hosts {
		b = append(b, Backend{EndpointID: fmt.Sprintf("task%d", h), Node: uint32(h), Addr4: gatewayOf(h), Addr6: gateway6Of(h)})
	}
	return Mesh{Ports: []PublishedPort{
		{ServiceID: "svcweb", Protocol: "tcp", Published: 8080, Target: 80, Backends: b},
		{ServiceID: "svcweb", Protocol: "udp", Published: 8080, Target: 80, Backends: b},
		{ServiceID: "svcempty", Protocol: "tcp", Published: 8081, Target: 80},
		{ServiceID: "svchost", Protocol: "tcp", Published: 8082, Target: 80, Local: true, Backends: b[:1]},
	}}
}

func webSandbox(host int) Sandbox {
	return Sandbox{ID: fmt.Sprintf("task%d", host), DNS: true, Gateway4: gatewayOf(host), Gateway6: gateway6Of(host),
		Legs: []Leg{{NetworkID: "netwebidnetwebidnetwebid1", Addr4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 10, 0, byte(10 + host)}), 24),
			Addr6: netip.MustParsePrefix(fmt.Sprintf("fd12:3456:789a:1::1%d/64", host))}}}
}

func TestClusterPaths(t *testing.T) {
	l := newLab(t, 3)
	l.setAll([]Network{webNetwork(Ready, Ready, Ready)}, webMesh(1, 2, 3))
	for i, h := range l.hosts {
		ns := l.sandbox(h, webSandbox(i+1))
		l.serve(ns, fmt.Sprintf("task%d", i+1), 80)
		defer func() { _ = h.RemoveSandbox(context.Background(), fmt.Sprintf("task%d", i+1)) }()
	}
	box := func(i int) string { return l.hosts[i-1].sandboxFile(fmt.Sprintf("task%d", i)) }
	t1 := openNS(t, box(1))
	t.Run("container to container", func(t *testing.T) {
		l := l.in(t)
		for i := 1; i <= 3; i++ {
			to := fmt.Sprintf("10.10.0.1%d:80", i)
			for _, network := range []string{"tcp4", "udp4"} {
				if got := l.spread(t1, network, to, 1, "10.10.0.11"); got[fmt.Sprintf("task%d", i)] != 1 {
					t.Errorf("%s %s: %v", network, to, got)
				}
			}
		}
	})
	t.Run("vip", func(t *testing.T) {
		l := l.in(t)
		if got := l.spread(t1, "tcp4", "10.10.0.2:80", 60, ""); len(got) != 3 {
			t.Errorf("VIP reached %v, want three tasks", got)
		}
		if _, _, err := get(t1, "tcp4", "10.10.0.3:80"); err == nil {
			t.Error("an empty service answered")
		}
	})
	t.Run("published", func(t *testing.T) {
		l := l.in(t)
		for i := 1; i <= 3; i++ {
			at := fmt.Sprintf("192.0.2.%d:8080", i)
			for _, network := range []string{"tcp4", "udp4"} {
				if got := l.spread(l.cl, network, at, 30, clientAddr); len(got) != 3 {
					t.Errorf("%s %s reached %v, want three tasks", network, at, got)
				}
			}
		}
	})
	t.Run("from nodes", func(t *testing.T) {
		l := l.in(t)
		for _, at := range []string{"127.0.0.1:8080", "192.0.2.1:8080", "192.0.2.2:8080", "192.0.2.3:8080"} {
			for _, network := range []string{"tcp4", "udp4"} {
				if got := l.spread(l.hosts[0].ns, network, at, 30, ""); len(got) != 3 {
					t.Errorf("%s %s from node 1 reached %v, want three tasks", network, at, got)
				}
			}
		}
	})
	t.Run("hairpin", func(t *testing.T) {
		l := l.in(t)
		for _, at := range []string{"192.0.2.1:8080", "192.0.2.3:8080"} {
			if got := l.spread(t1, "tcp4", at, 30, ""); len(got) != 3 {
				t.Errorf("%s from task 1 reached %v, want three tasks", at, got)
			}
		}
	})
}

// The same client port through three entry nodes to one task: three flows, each with the client's address.
func TestSameTupleThroughSeveralNodes(t *testing.T) {
	l, _ := webLab(t, 3)
	l.setAll([]Network{webNetwork(Ready, Ready, Ready)}, webMesh(2))
	var flows []*flow
	for i := 1; i <= 3; i++ {
		var c net.Conn
		l.must(l.cl.Do(func() (err error) {
			d := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(clientAddr), Port: 20000},
				Control: func(_, _ string, r syscall.RawConn) error {
					return r.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
				}}
			c, err = d.Dial("tcp4", fmt.Sprintf("192.0.2.%d:8080", i))
			return err
		}))
		defer c.Close()
		flows = append(flows, &flow{c, bufio.NewReader(c)})
	}
	for round := range 2 {
		for i, f := range flows {
			name, from, err := f.ask()
			if err != nil || name != "task2" || from.Addr().String() != clientAddr {
				t.Errorf("round %d, through node %d: %s saw %s, %v", round, i+1, name, from, err)
			}
		}
	}
}

func TestRefusedConfigs(t *testing.T) {
	l := newLab(t, 1)
	h := l.hosts[0]
	good := func() Config { return l.baseConfig(h) }
	for name, spoil := range map[string]func(*Config){
		"own index":      func(c *Config) { c.Self.Index = 0 },
		"pool":           func(c *Config) { c.MeshPool = netip.Prefix{} },
		"port":           func(c *Config) { c.DataPort = 0 },
		"peer's address": func(c *Config) { c.Peers = []Node{{Index: 2}} },
		"index twice":    func(c *Config) { c.Peers = []Node{{Index: 1, Underlay: addr("192.0.2.9")}} },
		"VNI of the mesh": func(c *Config) {
			c.Networks = []Network{{ID: "x", VNI: meshVNI, Subnet4: netip.MustParsePrefix("10.0.0.0/24")}}
		},
		"subnet": func(c *Config) { c.Networks = []Network{{ID: "x", VNI: 5}} },
	} {
		c := good()
		spoil(&c)
		if _, err := h.Set(context.Background(), c); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want invalid argument", name, err)
		}
	}
	for _, s := range []Sandbox{{}, {ID: "a/b"}, {ID: "net-x"}, {ID: ".."}, {ID: "x", Legs: []Leg{{NetworkID: "n"}}}} {
		if _, err := h.AddSandbox(context.Background(), s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("sandbox %+v: %v, want invalid argument", s, err)
		}
	}
	// A tunnel address that this node does not have is an error of the tables, not of the config.
	c := good()
	c.Self.Underlay = addr("203.0.113.1")
	applied, err := h.Set(context.Background(), c)
	if err != nil || applied["mesh"] == nil {
		t.Errorf("foreign tunnel address: %v, %v", applied, err)
	}
	applied, err = h.Set(context.Background(), good())
	if err != nil || applied["mesh"] != nil {
		t.Errorf("after that a good config: %v, %v", applied, err)
	}
}

// Leaving the cluster keeps single-host networks and their containers.
func TestLeave(t *testing.T) {
	l, _ := webLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	br := Bridge{ID: "b", Name: "skt0", Subnet4: netip.MustParsePrefix("172.30.0.0/24"), Gateway4: addr("172.30.0.1")}
	l.must(h.SetBridges(ctx, []Bridge{br}))
	leg := BridgeLeg{BridgeID: "b", Addr4: netip.MustParsePrefix("172.30.0.2/24"), Ports: []HostPort{{Published: 9090, Target: 80}}}
	l.serve(l.sandbox(h, Sandbox{ID: "plain", Bridges: []BridgeLeg{leg}}), "plain", 80)
	for range 2 {
		l.must(h.Leave(ctx))
		l.must(h.Check(ctx))
	}
	l.spread(l.cl, "tcp4", "192.0.2.1:9090", 1, clientAddr)
	refusedFast(t, l.cl, "192.0.2.1:8080")
	links, err := h.conn.Links()
	l.must(err)
	if len(links) != 4 { // lo, eth0, bridge, its leg
		t.Errorf("links after leaving: %v", links)
	}
	l.must(h.RemoveSandbox(ctx, "task1"))
	l.setAll([]Network{webNetwork(Ready)}, webMesh(1)) // and joins again
	l.serve(l.sandbox(h, webSandbox(1)), "task1", 80)
	l.spread(l.cl, "tcp4", "192.0.2.1:8080", 3, clientAddr)
}

func TestConcurrentSandboxes(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	l.setAll([]Network{webNetwork()}, Mesh{})
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			s := Sandbox{ID: fmt.Sprintf("box%d", i/2), DNS: true, Gateway4: netip.AddrFrom4([4]byte{10, 192, 4, byte(100 + i/2)}),
				Legs: []Leg{{NetworkID: "netwebidnetwebidnetwebid1", Addr4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 10, 0, byte(100 + i/2)}), 24)}}}
			if _, err := h.AddSandbox(ctx, s); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() { l.set(h, []Network{webNetwork(Ready)}, Mesh{}) })
	}
	wg.Wait()
	l.must(h.Check(ctx))
	if ids, err := h.Sandboxes(); err != nil || len(ids) != 20 {
		t.Errorf("%d sandboxes, %v", len(ids), err)
	}
	for i := range 20 {
		wg.Go(func() {
			if err := h.RemoveSandbox(ctx, fmt.Sprintf("box%d", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if ids, err := h.Sandboxes(); err != nil || len(ids) != 0 {
		t.Errorf("left: %v, %v", ids, err)
	}
}
