package liveness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	maxPacket    = 64 << 10
	packetsBound = 512 // waiting for memberlist; more are dropped, as UDP may
	streamsBound = 16
	acceptPause  = 100 * time.Millisecond
)

// transport is memberlist's network: the daemon's UDP socket and its TLS listener.
type transport struct {
	cfg     Config
	ctx     context.Context
	packets chan *memberlist.Packet
	streams chan net.Conn
	once    sync.Once
	wg      sync.WaitGroup
}

func newTransport(ctx context.Context, cfg Config) *transport {
	t := &transport{cfg: cfg, ctx: ctx, packets: make(chan *memberlist.Packet, packetsBound), streams: make(chan net.Conn, streamsBound)}
	t.wg.Go(t.readPackets)
	t.wg.Go(t.accept)
	return t
}

// FinalAdvertiseAddr implements memberlist.Transport.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return net.IP(t.cfg.Advertise.Addr().AsSlice()), int(t.cfg.Advertise.Port()), nil
}

// WriteTo implements memberlist.Transport.
func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, fmt.Errorf("gossip to %q: %w", addr, err)
	}
	_, err = t.cfg.Packets.WriteTo(b, net.UDPAddrFromAddrPort(to))
	return time.Now(), err
}

// PacketCh implements memberlist.Transport.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// DialTimeout implements memberlist.Transport.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	return t.cfg.Dial(ctx, addr)
}

// StreamCh implements memberlist.Transport.
func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

// Shutdown implements memberlist.Transport.
func (t *transport) Shutdown() error {
	t.stop()
	return nil
}

func (t *transport) stop() {
	t.once.Do(func() {
		_ = t.cfg.Packets.Close()
		_ = t.cfg.Streams.Close()
	})
	t.wg.Wait()
	for { // streams nobody took
		select {
		case c := <-t.streams:
			_ = c.Close()
		default:
			return
		}
	}
}

func (t *transport) readPackets() {
	for {
		buf := make([]byte, maxPacket)
		n, from, err := t.cfg.Packets.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) || t.ctx.Err() != nil {
			return
		}
		if err != nil || n == 0 {
			continue // an ICMP error of an earlier packet
		}
		select {
		case t.packets <- &memberlist.Packet{Buf: append([]byte(nil), buf[:n]...), From: from, Timestamp: time.Now()}:
		default:
		}
	}
}

func (t *transport) accept() {
	for {
		c, err := t.cfg.Streams.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || t.ctx.Err() != nil {
				return
			}
			timer := time.NewTimer(acceptPause) // out of descriptors
			select {
			case <-t.ctx.Done():
			case <-timer.C:
			}
			timer.Stop()
			continue
		}
		select {
		case t.streams <- c:
		case <-t.ctx.Done():
			_ = c.Close()
			return
		}
	}
}
