package overlay

import (
	"bytes"
	"context"
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// A path that carries less than its devices say, and does not say so: it is found, tunnels and running containers are lowered without being
// made anew, and what is large gets through. Two nodes between which all is well lose nothing of the first's.
func TestPathThatCarriesLess(t *testing.T) {
	l := newLab(t, 3)
	networks := []Network{webNetwork(Ready, Ready, Ready)}
	l.setAll(networks, webMesh(1, 2, 3))
	for i, h := range l.hosts {
		l.serve(l.sandbox(h, webSandbox(i+1)), webSandbox(i+1).ID, 80)
	}
	ctx := context.Background()
	h := l.hosts[0]
	if changed, err := h.pathRound(ctx); err != nil || changed {
		t.Fatalf("all is well: changed %v, %v", changed, err)
	}
	if least, _ := h.leastPath(); least != 1500 {
		t.Fatalf("all is well: %d", least)
	}
	before := l.tunnelOf(h, networks[0].ID)
	sw := l.conn(l.sw)
	port, err := sw.Link("h2") // the switch drops what does not fit into this, without a word
	l.must(err)
	l.must(sw.SetMTU(port.Index, 1400))
	if changed, err := h.pathRound(ctx); err != nil || !changed {
		t.Fatalf("changed %v, %v", changed, err)
	}
	if least, peer := h.leastPath(); least != 1400 || peer != 2 {
		t.Errorf("%d bytes to node %d, want 1400 to node 2", least, peer)
	}
	f, err := h.Facts()
	l.must(err)
	if f.PathMTU != 1400 || f.PathPeer != 2 || f.UnderlayMTU != 1500 {
		t.Errorf("facts %+v", f)
	}
	l.must(h.Check(ctx))
	after := l.tunnelOf(h, networks[0].ID)
	if after.MTU != 1350 || after.Index != before.Index {
		t.Errorf("the tunnel is %+v, was %+v", after, before)
	}
	inner := openNS(t, h.sandboxFile("task1"))
	links, err := l.conn(inner).Links()
	l.must(err)
	for name, k := range links {
		if name != "lo" && k.MTU != 1350 {
			t.Errorf("the container's %s has an MTU of %d", name, k.MTU)
		}
	}
	fresh := l.sandbox(h, Sandbox{ID: "late", Gateway4: netip.MustParseAddr("10.192.4.9"), Legs: []Leg{{NetworkID: networks[0].ID, Addr4: netip.MustParsePrefix("10.10.0.77/24")}}})
	if links, err = l.conn(fresh).Links(); err != nil || links["eth0"].MTU != 1350 || links["eth1"].MTU != 1350 {
		t.Errorf("a new container's legs: %+v, %v", links, err)
	}
	l.must(sw.SetMTU(port.Index, 1500))
	if changed, err := h.pathRound(ctx); err != nil || !changed {
		t.Errorf("when it is well again: changed %v, %v", changed, err)
	}
	l.must(sw.SetUp(port.Index, false)) // a node that does not answer says nothing of its path
	if changed, err := h.pathRound(ctx); err != nil || changed {
		t.Errorf("a node that is away: changed %v, %v", changed, err)
	}
}

func (l *lab) tunnelOf(h *labHost, network string) (out link.Link) {
	l.t.Helper()
	out, err := h.routers[network].conn.Link(vxlanDevice)
	l.must(err)
	return out
}

// What a probe looks like to the other side is an echo request of its own size.
func TestProbePacket(t *testing.T) {
	p := &prober{self: 1, pool: labPool, local: netip.MustParseAddr("192.0.2.1"), id: 7}
	b := p.packet(Node{Index: 2, Underlay: netip.MustParseAddr("192.0.2.2")}, 9, 1500)
	if len(b) != 1500-20-8 {
		t.Fatalf("%d bytes", len(b))
	}
	ip := b[vxlanHeader+ethHeader:]
	if internetSum(0, ip[:20]) != 0 || internetSum(0, ip[20:echoSize]) != 0 || ip[9] != unix.IPPROTO_ICMP {
		t.Errorf("checksums of % x", ip[:echoSize])
	}
}

// isProbe tells a probe of a path, or the answer to one, by a tunnel packet's content: an echo between nodes and nothing but zeros behind it.
func isProbe(b []byte) bool {
	if len(b) < vxlanHeader+ethHeader+echoSize || binary.BigEndian.Uint32(b[4:])>>8 != meshVNI {
		return false
	}
	ip := b[vxlanHeader+ethHeader:]
	src, dst := netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:]))
	return ip[0] == 0x45 && ip[9] == unix.IPPROTO_ICMP && binary.BigEndian.Uint16(ip[2:]) == echoSize && labPool.Contains(src) && labPool.Contains(dst) &&
		len(bytes.Trim(ip[echoSize-8:], "\x00")) == 0
}
