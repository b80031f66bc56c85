package overlay

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// lab is a few hosts on a switch and a client in another subnet behind it, all of them network namespaces.
type lab struct {
	t      *testing.T
	dir    string
	sw, cl *link.NS
	hosts  []*labHost
	under6 bool // tunnels over IPv6
}

type labHost struct {
	*Driver
	ns    *link.NS
	index uint32
	addr  netip.Addr
}

const (
	clientAddr = "198.51.100.7"
	client6    = "2001:db8:9::7"
	dataPort   = 4799
)

var (
	labPool  = netip.MustParsePrefix("10.192.0.0/10")
	labPool6 = netip.MustParsePrefix("fd12:3456:789a::/48")
)

func newLab(t *testing.T, hosts int) *lab {
	t.Helper()
	l := &lab{t: t, dir: t.TempDir()}
	l.sw = l.namespace("sw")
	l.cl = l.namespace("cl")
	sw := l.conn(l.sw)
	l.must(l.sw.Sysctl(map[string]string{"ipv4/ip_forward": "1", forwarding6: "1"}))
	l.must(sw.AddBridge(link.End{Name: "br0"}))
	l.address(l.sw, "br0", "192.0.2.254/24")
	l.address(l.sw, "br0", "2001:db8:1::fe/64")
	l.cable(l.cl, "eth0", "client")
	l.address(l.sw, "client", "198.51.100.1/24")
	l.address(l.cl, "eth0", clientAddr+"/24")
	l.defaultRoute(l.cl, "eth0", "198.51.100.1")
	l.address(l.sw, "client", "2001:db8:9::1/64")
	l.address(l.cl, "eth0", client6+"/64")
	l.defaultRoute(l.cl, "eth0", "2001:db8:9::1")
	br, err := sw.Link("br0")
	l.must(err)
	for i := 1; i <= hosts; i++ {
		ns := l.namespace(fmt.Sprintf("h%d", i))
		l.cable(ns, "eth0", fmt.Sprintf("h%d", i))
		port, err := sw.Link(fmt.Sprintf("h%d", i))
		l.must(err)
		l.must(sw.SetMaster(port.Index, br.Index, false))
		h := &labHost{ns: ns, index: uint32(i), addr: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}
		l.address(ns, "eth0", h.addr.String()+"/24")
		l.defaultRoute(ns, "eth0", "192.0.2.254")
		l.address(ns, "eth0", fmt.Sprintf("2001:db8:1::%d/64", i))
		l.defaultRoute(ns, "eth0", "2001:db8:1::fe")
		h.Driver = l.driver(i, nil)
		l.hosts = append(l.hosts, h)
	}
	return l
}

func (l *lab) driver(i int, store FDStore, with ...func(*Options)) *Driver {
	l.t.Helper()
	run := filepath.Join(l.dir, fmt.Sprintf("run%d", i))
	opts := Options{RunDir: run, NetNS: filepath.Join(l.dir, fmt.Sprintf("h%d", i)), FDStore: store,
		Logger: slog.New(slog.NewTextHandler(testWriter{l.t}, &slog.HandlerOptions{Level: slog.LevelWarn})).With("host", i)}
	for _, f := range with {
		f(&opts)
	}
	d, err := New(opts)
	l.must(err)
	l.t.Cleanup(func() {
		ctx := context.Background()
		if d.conn != nil {
			if err := d.Teardown(ctx); err != nil && !errors.Is(err, os.ErrClosed) && !strings.Contains(err.Error(), "closed") {
				l.t.Errorf("teardown of host %d: %v", i, err)
			}
		}
		d.Close()
	})
	return d
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", strings.TrimSpace(string(p)))
	return len(p), nil
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) namespace(name string) *link.NS {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	ns, err := link.CreateNS(path)
	if errors.Is(err, unix.EPERM) {
		l.t.Skip("needs CAP_SYS_ADMIN and CAP_NET_ADMIN")
	}
	l.must(err)
	l.t.Cleanup(func() {
		ns.Close()
		if err := link.RemoveNS(path); err != nil {
			l.t.Error(err)
		}
	})
	c := l.conn(ns)
	l.must(c.SetUp(loopback, true))
	return ns
}

func (l *lab) conn(ns *link.NS) *link.Conn {
	l.t.Helper()
	c, err := link.Dial(ns)
	l.must(err)
	l.t.Cleanup(func() { c.Close() })
	return c
}

// cable joins a namespace to the switch.
func (l *lab) cable(ns *link.NS, name, port string) {
	l.t.Helper()
	c := l.conn(ns)
	l.must(c.AddVeth(link.End{Name: name, MTU: 1500}, link.End{NS: l.sw, Name: port, MTU: 1500}))
	sw := l.conn(l.sw)
	p, err := sw.Link(port)
	l.must(err)
	l.must(sw.SetUp(p.Index, true))
}

func (l *lab) address(ns *link.NS, dev, prefix string) {
	l.t.Helper()
	c := l.conn(ns)
	i, err := c.Link(dev)
	l.must(err)
	l.must(c.Do([]link.Message{link.AddAddr(i.Index, netip.MustParsePrefix(prefix))}))
}

