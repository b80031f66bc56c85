package overlay

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"skein/overlay/link"
)

func testBridge() Bridge {
	return Bridge{ID: "brid1", Name: "skt1", Subnet4: netip.MustParsePrefix("172.31.0.0/24"), Gateway4: addr("172.31.0.1")}
}

func onBridge(id string, last byte) Sandbox {
	return Sandbox{ID: id, Bridges: []BridgeLeg{{BridgeID: "brid1", Addr4: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 31, 0, last}), 24)}}}
}

// nothingOf fails when a device or namespace file of a removed sandbox is there.
func (l *lab) nothingOf(h *labHost, id string) {
	l.t.Helper()
	links, err := l.conn(h.ns).Links()
	l.must(err)
	if _, ok := links[bridgeLegName(id, "brid1")]; ok {
		l.t.Errorf("the leg of %s is left", id)
	}
	if _, err := os.Stat(h.sandboxFile(id)); !os.IsNotExist(err) {
		l.t.Errorf("the namespace of %s is left: %v", id, err)
	}
}

// Who wants the id or the address of a removed sandbox again never meets what is left of it.
func TestDeparture(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	l.must(h.SetBridges(ctx, []Bridge{testBridge()}))
	other := l.sandbox(h, onBridge("other", 9))
	for i := range 4 {
		ids := []string{fmt.Sprintf("a%d", i), fmt.Sprintf("b%d", i), fmt.Sprintf("c%d", i)}
		for j, id := range ids {
			l.sandbox(h, onBridge(id, byte(2+j)))
		}
		for _, id := range ids {
			l.must(h.RemoveSandbox(ctx, id))
			l.must(h.RemoveSandbox(ctx, id))
		}
		if boxes, err := h.Sandboxes(); err != nil || len(boxes) != 1 {
			t.Fatalf("sandboxes after a removal: %v, %v", boxes, err)
		}
		heir := fmt.Sprintf("heir%d", i)
		ns := l.sandbox(h, onBridge(heir, 2)) // the address of the first
		l.nothingOf(h, ids[0])
		stop := l.serve(ns, heir, 80)
		l.spread(other, "tcp4", "172.31.0.2:80", 1, "172.31.0.9")
		stop()
		l.must(h.RemoveSandbox(ctx, heir))
		again := l.sandbox(h, onBridge(heir, 3)) // its own id
		if links, err := l.conn(again).Links(); err != nil || len(links) != 2 {
			t.Errorf("devices of a sandbox that came back: %v, %v", links, err)
		}
		l.must(h.RemoveSandbox(ctx, heir))
	}
	l.must(h.RemoveSandbox(ctx, "other"))
	l.must(h.SetBridges(ctx, nil))
	if links, err := l.conn(h.ns).Links(); err != nil || len(links) != 2 {
		t.Errorf("devices left: %v, %v", links, err)
	}
}

// A driver that was killed while sandboxes departed leaves them to its successor, who finds them; ready namespaces go with it.
func TestDepartureCrash(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	l.must(h.SetBridges(ctx, []Bridge{testBridge()}))
	l.sandbox(h, onBridge("gone", 2))
	_, err := h.dismiss(ctx, "gone") // killed before the rest
	l.must(err)
	l.must(h.Driver.Close())
	h.Driver = l.driver(1, nil)
	l.must(h.SetBridges(ctx, []Bridge{testBridge()}))
	boxes, err := h.Sandboxes()
	if err != nil || len(boxes) != 1 || boxes[0] != "gone" {
		t.Fatalf("found: %v, %v", boxes, err)
	}
	l.must(h.RemoveSandbox(ctx, "gone"))
	l.nothingOf(h, "gone")
}

// A device that cannot be deleted keeps its address, and is deleted when it can be.
func TestDepartureFails(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	l.must(h.SetBridges(ctx, []Bridge{testBridge()}))
	l.sandbox(h, onBridge("stuck", 2))
	path := h.sandboxFile("stuck")
	l.must(link.RemoveNS(path))
	l.must(os.MkdirAll(path+"/in/the/way", 0o755)) // its file cannot be removed
	l.must(h.RemoveSandbox(ctx, "stuck"))
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := h.AddSandbox(short, onBridge("heir", 2)); err == nil || short.Err() != nil {
		t.Errorf("an address that is not free was given away: %v", err)
	}
	if err := h.Check(ctx); err == nil {
		t.Error("a check finds nothing wrong")
	}
	l.must(os.RemoveAll(path))
	l.must(h.Check(ctx))
	l.sandbox(h, onBridge("heir", 2))
}

func TestReadyNamespaces(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	l.must(h.SetBridges(ctx, []Bridge{testBridge()}))
	ready := func() int {
		h.rooms.mu.Lock()
		defer h.rooms.mu.Unlock()
		return len(h.rooms.ready[onBridge("any", 2).kind()])
	}
	if ready() != 0 {
		t.Error("namespaces are made before anybody asked")
	}
	l.sandbox(h, onBridge("first", 2))
	for limit := time.Now().Add(10 * time.Second); ready() < readyNamespaces && time.Now().Before(limit); {
		time.Sleep(time.Millisecond)
	}
	if ready() != readyNamespaces {
		t.Fatalf("%d ready, want %d", ready(), readyNamespaces)
	}
	a := l.sandbox(h, onBridge("second", 3))
	for _, key := range []string{"ipv4/conf/default/accept_redirects", "ipv4/conf/eth0/accept_redirects"} {
		if v, err := a.ReadSysctl(key); err != nil || v != "0" {
			t.Errorf("%s is %s, %v", key, v, err)
		}
	}
	l.serve(a, "second", 80)
	l.spread(l.sandbox(h, onBridge("third", 4)), "tcp4", "172.31.0.3:80", 1, "172.31.0.4")
	l.must(h.Driver.Close())
	if ready() != 0 {
		t.Error("ready namespaces outlive the driver")
	}
	h.Driver = l.driver(1, nil)
}
