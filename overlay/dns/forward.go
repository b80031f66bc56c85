package dns

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	hedgeAfter   = 300 * time.Millisecond // then the next resolver is asked too
	upstreamTime = 2 * time.Second        // for one resolver
	totalTime    = 5 * time.Second        // for all; a client's own patience is about that
	maxUpstreams = 4
)

// forwarder asks foreign resolvers.
type forwarder struct {
	do func(func() error) error
}

type reply struct {
	msg *dns.Msg
	err error
}

// exchange asks the resolvers in order, the next one whenever the last failed or has been silent for hedgeAfter; the first usable
// answer wins.
func (f *forwarder) exchange(q *dns.Msg, tcp bool, upstreams []netip.AddrPort) (*dns.Msg, error) {
	upstreams = upstreams[:min(len(upstreams), maxUpstreams)]
	ctx, cancel := context.WithTimeout(context.Background(), totalTime)
	defer cancel()
	replies := make(chan reply, len(upstreams))
	asked, failed := 0, 0
	var errs []error
	var fallback *dns.Msg
	ask := func() {
		up := upstreams[asked]
		asked++
		go func() {
			m, err := f.one(ctx, q.Copy(), tcp, up)
			replies <- reply{m, err}
		}()
	}
	ask()
	hedge := time.NewTicker(hedgeAfter)
	defer hedge.Stop()
	for {
		select {
		case r := <-replies:
			if r.err == nil && r.msg.Rcode != dns.RcodeServerFailure && r.msg.Rcode != dns.RcodeRefused {
				return r.msg, nil
			}
			failed++
			if r.err != nil {
				errs = append(errs, r.err)
			} else {
				fallback = r.msg
			}
			if asked < len(upstreams) {
				ask()
			} else if failed == asked {
				if fallback != nil {
					return fallback, nil
				}
				return nil, errors.Join(errs...)
			}
		case <-hedge.C:
			if asked < len(upstreams) {
				ask()
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("no resolver of %v answered in %s", upstreams, totalTime)
		}
	}
}

func (f *forwarder) one(ctx context.Context, q *dns.Msg, tcp bool, up netip.AddrPort) (*dns.Msg, error) {
	m, err := f.over(ctx, "udp", q, up)
	if err == nil && m.Truncated && tcp { // a client that came by UDP gets it as it is, and comes again by TCP
		m, err = f.over(ctx, "tcp", q, up)
	}
	return m, err
}

func (f *forwarder) over(ctx context.Context, network string, q *dns.Msg, up netip.AddrPort) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTime)
	defer cancel()
	var conn net.Conn
	err := f.do(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, up.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("ask resolver %s: %w", up, err)
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c := &dns.Conn{Conn: conn, UDPSize: 4096}
	id := q.Id
	q.Id = dns.Id() // the client's choice must not be guessable upstream
	if err := c.WriteMsg(q); err != nil {
		return nil, fmt.Errorf("ask resolver %s: %w", up, err)
	}
	for {
		m, err := c.ReadMsg()
		if err != nil {
			return nil, fmt.Errorf("ask resolver %s: %w", up, err)
		}
		if m.Id == q.Id && len(m.Question) == 1 && strings.EqualFold(m.Question[0].Name, q.Question[0].Name) {
			m.Id = id
			return m, nil
		}
	}
}

// HostResolvers reads the node's resolvers from resolv.conf; where that names only systemd-resolved's stub, from the file behind it.
func HostResolvers(files ...string) []netip.AddrPort {
	if len(files) == 0 {
		files = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}
	}
	stub := netip.MustParseAddr("127.0.0.53")
	var out []netip.AddrPort
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			continue
		}
		sc := bufio.NewScanner(f)
		for sc.Scan() && len(out) < maxUpstreams {
			fields := strings.Fields(sc.Text())
			if len(fields) < 2 || fields[0] != "nameserver" {
				continue
			}
			if a, err := netip.ParseAddr(fields[1]); err == nil && a != stub {
				out = append(out, netip.AddrPortFrom(a, 53))
			}
		}
		f.Close()
		if len(out) > 0 {
			break
		}
	}
	return out
}
