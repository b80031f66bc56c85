package engine

import (
	"net/netip"
	"testing"
	"time"

	"skein/overlay/diag"
)

func TestBusy(t *testing.T) {
	const second = time.Second
	sock := func(state byte, local, remote string, change ...func(*diag.Socket)) diag.Socket {
		s := diag.Socket{State: state, Local: netip.MustParseAddrPort(local), Remote: netip.MustParseAddrPort(remote)}
		for _, c := range change {
			c(&s)
		}
		return s
	}
	quiet := func(received, sent time.Duration) func(*diag.Socket) {
		return func(s *diag.Socket) { s.Received, s.Sent = received, sent }
	}
	unsent := func(n uint32) func(*diag.Socket) { return func(s *diag.Socket) { s.Unsent = n } }
	unread := func(n uint32) func(*diag.Socket) { return func(s *diag.Socket) { s.Unread = n } }
	listener := sock(diag.Listen, "[::]:8080", "[::]:0")
	high := sock(diag.Listen, "0.0.0.0:40000", "0.0.0.0:0")
	const us, them = "10.0.0.5:8080", "10.0.0.9:50000"
	for _, c := range []struct {
		name string
		s    diag.Socket
		want bool
	}{
		{"a request is under way", sock(diag.Established, us, them, quiet(second, 2*second)), true},
		{"a long request is under way", sock(diag.Established, us, them, quiet(time.Minute, time.Hour)), true},
		{"just answered", sock(diag.Established, us, them, quiet(2*second, second)), true},
		{"a stream", sock(diag.Established, us, them, quiet(time.Hour, second)), true},
		{"kept for later", sock(diag.Established, us, them, quiet(20*second, 20*second)), false},
		{"kept, but not all has arrived", sock(diag.Established, us, them, quiet(20*second, 20*second), unsent(100)), true},
		{"kept, but not all was read", sock(diag.Established, us, them, quiet(20*second, 20*second), unread(100)), true},
		{"the client has closed its side", sock(diag.CloseWait, us, them), true},
		{"the rest of an answer is on its way", sock(diag.FinWait1, us, them, unsent(5000)), true},
		{"only the end is not confirmed", sock(diag.LastAck, us, them, unsent(1)), false},
		{"a probe from inside", sock(diag.Established, "127.0.0.1:8080", "127.0.0.1:50000"), false},
		{"a probe from inside to its own address", sock(diag.Established, us, "10.0.0.5:50000"), false},
		{"the server is another's client", sock(diag.Established, "10.0.0.5:50000", "10.0.0.7:5432"), false},
		{"a server on a high port", sock(diag.Established, "10.0.0.5:40000", them), true},
		{"it listens no more", sock(diag.Established, "10.0.0.5:9090", them), true},
		{"IPv6", sock(diag.Established, "[fd00::5]:8080", "[fd00::9]:50000"), true},
	} {
		now := time.Now()
		if got := newCrowd(now, false).look(now, []diag.Socket{listener, high, c.s}) != gone; got != c.want {
			t.Errorf("%s: waited for %v, want %v", c.name, got, c.want)
		}
	}
	now := time.Now()
	if newCrowd(now, true).look(now, []diag.Socket{listener, high}) != gone {
		t.Error("busy without a connection")
	}
}

// TestTakingTurns: who asks again and again on one connection would be waited for in vain; a stream is waited for, also one that was asked for
// on a connection that had been kept.
func TestTakingTurns(t *testing.T) {
	const ms = time.Millisecond
	sock := func(received, sent time.Duration) diag.Socket {
		return diag.Socket{State: diag.Established, Local: netip.MustParseAddrPort("10.0.0.5:8080"), Remote: netip.MustParseAddrPort("10.0.0.9:50000"),
			Received: received, Sent: sent}
	}
	type look struct {
		at             time.Duration // after the task left rotation
		received, sent time.Duration // ago
		want           doing
	}
	for _, c := range []struct {
		name  string
		all   bool
		looks []look
	}{
		{"asks and is answered", false, []look{{0, 40 * ms, 39 * ms, served}, {100 * ms, 50 * ms, 49 * ms, served}, {200 * ms, 50 * ms, 49 * ms, gone}}},
		{"all are waited for", true, []look{{100 * ms, 50 * ms, 49 * ms, served}, {200 * ms, 50 * ms, 49 * ms, served}, {900 * ms, 50 * ms, 49 * ms, served}}},
		{"in the middle of an answer", false, []look{{100 * ms, 50 * ms, 49 * ms, served}, {200 * ms, 50 * ms, 49 * ms, gone}, {300 * ms, 20 * ms, 120 * ms, asking},
			{500 * ms, 20 * ms, 120 * ms, asking}, {600 * ms, 20 * ms, 120 * ms, gone}}},
		{"a long answer", false, []look{{100 * ms, 50 * ms, 49 * ms, served}, {200 * ms, 50 * ms, 49 * ms, gone}, {900 * ms, 400 * ms, 600 * ms, served}}},
		{"a stream from before", false, []look{{100 * ms, 5000 * ms, 20 * ms, served}, {8000 * ms, 13000 * ms, 20 * ms, served}}},
		{"a stream asked for later", false, []look{{100 * ms, 50 * ms, 49 * ms, served}, {1000 * ms, 800 * ms, 20 * ms, served}, {5000 * ms, 4800 * ms, 20 * ms, served}}},
		{"a stream after many requests", false, []look{{100 * ms, 50 * ms, 49 * ms, served}, {200 * ms, 50 * ms, 49 * ms, gone}, {1000 * ms, 500 * ms, 20 * ms, served}}},
		{"silent", false, []look{{100 * ms, 500 * ms, 499 * ms, served}, {9000 * ms, 9400 * ms, 9399 * ms, served}, {9700 * ms, 10100 * ms, 10099 * ms, gone}}},
		{"times are not known", false, []look{{100 * ms, 0, 0, served}, {200 * ms, 0, 0, served}, {300 * ms, 0, 0, served}}},
	} {
		begin := time.Now()
		crowd := newCrowd(begin, c.all)
		for _, l := range c.looks {
			if got := crowd.look(begin.Add(l.at), []diag.Socket{sock(l.received, l.sent)}); got != l.want {
				t.Errorf("%s: %d at %s, want %d", c.name, got, l.at, l.want)
			}
		}
	}
}
