package engine

import (
	"context"
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
func (t *taskController) Quiet(ctx context.Context) error {
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
	for poll := quietPoll; ; poll = min(2*poll, quietPollMax) {
		r, _, removed, changed := c.watch()
		if removed || !r.State.active() {
			return nil
		}
		all, err := ns.TCP(diag.Listen, diag.Established, diag.CloseWait, diag.FinWait1, diag.LastAck, diag.Closing)
		if err != nil {
			return err
		}
		if !busy(all) {
			return nil
		}
		tick := time.NewTimer(poll)
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

// busy reports whether a client is served: connections from elsewhere that came in. What a server has written and closed is not done before the
// client has it. A connection that nothing was said on for long is not waited for, unless the client waits for an answer.
func busy(all []diag.Socket) bool {
	open := map[uint16]bool{}
	for _, s := range all {
		if s.State == diag.Listen {
			open[s.Local.Port()] = true
		}
	}
	for _, s := range all {
		port := s.Local.Port()
		if s.State == diag.Listen || s.Local.Addr() == s.Remote.Addr() || s.Local.Addr().IsLoopback() || (!open[port] && port >= ephemeralFirst) {
			continue
		}
		switch s.State {
		case diag.FinWait1, diag.LastAck, diag.Closing:
			if s.Unsent > 1 { // the end itself counts as one
				return true
			}
		default:
			kept := s.Unread == 0 && s.Unsent == 0 && s.Sent <= s.Received && s.Sent >= idleAfter
			if !kept {
				return true
			}
		}
	}
	return false
}
