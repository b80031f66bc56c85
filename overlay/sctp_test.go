package overlay

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/netip"
	"testing"
	"time"

	"skein/overlay/link"
)

// sctpInit is an association's first packet, or with ack the answer to it.
func sctpInit(from, to uint16, ack bool) []byte {
	p := binary.BigEndian.AppendUint16(nil, from)
	p = binary.BigEndian.AppendUint16(p, to)
	tag, chunk := uint32(0), byte(1)
	if ack {
		tag, chunk = 7, 2
	}
	p = binary.BigEndian.AppendUint32(p, tag)
	p = append(p, 0, 0, 0, 0, chunk, 0, 0, 20)
	p = binary.BigEndian.AppendUint32(p, 7) // initiate tag
	p = append(p, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1)
	binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)))
	return p
}

// rawSCTP speaks SCTP by itself, because many kernels that translate it have no sockets of it.
func (l *lab) rawSCTP(ns *link.NS, network, at string) *net.IPConn {
	l.t.Helper()
	var c *net.IPConn
	l.must(ns.Do(func() (err error) {
		c, err = net.ListenIP(network, &net.IPAddr{IP: net.ParseIP(at)})
		return err
	}))
	l.t.Cleanup(func() { c.Close() })
	return c
}

// Published ports of SCTP lead to tasks through any node with the client's address, which is answered by the node that it asked.
func TestSCTPThroughTheMesh(t *testing.T) {
	l, _ := webLab(t, 2)
	if !l.hosts[0].SCTP() {
		t.Skip("this kernel does not track SCTP")
	}
	mesh := webMesh(2)
	p := mesh.Ports[0]
	p.Protocol = "sctp"
	mesh.Ports = append(mesh.Ports, p)
	l.setAll([]Network{webNetwork(Ready, Ready)}, mesh)
	for i, c := range []struct {
		network, server, client, entry string
	}{
		{"ip4:132", gatewayOf(2).String(), clientAddr, "192.0.2.1"},
		{"ip6:132", gateway6Of(2).String(), client6, "2001:db8:1::1"},
		{"ip4:132", gatewayOf(2).String(), clientAddr, "192.0.2.2"},
		{"ip6:132", gateway6Of(2).String(), client6, "2001:db8:1::2"},
	} {
		port := uint16(5000 + i) // else the later one of two entry nodes would see it changed
		srv, cl := l.rawSCTP(l.box(2), c.network, c.server), l.rawSCTP(l.cl, c.network, c.client)
		got, from := l.deliver(cl, sctpInit(port, 8080, false), c.entry, srv)
		if !bytes.Equal(got, sctpInit(port, 80, false)) || from.String() != c.client {
			t.Errorf("through %s: the task got %x from %s", c.entry, got, from)
			continue
		}
		if got, from := l.deliver(srv, sctpInit(80, port, true), from.String(), cl); !bytes.Equal(got, sctpInit(8080, port, true)) || from.String() != c.entry {
			t.Errorf("through %s: the client got %x from %s", c.entry, got, from)
		}
		srv.Close()
		cl.Close()
	}
}

// deliver sends a packet until it arrives, as SCTP would: hosts that just came up lose some.
func (l *lab) deliver(from *net.IPConn, p []byte, to string, at *net.IPConn) ([]byte, netip.Addr) {
	l.t.Helper()
	b := make([]byte, 100)
	for range 6 {
		_, err := from.WriteTo(p, &net.IPAddr{IP: net.ParseIP(to)})
		l.must(err)
		_ = at.SetReadDeadline(time.Now().Add(time.Second))
		n, src, err := at.ReadFromIP(b)
		if err == nil {
			a, _ := netip.AddrFromSlice(src.IP)
			return b[:n], a.Unmap()
		}
	}
	l.t.Errorf("nothing arrives from %s at %s", from.LocalAddr(), at.LocalAddr())
	return nil, netip.Addr{}
}
