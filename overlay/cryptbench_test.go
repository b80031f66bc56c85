package overlay

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// TestMeasureEncrypted (SKEIN_MEASURE=1) compares what crosses two hosts plainly, over a network and over an encrypted one: bulk TCP and
// request/response, interleaved, the best and median of the rounds. Client, server and encryption share this process and its processors.
func TestMeasureEncrypted(t *testing.T) {
	if os.Getenv("SKEIN_MEASURE") == "" {
		t.Skip("a measurement: set SKEIN_MEASURE=1")
	}
	l := newSecretLab(t, 2)
	plain := l.nw
	plain.ID, plain.Name, plain.VNI, plain.Encrypted = "plain", "plain", 5002, false
	keys := l.keys()
	for _, h := range l.hosts {
		l.setKeys(h, keys, l.nw, plain)
	}
	var boxes []*link.NS
	for i, h := range l.hosts {
		e := plain.Endpoints[i]
		boxes = append(boxes, l.sandbox(h, Sandbox{ID: "p" + e.ID, Legs: []Leg{{NetworkID: plain.ID, Addr4: netip.PrefixFrom(e.Addr4, 24)}}}))
	}
	paths := []struct {
		name     string
		from, to *link.NS
		addr     netip.Addr
	}{
		{"raw", l.hosts[0].ns, l.hosts[1].ns, l.hosts[1].addr},
		{"network", boxes[0], boxes[1], plain.Endpoints[1].Addr4},
		{"encrypted", l.boxes[0], l.boxes[1], l.nw.Endpoints[1].Addr4},
	}
	l.reaches(0, 1, 5*time.Second)
	bulk, rr, cpu := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	for range 5 {
		for _, p := range paths {
			began, busy := time.Now(), cpuTime()
			n := l.bulk(p.from, p.to, p.addr, time.Second)
			bulk[p.name] = append(bulk[p.name], float64(n)*8/time.Since(began).Seconds()/1e9)
			cpu[p.name] = append(cpu[p.name], (cpuTime()-busy).Seconds()*1e9/float64(n))
			rr[p.name] = append(rr[p.name], l.exchange(p.from, p.to, p.addr, time.Second))
		}
	}
	for _, p := range paths {
		fmt.Printf("%-10s %6.2f Gb/s best %6.2f median (%.2f CPU ns a byte)   %7.0f/s best %7.0f median\n", p.name,
			best(bulk[p.name]), median(bulk[p.name]), median(cpu[p.name]), best(rr[p.name]), median(rr[p.name]))
	}
	fmt.Printf("encrypted/raw: bulk %.2f, request/response %.2f\n", best(bulk["encrypted"])/best(bulk["raw"]), best(rr["encrypted"])/best(rr["raw"]))
}

func cpuTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func best(v []float64) float64 {
	m := v[0]
	for _, x := range v {
		m = max(m, x)
	}
	return m
}

func median(v []float64) float64 {
	s := append([]float64(nil), v...)
	for i := range s {
		for j := i + 1; j < len(s); j++ {
			if s[j] < s[i] {
				s[i], s[j] = s[j], s[i]
			}
		}
	}
	return s[len(s)/2]
}

// pair is a connection between two namespaces.
func (l *lab) pair(from, to *link.NS, addr netip.Addr) (client, server net.Conn) {
	l.t.Helper()
	var ln net.Listener
	l.must(to.Do(func() (err error) {
		ln, err = net.Listen("tcp4", ":0")
		return err
	}))
	defer ln.Close()
	l.must(from.Do(func() (err error) {
		client, err = net.DialTimeout("tcp", netip.AddrPortFrom(addr, uint16(ln.Addr().(*net.TCPAddr).Port)).String(), 3*time.Second)
		return err
	}))
	server, err := ln.Accept()
	l.must(err)
	return client, server
}

// bulk sends for some time and returns how many bytes arrived.
func (l *lab) bulk(from, to *link.NS, addr netip.Addr, during time.Duration) int64 {
	c, s := l.pair(from, to, addr)
	defer s.Close()
	got := make(chan int64)
	go func() {
		n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{s}, make([]byte, 256<<10))
		got <- n
	}()
	buf := make([]byte, 256<<10)
	for deadline := time.Now().Add(during); time.Now().Before(deadline); {
		if _, err := c.Write(buf); err != nil {
			break
		}
	}
	c.Close()
	return <-got
}

// exchange sends a byte to and fro for some time and returns how often in a second.
func (l *lab) exchange(from, to *link.NS, addr netip.Addr, during time.Duration) float64 {
	c, s := l.pair(from, to, addr)
	defer c.Close()
	go func() {
		defer s.Close()
		b := make([]byte, 1)
		for {
			if _, err := s.Read(b); err != nil {
				return
			}
			if _, err := s.Write(b); err != nil {
				return
			}
		}
	}()
	n, b, began := 0, make([]byte, 1), time.Now()
	for time.Since(began) < during {
		if _, err := c.Write(b); err != nil {
			break
		}
		if _, err := c.Read(b); err != nil {
			break
		}
		n++
	}
	return float64(n) / time.Since(began).Seconds()
}
