package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// leaving adds tasks of hosts that take no new clients.
func leaving(m Mesh, hosts ...int) Mesh {
	m.Leaving = webMesh(hosts...).Ports[0].Backends
	return m
}

// lost adds tasks of hosts that are called down.
func lost(m Mesh, hosts ...int) Mesh {
	m.Lost = webMesh(hosts...).Ports[0].Backends
	return m
}

// onto opens flows until one reaches a task.
func (l *lab) onto(ns *link.NS, network, at, want string) *flow {
	l.t.Helper()
	for range 100 {
		f, err := open(ns, network, at)
		l.must(err)
		if name, _, err := f.ask(); err == nil && name == want {
			l.t.Cleanup(func() { f.Close() })
			return f
		}
		f.Close()
	}
	l.t.Fatalf("no flow to %s reached %s", at, want)
	return nil
}

// listen reads without asking anything: nil when nothing came in time.
func (f *flow) listen(limit time.Duration) error {
	_ = f.SetDeadline(time.Now().Add(limit))
	_, err := f.r.ReadByte()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// cut takes a host off the switch.
func (l *lab) cut(host int) {
	l.t.Helper()
	c := l.conn(l.sw)
	port, err := c.Link(fmt.Sprintf("h%d", host))
	l.must(err)
	l.must(c.SetUp(port.Index, false))
}

// heldFlows are connections to task2 on which nothing is said: from outside in both families, from a node, and by VIPs.
func (l *lab) heldFlows() map[string]*flow {
	return map[string]*flow{
		"outside, IPv4":    l.onto(l.cl, "tcp4", "192.0.2.1:8080", "task2"),
		"outside, IPv6":    l.onto(l.cl, "tcp6", "[2001:db8:1::1]:8080", "task2"),
		"from the node":    l.onto(l.hosts[0].ns, "tcp4", "192.0.2.1:8080", "task2"),
		"from localhost":   l.onto(l.hosts[0].ns, "tcp4", "127.0.0.1:8080", "task2"),
		"by the VIP, IPv4": l.onto(l.box(1), "tcp4", "10.10.0.2:80", "task2"),
		"by the VIP, IPv6": l.onto(l.box(1), "tcp6", "[fd12:3456:789a:1::2]:80", "task2"),
	}
}

// Clients that wait for an answer of a backend that is gone are told, though they send nothing.
func TestClientsOfTheGoneAreTold(t *testing.T) {
	l, _ := webLab(t, 2)
	held := l.heldFlows()
	nw := webNetwork(Ready, Draining)
	l.setAll([]Network{nw}, leaving(webMesh(1), 2))
	for name, f := range held {
		if got, _, err := f.ask(); err != nil || got != "task2" {
			t.Errorf("%s: while task2 takes no new clients: %q, %v", name, got, err)
		}
	}
	nw.Endpoints = nw.Endpoints[:1]
	l.set(l.hosts[0], []Network{nw}, webMesh(1))
	for name, f := range held {
		if err := f.listen(5 * time.Second); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: after task2 is gone: %v, want a reset", name, err)
		}
	}
}

// A client that uses the port of a connection that was ended for a new one is served: nothing is left of what told it.
func TestPortOfAnEndedFlowIsFree(t *testing.T) {
	l, _ := webLab(t, 2)
	nw := webNetwork(Ready, Ready)
	var ports []int
	for range 20 { // some of them closed again
		f := l.onto(l.cl, "tcp4", "192.0.2.1:8080", "task2")
		ports = append(ports, f.LocalAddr().(*net.TCPAddr).Port)
		if len(ports)%2 == 0 {
			f.Close()
		}
	}
	nw.Endpoints = nw.Endpoints[:1]
	l.set(l.hosts[0], []Network{nw}, webMesh(1))
	time.Sleep(200 * time.Millisecond) // a moment for answers to what is sent to clients: no event tells that there are none
	for _, port := range ports {
		err := l.cl.Do(func() error {
			d := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(clientAddr), Port: port}, Control: func(_, _ string, c syscall.RawConn) error {
				return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
			}}
			c, err := d.Dial("tcp4", "192.0.2.1:8080")
			if err == nil {
				c.Close()
			}
			return err
		})
		if err != nil && !errors.Is(err, syscall.EADDRNOTAVAIL) && !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("from port %d, which was used before: %v", port, err)
		}
	}
}

// What left while no daemon was here is found by the next one.
func TestStraysAreEnded(t *testing.T) {
	l, _ := webLab(t, 2)
	h := l.hosts[0]
	gone, stays := l.onto(l.cl, "tcp4", "192.0.2.1:8080", "task2"), l.onto(l.cl, "tcp4", "192.0.2.1:8080", "task1")
	h.Close()
	h.Driver = l.driver(1, nil)
	nw := webNetwork(Ready, Ready)
	nw.Endpoints = nw.Endpoints[:1]
	l.set(h, []Network{nw}, webMesh(1))
	if err := gone.listen(5 * time.Second); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a flow to a backend that is gone: %v, want a reset", err)
	}
	if got, _, err := stays.ask(); err != nil || got != "task1" {
		t.Errorf("a flow to a backend that is there: %q, %v", got, err)
	}
}

// Flows to a node that is called down go on as long as it answers, and end when it does not.
func TestClientsOfADeadNode(t *testing.T) {
	l, _ := webLab(t, 2)
	h, ctx := l.hosts[0], context.Background()
	held := l.heldFlows()
	l.set(h, []Network{webNetwork(Ready, Lost)}, lost(webMesh(1), 2))
	l.must(h.endLost(ctx))
	for name, f := range held {
		if got, _, err := f.ask(); err != nil || got != "task2" {
			t.Errorf("%s: while only the daemon is away: %q, %v", name, got, err)
		}
	}
	l.cut(2)
	began := time.Now()
	l.must(h.endLost(ctx))
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %v to find out that the node is dead", took)
	}
	for name, f := range held {
		if err := f.listen(5 * time.Second); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: after the node died: %v, want a reset", name, err)
		}
	}
}

// The packet that makes a client tell where it stands: its checksum is right, as everything else is the kernel's to check.
func TestProbe(t *testing.T) {
	for _, f := range []nft.Flow{
		{Client: netip.MustParseAddrPort("198.51.100.7:50000"), Server: netip.MustParseAddrPort("192.0.2.1:8080")},
		{Client: netip.MustParseAddrPort("[2001:db8::7]:50000"), Server: netip.MustParseAddrPort("[2001:db8::1]:8080")},
	} {
		p := probe(f)
		src, dst := f.Server.Addr().AsSlice(), f.Client.Addr().AsSlice()
		seg := p.data[len(p.data)-20:]
		if checksum(src, dst, seg) != 0 {
			t.Errorf("%v: checksum of the segment is wrong", f)
		}
		if p.to != f.Client.Addr() || !bytes.Contains(p.data, append(bytes.Clone(src), dst...)) || seg[13] != 0x10 {
			t.Errorf("%v: packet % x", f, p.data)
		}
	}
	if got := internetSum(0, []byte{0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7}); got != 0xb861 {
		t.Errorf("checksum %#x, want 0xb861", got)
	}
}

// An unconnected namespace has nobody to tell.
func TestResetWithoutFlows(t *testing.T) {
	if err := reset(failing{}, []nft.Flow{{Protocol: unix.IPPROTO_UDP, Answered: true, Client: netip.MustParseAddrPort("192.0.2.1:1")}}); err != nil {
		t.Error(err)
	}
}

type failing struct{}

func (failing) Do(func() error) error { return net.ErrClosed }
