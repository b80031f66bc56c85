package crypt

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

// side is one key of this node at work: a WireGuard device on a socket of its own. There are two while a key is replaced.
type side struct {
	t        *Tunnel
	slot     uint8
	self     uint32
	dataPort uint16
	mtu      int
	bind     *bind
	dev      *device.Device

	ready  chan *network // networks with something to send
	closed chan struct{}
	events chan tun.Event

	peers map[[32]byte]*peer // under Tunnel.mu
}

// peer is a key of another node as a side knows it.
type peer struct {
	peerConfig
	added time.Time
	since time.Time // of the present attempt
	tries int
	up    bool // there was a session
	over  bool // and it is so long ago that it has ended

	sent, heard uint64 // bytes
	unanswered  bool   // something was sent since something was heard
}

type peerConfig struct {
	node    uint32
	at      netip.AddrPort
	allowed netip.Addr
}

func udpName(slot uint8) string { return udpPrefix + strconv.Itoa(int(slot)) }

// startSide has a key at work. The caller holds mu.
func (t *Tunnel) startSide(ctx context.Context, k ownKey) error {
	if t.sides[k.Slot] != nil {
		return nil
	}
	fd, err := t.socket(ctx, k.Slot)
	if err != nil {
		return fmt.Errorf("encrypted networks: %w", err)
	}
	s := &side{
		t: t, slot: k.Slot, self: t.cfg.Self, dataPort: t.cfg.DataPort, mtu: t.cfg.MTU, bind: newBind(fd, t.port(k.Slot)), peers: map[[32]byte]*peer{},
		ready: make(chan *network), closed: make(chan struct{}), events: make(chan tun.Event),
	}
	s.dev = device.NewDevice(s, s.bind, wireguardLog(t.log))
	err = s.dev.IpcSet("private_key=" + hex.EncodeToString(k.Private) + "\n")
	if err == nil {
		err = s.dev.Up()
	}
	if err != nil {
		s.close()
		return fmt.Errorf("encrypted networks: start WireGuard: %w", err)
	}
	t.sides[k.Slot] = s
	if t.sender.Load() == nil {
		t.setSender(s)
	}
	return nil
}

// socket takes the key's UDP socket from the store or opens it.
func (t *Tunnel) socket(ctx context.Context, slot uint8) (int, error) {
	at := netip.AddrPortFrom(t.cfg.Underlay, t.port(slot))
	if fd := t.takeStored(udpName(slot)); fd >= 0 {
		if socketAt(fd, at) {
			return fd, nil
		}
		unix.Close(fd)
	}
	if err := t.release(ctx, udpName(slot)); err != nil { // one at another address may hold the port
		return -1, err
	}
	var fd int
	err := t.opts.Do(func() (err error) {
		fd, err = openSocket(at)
		return err
	})
	if err != nil {
		return -1, err
	}
	if t.opts.Store != nil {
		if err := t.opts.Store.StoreFD(ctx, udpName(slot), fd); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("keep socket: %w", err)
		}
	}
	return fd, nil
}

// stopSides ends all sides. The caller holds mu. What networks read meanwhile waits in their devices.
func (t *Tunnel) stopSides() {
	t.setSender(nil)
	for i, s := range t.sides {
		if s != nil {
			s.close()
			t.sides[i] = nil
		}
	}
}

func (s *side) close() {
	s.dev.Close()
	s.bind.release()
}

// setPeers configures what differs. With at once, sessions are begun with everybody, else the node with the lower index begins: when both do
// at the same time, neither attempt succeeds.
func (s *side) setPeers(nodes []Node, atOnce bool) error {
	want := map[[32]byte]peerConfig{}
	for _, n := range nodes {
		for _, k := range n.Keys {
			want[k.Public] = peerConfig{n.Index, netip.AddrPortFrom(n.Underlay, k.Port), NodeAddr(k.Slot, n.Index)}
		}
	}
	var b strings.Builder
	for key, p := range s.peers {
		if w, ok := want[key]; !ok || w != p.peerConfig { // one that moved is a new one, so that it is asked anew
			fmt.Fprintf(&b, "public_key=%x\nremove=true\n", key)
			delete(s.peers, key)
			s.bind.forget(p.at)
		}
	}
	var added [][32]byte
	for key, w := range want {
		if s.peers[key] == nil {
			b.WriteString(peerText(key, w))
			s.peers[key] = &peer{peerConfig: w, added: time.Now(), since: time.Now()}
			added = append(added, key)
		}
	}
	if err := s.dev.IpcSet(b.String()); err != nil {
		return fmt.Errorf("encrypted networks: configure WireGuard: %w", err)
	}
	for _, key := range added {
		if atOnce || s.self < want[key].node {
			s.greet(key)
		}
	}
	return nil
}

func peerText(key [32]byte, c peerConfig) string {
	return fmt.Sprintf("public_key=%x\nendpoint=%s\nreplace_allowed_ips=true\nallowed_ip=%s/32\n", key, c.at, c.allowed)
}

// greet begins a session.
func (s *side) greet(key [32]byte) {
	if p := s.dev.LookupPeer(key); p != nil {
		_ = p.SendHandshakeInitiation(false) // what is lost is tried again
	}
}

// again begins a session anew although the last attempt is not over for WireGuard, which would wait for five seconds.
func (s *side) again(key [32]byte, p *peer) error {
	err := s.dev.IpcSet(fmt.Sprintf("public_key=%x\nremove=true\n", key) + peerText(key, p.peerConfig))
	s.greet(key)
	return err
}

