package overlay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// What a path between two nodes carries may be less than their devices say, and nobody may say so: packets that are too large vanish. So nodes
// try it, with what they will send: a tunnel packet of full size, never to be cut in pieces, in which the other node finds a small echo request
// behind which there is nothing but padding. An answer comes back by the mesh.

const (
	pathEvery   = time.Minute // a round over all peers
	pathFirst   = 3 * time.Second
	pathAnswer  = 250 * time.Millisecond
	pathTries   = 3
	pathAtOnce  = 8   // peers that are tried at the same time
	pathPeers   = 128 // of a round; the others come in the next ones
	minPathMTU  = 1280
	ethHeader   = 14
	vxlanHeader = 8
	udpHeader   = 8
	echoSize    = 36 // IPv4, ICMP and eight bytes
)

// paths are what was measured.
type paths struct {
	mu    sync.Mutex
	sizes map[netip.Addr]int // largest packet that reached a peer, by its tunnel address
	least int                // of all; 0: not known
	peer  uint32             // whose that is
	next  int                // peer that the next round begins with
}

// tunnelHeaders is what a tunnel adds to a packet.
func tunnelHeaders(local netip.Addr) int {
	if local.Is6() {
		return 40 + udpHeader + vxlanHeader + ethHeader
	}
	return 20 + udpHeader + vxlanHeader + ethHeader
}

// measurePaths tries the paths to the peers every now and then until ctx is done. What carries less than before takes effect at once.
func (d *Driver) measurePaths(ctx context.Context) {
	timer := time.NewTimer(pathFirst)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if changed, err := d.pathRound(ctx); err != nil && ctx.Err() == nil {
			d.log.Warn("measure what paths to other nodes carry", "error", err)
		} else if changed {
			if err := d.Check(ctx); err != nil && ctx.Err() == nil {
				d.log.Error("set what paths carry", "error", err)
			}
		}
		timer.Reset(pathEvery)
	}
}

// pathRound measures the paths to some peers. It reports whether the least of all has changed.
func (d *Driver) pathRound(ctx context.Context) (changed bool, err error) {
	d.mu.Lock()
	self, peers, pool, port, local, device := d.cfg.Self, d.cfg.Peers, d.cfg.MeshPool, d.cfg.DataPort, d.underlay(), d.mesh.device
	full, err := 0, error(nil)
	if d.have {
		full, err = d.deviceMTU(local)
	}
	d.mu.Unlock()
	if err != nil || device == 0 || full <= minPathMTU || len(peers) == 0 {
		return false, err
	}
	p, err := openProber(d.host, local, self.Index, pool, port)
	if err != nil {
		return false, err
	}
	defer p.close()
	var wg sync.WaitGroup
	tokens := make(chan struct{}, pathAtOnce)
	for _, peer := range d.paths.some(peers) {
		tokens <- struct{}{}
		wg.Go(func() {
			defer func() { <-tokens }()
			if size := p.measure(ctx, peer, full); size > 0 {
				d.paths.note(peer.Underlay, size)
			}
		})
	}
	wg.Wait()
	least, was, of := d.paths.settle(peers)
	if least != was && least > 0 && (was > 0 || least < full) {
		d.log.Warn("what paths to other nodes carry has changed", "bytes", least, "before", was, "device", full, "node", of)
		return true, nil
	}
	return false, nil
}

// some are the peers of one round.
func (p *paths) some(peers []Node) []Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(peers) <= pathPeers {
		return peers
	}
	out := make([]Node, pathPeers)
	for i := range out {
		out[i] = peers[(p.next+i)%len(peers)]
	}
	p.next = (p.next + pathPeers) % len(peers)
	return out
}

func (p *paths) note(a netip.Addr, size int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sizes == nil {
		p.sizes = map[netip.Addr]int{}
	}
	p.sizes[a] = size
}

// settle forgets those that are no peers any more, and finds the least.
func (p *paths) settle(peers []Node) (least, was int, hostname string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	sizes := map[netip.Addr]int{}
	was, p.peer = p.least, 0
	p.least = 0
	for _, n := range peers {
		size, ok := p.sizes[n.Underlay]
		if !ok {
			continue
		}
		sizes[n.Underlay] = size
		if p.least == 0 || size < p.least {
			p.least, p.peer, hostname = size, n.Index, n.Hostname
		}
	}
	p.sizes = sizes
	return p.least, was, hostname
}

// least is the largest packet that all paths carry, and to which node that is; 0 if it is not known.
func (d *Driver) leastPath() (size int, peer uint32) {
	d.paths.mu.Lock()
	defer d.paths.mu.Unlock()
	return d.paths.least, d.paths.peer
}

// fits lowers a tunnel's MTU to what paths carry.
func (d *Driver) fits(mtu int, local netip.Addr) int {
	if least, _ := d.leastPath(); least > 0 {
		return min(mtu, least-tunnelHeaders(local))
	}
	return mtu
}

// prober sends tunnel packets and hears answers.
type prober struct {
	self  uint32
	pool  netip.Prefix
	port  uint16
	local netip.Addr
	udp   int
	icmp  int
	id    uint16
	done  chan struct{}

	mu    sync.Mutex
	seq   uint16
	heard map[uint16]chan struct{}
}

