package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	loadPause   = 10 * time.Millisecond
	loadTimeout = 5 * time.Second
	loadClients = 2 // for each address: one with new connections, one keeping its own
)

// report is what the clients of published ports saw.
type report struct {
	sent, failed int
	reasons      map[string]int
	gap          time.Duration // the longest time in which a client got no answer
}

func (r report) reason() string {
	var out []string
	for s, n := range r.reasons {
		out = append(out, fmt.Sprintf("%d× %s", n, s))
	}
	if len(out) == 0 {
		return ""
	}
	if len(out) > 4 {
		out = append(out[:4], "…")
	}
	return ": " + strings.Join(out, "; ")
}

// load is clients that ask until stopped.
type load struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	rep    report
}

// startLoad asks every published port of the steady services on every node that is not away, all the time.
func (w *world) startLoad() *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{cancel: cancel, rep: report{reasons: map[string]int{}}}
	for at, n := range w.Nodes {
		for _, port := range []int{8080, 8081} {
			for i := range loadClients {
				l.wg.Go(func() { l.client(ctx, w, n.Name, fmt.Sprintf("http://%s:%d/", n.Address, port), i == 0, at) })
			}
		}
	}
	return l
}

func (l *load) client(ctx context.Context, w *world, node, url string, fresh bool, at int) {
	c := &http.Client{Timeout: loadTimeout, Transport: &http.Transport{DisableKeepAlives: fresh, DialContext: ownPorts(at).DialContext}}
	defer c.CloseIdleConnections()
	tick := time.NewTicker(loadPause)
	defer tick.Stop()
	answered := time.Now()
	for ctx.Err() == nil {
		w.mu.Lock()
		away := w.down_[node]
		w.mu.Unlock()
		if away {
			answered = time.Now()
		} else {
			asked := time.Now()
			_, err := fetch(c, url)
			now := time.Now()
			if err != nil && w.opts.verbose {
				w.say("    asked %s (new connection: %v) at %s: %v", url, fresh, asked.UTC().Format("15:04:05.000"), err)
			}
			l.mu.Lock()
			l.rep.sent++
			l.rep.gap = max(l.rep.gap, now.Sub(answered))
			if err != nil {
				l.rep.failed++
				l.rep.reasons[node+": "+shorten(err)]++
			} else {
				answered = now
			}
			l.mu.Unlock()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// ownPorts dials from ports that clients of other nodes do not use: one machine is all clients, and a task should not meet the same
// address and port through two nodes within the minute for which its kernel remembers a connection.
func ownPorts(at int) *net.Dialer {
	const first, count = 20000, 4000
	low := first + at%10*count
	return &net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { // kernels before 6.3 do without
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, low|(low+count-1)<<16)
		})
	}}
}

func (l *load) stop() report {
	l.cancel()
	l.wg.Wait()
	return l.rep
}

func shorten(err error) string {
	s := err.Error()
	if i := strings.LastIndex(s, ": "); i >= 0 && i < len(s)-2 {
		if j := strings.LastIndex(s[:i], ": "); j >= 0 {
			return s[j+2:]
		}
		return s[i+2:]
	}
	return s
}

// fetch asks once.
func fetch(c *http.Client, url string) (string, error) {
	resp, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %s: %s", resp.Status, strings.TrimSpace(string(b)))
	}
	return string(b), err
}

// fresh asks once over a new connection.
func fresh(url string, limit time.Duration) (string, error) {
	c := &http.Client{Timeout: limit, Transport: &http.Transport{DisableKeepAlives: true}}
	return fetch(c, url)
}
