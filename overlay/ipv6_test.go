package overlay

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
	"skein/overlay/nft"
)

func TestClusterPathsIPv6(t *testing.T) {
	l, _ := webLab(t, 3)
	t1 := l.box(1)
	t.Run("container to container", func(t *testing.T) {
		l := l.in(t)
		for i := 1; i <= 3; i++ {
			to := fmt.Sprintf("[fd12:3456:789a:1::1%d]:80", i)
			for _, network := range []string{"tcp6", "udp6"} {
				if got := l.spread(t1, network, to, 1, "fd12:3456:789a:1::11"); got[fmt.Sprintf("task%d", i)] != 1 {
					t.Errorf("%s %s: %v", network, to, got)
				}
			}
		}
	})
	t.Run("vip", func(t *testing.T) {
		l := l.in(t)
		if got := l.spread(t1, "tcp6", "[fd12:3456:789a:1::2]:80", 60, ""); len(got) != 3 {
			t.Errorf("VIP reached %v, want three tasks", got)
		}
		refusedFast6(t, t1, "[fd12:3456:789a:1::3]:80") // no endpoint
	})
	t.Run("published", func(t *testing.T) {
		l := l.in(t)
		for i := 1; i <= 3; i++ {
			at := fmt.Sprintf("[2001:db8:1::%d]:8080", i)
			for _, network := range []string{"tcp6", "udp6"} {
				if got := l.spread(l.cl, network, at, 30, client6); len(got) != 3 {
					t.Errorf("%s %s reached %v, want three tasks", network, at, got)
				}
			}
		}
		refusedFast6(t, l.cl, "[2001:db8:1::1]:8081")
		l.spread(l.cl, "tcp6", "[2001:db8:1::1]:8082", 2, client6)
		refusedFast6(t, l.cl, "[2001:db8:1::2]:8082")
	})
	t.Run("from nodes", func(t *testing.T) {
		l := l.in(t)
		for _, at := range []string{"[::1]:8080", "[2001:db8:1::1]:8080", "[2001:db8:1::2]:8080", "[2001:db8:1::3]:8080"} {
			for _, network := range []string{"tcp6", "udp6"} {
				if got := l.spread(l.hosts[0].ns, network, at, 30, ""); len(got) != 3 {
					t.Errorf("%s %s from node 1 reached %v, want three tasks", network, at, got)
				}
			}
		}
	})
	t.Run("hairpin", func(t *testing.T) {
		l := l.in(t)
		for _, at := range []string{"[2001:db8:1::1]:8080", "[2001:db8:1::3]:8080"} {
			if got := l.spread(t1, "tcp6", at, 30, ""); len(got) != 3 {
				t.Errorf("%s from task 1 reached %v, want three tasks", at, got)
			}
		}
	})
	t.Run("same tuple through several nodes", func(t *testing.T) { l.in(t).sameTuple6() })
	t.Run("egress", func(t *testing.T) {
		l := l.in(t)
		ln, err := listenIn6(l.cl, "["+client6+"]:7000")
		l.must(err)
		defer ln.Close()
		f, err := open(t1, "tcp6", "["+client6+"]:7000")
		l.must(err)
		defer f.Close()
		srv, err := ln.Accept()
		l.must(err)
		defer srv.Close()
		if from, _, _ := net.SplitHostPort(srv.RemoteAddr().String()); from != "2001:db8:1::1" {
			t.Errorf("outside saw the container as %s", from)
		}
	})
}

func refusedFast6(t *testing.T, ns *link.NS, at string) {
	t.Helper()
	start := time.Now()
	_, _, err := get(ns, "tcp6", at)
	if !errors.Is(err, syscall.ECONNREFUSED) || time.Since(start) > time.Second {
		t.Errorf("%s: %v after %s, want an immediate refusal", at, err, time.Since(start))
	}
}

func listenIn6(ns *link.NS, at string) (ln net.Listener, err error) {
	err = ns.Do(func() (err error) { ln, err = net.Listen("tcp6", at); return err })
	return ln, err
}

// sameTuple6: the same client port through three entry nodes to one task makes three flows, each with the client's address.
func (l *lab) sameTuple6() {
	l.t.Helper()
	l.setAll([]Network{webNetwork(Ready, Ready, Ready)}, webMesh(2))
	defer l.setAll([]Network{webNetwork(Ready, Ready, Ready)}, webMesh(1, 2, 3))
	var flows []*flow
	for i := 1; i <= 3; i++ {
		var c net.Conn
		l.must(l.cl.Do(func() (err error) {
			d := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(client6), Port: 20000},
				Control: func(_, _ string, r syscall.RawConn) error {
					return r.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
				}}
			c, err = d.Dial("tcp6", fmt.Sprintf("[2001:db8:1::%d]:8080", i))
			return err
		}))
		defer c.Close()
		flows = append(flows, &flow{c, bufio.NewReader(c)})
	}
	for round := range 2 {
		for i, f := range flows {
			name, from, err := f.ask()
			if err != nil || name != "task2" || from.Addr().String() != client6 {
				l.t.Errorf("round %d, through node %d: %s saw %s, %v", round, i+1, name, from, err)
			}
		}
	}
}

