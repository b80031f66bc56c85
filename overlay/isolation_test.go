package overlay

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// Who is no node cannot send into a network, whatever addresses the packet inside has.
func TestStrangersTunnel(t *testing.T) {
	l, _ := webLab(t, 2)
	l.strangersTunnel("192.0.2.1")
}

// strangersTunnel has the outside client send a forged tunnel packet to the first node's tunnel address, from which nothing must come to the
// node's container; without the rules it does.
func (l *lab) strangersTunnel(node string) {
	l.t.Helper()
	h, nw := l.hosts[0], webNetwork(Ready, Ready)
	inner := ipv4UDP(addr("10.10.0.12"), addr("10.10.0.11"), 9997)
	to, from := nodeMAC(nw.VNI, 1), nodeMAC(nw.VNI, 2)
	p := []byte{8, 0, 0, 0, byte(nw.VNI >> 16), byte(nw.VNI >> 8), byte(nw.VNI), 0}
	p = append(append(append(p, to[:]...), from[:]...), 0x08, 0x00)
	p = append(p, inner...)
	arrives := func() bool {
		var in, out net.PacketConn
		l.must(l.box(1).Do(func() (err error) { in, err = net.ListenPacket("udp4", ":9997"); return err }))
		defer in.Close()
		l.must(l.cl.Do(func() (err error) { out, err = net.ListenPacket("udp", ":0"); return err }))
		defer out.Close()
		_, err := out.WriteTo(p, &net.UDPAddr{IP: net.ParseIP(node), Port: dataPort})
		l.must(err)
		_ = in.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		_, _, err = in.ReadFrom(make([]byte, 10))
		return err == nil
	}
	for _, f := range []byte{nft.IPv4, nft.IPv6} {
		l.must(h.nft.Delete(f, nft.MeshTableName))
	}
	if !arrives() {
		l.t.Error("control: a forged tunnel packet does not arrive without rules")
	}
	l.must(h.Check(context.Background()))
	if arrives() {
		l.t.Error("a tunnel packet of a stranger arrives at a container")
	}
}

// ipv4UDP is a datagram with one byte in it.
func ipv4UDP(from, to netip.Addr, port uint16) []byte {
	b := make([]byte, 20, 29)
	b[0], b[3], b[8], b[9] = 0x45, 29, 64, 17
	copy(b[12:], from.AsSlice())
	copy(b[16:], to.AsSlice())
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum+sum>>16))
	b = binary.BigEndian.AppendUint16(b, port)
	b = binary.BigEndian.AppendUint16(b, port)
	return append(b, 0, 9, 0, 0, 'x')
}

// Two networks with one subnet: containers with the same address live side by side, and neither reaches the other's.
func TestNetworksApart(t *testing.T) {
	l := newLab(t, 2)
	red, blue := webNetwork(Ready, Ready), webNetwork(Ready, Ready)
	blue.ID, blue.Name, blue.VNI = "blueidblueidblueidblueid1", "blue", 4098
	blue.Subnet6 = netip.MustParsePrefix("fd12:3456:789a:2::/64") // each has its own: only IPv4 subnets are chosen by hand
	for i := range blue.Services {
		blue.Services[i].VIP6 = netip.Addr{}
	}
	for i := range blue.Endpoints {
		blue.Endpoints[i].ID, blue.Endpoints[i].Addr6 = "blue"+blue.Endpoints[i].ID, netip.Addr{}
	}
	l.setAll([]Network{red, blue}, Mesh{})
	boxes := map[string]*link.NS{}
	for i, h := range l.hosts {
		s := webSandbox(i + 1)
		boxes["red"] = l.sandbox(h, s)
		l.serve(boxes["red"], "red", 80)
		b := s
		b.ID, b.Gateway4, b.Gateway6 = "blue"+s.ID, netip.Addr{}, netip.Addr{}
		b.Legs = []Leg{{NetworkID: blue.ID, Addr4: s.Legs[0].Addr4}}
		boxes["blue"] = l.sandbox(h, b)
		if i == 0 { // on the second host blue has no server, so that an answer there would be red's
			l.serve(boxes["blue"], "blue", 80)
		}
	}
	red2, blue2 := boxes["red"], boxes["blue"]
	for _, to := range []string{"10.10.0.11:80", "10.10.0.12:80", "10.10.0.2:80"} {
		if got := l.spread(red2, "tcp4", to, 4, ""); got["red"] != 4 {
			t.Errorf("red asks %s: %v", to, got)
		}
	}
	if got := l.spread(blue2, "tcp4", "10.10.0.11:80", 4, "10.10.0.12"); got["blue"] != 4 {
		t.Errorf("blue asks: %v", got)
	}
	refusedFast(t, blue2, "10.10.0.12:80") // itself, without a server
	unreachable(t, blue2, "[fd12:3456:789a:1::11]:80")
	gw := gatewayOf(2).String()
	unreachable(t, blue2, gw+":80") // blue has no gateway leg
}

// The metadata service of a cloud is closed to containers in both families, though the node itself reaches it.
func TestMetadataIsClosed(t *testing.T) {
	l, _ := webLab(t, 1)
	h, t1 := l.hosts[0], l.box(1)
	l.address(l.sw, "br0", "169.254.169.254/32")
	l.address(l.sw, "br0", "fd00:ec2::254/128")
	var ln net.Listener
	l.must(l.sw.Do(func() (err error) { ln, err = net.Listen("tcp", ":80"); return err }))
	defer ln.Close()
	at := []string{"169.254.169.254:80", "[fd00:ec2::254]:80"}
	open := func(ns *link.NS, at string) bool {
		f, err := open(ns, "tcp", at)
		if err == nil {
			f.Close()
		}
		return err == nil
	}
	for _, a := range at {
		if !open(h.ns, a) {
			t.Errorf("control: the node does not reach %s", a)
		}
		unreachable(t, t1, a)
	}
	if !open(t1, "192.0.2.254:80") || !open(t1, "[2001:db8:1::fe]:80") {
		t.Error("control: the container reaches nothing there")
	}
}
