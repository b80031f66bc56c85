package liveness_test

import (
	"bytes"
	"math/rand/v2"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// The key is replaced in three steps while packets of every kind of nonsense arrive: nobody who was told is held for dead, and a node that
// was not told is out.
func TestKeysChangeUnderGarbage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &wire{nodes: map[string]*port{}}
		var ports []*port
		for i := 1; i <= 5; i++ {
			ports = append(ports, w.node(t, i))
		}
		stop := make(chan struct{})
		go garbage(w, stop)
		time.Sleep(20 * time.Second)
		old, fresh := make([]byte, 32), bytes.Repeat([]byte{7}, 32)
		for _, keys := range [][][]byte{{old, fresh}, {fresh, old}, {fresh}} {
			for _, p := range ports[:4] {
				if err := p.l.SetKeys(keys); err != nil {
					t.Fatal(err)
				}
				time.Sleep(500 * time.Millisecond) // not all at once
			}
			time.Sleep(time.Second)
		}
		began := time.Now()
		time.Sleep(20 * time.Second)
		for i, p := range ports[:4] {
			for _, id := range []string{"n1", "n2", "n3", "n4"} {
				if _, dead := p.diedAt(id); dead {
					t.Errorf("n%d was told that %s is dead", i+1, id)
				}
			}
			if at, dead := p.diedAt("n5"); !dead || at.Sub(began) > 10*time.Second {
				t.Errorf("n%d still listens to n5, which does not know the key", i+1)
			}
		}
		for _, bad := range [][][]byte{nil, {[]byte("short")}, {fresh, nil}} {
			if ports[0].l.SetKeys(bad) == nil {
				t.Errorf("keys %v were taken", bad)
			}
		}
		close(stop)
		for _, p := range ports {
			p.cancel()
			<-p.stopped
		}
		time.Sleep(time.Minute) // memberlist's timers end
	})
}

// garbage sends packets that no member sends, to all, as fast as memberlist gossips.
func garbage(w *wire, stop chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(20 * time.Millisecond):
		}
		b := make([]byte, []int{0, 1, 16, 200, 1400, 65_000}[rand.IntN(6)])
		for i := range b {
			b[i] = byte(rand.IntN(256))
		}
		if len(b) > 0 {
			b[0] = byte(rand.IntN(14)) // memberlist's kinds of messages, in clear
		}
		w.mu.Lock()
		for _, o := range w.nodes {
			select {
			case o.in <- packet{b, &net.UDPAddr{IP: net.IPv4(203, 0, 113, 9), Port: 9}}:
			default:
			}
		}
		w.mu.Unlock()
	}
}
