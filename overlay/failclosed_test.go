package overlay

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/crypt"
	"skein/overlay/link"
	"skein/overlay/nft"
)

// secretLab is a lab with an encrypted network, its containers and what crosses the wires from the beginning. Descriptors rest in stores.
type secretLab struct {
	*lab
	nw     Network
	stores []*memoryStore
	wires  []*wire
	boxes  []*link.NS
	stop   []func()
}

func newSecretLab(t *testing.T, hosts int, opts ...func(*Options)) *secretLab {
	l := &secretLab{lab: newLab(t, hosts), nw: secretNetwork(hosts)}
	for i, h := range l.hosts {
		l.wires = append(l.wires, l.wire(h))
		l.stores = append(l.stores, &memoryStore{fds: map[string]int{}})
		l.stop = append(l.stop, func() {})
		h.Driver.Close()
		t.Cleanup(l.stores[i].close)
		l.start(i, opts...)
		t.Cleanup(func() { l.stop[i]() })
	}
	l.setEncrypted(l.nw)
	l.boxes = l.secretBoxes(l.nw)
	for i, b := range l.boxes {
		l.serve(b, fmt.Sprintf("plaintext%d", i+1), 80)
	}
	return l
}

// start is the start of a host's daemon, end its end.
func (l *secretLab) start(i int, opts ...func(*Options)) {
	l.t.Helper()
	h := l.hosts[i]
	h.Driver = l.driver(i+1, l.stores[i], opts...)
	ctx, cancel := context.WithCancel(context.Background())
	done, d := make(chan struct{}), h.Driver
	go func() {
		defer close(done)
		_ = d.Run(ctx)
	}()
	l.stop[i] = func() { cancel(); <-done }
}

func (l *secretLab) end(i int) {
	l.stop[i]()
	l.stop[i] = func() {}
	l.hosts[i].Driver.Close()
}

// reaches waits until container i gets an answer of container j.
func (l *secretLab) reaches(i, j int, within time.Duration) time.Duration {
	l.t.Helper()
	began := time.Now()
	eventually(l.t, within, func() error { return l.ask(i, j) })
	return time.Since(began)
}

func (l *secretLab) ask(i, j int) error {
	name, _, err := getWithin(l.boxes[i], 400*time.Millisecond, netip.AddrPortFrom(l.nw.Endpoints[j].Addr4, 80).String())
	if err == nil && name != fmt.Sprintf("plaintext%d", j+1) {
		err = fmt.Errorf("%q answered", name)
	}
	return err
}

// silent tells that container i gets no answer of container j over some time.
func (l *secretLab) silent(i, j int, when string) {
	l.t.Helper()
	if l.ask(i, j) == nil {
		l.t.Errorf("%s: container %d still reaches %d", when, i+1, j+1)
	}
}

func getWithin(ns *link.NS, within time.Duration, addr string) (string, netip.Addr, error) {
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", addr, within)
		return err
	})
	if err != nil {
		return "", netip.Addr{}, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(within))
	if _, err := c.Write([]byte("plaintext\n")); err != nil {
		return "", netip.Addr{}, err
	}
	buf := make([]byte, 100)
	n, err := c.Read(buf)
	name, _, _ := strings.Cut(string(buf[:n]), " ")
	return name, netip.Addr{}, err
}

// Whatever is missing or broken, nothing plain leaves, and all goes on when it is mended.
func TestEncryptedFailsClosed(t *testing.T) {
	l := newSecretLab(t, 2)
	l.reaches(0, 1, 5*time.Second)
	keys := l.keys()
	h, ctx := l.hosts[0], context.Background()
	router := h.routers[l.nw.ID]
	cases := []struct {
		name        string
		do, restore func()
	}{
		{"the other node has no key", func() { l.setKeys(h, nil, l.nw) }, func() { l.setKeys(h, keys, l.nw) }},
		{"the other node has another key", func() {
			wrong := keys[2][0]
			wrong.Public[0] ^= 1
			l.setKeys(h, map[uint32][]crypt.Key{2: {wrong}}, l.nw)
		}, func() { l.setKeys(h, keys, l.nw) }},
		{"the device is deleted", func() { l.must(router.conn.DelLink(vxlanDevice)) }, func() { l.must(h.Check(ctx)) }},
		{"the device is replaced by a plain one", func() {
			l.must(router.conn.DelLink(vxlanDevice))
			plain := link.VXLAN{End: link.End{NS: router.ns, Name: vxlanDevice, MAC: nodeMAC(l.nw.VNI, 1), MTU: 1400}, VNI: l.nw.VNI, Local: h.addr, Port: dataPort}
			l.must(h.conn.AddVXLAN(plain))
			dev := mustLink(t, router.conn, vxlanDevice)
			l.must(router.conn.Do([]link.Message{
				link.SetFDB(link.FDBKey{Dev: dev, MAC: nodeMAC(l.nw.VNI, 2)}, l.hosts[1].addr),
				link.SetNeigh(link.NeighKey{Dev: dev, IP: nodeVia(2, false)}, nodeMAC(l.nw.VNI, 2)),
				link.SetRoute(link.RouteKey{Dst: host(l.nw.Endpoints[1].Addr4)}, link.Route{Dev: dev, Via: nodeVia(2, false)}),
			}))
		}, func() { l.must(h.Check(ctx)) }},
		{"the tunnel is closed", func() { h.crypt.Close() }, func() {
			l.end(0)
			l.start(0)
			l.setKeys(h, keys, l.nw)
			router = h.routers[l.nw.ID]
		}},
	}
	for _, c := range cases {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			c.do()
			l.silent(0, 1, c.name)
			if strings.HasSuffix(c.name, "another key") {
				eventually(t, 20*time.Second, func() error {
					if f, err := h.Facts(); err != nil || len(f.NoSession) != 1 || f.NoSession[0] != 2 {
						return fmt.Errorf("nodes without a session: %v, %v", f.NoSession, err)
					}
					return nil
				})
			}
			c.restore()
			l.reaches(0, 1, 10*time.Second)
		})
	}
	for _, w := range l.wires {
		w.check("plaintext")
	}
}

