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
		if got := busy([]diag.Socket{listener, high, c.s}); got != c.want {
			t.Errorf("%s: busy %v, want %v", c.name, got, c.want)
		}
	}
	if busy([]diag.Socket{listener, high}) {
		t.Error("busy without a connection")
	}
}
