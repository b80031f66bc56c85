package crypt

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
)

func TestNodeAddr(t *testing.T) {
	seen := map[netip.Addr]bool{}
	for _, node := range []uint32{1, 255, 256, 0x3f01, 1<<14 - 2} {
		for slot := range uint8(Slots) {
			a := NodeAddr(slot, node)
			gotSlot, gotNode, ok := nodeOf(a.As4())
			if !ok || gotSlot != slot || gotNode != node || seen[a] || !a.IsLinkLocalUnicast() || a == netip.MustParseAddr("169.254.169.254") {
				t.Errorf("node %d, slot %d: %s is node %d, slot %d", node, slot, a, gotNode, gotSlot)
			}
			seen[a] = true
		}
	}
}

func packetOf(content []byte) []byte {
	b := append(make([]byte, headerLen), content...)
	seal(b, NodeAddr(0, 1), NodeAddr(1, 300), 4789, 0xabcdef, MAC{2, 0, 0, 0, 0, 1}, MAC{2, 0, 0, 0, 0, 2})
	return b
}

func TestPacket(t *testing.T) {
	four := append([]byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0}, 10, 0, 0, 1, 10, 0, 0, 2)
	six := append([]byte{0x60, 0, 0, 0, 0, 0, 59, 64}, make([]byte, 32)...)
	for _, content := range [][]byte{four, six} {
		b := packetOf(content)
		vni, slot, node, ok := open(b, 4789)
		if !ok || vni != 0xabcdef || slot != 1 || node != 300 {
			t.Errorf("% x: VNI %x, slot %d, node %d, %v", b, vni, slot, node, ok)
		}
		if ipChecksum(b[:ipv4Len]) != 0 {
			t.Errorf("checksum of % x", b[:ipv4Len])
		}
		if _, ok := destination(content); !ok {
			t.Errorf("no destination in % x", content)
		}
	}
	bad := map[string]func(b []byte) []byte{
		"other port":    func(b []byte) []byte { b[22] ^= 1; return b },
		"no VNI":        func(b []byte) []byte { b[28] = 0; return b },
		"a fragment":    func(b []byte) []byte { b[6] |= 0x20; return b },
		"TCP":           func(b []byte) []byte { b[9] = 6; return b },
		"another block": func(b []byte) []byte { b[17] = 1; return b },
		"ARP":           func(b []byte) []byte { b[49] = 6; return b },
		"short":         func(b []byte) []byte { return b[:headerLen+minInnerIPv4-1] },
		"no IPv4":       func(b []byte) []byte { b[headerLen] = 0x60; return b },
	}
	for name, f := range bad {
		if _, _, _, ok := open(f(packetOf(four)), 4789); ok {
			t.Errorf("%s was taken", name)
		}
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(packetOf(append([]byte{0x45}, make([]byte, 30)...)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, node, ok := open(b, 4789); ok && (len(b) < headerLen+minInnerIPv4 || node >= 1<<14) {
			t.Errorf("took % x", b)
		}
		destination(b)
	})
}

func TestGather(t *testing.T) {
	sizes := []int{100, 100, 40, 100, 200, 200, 0}
	for i := range 130 {
		_ = i
		sizes = append(sizes, 1000)
	}
	var bufs [][]byte
	for i, n := range sizes {
		bufs = append(bufs, bytes.Repeat([]byte{byte(i)}, n))
	}
	for _, join := range []bool{false, true} {
		b := newBind(-1, 0)
		msgs := *b.msgs.New().(*[]ipv6.Message)
		var batches [][][]byte
		for rest := bufs; len(rest) > 0; {
			k := min(len(rest), conn.IdealBatchSize)
			n := gather(msgs, rest[:k], &net.UDPAddr{}, join)
			for _, m := range msgs[:n] {
				batches = append(batches, append([][]byte(nil), m.Buffers...))
			}
			rest = rest[k:]
		}
		var got [][]byte
		for _, m := range batches {
			total := 0
			for i, p := range m {
				total += len(p)
				if i > 0 && (len(p) > len(m[0]) || len(m[i-1]) < len(m[0])) {
					t.Errorf("segments of %d after %d and first %d bytes", len(p), len(m[i-1]), len(m[0]))
				}
			}
			if len(m) > maxSegments || total > maxUDP || !join && len(m) > 1 {
				t.Errorf("%d segments, %d bytes", len(m), total)
			}
			got = append(got, m...)
		}
		if len(got) != len(bufs) {
			t.Fatalf("%d datagrams of %d", len(got), len(bufs))
		}
		for i := range got {
			if !bytes.Equal(got[i], bufs[i]) {
				t.Errorf("datagram %d differs", i)
			}
		}
		if join && len(batches) > 12 {
			t.Errorf("%d messages for %d datagrams", len(batches), len(bufs))
		}
	}
}

