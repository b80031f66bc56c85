package netbench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"skein/overlay"
	"skein/overlay/link"
)

// queries measures names of the cluster in a container of a network with many of them.
func queries(ctx context.Context, b *bench) (err error) {
	w := newWorld(b)
	defer func() { err = errors.Join(err, w.close()) }()
	d, _, err := bigNode(ctx, w, b.endpoints)
	if err != nil {
		return err
	}
	ns, err := w.box(ctx, d, overlay.Sandbox{ID: "asker", DNS: true, Legs: []overlay.Leg{{NetworkID: "bignetwork", Addr4: prefix("10.20.250.1/16")}}})
	if err != nil {
		return err
	}
	for _, c := range []struct {
		name    string
		typ     uint16
		answers int
	}{{"svc7.", dns.TypeA, 1}, {"tasks.svc7.", dns.TypeA, 5}, {"7.128.20.10.in-addr.arpa.", dns.TypePTR, 1}, {"nosuch.", dns.TypeA, 0}} {
		q, err := new(dns.Msg).SetQuestion(c.name, c.typ).Pack()
		if err != nil {
			return err
		}
		for _, load := range []struct{ sockets, each int }{{1, 1}, {2, 8}} {
			var rates []float64
			var all []time.Duration
			var asked int
			cpu := cpuTime()
			for range b.rounds {
				took, wall, err := ask(ns, q, c.answers, load.sockets, load.each, b.slice)
				if err != nil {
					return fmt.Errorf("%s: %w", c.name, err)
				}
				rates, all, asked = append(rates, float64(len(took))/wall.Seconds()), append(all, took...), asked+len(took)
			}
			used := (cpuTime() - cpu) / time.Duration(asked)
			slices.Sort(rates)
			slices.Sort(all)
			fmt.Printf("  %-28s %2d at once: best %7.0f/s  median %7.0f/s  p50 %6.0f µs  p99 %6.0f µs  CPU with client %5.1f µs\n", c.name, load.sockets*load.each,
				quantile(rates, 1), quantile(rates, 0.5), float64(quantile(all, 0.5))/1e3, float64(quantile(all, 0.99))/1e3, float64(used)/1e3)
		}
	}
	return nil
}

var resolver = netip.MustParseAddrPort("127.0.0.11:53")

// ask keeps a number of questions under way on each of some sockets.
func ask(ns *link.NS, q []byte, answers, sockets, each int, d time.Duration) (took []time.Duration, wall time.Duration, err error) {
	var wg sync.WaitGroup
	per, errs := make([][]time.Duration, sockets), make([]error, sockets)
	begun := time.Now()
	for i := range sockets {
		wg.Go(func() {
			errs[i] = ns.Do(func() error {
				fd, err := dial(unix.SOCK_DGRAM, resolver)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				per[i], err = window(fd, slices.Clone(q), answers, each, d)
				return err
			})
		})
	}
	wg.Wait()
	return slices.Concat(per...), time.Since(begun), errors.Join(errs...)
}

// window asks the next question whenever one is answered.
func window(fd int, q []byte, answers, each int, d time.Duration) (took []time.Duration, err error) {
	const ids = 1 << 12
	sent := make([]time.Time, ids)
	next := uint16(0)
	send := func() error {
		binary.BigEndian.PutUint16(q, next)
		sent[next%ids] = time.Now()
		next++
		_, err := write(fd, q)
		return err
	}
	begun := time.Now()
	for range each {
		if err := send(); err != nil {
			return nil, err
		}
	}
	buf := make([]byte, 4096)
	for under := each; under > 0; {
		n, err := readWithin(fd, buf)
		if err != nil {
			return nil, err
		}
		if n < 12 || int(binary.BigEndian.Uint16(buf[6:])) != answers {
			return nil, fmt.Errorf("an answer of %d bytes with %d records, want %d", n, binary.BigEndian.Uint16(buf[6:]), answers)
		}
		took = append(took, time.Since(sent[binary.BigEndian.Uint16(buf)%ids]))
		if under--; time.Since(begun) < d {
			if err := send(); err != nil {
				return nil, err
			}
			under++
		}
	}
	return took, nil
}