// The mesh is no back door in IPv6 either, containers cannot send from others' addresses, and the metadata service is closed.
func TestIsolationIPv6(t *testing.T) {
	l, _ := webLab(t, 2)
	t1 := l.box(1)
	l.serve(t1, "hidden", 9999)
	l.serve(l.box(2), "hidden", 9999)
	gw1, gw2 := gateway6Of(1).String(), gateway6Of(2).String()
	cl, sw := l.conn(l.cl), l.conn(l.sw)
	block := link.RouteKey{Dst: nodeBlock6(labPool6, 1)}
	l.must(cl.Do([]link.Message{link.SetRoute(block, link.Route{Dev: mustLink(t, cl, "eth0"), Via: addr("2001:db8:9::1")})}))
	l.must(sw.Do([]link.Message{link.SetRoute(block, link.Route{Dev: mustLink(t, sw, "br0"), Via: addr("2001:db8:1::1")})}))
	c := l.conn(t1)
	l.must(c.Do([]link.Message{link.AddAddr(mustLink(t, c, "eth1"), host(addr("2001:db8:77::1")))}))
	spoof := func() bool { // a datagram from an address that is not the container's
		var in, out net.PacketConn
		l.must(l.cl.Do(func() (err error) { in, err = net.ListenPacket("udp6", "["+client6+"]:9998"); return err }))
		defer in.Close()
		l.must(t1.Do(func() (err error) { out, err = net.ListenPacket("udp6", "[2001:db8:77::1]:0"); return err }))
		defer out.Close()
		_, err := out.WriteTo([]byte("x"), &net.UDPAddr{IP: net.ParseIP(client6), Port: 9998})
		l.must(err)
		_ = in.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		_, _, err = in.ReadFrom(make([]byte, 10))
		return err == nil
	}
	doors := []struct {
		what string
		from *link.NS
		at   string
	}{
		{"another node's container over the mesh", t1, "[" + gw2 + "]:9999"},
		{"another node's published target past its port", t1, "[" + gw2 + "]:80"},
		{"a container from outside, the pool being routed to the node", l.cl, "[" + gw1 + "]:9999"},
	}
	for _, h := range l.hosts {
		l.must(h.nft.Delete(nft.IPv6, nft.MeshTableName))
	}
	for _, d := range doors {
		if f, err := open(d.from, "tcp6", d.at); err != nil {
			t.Errorf("control: %s is closed without rules: %v", d.what, err)
		} else {
			f.Close()
		}
	}
	if !spoof() {
		t.Error("control: a foreign source is refused without rules")
	}
	for _, h := range l.hosts {
		l.must(h.Check(context.Background()))
	}
	for _, d := range doors {
		unreachable(t, d.from, d.at)
	}
	if spoof() {
		t.Error("a container sends from an address that is not its own")
	}
}