// memory is a store.
type memory struct{ fds map[string]int }

func (m memory) StoreFD(_ context.Context, name string, fd int) error {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if old, ok := m.fds[name]; ok {
		unix.Close(old)
	}
	m.fds[name] = dup
	return err
}

func (m memory) LoadFDs(_ context.Context, _ string) (map[string]int, error) {
	out := map[string]int{}
	for name, fd := range m.fds {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		out[name] = dup
	}
	return out, nil
}

func (m memory) ReleaseFD(_ context.Context, name string) error {
	if fd, ok := m.fds[name]; ok {
		unix.Close(fd)
		delete(m.fds, name)
	}
	return nil
}

// Keys survive a daemon, are others after the node left, and damaged ones are made anew.
func TestKeys(t *testing.T) {
	store, ctx := memory{map[string]int{}}, context.Background()
	start := func() *Tunnel {
		t.Helper()
		k, err := New(ctx, Options{Do: func(f func() error) error { return f() }, Store: store})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(k.Close)
		return k
	}
	first := start()
	keys := first.Keys()
	if len(keys) != 1 || keys[0].Port != DefaultPort || keys[0].Public == [32]byte{} {
		t.Fatalf("keys %v", keys)
	}
	first.Close()
	second := start()
	if got := second.Keys(); !sameKeys(got, keys) {
		t.Errorf("after a restart %v, before %v", got, keys)
	}
	if err := second.Forget(ctx); err != nil {
		t.Fatal(err)
	}
	forgot := second.Keys()
	if sameKeys(forgot, keys) {
		t.Error("the node left and kept its key")
	}
	second.Close()
	for _, damage := range [][]byte{nil, []byte("x"), []byte("[]"), []byte(`[{"Slot":7,"Private":"AAAA"}]`), mustJSON(t, []ownKey{second.keys[0], second.keys[0]})} {
		fd, err := unix.MemfdCreate("damaged", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(fd, damage); err != nil {
			t.Fatal(err)
		}
		_ = store.StoreFD(ctx, keysName, fd)
		unix.Close(fd)
		k := start()
		if got := k.Keys(); len(got) != 1 || sameKeys(got, forgot) {
			t.Errorf("after damage %q: %v", damage, got)
		}
		k.Close()
	}
	for name := range store.fds {
		_ = store.ReleaseFD(ctx, name)
	}
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Without anybody to talk to, a key is replaced in steps all the same.
func TestRotateAlone(t *testing.T) {
	ctx := context.Background()
	k, err := New(ctx, Options{Do: func(f func() error) error { return f() }, Port: 51850, MAC: func(_, _ uint32) MAC { return MAC{} }, RotateEvery: time.Hour, Overlap: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.Set(ctx, Config{Self: 1, Underlay: netip.MustParseAddr("127.0.0.1"), DataPort: 4789, MTU: 1400}); err != nil {
		t.Fatal(err)
	}
	first := k.Keys()[0]
	now := time.Now()
	steps := []struct {
		after time.Duration
		keys  int
		said  bool
	}{{0, 1, false}, {time.Hour + time.Second, 2, true}, {time.Hour + 2*time.Second, 2, false}, {time.Hour + 30*time.Second, 2, false}, {time.Hour + 63*time.Second, 1, true}, {time.Hour + 64*time.Second, 1, false}}
	for _, s := range steps {
		_, changed, err := k.settle(ctx, now.Add(s.after))
		if err != nil || changed != s.said || len(k.Keys()) != s.keys {
			t.Errorf("after %v: %d keys, changed %v, %v", s.after, len(k.Keys()), changed, err)
		}
	}
	if last := k.Keys()[0]; last.Public == first.Public || last.Slot == first.Slot || last.Port == first.Port {
		t.Errorf("key %v after %v", last, first)
	}
}