// missing tells that there should be a session with this key of a node, and is none.
func (s *side) missing(key [32]byte) bool {
	p := s.peers[key]
	return p == nil || !p.up && time.Since(p.added) > missingAfter || p.up && p.mute()
}

// missingAfter is what a session may take to begin before somebody hears of it.
const missingAfter = 2 * time.Second

func (s *side) hasSession(key [32]byte) bool {
	p := s.peers[key]
	return p != nil && p.up
}

// look notes with whom there was a session.
func (s *side) look() error {
	text, err := s.dev.IpcGet()
	if err != nil {
		return err
	}
	var p *peer
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), "=")
		switch name {
		case "public_key":
			p = nil
			if b, err := hex.DecodeString(value); err == nil && len(b) == 32 {
				p = s.peers[[32]byte(b)]
			}
		case "last_handshake_time_sec":
			if p != nil && value != "0" {
				p.up = true
				sec, _ := strconv.ParseInt(value, 10, 64)
				p.over = time.Since(time.Unix(sec, 0)) > sessionEnds
			}
		case "tx_bytes":
			p.count(&p.sent, value, false)
		case "rx_bytes":
			p.count(&p.heard, value, true)
		}
	}
	return nil
}

// sessionEnds is when a session is over that was not renewed, by WireGuard's rules. Idle ones are not renewed.
const sessionEnds = 180 * time.Second

// count takes the counter of what was sent or heard.
func (p *peer) count(counter *uint64, value string, heard bool) {
	if p == nil {
		return
	}
	n, _ := strconv.ParseUint(value, 10, 64)
	if n != *counter {
		p.unanswered = !heard
	}
	*counter = n
}

// mute tells that what is sent to a peer is not answered any more.
func (p *peer) mute() bool { return p.over && p.unanswered }

// The side is WireGuard's tun.Device.

// File is not used: there are many devices.
func (s *side) File() *os.File { return nil }

// MTU is the tunnel's.
func (s *side) MTU() (int, error) { return s.mtu, nil }

// Name is for messages.
func (s *side) Name() (string, error) { return "skein-crypt" + strconv.Itoa(int(s.slot)), nil }

// Events has none.
func (s *side) Events() <-chan tun.Event { return s.events }

// BatchSize is how many packets Read may return.
func (s *side) BatchSize() int { return conn.IdealBatchSize }

// Close is called by WireGuard.
func (s *side) Close() error {
	close(s.closed)
	close(s.events)
	return nil
}

// Read waits until a network has something to send and returns it as packets of the tunnel.
func (s *side) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	for {
		select {
		case <-s.closed:
			return 0, os.ErrClosed
		case n := <-s.ready:
			k := s.take(n, bufs, sizes, offset)
			n.taken <- struct{}{}
			if k > 0 {
				return k, nil
			}
		}
	}
}

func (s *side) take(n *network, bufs [][]byte, sizes []int, offset int) int {
	k, err := n.dev.Read(bufs, sizes, offset+headerLen)
	if err != nil && !errors.Is(err, tun.ErrTooManySegments) {
		if !errors.Is(err, os.ErrClosed) {
			s.t.log.Debug("read a packet of an encrypted network", "network", n.id, "error", err)
		}
		return 0
	}
	routes, where := *s.t.routes.Load(), *n.where.Load()
	var last netip.Addr
	var target uint32
	var known bool
	for i := range k {
		if sizes[i] == 0 {
			continue
		}
		b := bufs[i][offset : offset+headerLen+sizes[i]]
		a, ok := destination(b[headerLen:])
		if ok && a != last {
			last = a
			target, known = where[a]
		}
		slot, reachable := routes[target]
		if !ok || !known || !reachable {
			sizes[i] = 0
			s.t.lost.noNode.Add(1)
			continue
		}
		seal(b, NodeAddr(s.slot, s.self), NodeAddr(slot, target), s.dataPort, n.vni, s.t.opts.MAC(n.vni, s.self), s.t.opts.MAC(n.vni, target))
		sizes[i] = len(b)
	}
	return k
}

// Write takes packets that came out of the tunnel, whose sender is the node that their source address says, and gives them to their networks.
func (s *side) Write(bufs [][]byte, offset int) (int, error) {
	vnis := *s.t.vnis.Load()
	for start := 0; start < len(bufs); {
		n := s.networkOf(vnis, bufs[start], offset)
		end := start + 1
		for end < len(bufs) && s.networkOf(vnis, bufs[end], offset) == n {
			end++
		}
		if n == nil {
			s.t.lost.refused.Add(uint64(end - start))
		} else if _, err := n.dev.Write(bufs[start:end], offset+headerLen); err != nil && !errors.Is(err, os.ErrClosed) {
			s.t.log.Debug("deliver to an encrypted network", "network", n.id, "error", err)
		}
		start = end
	}
	return len(bufs), nil
}

// networkOf is the network of a packet that is for this node, nil for all else.
func (s *side) networkOf(vnis map[uint32]*network, buf []byte, offset int) *network {
	vni, _, node, ok := open(buf[offset:], s.dataPort)
	if !ok || node != s.self {
		return nil
	}
	return vnis[vni]
}

func wireguardLog(log *slog.Logger) *device.Logger {
	return &device.Logger{
		Verbosef: device.DiscardLogf,
		Errorf:   func(format string, args ...any) { log.Debug("wireguard: " + fmt.Sprintf(format, args...)) },
	}
}
