package diag

import (
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// here opens this process's own namespace: reading it needs no rights.
func here(t *testing.T) *Namespace {
	t.Helper()
	n, err := Of(os.Getpid())
	if err != nil {
		t.Skipf("the namespace cannot be opened: %v", err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func of(all []Socket, local netip.AddrPort) []Socket {
	return slices.DeleteFunc(all, func(s Socket) bool { return s.Local.Port() != local.Port() || s.Local.Addr() != local.Addr() })
}

func TestTCP(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: enters a network namespace")
	}
	n := here(t)
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Logf("%s: %v", at, err)
			continue
		}
		defer l.Close()
		addr := l.Addr().(*net.TCPAddr).AddrPort()
		c, err := net.Dial("tcp", addr.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, err := io.WriteString(c, "question"); err != nil {
			t.Fatal(err)
		}
		all, err := n.TCP(Listen)
		if err != nil {
			t.Fatal(err)
		}
		if got := of(all, addr); len(got) != 1 || got[0].State != Listen {
			t.Errorf("%s: listeners %+v", at, got)
		}
		time.Sleep(30 * time.Millisecond) // the kernel counts since the data came: there is no event
		all, err = n.TCP(Established, CloseWait)
		if err != nil {
			t.Fatal(err)
		}
		got := of(all, addr)
		if len(got) != 1 || got[0].State != Established || got[0].Remote != c.LocalAddr().(*net.TCPAddr).AddrPort() || got[0].Unread != 8 {
			t.Fatalf("%s: connections %+v", at, got)
		}
		if got[0].Received < 20*time.Millisecond || got[0].Received > 20*time.Second {
			t.Errorf("%s: received %v ago", at, got[0].Received)
		}
	}
}

func TestUDP(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: enters a network namespace")
	}
	n := here(t)
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	all, err := n.UDP(Closed)
	if err != nil {
		t.Fatal(err)
	}
	if got := of(all, c.LocalAddr().(*net.UDPAddr).AddrPort()); len(got) != 1 {
		t.Errorf("bound sockets: %+v", got)
	}
}

// Without sock_diag the same is found in /proc.
func TestProc(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: enters a network namespace")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n := here(t)
	for _, states := range [][]byte{{Listen}, {Established}} {
		want, err := n.list(6, states)
		if err != nil {
			t.Fatal(err)
		}
		got, err := n.listProc(6, states)
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().(*net.TCPAddr).AddrPort()
		a, b := of(want, addr), of(got, addr)
		if len(a) != 1 || len(b) != 1 || a[0].Remote != b[0].Remote || a[0].State != b[0].State {
			t.Errorf("states %v: sock_diag %+v, /proc %+v", states, a, b)
		}
	}
}

func TestReadProc(t *testing.T) {
	const text = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 0200000A:C350 01 0000000A:00000005 00:00000000 00000000     0        0 1
   1: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2
   2: 0000000000000000FFFF00000100007F:0051 00000000000000000000000000000000:0000 0A
   3: nonsense
`
	got, err := readProc(strings.NewReader(text))
	want := []Socket{
		{Local: netip.MustParseAddrPort("127.0.0.1:8080"), Remote: netip.MustParseAddrPort("10.0.0.2:50000"), State: Established, Unsent: 10, Unread: 5},
		{Local: netip.MustParseAddrPort("[::1]:80"), Remote: netip.MustParseAddrPort("[::]:0"), State: Listen},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

func TestParseRefusesShortMessages(t *testing.T) {
	for _, n := range []int{0, 1, answerLen - 1} {
		if s, err := parse(make([]byte, n)); err == nil {
			t.Errorf("%d bytes: got %+v", n, s)
		}
	}
}

func BenchmarkTCP(b *testing.B) {
	n, err := Of(os.Getpid())
	if err != nil {
		b.Skip(err)
	}
	defer n.Close()
	for range b.N {
		if _, err := n.TCP(Established, CloseWait); err != nil {
			b.Fatal(err)
		}
	}
}
