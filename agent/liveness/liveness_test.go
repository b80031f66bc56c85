package liveness_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"skein/agent/liveness"
)

// wire is a network in memory that loses packets of nodes that are cut off.
type wire struct {
	mu    sync.Mutex
	nodes map[string]*port
}

type packet struct {
	b    []byte
	from net.Addr
}

// port is one node's socket and listener.
type port struct {
	w       *wire
	addr    netip.AddrPort
	in      chan packet
	conns   chan net.Conn
	closed  chan struct{}
	once    sync.Once
	cut     bool
	deadMu  sync.Mutex
	dead    map[string]time.Time
	cancel  context.CancelFunc
	stopped chan struct{}
	l       *liveness.Liveness
}

func (p *port) Close() error                       { p.once.Do(func() { close(p.closed) }); return nil }
func (p *port) Addr() net.Addr                     { return net.TCPAddrFromAddrPort(p.addr) }
func (p *port) LocalAddr() net.Addr                { return net.UDPAddrFromAddrPort(p.addr) }
func (p *port) SetDeadline(t time.Time) error      { return nil }
func (p *port) SetReadDeadline(t time.Time) error  { return nil }
func (p *port) SetWriteDeadline(t time.Time) error { return nil }

func (p *port) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case <-p.closed:
		return 0, nil, net.ErrClosed
	case x := <-p.in:
		return copy(b, x.b), x.from, nil
	}
}

func (p *port) WriteTo(b []byte, to net.Addr) (int, error) {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if o := p.w.nodes[to.String()]; o != nil && !o.cut && !p.cut {
		select {
		case o.in <- packet{append([]byte(nil), b...), p.LocalAddr()}:
		default:
		}
	}
	return len(b), nil
}

func (p *port) Accept() (net.Conn, error) {
	select {
	case <-p.closed:
		return nil, net.ErrClosed
	case c := <-p.conns:
		return c, nil
	}
}

func (p *port) dial(ctx context.Context, addr string) (net.Conn, error) {
	p.w.mu.Lock()
	o := p.w.nodes[addr]
	lost := o == nil || o.cut || p.cut
	p.w.mu.Unlock()
	if lost {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	a, b := net.Pipe()
	select {
	case o.conns <- b:
		return a, nil
	case <-o.closed:
		return nil, errors.New("connection refused")
	}
}

func (w *wire) node(t *testing.T, i int) *port {
	p := &port{
		w: w, addr: netip.MustParseAddrPort(fmt.Sprintf("192.0.2.%d:7946", i)), in: make(chan packet, 1024), conns: make(chan net.Conn, 16),
		closed: make(chan struct{}), dead: map[string]time.Time{}, stopped: make(chan struct{}),
	}
	w.mu.Lock()
	w.nodes[p.addr.String()] = p
	w.mu.Unlock()
	l, err := liveness.New(liveness.Config{
		NodeID: fmt.Sprintf("n%d", i), Advertise: p.addr, Packets: p, Streams: p, Dial: p.dial, Keys: [][]byte{make([]byte, 32)},
		Peers: func() []string { return []string{"192.0.2.1:7946", "192.0.2.2:7946"} },
		OnDead: func(id string) {
			p.deadMu.Lock()
			defer p.deadMu.Unlock()
			p.dead[id] = time.Now()
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	p.l = l
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	go func() { defer close(p.stopped); _ = l.Run(ctx) }()
	return p
}

func (p *port) diedAt(id string) (time.Time, bool) {
	p.deadMu.Lock()
	defer p.deadMu.Unlock()
	at, ok := p.dead[id]
	return at, ok
}

func TestDeathIsHinted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &wire{nodes: map[string]*port{}}
		var ports []*port
		for i := 1; i <= 5; i++ {
			ports = append(ports, w.node(t, i))
		}
		time.Sleep(30 * time.Second)
		for i, p := range ports {
			if len(p.dead) != 0 {
				t.Errorf("n%d was told of deaths: %v", i+1, p.dead)
			}
		}
		cut := time.Now()
		w.mu.Lock()
		ports[4].cut = true
		w.mu.Unlock()
		time.Sleep(10 * time.Second)
		at, ok := ports[0].diedAt("n5")
		if took := at.Sub(cut); !ok || took > 4*time.Second {
			t.Errorf("n1 heard of n5's death: %v, after %v", ok, took)
		} else {
			t.Logf("hint after %v", took)
		}
		// Healed, it is a member again; its next death is told again.
		w.mu.Lock()
		ports[4].cut = false
		w.mu.Unlock()
		time.Sleep(time.Minute)
		died := time.Now()
		ports[4].cancel()
		<-ports[4].stopped
		time.Sleep(10 * time.Second)
		if at, _ := ports[0].diedAt("n5"); !at.After(died) {
			t.Error("second death of n5 was not told")
		} else {
			t.Logf("hint after %v", at.Sub(died))
		}
		for _, p := range ports[:4] {
			p.cancel()
			<-p.stopped
		}
		time.Sleep(time.Minute) // memberlist's timers end
	})
}

func TestConfigIsChecked(t *testing.T) {
	for _, cfg := range []liveness.Config{{}, {NodeID: "n", Advertise: netip.MustParseAddrPort("192.0.2.1:1"), Keys: [][]byte{[]byte("short")}}} {
		if _, err := liveness.New(cfg); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
}
