package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	hedgeAfter   = 300 * time.Millisecond // then the next resolver is asked too
	resendAfter  = 700 * time.Millisecond // then a resolver that may not have got the question is asked again
	upstreamTime = 2 * time.Second        // for one resolver
	totalTime    = 4 * time.Second        // for all; a client's own patience is 5 s
	maxUpstreams = 3                      // as many as resolv.conf may name
	forwardSize  = 4096                   // bytes of an answer by UDP, or more where the client takes more
)

// forwarder asks foreign resolvers.
type forwarder struct {
	node func(func() error) error // runs a function in the node's network
}

// question is a query to pass on.
type question struct {
	*dns.Msg
	tcp    bool                     // the client came by TCP
	inside func(func() error) error // runs a function in the client's network
}

type reply struct {
	msg *dns.Msg
	err error
}

// exchange asks the resolvers in order, the next one whenever the last failed or has been silent for hedgeAfter; the first usable
// answer wins.
func (f *forwarder) exchange(q question, upstreams []Upstream) (*dns.Msg, error) {
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
			m, err := f.one(ctx, q, up)
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

func (f *forwarder) one(ctx context.Context, q question, up Upstream) (*dns.Msg, error) {
	m, err := f.over(ctx, "udp", q, up)
	if err == nil && m.Truncated && q.tcp { // a client that came by UDP gets it as it is, and comes again by TCP
		m, err = f.over(ctx, "tcp", q, up)
	}
	if err != nil {
		return nil, fmt.Errorf("ask resolver %s: %w", up.Addr, err)
	}
	return m, nil
}

func (f *forwarder) over(ctx context.Context, network string, q question, up Upstream) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTime)
	defer cancel()
	do := q.inside
	if up.Node || do == nil {
		do = f.node
	}
	var conn net.Conn
	err := do(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, up.Addr.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c := &dns.Conn{Conn: conn, UDPSize: forwardSize}
	if o := q.IsEdns0(); o != nil {
		c.UDPSize = max(c.UDPSize, o.UDPSize())
	}
	own := q.Copy()
	own.Id = dns.Id() // the client's choice must not be guessable upstream
	m, err := ask(ctx, c, own, network == "udp")
	if err != nil {
		return nil, err
	}
	m.Id = q.Id
	return m, nil
}

// ask sends the question, by UDP from time to time again, and waits for the answer to it.
func ask(ctx context.Context, c *dns.Conn, q *dns.Msg, again bool) (*dns.Msg, error) {
	for ctx.Err() == nil {
		if err := c.WriteMsg(q); err != nil {
			return nil, err
		}
		end, _ := ctx.Deadline()
		if resend := time.Now().Add(resendAfter); again && resend.Before(end) {
			end = resend
		}
		if err := c.SetReadDeadline(end); err != nil {
			return nil, err
		}
		for ctx.Err() == nil { // the deadline may have been set after ctx ended; then it is at most resendAfter away
			m, err := c.ReadMsg()
			if again && errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			var lost net.Error
			if err != nil && (!again || errors.As(err, &lost)) {
				return nil, err
			}
			if err == nil && answers(m, q) { // anything else was made up by somebody
				return m, nil
			}
		}
	}
	return nil, fmt.Errorf("no answer: %w", ctx.Err())
}

func answers(m, q *dns.Msg) bool {
	return m.Response && m.Id == q.Id && len(m.Question) == 1 && strings.EqualFold(m.Question[0].Name, q.Question[0].Name) &&
		m.Question[0].Qtype == q.Question[0].Qtype && m.Question[0].Qclass == q.Question[0].Qclass
}