// Routes that a router advertised survive that the node begins to forward, and everything is back after leaving.
func TestAdvertisedRoutesSurvive(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	read := func(key string) string {
		v, err := h.ns.ReadSysctl(key)
		l.must(err)
		return v
	}
	if read(forwarding6) != "0" || read("ipv6/conf/eth0/accept_ra") != "1" {
		t.Skip("this kernel's defaults are others")
	}
	l.setAll(nil, Mesh{})
	for key, want := range map[string]string{forwarding6: "1", "ipv6/conf/eth0/accept_ra": "2", "ipv6/conf/default/accept_ra": "2",
		"ipv6/conf/" + meshDevice + "/accept_ra": "0"} {
		if got := read(key); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
	l.hosts[0].Driver.Close() // another daemon leaves
	h.Driver = l.driver(1, nil)
	l.must(h.Leave(ctx))
	for key, want := range map[string]string{forwarding6: "0", "ipv6/conf/eth0/accept_ra": "1", "ipv6/conf/default/accept_ra": "1"} {
		if got := read(key); got != want {
			t.Errorf("after leaving, %s: %s, want %s", key, got, want)
		}
	}
}

// Hosts that have no IPv4 address at all carry both families between containers.
func TestTunnelsOverIPv6(t *testing.T) {
	l := newLab(t, 3)
	l.under6 = true
	for _, h := range l.hosts {
		c := l.conn(h.ns)
		m := link.AddAddr(mustLink(t, c, "eth0"), netip.PrefixFrom(h.addr, 24))
		l.must(c.Do([]link.Message{{Type: unix.RTM_DELADDR, Body: m.Body}}))
	}
	l.setAll([]Network{webNetwork(Ready, Ready, Ready)}, webMesh(1, 2, 3))
	for i, h := range l.hosts {
		l.serve(l.sandbox(h, webSandbox(i+1)), fmt.Sprintf("task%d", i+1), 80)
	}
	t1 := l.box(1)
	l.spread(t1, "tcp4", "10.10.0.12:80", 2, "10.10.0.11")
	l.spread(t1, "udp6", "[fd12:3456:789a:1::13]:80", 2, "fd12:3456:789a:1::11")
	if got := l.spread(t1, "tcp4", "10.10.0.2:80", 40, ""); len(got) != 3 {
		t.Errorf("VIP reached %v", got)
	}
	for i := 1; i <= 3; i++ {
		for _, network := range []string{"tcp6", "udp6"} {
			if got := l.spread(l.cl, network, fmt.Sprintf("[2001:db8:1::%d]:8080", i), 30, client6); len(got) != 3 {
				t.Errorf("%s through node %d reached %v", network, i, got)
			}
		}
	}
	for _, at := range []string{"127.0.0.1:8080", "[::1]:8080", "[2001:db8:1::2]:8080"} {
		if got := l.spread(l.hosts[0].ns, "tcp", at, 30, ""); len(got) != 3 {
			t.Errorf("%s from node 1 reached %v", at, got)
		}
	}
	if dev, err := l.conn(l.hosts[0].ns).Link(meshDevice); err != nil || dev.MTU != 1430 {
		t.Errorf("MTU of tunnels over IPv6: %d, %v, want 1430", dev.MTU, err)
	}
	l.strangersTunnel("2001:db8:1::1")
}

// A node on which IPv6 is switched off for all devices serves IPv4 as ever, and carries its containers' IPv6.
func TestIPv6SwitchedOff(t *testing.T) {
	l := newLab(t, 2)
	h := l.hosts[0]
	l.must(h.ns.Sysctl(map[string]string{"ipv6/conf/all/disable_ipv6": "1", "ipv6/conf/default/disable_ipv6": "1"}))
	l.setAll([]Network{webNetwork(Ready, Ready)}, webMesh(1, 2))
	for i, h := range l.hosts {
		l.serve(l.sandbox(h, webSandbox(i+1)), fmt.Sprintf("task%d", i+1), 80)
	}
	if got := l.spread(l.cl, "tcp4", "192.0.2.1:8080", 30, clientAddr); len(got) != 2 {
		t.Errorf("IPv4 through the node reached %v", got)
	}
	if got := l.spread(l.cl, "tcp6", "[2001:db8:1::2]:8080", 30, client6); len(got) != 2 {
		t.Errorf("IPv6 through the other node reached %v, want its task, too", got)
	}
	l.spread(l.box(1), "tcp6", "[fd12:3456:789a:1::12]:80", 1, "fd12:3456:789a:1::11")
	r, err := h.Compare(t.Context(), false)
	l.must(err)
	for _, f := range r.Findings {
		t.Errorf("found: %v", f)
	}
}

// A container's addresses can be used as soon as its network is there: the kernel keeps them back while it has not activated the device.
func TestAddressesAreReady(t *testing.T) {
	l := newLab(t, 1)
	h := l.hosts[0]
	l.setAll([]Network{webNetwork(Ready)}, Mesh{})
	for i := range 20 {
		s := webSandbox(1)
		s.ID = fmt.Sprintf("box%d", i)
		ns := l.sandbox(h, s)
		var list []byte
		l.must(ns.Do(func() (err error) { list, err = os.ReadFile("/proc/thread-self/net/if_inet6"); return err }))
		global := 0
		for _, line := range strings.Split(string(list), "\n") {
			f := strings.Fields(line) // address, device, prefix length, scope, flags, name
			if len(f) != 6 || f[3] != "00" || f[5] == "lo" {
				continue
			}
			global++
			if flags, err := strconv.ParseUint(f[4], 16, 32); err != nil || flags&unix.IFA_F_TENTATIVE != 0 {
				t.Fatalf("container %d: an address is not ready: %s", i, line)
			}
		}
		if global != 2 {
			t.Fatalf("container %d has %d global addresses, want that of its network and that of its gateway leg:\n%s", i, global, list)
		}
		l.must(h.RemoveSandbox(t.Context(), s.ID))
	}
}
