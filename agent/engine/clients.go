package engine

import (
	"context"
	"net/netip"
	"time"

	"skein/overlay/diag"
)

const (
	// idleAfter is the silence after which a connection on which the server had the last word counts as one that is merely kept for later.
	idleAfter = 10 * time.Second
	// ephemeralFirst is the first port that the kernel gives to those who do not ask for one: who connects to the outside has such a port.
	ephemeralFirst = 32768
	quietPoll      = 20 * time.Millisecond // the kernel announces no end of a connection; grows to quietPollMax
	quietPollMax   = 200 * time.Millisecond
	// A client that asked turns times since its task left rotation, each time answered within shortAnswer, keeps its connection for the next
	// request; no wait ends that. It is only spared in the middle of an answer, which momentMax is enough for with many of them.
	turns       = 2
	shortAnswer = 250 * time.Millisecond
	momentPoll  = 5 * time.Millisecond
	momentMax   = 300 * time.Millisecond
	tickLength  = 10 * time.Millisecond // the kernel's times are as exact as its clock's ticks: up to so much
)

// listening reports which of the ports have a listener in the network namespace of pid. UDP ports count when they are bound. A process
// that has ended has none.
func listening(pid int, ports map[portKey]bool) map[portKey]bool {
	out := map[portKey]bool{}
	ns, err := diag.Of(pid)
	if err != nil {
		return out
	}
	defer ns.Close()
	note := func(proto string, list []diag.Socket, err error) {
		for _, s := range list {
			if k := (portKey{proto, s.Local.Port()}); err == nil && ports[k] {
				out[k] = true
			}
		}
	}
	tcp, err := ns.TCP(diag.Listen)
	note("tcp", tcp, err)
	udp, err := ns.UDP(diag.Closed)
	note("udp", udp, err)
	return out
}

// Quiet returns when no client is connected to the task's container any more, or its process has ended. Connections are counted where
// the server holds them, by its own sockets: they are the same however the client came, and say who spoke last.
func (t *taskController) Quiet(ctx context.Context, all bool) error {
	c, err := t.mustContainer()
	if err != nil {
		return nil // nobody is connected to it
	}
	r, _, _, _ := c.watch()
	if !r.State.active() {
		return nil
	}
	ns, err := diag.Of(r.State.Pid)
	if err != nil {
		return err
	}
	defer ns.Close()
	crowd := newCrowd(time.Now(), all)
	for poll := quietPoll; ; poll = min(2*poll, quietPollMax) {
		r, _, removed, changed := c.watch()
		if removed || !r.State.active() {
			return nil
		}
		list, err := ns.TCP(diag.Listen, diag.Established, diag.CloseWait, diag.FinWait1, diag.LastAck, diag.Closing)
		if err != nil {
			return err
		}
		wait := poll
		switch crowd.look(time.Now(), list) {
		case gone:
			return nil
		case asking:
			wait = momentPoll
		}
		tick := time.NewTimer(wait)
		select {
		case <-tick.C:
		case <-changed:
			tick.Stop()
		case <-ctx.Done():
			tick.Stop()
			return ctx.Err()
		}
	}
}

// What a task's clients are doing.
type doing int

const (
	gone   doing = iota // none is served
	asking              // short answers are under way, to clients that will ask again
	served              // clients are waited for
)

// crowd is a stopping task's clients.
type crowd struct {
	since time.Time
	all   bool // also those that ask again and again are waited for
	asks  map[connection]*asks
	// moment is since when only short answers are under way; zero: they are not.
	moment time.Time
}

type connection struct{ local, remote netip.AddrPort }

// asks are a client's requests since its task left rotation.
type asks struct {
	last  time.Time
	count int
}

func newCrowd(now time.Time, all bool) *crowd {
	return &crowd{since: now, all: all, asks: map[connection]*asks{}}
}

// look judges the sockets of the container as they are now: connections from elsewhere that came in. What a server has written and closed is not
// done before the client has it. A connection that nothing was said on for long is not waited for, unless the client waits for an answer.
func (c *crowd) look(now time.Time, list []diag.Socket) doing {
	open := map[uint16]bool{}
	for _, s := range list {
		if s.State == diag.Listen {
			open[s.Local.Port()] = true
		}
	}
	out := gone
	for _, s := range list {
		port := s.Local.Port()
		if s.State == diag.Listen || s.Local.Addr() == s.Remote.Addr() || s.Local.Addr().IsLoopback() || (!open[port] && port >= ephemeralFirst) {
			continue
		}
		switch s.State {
		case diag.FinWait1, diag.LastAck, diag.Closing:
			if s.Unsent > 1 { // the end itself counts as one
				out = served
			}
		default:
			out = max(out, c.connected(now, s))
		}
	}
	if out != asking {
		c.moment = time.Time{}
		return out
	}
	if c.moment.IsZero() {
		c.moment = now
	}
	if now.Sub(c.moment) >= momentMax {
		return gone
	}
	return asking
}

// connected judges one connection.
func (c *crowd) connected(now time.Time, s diag.Socket) doing {
	idle := s.Unread == 0 && s.Unsent == 0 && s.Sent <= s.Received
	switch {
	case idle && s.Sent >= idleAfter:
		return gone
	case c.all || s.State != diag.Established || !c.turning(now, s):
		return served
	case idle:
		return gone
	}
	return asking
}

// turning tells that client and server take turns: the client asks again and again and has each time its answer at once.
func (c *crowd) turning(now time.Time, s diag.Socket) bool {
	if s.Received == 0 && s.Sent == 0 { // times are not known
		return false
	}
	k := connection{s.Local, s.Remote}
	a := c.asks[k]
	if a == nil {
		a = &asks{last: c.since}
		c.asks[k] = a
	}
	if asked := now.Add(-s.Received); asked.Sub(a.last) > tickLength {
		a.last = asked
		a.count++
	}
	if s.Sent > s.Received { // its answer has not begun
		return a.count > turns && s.Received <= shortAnswer
	}
	return a.count >= turns && s.Received-s.Sent <= shortAnswer
}
