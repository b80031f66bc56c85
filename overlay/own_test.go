package overlay

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"

	mdns "github.com/miekg/dns"

	"skein/overlay/link"
)

// TestInOwnNamespace runs a driver as a node's daemon does: the process itself is in the node's network and mount namespaces.
func TestInOwnNamespace(t *testing.T) {
	if os.Getenv("SKEIN_OVERLAY_OWN") == "1" {
		ownNamespace(t)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestInOwnNamespace$", "-test.v")
	cmd.Env = append(os.Environ(), "SKEIN_OVERLAY_OWN=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Unshareflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS")) {
		t.Fatalf("%v\n%s", err, out)
	}
}

func ownNamespace(t *testing.T) {
	ctx := context.Background()
	me, err := link.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer me.Close()
	c, err := link.Dial(me)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.AddBridge(link.End{Name: "under"}); err != nil {
		t.Fatal(err)
	}
	err = c.Do([]link.Message{link.Up(loopback), link.AddAddr(mustLink(t, c, "under"), netip.MustParsePrefix("192.0.2.1/24"))})
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(Options{RunDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	cfg := Config{Self: Node{Index: 1, Underlay: addr("192.0.2.1")}, DataPort: dataPort, MeshPool: labPool,
		Networks: []Network{webNetwork(Ready)}, Mesh: webMesh(1)}
	applied, err := d.Set(ctx, cfg)
	if err != nil || applied["mesh"] != nil || applied[cfg.Networks[0].ID] != nil {
		t.Fatal(applied, err)
	}
	path, err := d.AddSandbox(ctx, webSandbox(1))
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t}
	box := openNS(t, path)
	l.serve(box, "task1", 80)
	for _, at := range []string{"127.0.0.1:8080", "192.0.2.1:8080"} {
		conn, err := net.Dial("tcp4", at) // on whatever thread this goroutine happens to be
		if err != nil {
			t.Fatal(at, err)
		}
		conn.Close()
	}
	if m, err := query(box, "udp", "web", mdns.TypeA); err != nil || answers(m) != "10.10.0.2" {
		t.Error(m, err)
	}
	if err := d.Check(ctx); err != nil {
		t.Error(err)
	}
	if err := d.Teardown(ctx); err != nil {
		t.Error(err)
	}
	links, err := c.Links()
	if err != nil || len(links) != 2 {
		t.Error(links, err)
	}
}