// A daemon's death stops the network at worst, and its successor goes on with the same devices within a second.
func TestEncryptedRestart(t *testing.T) {
	l := newSecretLab(t, 2)
	l.reaches(0, 1, 5*time.Second)
	held, err := open(l.boxes[0], "tcp", netip.AddrPortFrom(l.nw.Endpoints[1].Addr4, 80).String())
	l.must(err)
	defer held.Close()
	if _, _, err := held.ask(); err != nil {
		t.Fatal(err)
	}
	keys, h := l.keys(), l.hosts[0]
	device := mustLink(t, h.routers[l.nw.ID].conn, vxlanDevice)
	l.end(0)
	l.silent(0, 1, "without a daemon")
	began := time.Now()
	l.start(0)
	if got := l.keys(); !slicesEqual(got[1], keys[1]) {
		t.Errorf("the key is another: %v, before %v", got[1], keys[1])
	}
	l.setKeys(h, keys, l.nw)
	if got := mustLink(t, h.routers[l.nw.ID].conn, vxlanDevice); got != device {
		t.Errorf("the device was made anew: index %d, before %d", got, device)
	}
	l.reaches(1, 0, 5*time.Second)
	l.reaches(0, 1, 5*time.Second)
	t.Logf("both directions again after %v", time.Since(began))
	if _, _, err := held.ask(); err != nil {
		t.Errorf("held connection: %v", err)
	}
	for _, w := range l.wires {
		w.check("plaintext")
	}
}

func slicesEqual(a, b []crypt.Key) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// Plain packets of an encrypted network are dropped where they are made and where they come in.
func TestEncryptedGuard(t *testing.T) {
	l := newSecretLab(t, 2)
	l.reaches(0, 1, 5*time.Second)
	inbox := make([]int, 2)
	for i, h := range l.hosts {
		l.must(h.conn.AddVXLAN(link.VXLAN{End: link.End{Name: "plain", MAC: nodeMAC(7, uint32(i+1)), MTU: 1400}, VNI: l.nw.VNI, Local: h.addr, Port: dataPort}))
		dev := mustLink(t, h.conn, "plain")
		l.must(h.conn.Do([]link.Message{link.SetFDB(link.FDBKey{Dev: dev, MAC: nodeMAC(7, uint32(2-i))}, l.hosts[1-i].addr)}))
		l.must(h.ns.Do(func() (err error) {
			protocol := binary.NativeEndian.Uint16([]byte{0x88, 0xb5})
			if inbox[i], err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(protocol)); err != nil {
				return err
			}
			return unix.Bind(inbox[i], &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: dev})
		}))
		defer unix.Close(inbox[i])
	}
	// crosses tells whether a frame from host 2 arrives at host 1.
	crosses := func() bool {
		mac := nodeMAC(7, 1)
		to := &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16([]byte{0x88, 0xb5}), Ifindex: mustLink(t, l.hosts[1].conn, "plain"), Halen: 6}
		copy(to.Addr[:], mac[:])
		buf := make([]byte, 100)
		for range 5 {
			if err := unix.Sendto(inbox[1], []byte("plaintext"), 0, to); err != nil && !errors.Is(err, unix.EPERM) {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Millisecond)
			if n, _, err := unix.Recvfrom(inbox[0], buf, 0); err == nil && n > 0 {
				return true
			}
		}
		return false
	}
	if crosses() {
		t.Error("a plain packet of an encrypted network left its node")
	}
	for _, w := range l.wires {
		w.check("plaintext")
	}
	l.must(l.hosts[1].nft.Delete(nft.IPv4, nft.CryptTableName))
	if crosses() {
		t.Error("a plain packet of an encrypted network was taken")
	}
	l.must(l.hosts[0].nft.Delete(nft.IPv4, nft.CryptTableName))
	if !crosses() {
		t.Error("without guards nothing crosses either: this test shows nothing")
	}
	for _, h := range l.hosts {
		l.must(h.Check(context.Background()))
	}
	if crosses() {
		t.Error("the guards were not put up again")
	}
}

