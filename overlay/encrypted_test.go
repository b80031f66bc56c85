package overlay

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/crypt"
	"skein/overlay/link"
)

// wire is all that crosses a device of a host, from its first packet on.
type wire struct {
	t    *testing.T
	fd   int
	done sync.WaitGroup

	mu      sync.Mutex
	packets [][]byte // without Ethernet header
}

func (l *lab) wire(h *labHost) *wire {
	l.t.Helper()
	w := &wire{t: l.t, fd: -1}
	l.must(h.ns.Do(func() (err error) {
		protocol := int(binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}))
		if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, protocol); err != nil {
			return err
		}
		c := l.conn(h.ns)
		dev, err := c.Link("eth0")
		if err != nil {
			return err
		}
		_ = unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
		tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
		if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		return unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: uint16(protocol), Ifindex: dev.Index})
	}))
	stop := make(chan struct{})
	w.done.Go(func() {
		buf := make([]byte, 1<<17)
		for {
			n, _, err := unix.Recvfrom(w.fd, buf, 0)
			if err == nil {
				w.mu.Lock()
				w.packets = append(w.packets, bytes.Clone(buf[:n]))
				w.mu.Unlock()
			}
			select {
			case <-stop:
				if err != nil {
					return
				}
			default:
			}
		}
	})
	l.t.Cleanup(func() {
		close(stop)
		w.done.Wait()
		unix.Close(w.fd)
	})
	return w
}

// check tells that nothing crossed but WireGuard (and ARP, and what the kernel says of neighbours), that something did, and that none of it has one of
// the words.
func (w *wire) check(words ...string) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	encrypted := 0
	for _, p := range w.packets {
		for _, word := range words {
			if bytes.Contains(p, []byte(word)) {
				w.t.Errorf("%q crossed the wire: % x", word, p[:min(len(p), 80)])
				return
			}
		}
		header, next := 20, 9
		if p[0]>>4 == 6 {
			header, next = 40, 6
		}
		if len(p) < header+8 || p[next] != unix.IPPROTO_UDP {
			continue
		}
		switch port := binary.BigEndian.Uint16(p[header+2:]); port {
		case testCryptPort, testCryptPort + 1:
			encrypted++
		case dataPort:
			if isProbe(p[header+8:]) {
				continue
			}
			w.t.Errorf("a VXLAN packet crossed the wire: % x", p[:min(len(p), 80)])
			return
		}
	}
	if encrypted == 0 {
		w.t.Errorf("of %d packets none was WireGuard's", len(w.packets))
	}
}

const testCryptPort = crypt.DefaultPort

// keys are all hosts' keys.
func (l *lab) keys() map[uint32][]crypt.Key {
	out := map[uint32][]crypt.Key{}
	for _, h := range l.hosts {
		k, err := h.CryptKeys()
		l.must(err)
		out[h.index] = k
	}
	return out
}

func (l *lab) setEncrypted(nw Network) {
	l.t.Helper()
	keys := l.keys()
	for _, h := range l.hosts {
		l.setKeys(h, keys, nw)
	}
}

func (l *lab) setKeys(h *labHost, keys map[uint32][]crypt.Key, networks ...Network) {
	l.t.Helper()
	cfg := l.baseConfig(h)
	cfg.Networks, cfg.Keys = networks, keys
	applied, err := h.Set(context.Background(), cfg)
	l.must(err)
	for table, err := range applied {
		if err != nil {
			l.t.Fatalf("host %d: %s: %v", h.index, table, err)
		}
	}
}

// run has the driver's Run work until the test ends.
func (l *lab) run(h *labHost) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = h.Run(ctx)
	}()
	l.t.Cleanup(func() { cancel(); <-done })
}

// secretNetwork has one endpoint on each host, with a service of all of them.
func secretNetwork(hosts int) Network {
	nw := Network{ID: "secret", Name: "secret", VNI: 5001, Subnet4: netip.MustParsePrefix("10.77.0.0/24"), Subnet6: netip.MustParsePrefix("fd77::/64"), Encrypted: true,
		Services: []Service{{ID: "s", Names: []string{"s"}, VIP4: netip.MustParseAddr("10.77.0.2")}}}
	for i := 1; i <= hosts; i++ {
		nw.Endpoints = append(nw.Endpoints, Endpoint{ID: fmt.Sprintf("t%d", i), ServiceID: "s", Node: uint32(i),
			Addr4: netip.AddrFrom4([4]byte{10, 77, 0, byte(10 + i)}), Addr6: netip.MustParseAddr(fmt.Sprintf("fd77::%d", 10+i)), State: Ready})
	}
	return nw
}

func (l *lab) secretBoxes(nw Network) []*link.NS {
	l.t.Helper()
	var out []*link.NS
	for i, h := range l.hosts {
		e := nw.Endpoints[i]
		out = append(out, l.sandbox(h, Sandbox{ID: e.ID, Legs: []Leg{{NetworkID: nw.ID, Addr4: netip.PrefixFrom(e.Addr4, 24), Addr6: netip.PrefixFrom(e.Addr6, 64)}}}))
	}
	return out
}

func TestEncrypted(t *testing.T) {
	l := newLab(t, 3)
	nw := secretNetwork(3)
	var wires []*wire
	for _, h := range l.hosts {
		wires = append(wires, l.wire(h))
		l.run(h)
	}
	l.setEncrypted(nw)
	boxes := l.secretBoxes(nw)
	for i, b := range boxes {
		l.serve(b, fmt.Sprintf("plaintext%d", i+1), 80)
	}
	for _, network := range []string{"tcp", "udp"} {
		for i := range boxes {
			for j := range boxes {
				for _, a := range []netip.Addr{nw.Endpoints[j].Addr4, nw.Endpoints[j].Addr6} {
					eventually(t, 10*time.Second, func() error {
						name, from, err := get(boxes[i], network, netip.AddrPortFrom(a, 80).String())
						if err != nil {
							return err
						}
						if name != fmt.Sprintf("plaintext%d", j+1) || from != nw.Endpoints[i].Addr4 && from != nw.Endpoints[i].Addr6 {
							return fmt.Errorf("%s answered, to %s", name, from)
						}
						return nil
					})
				}
			}
		}
	}
	if names := l.spread(boxes[0], "tcp", "10.77.0.2:80", 60, ""); len(names) != 3 {
		t.Errorf("the VIP leads to %v", names)
	}
	for _, w := range wires {
		w.check("plaintext")
	}
}

func eventually(t *testing.T, within time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