func (l *lab) defaultRoute(ns *link.NS, dev, via string) {
	l.t.Helper()
	c := l.conn(ns)
	i, err := c.Link(dev)
	l.must(err)
	to := anywhere4
	if strings.Contains(via, ":") {
		to = anywhere6
	}
	m := link.SetRoute(link.RouteKey{Dst: to}, link.Route{Dev: i.Index, Via: netip.MustParseAddr(via)})
	m.Body[5] = 4 // static: not one of ours
	l.must(c.Do([]link.Message{m}))
}

// baseConfig is a cluster of all hosts without networks.
func (l *lab) baseConfig(h *labHost) Config {
	cfg := Config{DataPort: dataPort, MeshPool: labPool, MeshPool6: labPool6}
	for _, o := range l.hosts {
		cfg.NodeAddrs = append(cfg.NodeAddrs, addr(fmt.Sprintf("2001:db8:1::%d", o.index)))
		n := Node{Index: o.index, Hostname: fmt.Sprintf("h%d", o.index), Underlay: o.addr}
		if l.under6 {
			n.Underlay = addr(fmt.Sprintf("2001:db8:1::%d", o.index))
		}
		if o == h {
			cfg.Self = n
		} else {
			cfg.Peers = append(cfg.Peers, n)
		}
	}
	return cfg
}

// setAll gives every host the same networks and mesh.
func (l *lab) setAll(networks []Network, mesh Mesh) {
	l.t.Helper()
	for _, h := range l.hosts {
		l.set(h, networks, mesh)
	}
}

func (l *lab) set(h *labHost, networks []Network, mesh Mesh) {
	l.t.Helper()
	cfg := l.baseConfig(h)
	cfg.Networks, cfg.Mesh = networks, mesh
	applied, err := h.Set(context.Background(), cfg)
	l.must(err)
	for table, err := range applied {
		if err != nil {
			l.t.Fatalf("host %d: %s: %v", h.index, table, err)
		}
	}
}

func (l *lab) sandbox(h *labHost, s Sandbox) *link.NS {
	l.t.Helper()
	path, err := h.AddSandbox(context.Background(), s)
	l.must(err)
	ns, err := link.OpenNS(path)
	l.must(err)
	l.t.Cleanup(func() { ns.Close() })
	return ns
}

// serve answers every line on TCP, and every datagram on UDP, with "name client-address"; it returns a function that ends it.
func (l *lab) serve(ns *link.NS, name string, port int) func() {
	l.t.Helper()
	var tcp net.Listener
	var udp net.PacketConn
	l.must(ns.Do(func() (err error) {
		if tcp, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err == nil {
			udp, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		}
		return err
	}))
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			l.t.Cleanup(func() { c.Close() })
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				for {
					if _, err := r.ReadString('\n'); err != nil {
						return
					}
					fmt.Fprintf(c, "%s %s\n", name, plainAddr(c.RemoteAddr()))
				}
			}()
		}
	}()
	go func() {
		buf := make([]byte, 1500)
		for {
			_, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			fmt.Fprintf(&datagram{udp, from}, "%s %s\n", name, plainAddr(from))
		}
	}()
	stop := func() { tcp.Close(); udp.Close() }
	l.t.Cleanup(stop)
	return stop
}

type datagram struct {
	net.PacketConn
	to net.Addr
}

func (d *datagram) Write(b []byte) (int, error) { return d.WriteTo(b, d.to) }

// flow is an open connection to a served port.
type flow struct {
	net.Conn
	r *bufio.Reader
}

func open(ns *link.NS, network, addr string) (*flow, error) {
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = net.DialTimeout(network, addr, 3*time.Second)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &flow{c, bufio.NewReader(c)}, nil
}

// ask sends a line and returns who answered and from where it saw us.
func (f *flow) ask() (name string, from netip.AddrPort, err error) {
	_ = f.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.WriteString(f, "?\n"); err != nil {
		return "", from, err
	}
	line, err := f.r.ReadString('\n')
	if err != nil {
		return "", from, err
	}
	name, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	from, err = netip.ParseAddrPort(rest)
	return name, from, err
}

// get asks once over a new connection.
func get(ns *link.NS, network, addr string) (name string, from netip.Addr, err error) {
	f, err := open(ns, network, addr)
	if err != nil {
		return "", netip.Addr{}, err
	}
	defer f.Close()
	name, ap, err := f.ask()
	return name, ap.Addr(), err
}

// spread asks n times and counts the names; every answer must have seen the address want, if it is valid.
func (l *lab) spread(ns *link.NS, network, addr string, n int, want string) map[string]int {
	l.t.Helper()
	names := map[string]int{}
	for range n {
		name, from, err := get(ns, network, addr)
		if err != nil {
			l.t.Errorf("%s %s: %v", network, addr, err)
			return names
		}
		if want != "" && from.String() != want {
			l.t.Errorf("%s %s: %s saw the client as %s, want %s", network, addr, name, from, want)
			return names
		}
		names[name]++
	}
	return names
}

func openNS(t *testing.T, path string) *link.NS {
	t.Helper()
	ns, err := link.OpenNS(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// in is the lab for a subtest.
func (l *lab) in(t *testing.T) *lab {
	c := *l
	c.t = t
	return &c
}

// plainAddr writes IPv4 addresses of dual-stack sockets as such.
func plainAddr(a net.Addr) string {
	ap := netip.MustParseAddrPort(a.String())
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}