// A key is replaced without a pause.
func TestEncryptedRotation(t *testing.T) {
	l := newSecretLab(t, 2, func(o *Options) { o.RotateKeysEvery, o.KeyOverlap = time.Second, 500*time.Millisecond })
	l.reaches(0, 1, 5*time.Second)
	first := l.keys()
	held, err := open(l.boxes[0], "tcp", netip.AddrPortFrom(l.nw.Endpoints[1].Addr4, 80).String())
	l.must(err)
	defer held.Close()
	worst, asked := time.Duration(0), 0
	for deadline := time.Now().Add(20 * time.Second); ; {
		for _, h := range l.hosts { // what the managers do
			select {
			case <-h.CryptKeysChanged():
				l.setEncrypted(l.nw)
			default:
			}
		}
		began := time.Now()
		if _, _, err := held.ask(); err != nil {
			t.Fatalf("after %d questions: %v", asked, err)
		}
		worst = max(worst, time.Since(began))
		asked++
		now := l.keys()
		if len(now[1]) == 1 && len(now[2]) == 1 && now[1][0].Public != first[1][0].Public && now[2][0].Public != first[2][0].Public {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("keys %v, first %v", now, first)
		}
		time.Sleep(2 * time.Millisecond)
	}
	if worst > 2500*time.Millisecond { // what WireGuard would need to notice is five seconds
		t.Errorf("an answer took %v", worst)
	}
	t.Logf("%d questions, the slowest answer after %v", asked, worst)
	for _, w := range l.wires {
		w.check("plaintext")
	}
}

// A path that takes less than was thought costs speed, not data.
func TestEncryptedNarrowPath(t *testing.T) {
	l := newSecretLab(t, 2)
	l.reaches(0, 1, 5*time.Second)
	c := l.conn(l.hosts[0].ns)
	l.must(c.SetMTU(mustLink(t, c, "eth0"), 1300))
	for _, h := range l.hosts { // which must not cost the containers their IPv6
		l.must(h.Check(context.Background()))
	}
	for i := range 2 {
		client, server := l.pair(l.boxes[i], l.boxes[1-i], l.nw.Endpoints[1-i].Addr4)
		sent := bytes.Repeat([]byte("plaintext and more of it. "), 1<<16)
		go func() {
			defer client.Close()
			_, _ = client.Write(sent)
		}()
		_ = server.SetDeadline(time.Now().Add(20 * time.Second))
		got, err := io.ReadAll(server)
		server.Close()
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("from container %d: %d of %d bytes arrived: %v", i+1, len(got), len(sent), err)
		}
	}
	for _, w := range l.wires {
		w.check("plaintext")
	}
}

func TestEncryptedOverIPv6(t *testing.T) {
	l := newLab(t, 2)
	l.under6 = true
	for _, h := range l.hosts {
		c := l.conn(h.ns)
		m := link.AddAddr(mustLink(t, c, "eth0"), netip.PrefixFrom(h.addr, 24))
		l.must(c.Do([]link.Message{{Type: unix.RTM_DELADDR, Body: m.Body}}))
		l.run(h)
	}
	nw := secretNetwork(2)
	l.setEncrypted(nw)
	boxes := l.secretBoxes(nw)
	l.serve(boxes[1], "plaintext", 80)
	w := l.wire(l.hosts[0])
	for _, a := range []netip.Addr{nw.Endpoints[1].Addr4, nw.Endpoints[1].Addr6} {
		eventually(t, 10*time.Second, func() error {
			_, _, err := getWithin(boxes[0], time.Second, netip.AddrPortFrom(a, 80).String())
			return err
		})
	}
	if dev, err := l.conn(l.hosts[0].routers[nw.ID].ns).Link(vxlanDevice); err != nil || dev.MTU != 1500-80-50 {
		t.Errorf("MTU over IPv6: %d, %v, want 1370", dev.MTU, err)
	}
	w.check("plaintext")
}

// A port that somebody else holds is told with the holder, and nothing goes plainly instead.
func TestEncryptedPortTaken(t *testing.T) {
	l := newLab(t, 2)
	h := l.hosts[0]
	var other net.PacketConn
	l.must(h.ns.Do(func() (err error) {
		other, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", testCryptPort))
		return err
	}))
	cfg := l.baseConfig(h)
	nw := secretNetwork(2)
	cfg.Networks, cfg.Keys = []Network{nw}, l.keys()
	applied, err := h.Set(context.Background(), cfg)
	l.must(err)
	if err := applied[nw.ID]; !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("with its port taken the network was applied: %v", err)
	}
	if _, err := h.routers[nw.ID].conn.Link(vxlanDevice); !errors.Is(err, unix.ENODEV) {
		t.Errorf("there is a device all the same: %v", err)
	}
	other.Close()
	l.setEncrypted(nw)
}