func openProber(ns *link.NS, local netip.Addr, self uint32, pool netip.Prefix, port uint16) (*prober, error) {
	p := &prober{self: self, pool: pool, port: port, local: local, udp: -1, icmp: -1, id: uint16(rand.Uint32()), done: make(chan struct{}), heard: map[uint16]chan struct{}{}}
	err := ns.Do(func() (err error) {
		family, level, option, never := unix.AF_INET, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE
		if local.Is6() {
			family, level, option, never = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE
		}
		if p.udp, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		if err = unix.SetsockoptInt(p.udp, level, option, never); err != nil {
			return err
		}
		if err = unix.Bind(p.udp, sockaddr(local, 0)); err != nil {
			return err
		}
		if p.icmp, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(pathAnswer))
		if err = unix.SetsockoptTimeval(p.icmp, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		return unix.Bind(p.icmp, sockaddr(nodeAddr(pool, self), 0))
	})
	if err != nil {
		p.closeSockets()
		return nil, fmt.Errorf("open sockets: %w", err)
	}
	go p.listen() // until close
	return p, nil
}

func sockaddr(a netip.Addr, port uint16) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: int(port)}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: int(port)}
}

func (p *prober) closeSockets() {
	for _, fd := range []int{p.udp, p.icmp} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// close waits for the listener, which looks up after each wait for an answer.
func (p *prober) close() {
	p.mu.Lock()
	p.heard = nil
	p.mu.Unlock()
	<-p.done
	p.closeSockets()
}

func (p *prober) listen() {
	defer close(p.done)
	buf := make([]byte, 256)
	for {
		n, err := unix.Read(p.icmp, buf)
		p.mu.Lock()
		if p.heard == nil {
			p.mu.Unlock()
			return
		}
		if b := buf[:max(n, 0)]; err == nil && len(b) >= 28 && b[20] == 0 && binary.BigEndian.Uint16(b[24:]) == p.id { // an echo reply
			seq := binary.BigEndian.Uint16(b[26:])
			if c := p.heard[seq]; c != nil {
				close(c)
				delete(p.heard, seq)
			}
		}
		p.mu.Unlock()
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			time.Sleep(pathAnswer) // the tries end without answers, and close comes
		}
	}
}

// measure finds the largest packet up to full that reaches a peer; 0 when nothing does. Less than full counts when it was found twice.
func (p *prober) measure(ctx context.Context, peer Node, full int) int {
	if p.carries(ctx, peer, full) {
		return full
	}
	first := p.search(ctx, peer, full)
	if first == 0 {
		return 0
	}
	switch second := p.search(ctx, peer, full); {
	case p.carries(ctx, peer, full):
		return full
	case second == first:
		return first
	}
	return 0 // the path is bad at the moment: nothing is known
}

// search halves the range until the size is found.
func (p *prober) search(ctx context.Context, peer Node, full int) int {
	if !p.carries(ctx, peer, minPathMTU) {
		return 0
	}
	good, bad := minPathMTU, full
	for bad-good > 1 {
		if ctx.Err() != nil {
			return 0
		}
		if mid := (good + bad) / 2; p.carries(ctx, peer, mid) {
			good = mid
		} else {
			bad = mid
		}
	}
	return good
}

// carries reports whether a packet of a size reaches the peer; one that is lost is sent again.
func (p *prober) carries(ctx context.Context, peer Node, size int) bool {
	for range pathTries {
		p.mu.Lock()
		p.seq++
		seq, answer := p.seq, make(chan struct{})
		if p.heard == nil {
			p.mu.Unlock()
			return false
		}
		p.heard[seq] = answer
		p.mu.Unlock()
		err := unix.Sendto(p.udp, p.packet(peer, seq, size), 0, sockaddr(peer.Underlay, p.port))
		if errors.Is(err, unix.EMSGSIZE) || ctx.Err() != nil {
			return false
		}
		wait := time.NewTimer(pathAnswer)
		select {
		case <-answer:
			wait.Stop()
			return true
		case <-wait.C:
		case <-ctx.Done():
		}
		wait.Stop()
		p.mu.Lock()
		delete(p.heard, seq)
		p.mu.Unlock()
	}
	return false
}

// packet is a tunnel packet's content, so long that the packet has the given size: an echo request to the peer's address on the mesh.
func (p *prober) packet(peer Node, seq uint16, size int) []byte {
	b := make([]byte, vxlanHeader, size)
	b[0] = 0x08 // the VNI is valid
	binary.BigEndian.PutUint32(b[4:], meshVNI<<8)
	to, from := nodeMAC(meshVNI, peer.Index), nodeMAC(meshVNI, p.self)
	b = append(append(b, to[:]...), from[:]...)
	b = binary.BigEndian.AppendUint16(b, 0x0800)
	ip := make([]byte, echoSize)
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_ICMP
	binary.BigEndian.PutUint16(ip[2:], echoSize)
	src, dst := nodeAddr(p.pool, p.self).As4(), nodeAddr(p.pool, peer.Index).As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[10:], internetSum(0, ip[:20]))
	ip[20] = 8 // echo request
	binary.BigEndian.PutUint16(ip[24:], p.id)
	binary.BigEndian.PutUint16(ip[26:], seq)
	binary.BigEndian.PutUint16(ip[22:], internetSum(0, ip[20:]))
	b = append(b, ip...)
	outer := tunnelHeaders(p.local) - vxlanHeader - ethHeader
	return b[:size-outer]
}
