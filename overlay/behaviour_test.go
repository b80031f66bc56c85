package overlay

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	mdns "github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// webLab is a lab with one task of service web per host, all served.
func webLab(t *testing.T, hosts int) (*lab, []func()) {
	l := newLab(t, hosts)
	states := make([]EndpointState, hosts)
	all := make([]int, hosts)
	for i := range states {
		states[i], all[i] = Ready, i+1
	}
	l.setAll([]Network{webNetwork(states...)}, webMesh(all...))
	var stops []func()
	for i, h := range l.hosts {
		stops = append(stops, l.serve(l.sandbox(h, webSandbox(i+1)), fmt.Sprintf("task%d", i+1), 80))
	}
	return l, stops
}

func (l *lab) box(i int) *link.NS {
	return openNS(l.t, l.hosts[i-1].sandboxFile(fmt.Sprintf("task%d", i)))
}

func refusedFast(t *testing.T, ns *link.NS, at string) {
	t.Helper()
	start := time.Now()
	_, _, err := get(ns, "tcp4", at)
	if !errors.Is(err, syscall.ECONNREFUSED) || time.Since(start) > time.Second {
		t.Errorf("%s: %v after %s, want an immediate refusal", at, err, time.Since(start))
	}
}

func unreachable(t *testing.T, ns *link.NS, at string) {
	t.Helper()
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", at, 300*time.Millisecond)
		return err
	})
	if err == nil {
		c.Close()
		t.Errorf("%s could be reached", at)
	}
}

func TestRefusalAndIsolation(t *testing.T) {
	l, _ := webLab(t, 2)
	t1 := l.box(1)
	refusedFast(t, t1, "10.10.0.3:80")     // VIP of a service without endpoints
	refusedFast(t, l.cl, "192.0.2.1:8081") // published, no backend
	refusedFast(t, l.hosts[0].ns, "127.0.0.1:8081")
	refusedFast(t, t1, "10.10.0.12:81") // no listener
	if got := l.spread(l.cl, "tcp4", "192.0.2.1:8082", 4, clientAddr); got["task1"] != 4 {
		t.Errorf("host-mode port on its node: %v", got)
	}
	refusedFast(t, l.cl, "192.0.2.2:8082") // host mode: nowhere else
	l.serve(t1, "hidden", 9999)
	gw1, gw2 := gatewayOf(1).String(), gatewayOf(2).String()
	l.serve(l.box(2), "hidden", 9999)
	c := l.conn(t1)
	toNode := link.Route{Dev: mustLink(t, c, "eth1"), Via: gatewayVia}
	l.must(t1.Sysctl(map[string]string{"ipv4/conf/eth1/route_localnet": "1"}))
	l.must(c.Do([]link.Message{link.SetRoute(link.RouteKey{Dst: netip.MustParsePrefix("127.0.0.1/32"), Table: unix.RT_TABLE_LOCAL}, toNode)}))
	cl := l.conn(l.cl)
	pool := link.SetRoute(link.RouteKey{Dst: nodeBlock(labPool, 1)}, link.Route{Dev: mustLink(t, cl, "eth0"), Via: addr("198.51.100.1")})
	l.must(cl.Do([]link.Message{pool}))
	sw := l.conn(l.sw)
	l.must(sw.Do([]link.Message{link.SetRoute(link.RouteKey{Dst: nodeBlock(labPool, 1)}, link.Route{Dev: mustLink(t, sw, "br0"), Via: addr("192.0.2.1")})}))
	backDoors := []struct {
		what string
		from *link.NS
		at   string
	}{
		{"another node's container over the mesh", t1, gw2 + ":9999"},
		{"another node's published target past its port", t1, gw2 + ":80"},
		{"a container from outside, the pool being routed to the node", l.cl, gw1 + ":9999"},
	}
	// Without the rules every one is open, so each is closed by a rule and not by chance.
	for _, h := range l.hosts {
		l.must(h.nft.Delete(nft.IPv4, "skein_mesh"))
	}
	for _, d := range backDoors {
		if f, err := open(d.from, "tcp4", d.at); err != nil {
			t.Errorf("control: %s is closed without rules: %v", d.what, err)
		} else {
			f.Close()
		}
	}
	if !reachesLoopback(l, l.hosts[0].ns, t1) {
		t.Error("control: the node's loopback services are closed to containers without rules")
	}
	for _, h := range l.hosts {
		l.must(h.Check(context.Background()))
	}
	for _, d := range backDoors {
		unreachable(t, d.from, d.at)
	}
	if reachesLoopback(l, l.hosts[0].ns, t1) {
		t.Error("a container reaches the node's loopback services")
	}
	unreachable(t, t1, "169.254.169.254:80") // metadata service
	// egress is masqueraded as the node
	out, err := listenIn(l.cl, clientAddr+":7000")
	l.must(err)
	defer out.Close()
	f, err := open(t1, "tcp4", clientAddr+":7000")
	l.must(err)
	defer f.Close()
	srv, err := out.Accept()
	l.must(err)
	defer srv.Close()
	if from, _, _ := net.SplitHostPort(srv.RemoteAddr().String()); from != "192.0.2.1" {
		t.Errorf("outside saw the container as %s", from)
	}
}

// reachesLoopback sends a datagram from a container to the node's 127.0.0.1.
func reachesLoopback(l *lab, node, from *link.NS) bool {
	l.t.Helper()
	var in net.PacketConn
	l.must(node.Do(func() (err error) { in, err = net.ListenPacket("udp4", "127.0.0.1:9998"); return err }))
	defer in.Close()
	out, err := open(from, "udp4", "127.0.0.1:9998")
	l.must(err)
	defer out.Close()
	_, err = out.Write([]byte("x"))
	l.must(err)
	_ = in.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	_, _, err = in.ReadFrom(make([]byte, 10))
	return err == nil
}

func listenIn(ns *link.NS, at string) (ln net.Listener, err error) {
	err = ns.Do(func() (err error) { ln, err = net.Listen("tcp4", at); return err })
	return ln, err
}

// A task leaves the maps on all nodes while clients connect through every node; 200 ms later it stops. No new connection fails and those
// that are open go on.
func TestDraining(t *testing.T) {
	l, stops := webLab(t, 3)
	held := map[string]*flow{}
	for range 100 {
		f, err := open(l.cl, "tcp4", "192.0.2.1:8080")
		l.must(err)
		name, _, err := f.ask()
		l.must(err)
		if held[name] != nil {
			f.Close()
		} else {
			held[name] = f
		}
	}
	if len(held) != 3 {
		t.Fatalf("held flows on %d tasks, want 3", len(held))
	}
	var done atomic.Bool
	var total, failed atomic.Int64
	var wg sync.WaitGroup
	for i := 1; i <= 3; i++ {
		wg.Go(func() {
			for !done.Load() {
				total.Add(1)
				if _, _, err := get(l.cl, "tcp4", fmt.Sprintf("192.0.2.%d:8080", i)); err != nil {
					failed.Add(1)
					t.Log(err)
				}
			}
		})
	}
	time.Sleep(200 * time.Millisecond)
	l.setAll([]Network{webNetwork(Ready, Draining, Ready)}, leaving(webMesh(1, 3), 2))
	before := total.Load()
	time.Sleep(200 * time.Millisecond)
	if _, _, err := held["task2"].ask(); err != nil {
		t.Errorf("an established connection to the draining task: %v", err)
	}
	stops[1]()
	time.Sleep(200 * time.Millisecond)
	done.Store(true)
	wg.Wait()
	if failed.Load() != 0 || total.Load()-before < 50 {
		t.Errorf("%d of %d connections failed, %d after the change", failed.Load(), total.Load(), total.Load()-before)
	}
	for name, f := range held {
		if name != "task2" {
			if _, _, err := f.ask(); err != nil {
				t.Errorf("held flow on %s: %v", name, err)
			}
		}
	}
	t1 := l.box(1)
	if got := l.spread(t1, "tcp4", "10.10.0.2:80", 40, ""); got["task2"] != 0 || len(got) != 2 {
		t.Errorf("VIP after draining: %v", got)
	}
}

// What somebody deletes by hand comes back with the next check.
func TestMending(t *testing.T) {
	l, _ := webLab(t, 2)
	t1, h := l.box(1), l.hosts[0]
	router := h.routers["netwebidnetwebidnetwebid1"]
	damage := []struct {
		name string
		do   func() error
	}{
		{"route to a remote endpoint", func() error {
			return router.conn.Do([]link.Message{link.DelRoute(link.RouteKey{Dst: host(addr("10.10.0.12"))}, router.routes[link.RouteKey{Dst: host(addr("10.10.0.12"))}])})
		}},
		{"route of a local endpoint", func() error {
			return router.conn.Do([]link.Message{link.DelRoute(link.RouteKey{Dst: host(addr("10.10.0.11"))}, link.Route{Dev: mustLink(t, router.conn, legPrefix+tag("task1"))})})
		}},
		{"forwarding entry", func() error {
			return router.conn.Do(link.Diff(nil, router.fdb, link.SetFDB, link.DelFDB))
		}},
		{"VXLAN device", func() error { return router.conn.DelLink(vxlanDevice) }},
		{"table of VIPs", func() error { return router.nft.Delete(nft.IPv4, "skein_vip") }},
		{"table of the mesh", func() error { return h.nft.Delete(nft.IPv4, "skein_mesh") }},
		{"mesh device", func() error { return h.conn.DelLink(meshDevice) }},
		{"policy rules", func() error {
			return h.conn.Do(link.Diff(nil, h.mesh.rules, link.SetRule, link.DelRule))
		}},
		{"gateway leg", func() error { return h.conn.DelLink(gatewayPrefix + tag("task1")) }},
		{"overlay leg", func() error { return router.conn.DelLink(legPrefix + tag("task1")) }},
		{"router namespace", func() error {
			_ = router.conn.DelLink(vxlanDevice)
			return link.RemoveNS(router.file)
		}},
	}
	for _, d := range damage {
		t.Run(d.name, func(t *testing.T) {
			l := l.in(t)
			router = h.routers["netwebidnetwebidnetwebid1"]
			l.must(d.do())
			l.must(h.Check(context.Background()))
			l.spread(t1, "tcp4", "10.10.0.12:80", 1, "10.10.0.11")
			l.spread(t1, "tcp4", "10.10.0.2:80", 4, "")
			if got := l.spread(l.cl, "tcp4", "192.0.2.1:8080", 30, clientAddr); len(got) != 2 {
				t.Errorf("published port through node 1: %v", got)
			}
			if got := l.spread(l.cl, "tcp4", "192.0.2.2:8080", 30, clientAddr); len(got) != 2 {
				t.Errorf("published port through node 2: %v", got)
			}
		})
	}
}

func mustLink(t *testing.T, c *link.Conn, name string) int {
	t.Helper()
	l, err := c.Link(name)
	if err != nil {
		t.Fatal(err)
	}
	return l.Index
}

// memoryStore keeps descriptors as the supervisor does.
type memoryStore struct {
	mu   sync.Mutex
	fds  map[string]int
	dead bool // keeps nothing more
}

func (s *memoryStore) StoreFD(_ context.Context, name string, fd int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return nil
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if old, ok := s.fds[name]; ok {
		unix.Close(old)
	}
	s.fds[name] = dup
	return err
}

func (s *memoryStore) count(prefix string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for name := range s.fds {
		if strings.HasPrefix(name, prefix) {
			n++
		}
	}
	return n
}

// close lets go of everything, as a supervisor that dies.
func (s *memoryStore) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = true
	for name, fd := range s.fds {
		unix.Close(fd)
		delete(s.fds, name)
	}
}

func (s *memoryStore) LoadFDs(_ context.Context, prefix string) (map[string]int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]int{}
	for name, fd := range s.fds {
		if strings.HasPrefix(name, prefix) {
			dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			out[name] = dup
		}
	}
	return out, nil
}

func (s *memoryStore) ReleaseFD(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if fd, ok := s.fds[name]; ok {
		unix.Close(fd)
		delete(s.fds, name)
		return nil
	}
	return fmt.Errorf("descriptor %q: %w", name, errdefs.ErrNotFound)
}

func query(ns *link.NS, network, name string, typ uint16) (*mdns.Msg, error) {
	m := new(mdns.Msg)
	m.SetQuestion(mdns.Fqdn(name), typ)
	var conn net.Conn
	err := ns.Do(func() (err error) {
		conn, err = net.Dial(network, dnsResolver+":53")
		return err
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	c := &mdns.Conn{Conn: conn}
	if err := c.WriteMsg(m); err != nil {
		return nil, err
	}
	return c.ReadMsg()
}

func TestDNSInSandboxes(t *testing.T) {
	l, _ := webLab(t, 2)
	t1 := l.box(1)
	for _, c := range []struct {
		name string
		typ  uint16
		want string
	}{
		{"web", mdns.TypeA, "10.10.0.2"},
		{"WEB.front", mdns.TypeA, "10.10.0.2"},
		{"tasks.web", mdns.TypeA, "10.10.0.11 10.10.0.12"},
		{"web.2", mdns.TypeA, "10.10.0.12"},
		{"web", mdns.TypeAAAA, "fd12:3456:789a:1::2"},
		{"2.0.10.10.in-addr.arpa", mdns.TypePTR, "web.front."},
		{"12.0.10.10.in-addr.arpa", mdns.TypePTR, "web.2.front."},
		{"rr", mdns.TypeA, ""},
		{"nosuch", mdns.TypeA, "NXDOMAIN"},
	} {
		for _, network := range []string{"udp", "tcp"} {
			m, err := query(t1, network, c.name, c.typ)
			if err != nil {
				t.Fatalf("%s %s: %v", network, c.name, err)
			}
			if got := answers(m); got != c.want {
				t.Errorf("%s %s %s: %q, want %q", network, c.name, mdns.TypeToString[c.typ], got, c.want)
			}
		}
	}
	// a container may be a DNS server itself
	own := l.serve(t1, "own", 53)
	defer own()
	if got := l.spread(t1, "udp4", "127.0.0.1:53", 1, ""); got["own"] != 1 {
		t.Errorf("the container's own port 53: %v", got)
	}
	l.setAll([]Network{webNetwork(Ready, Draining)}, webMesh(1))
	if m, err := query(t1, "udp", "tasks.web", mdns.TypeA); err != nil || answers(m) != "10.10.0.11" {
		t.Errorf("tasks.web while the second drains: %v, %v", m, err)
	}
}

func answers(m *mdns.Msg) string {
	if m.Rcode != mdns.RcodeSuccess {
		return mdns.RcodeToString[m.Rcode]
	}
	var out []string
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *mdns.A:
			out = append(out, rr.A.String())
		case *mdns.AAAA:
			out = append(out, rr.AAAA.String())
		case *mdns.PTR:
			out = append(out, rr.Ptr)
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// A daemon dies and another takes over: data paths never stop, and a query asked in between is answered by the successor.
func TestDaemonRestart(t *testing.T) {
	l := newLab(t, 2)
	store := &memoryStore{fds: map[string]int{}}
	defer store.close()
	l.hosts[0].Driver.Close()
	l.hosts[0].Driver = l.driver(1, store)
	l.setAll([]Network{webNetwork(Ready, Ready)}, webMesh(1, 2))
	for i, h := range l.hosts {
		l.serve(l.sandbox(h, webSandbox(i+1)), fmt.Sprintf("task%d", i+1), 80)
	}
	t1 := l.box(1)
	held, err := open(l.cl, "tcp4", "192.0.2.1:8080")
	l.must(err)
	_, _, err = held.ask()
	l.must(err)
	if n := store.count(dnsStorePrefix); n != 2 {
		t.Fatalf("%d descriptors stored, want 2", n)
	}
	l.hosts[0].Driver.Close()
	asked := make(chan string, 1)
	go func() {
		m, err := query(t1, "udp", "web", mdns.TypeA)
		if err != nil {
			asked <- err.Error()
			return
		}
		asked <- answers(m)
	}()
	if got := l.spread(l.cl, "tcp4", "192.0.2.1:8080", 20, clientAddr); len(got) != 2 {
		t.Errorf("without a daemon: %v", got)
	}
	l.spread(t1, "tcp4", "10.10.0.2:80", 10, "")
	h := l.hosts[0]
	h.Driver = l.driver(1, store)
	if ids, err := h.Sandboxes(); err != nil || len(ids) != 1 || ids[0] != "task1" {
		t.Errorf("sandboxes found: %v, %v", ids, err)
	}
	h.cfg = l.baseConfig(h)
	slots := func() map[string]string {
		t := nft.MeshTable(false, h.meshParams(false))
		l.must(h.nft.Load(t))
		return maps.Collect(t.Set("slots").All())
	}
	before := slots()
	l.set(h, []Network{webNetwork(Ready, Ready)}, webMesh(1, 2))
	after := slots()
	if len(after) == 0 || len(after) != len(before) {
		t.Errorf("%d slots before, %d after", len(before), len(after))
	}
	for k, v := range after {
		if before[k] != v {
			t.Errorf("the successor moved a slot")
			break
		}
	}
	unreachableSelf(t, l)
	l.sandbox(h, webSandbox(1))
	if got := <-asked; got != "10.10.0.2" {
		t.Errorf("query asked while no daemon ran: %s", got)
	}
	if _, _, err := held.ask(); err != nil {
		t.Errorf("held connection: %v", err)
	}
	l.must(h.RemoveSandbox(context.Background(), "task1"))
	if store.count(dnsStorePrefix) != 0 {
		t.Errorf("left in the store: %v", store.fds)
	}
}

// A daemon takes the sandboxes of the one before over ahead of the first tables, as an engine does at its start: what it is asked by then is
// answered with the tables, and nothing is moved.
func TestSandboxBeforeTables(t *testing.T) {
	l := newLab(t, 2)
	store := &memoryStore{fds: map[string]int{}}
	defer store.close()
	l.hosts[0].Driver.Close()
	l.hosts[0].Driver = l.driver(1, store)
	l.setAll([]Network{webNetwork(Ready, Ready)}, webMesh(1, 2))
	for i, h := range l.hosts {
		l.serve(l.sandbox(h, webSandbox(i+1)), fmt.Sprintf("task%d", i+1), 80)
	}
	h := l.hosts[0]
	h.Driver.Close()
	h.Driver = l.driver(1, store)
	if _, err := h.AddSandbox(context.Background(), webSandbox(1)); err != nil {
		t.Fatalf("a complete sandbox before the first tables: %v", err)
	}
	fresh := webSandbox(3)
	if _, err := h.AddSandbox(context.Background(), fresh); !errdefs.IsUnavailable(err) {
		t.Errorf("a new sandbox before the first tables: %v, want unavailable", err)
	}
	asked := make(chan string, 1)
	go func() {
		m, err := query(l.box(1), "udp", "web", mdns.TypeA)
		if err != nil {
			asked <- err.Error()
			return
		}
		asked <- answers(m)
	}()
	l.spread(l.box(1), "tcp4", "10.10.0.2:80", 10, "")
	l.set(h, []Network{webNetwork(Ready, Ready)}, webMesh(1, 2))
	if got := <-asked; got != "10.10.0.2" {
		t.Errorf("query asked before the tables came: %s", got)
	}
	if len(h.waiting) != 0 || h.boxes["task1"] == nil {
		t.Errorf("not taken over: %v", h.waiting)
	}
	closeFDs(store.fds) // the supervisor died, and what it kept
	l.must(h.RemoveSandbox(context.Background(), "task1"))
	if len(store.fds) != 0 {
		t.Errorf("left in the store: %v", store.fds)
	}
}

// A client whose first packet went to a backend that was dead already is dealt to another one as soon as the dead one is out of rotation.
func TestUnansweredAreDealtAnew(t *testing.T) {
	l := newLab(t, 2)
	l.setAll([]Network{webNetwork(Ready, Ready)}, webMesh(2)) // nobody made its sandbox: packets to it are lost
	l.serve(l.sandbox(l.hosts[0], webSandbox(1)), "task1", 80)
	answered := make(chan error, 1)
	go func() {
		f, err := open(l.cl, "tcp4", "192.0.2.1:8080")
		if err == nil {
			_, _, err = f.ask()
			f.Close()
		}
		answered <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("the dead backend answered: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	l.setAll([]Network{webNetwork(Ready, Ready)}, webMesh(1))
	select {
	case err := <-answered:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(2500 * time.Millisecond):
		t.Error("the client still waits for the dead backend")
	}
}

// unreachableSelf: before AddSandbox is called again, the hairpin of an adopted leg works.
func unreachableSelf(t *testing.T, l *lab) {
	t.Helper()
	if got := l.in(t).spread(l.box(1), "tcp4", "192.0.2.1:8080", 20, ""); len(got) != 2 {
		t.Errorf("hairpin after a restart: %v", got)
	}
}

func TestTeardownLeavesNothing(t *testing.T) {
	l, stops := webLab(t, 2)
	h := l.hosts[0]
	l.must(h.SetBridges(context.Background(), []Bridge{{ID: "br1", Name: "skt0", Subnet4: netip.MustParsePrefix("172.30.0.0/16"), Gateway4: addr("172.30.0.1")}}))
	for _, s := range stops {
		s()
	}
	c := l.conn(h.ns)
	fresh := l.driver(1, nil) // a driver without any memory removes it all
	for range 2 {
		l.must(fresh.Teardown(context.Background()))
	}
	links, err := c.Links()
	l.must(err)
	for name, k := range links {
		if name != "lo" && name != "eth0" {
			t.Errorf("device left: %s (%s)", name, k.Kind)
		}
	}
	rules, err := c.Rules()
	l.must(err)
	routes, err := c.Routes()
	l.must(err)
	files, err := os.ReadDir(h.netnsDir())
	l.must(err)
	if len(rules)+len(routes)+len(files) != 0 {
		t.Errorf("left: rules %v, routes %v, files %v", rules, routes, files)
	}
	for _, table := range []*nft.Table{nft.MeshTable(false, h.meshParams(false)), nft.BridgeTable(false, false, nil)} {
		if there, err := fresh.nft.Exists(table); err != nil || there {
			t.Errorf("table %s left: %v, %v", table.Name, there, err)
		}
	}
}

func TestNetworkChanges(t *testing.T) {
	l := newLab(t, 2)
	h := l.hosts[0]
	ctx := context.Background()
	if _, err := h.AddSandbox(ctx, webSandbox(1)); err == nil {
		t.Error("a leg on an unknown network was accepted")
	}
	l.setAll([]Network{webNetwork(Ready, Ready)}, Mesh{})
	other := Network{ID: "other", Name: "back", VNI: 5000, Subnet4: netip.MustParsePrefix("10.11.0.0/24"),
		Endpoints: []Endpoint{{ID: "task1", Node: 1, Addr4: addr("10.11.0.2"), State: Ready}, {ID: "task2", Node: 2, Addr4: addr("10.11.0.3"), State: Ready}}}
	for i, h := range l.hosts {
		l.serve(l.sandbox(h, webSandbox(i+1)), fmt.Sprintf("task%d", i+1), 80)
	}
	t1 := l.box(1)
	// connect a running container to another network: its devices keep their names
	l.setAll([]Network{webNetwork(Ready, Ready), other}, Mesh{})
	for i, h := range l.hosts {
		s := webSandbox(i + 1)
		s.Legs = append(s.Legs, Leg{NetworkID: "other", Addr4: netip.PrefixFrom(other.Endpoints[i].Addr4, 24)})
		l.sandbox(h, s)
	}
	l.spread(t1, "tcp4", "10.11.0.3:80", 1, "10.11.0.2")
	l.spread(t1, "tcp4", "10.10.0.12:80", 1, "10.10.0.11")
	c := l.conn(t1)
	links, err := c.Links()
	l.must(err)
	for name, mac := range map[string]link.MAC{"eth0": legMAC(overlayLeg, addr("10.10.0.11")), "eth1": legMAC(gatewayLeg, gatewayOf(1)), "eth2": legMAC(overlayLeg, addr("10.11.0.2"))} {
		if links[name].MAC != mac {
			t.Errorf("%s has MAC %s, want %s", name, links[name].MAC, mac)
		}
	}
	// disconnect: the leg goes, and the network with it once nothing hangs on it
	l.set(h, []Network{webNetwork(Ready, Ready)}, Mesh{})
	if _, err := os.Stat(h.routerFile("other")); err != nil {
		t.Errorf("a network with a leg was removed: %v", err)
	}
	l.sandbox(h, webSandbox(1))
	l.set(h, []Network{webNetwork(Ready, Ready)}, Mesh{})
	if _, err := os.Stat(h.routerFile("other")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the network was not removed: %v", err)
	}
	// the VNI is free at once for another network
	other.ID = "third"
	l.set(h, []Network{webNetwork(Ready, Ready), other}, Mesh{})
}

func TestBridges(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	user := Bridge{ID: "brid1", Name: "skt1", Subnet4: netip.MustParsePrefix("172.31.0.0/24"), Gateway4: addr("172.31.0.1")}
	def := Bridge{ID: "brid0", Name: "skt0", Subnet4: netip.MustParsePrefix("172.30.0.0/24"), Gateway4: addr("172.30.0.1")}
	shut := Bridge{ID: "brid2", Name: "skt2", Subnet4: netip.MustParsePrefix("172.29.0.0/24"), Gateway4: addr("172.29.0.1"), Internal: true}
	l.must(h.SetBridges(ctx, []Bridge{user, def, shut}))
	l.must(h.SetBridges(ctx, []Bridge{user, def, shut}))
	leg := func(b Bridge, last byte, names ...string) BridgeLeg {
		a := b.Subnet4.Addr().As4()
		a[3] = last
		return BridgeLeg{BridgeID: b.ID, Addr4: netip.PrefixFrom(netip.AddrFrom4(a), 24), Names: names}
	}
	la := leg(user, 2, "a", "alias")
	la.Ports = []HostPort{{Published: 8080, Target: 80, Protocol: "tcp"}, {HostIP: addr("127.0.0.1"), Published: 8081, Target: 80, Protocol: "tcp"}}
	a := l.sandbox(h, Sandbox{ID: "cont-a", DNS: true, Bridges: []BridgeLeg{la}})
	b := l.sandbox(h, Sandbox{ID: "cont-b", DNS: true, Bridges: []BridgeLeg{leg(user, 3, "b")}})
	c := l.sandbox(h, Sandbox{ID: "cont-c", DNS: true, Bridges: []BridgeLeg{leg(def, 2)}})
	e := l.sandbox(h, Sandbox{ID: "cont-e", DNS: true, Bridges: []BridgeLeg{leg(shut, 2)}})
	l.serve(a, "a", 80)
	l.serve(b, "b", 80)
	l.spread(b, "tcp4", "172.31.0.2:80", 1, "172.31.0.3")
	l.spread(l.cl, "tcp4", "192.0.2.1:8080", 1, clientAddr)
	l.spread(h.ns, "tcp4", "127.0.0.1:8080", 1, "")
	l.spread(h.ns, "tcp4", "127.0.0.1:8081", 1, "")
	l.spread(h.ns, "tcp4", "192.0.2.1:8080", 1, "")
	l.spread(b, "tcp4", "192.0.2.1:8080", 1, "")
	l.spread(a, "tcp4", "192.0.2.1:8080", 1, "")
	l.spread(c, "tcp4", "192.0.2.1:8080", 1, "")
	refusedFast(t, l.cl, "192.0.2.1:8081")
	unreachable(t, c, "172.31.0.2:80")
	unreachable(t, e, "172.31.0.2:80")
	if m, err := query(b, "udp", "a", mdns.TypeA); err != nil || answers(m) != "172.31.0.2" {
		t.Errorf("a from b: %v, %v", m, err)
	}
	if m, err := query(a, "udp", "b", mdns.TypeA); err != nil || answers(m) != "172.31.0.3" {
		t.Errorf("b, which came later, from a: %v, %v", m, err)
	}
	if m, err := query(c, "udp", "a", mdns.TypeA); err != nil || answers(m) != "NXDOMAIN" {
		t.Errorf("a from another bridge: %v, %v", m, err)
	}
	out, err := listenIn(l.cl, clientAddr+":7000")
	l.must(err)
	defer out.Close()
	f, err := open(b, "tcp4", clientAddr+":7000")
	l.must(err)
	f.Close()
	unreachable(t, e, clientAddr+":7000")
	if name, _, used := h.PortHolder("tcp", 8080); !used || name != "container cont-a" {
		t.Errorf("holder of 8080: %q %v", name, used)
	}
	own, err := listenIn(h.ns, "192.0.2.1:6000")
	l.must(err)
	defer own.Close()
	if _, pid, used := h.PortHolder("tcp", 6000); !used || pid != os.Getpid() {
		t.Errorf("holder of 6000: pid %d %v, want %d", pid, used, os.Getpid())
	}
	if _, _, used := h.PortHolder("udp", 6000); used {
		t.Error("UDP 6000 is free")
	}
	l.must(h.RemoveSandbox(ctx, "cont-a"))
	refusedFast(t, l.cl, "192.0.2.1:8080")
	if m, err := query(b, "udp", "a", mdns.TypeA); err != nil || answers(m) != "NXDOMAIN" {
		t.Errorf("a, which is gone, from b: %v, %v", m, err)
	}
	noLeaks(l, h, leg(user, 9), leg(shut, 9))
	for _, id := range []string{"cont-b", "cont-c", "cont-e"} {
		l.must(h.RemoveSandbox(ctx, id))
	}
	l.must(h.SetBridges(ctx, nil))
	if links, err := l.conn(h.ns).Links(); err != nil || len(links) != 2 {
		t.Errorf("devices left: %v, %v", links, err)
	}
}

// Flows to an endpoint that is gone end, so that a UDP client that goes on sending from the same port reaches another one.
func TestFlowsOfTheGone(t *testing.T) {
	l, _ := webLab(t, 2)
	t1 := l.box(1)
	onto := func(ns *link.NS, at, want string) *flow {
		t.Helper()
		for range 100 {
			f, err := open(ns, "udp4", at)
			l.must(err)
			if name, _, err := f.ask(); err == nil && name == want {
				t.Cleanup(func() { f.Close() })
				return f
			}
			f.Close()
		}
		t.Fatalf("no flow to %s reached %s", at, want)
		return nil
	}
	udp := onto(t1, "10.10.0.2:80", "task2")
	nw := webNetwork(Ready, Ready)
	nw.Endpoints = nw.Endpoints[:1]
	l.setAll([]Network{nw}, webMesh(1, 2))
	if got, _, err := udp.ask(); err != nil || got != "task1" {
		t.Errorf("after task2 is gone the flow goes to %q (%v), want task1", got, err)
	}
	mesh := onto(l.cl, "192.0.2.1:8080", "task2")
	h := l.hosts[0]
	l.set(h, []Network{nw}, leaving(webMesh(1), 2))
	if got, from, err := mesh.ask(); err != nil || got != "task1" || from.Addr().String() != clientAddr {
		t.Errorf("a UDP flow to a backend that takes no new clients goes to %q (%v), want task1", got, err)
	}
}

// IPv6 on an overlay network: endpoints, VIP and names.
func TestIPv6Overlay(t *testing.T) {
	l := newLab(t, 2)
	nw := webNetwork(Ready, Ready)
	nw.Subnet6 = netip.MustParsePrefix("fd00:10::/64")
	nw.Services[0].VIP6 = addr("fd00:10::2")
	nw.Endpoints[0].Addr6, nw.Endpoints[1].Addr6 = addr("fd00:10::11"), addr("fd00:10::12")
	l.setAll([]Network{nw}, Mesh{})
	for i, h := range l.hosts {
		s := webSandbox(i + 1)
		s.Legs[0].Addr6 = netip.PrefixFrom(nw.Endpoints[i].Addr6, 64)
		l.serve(l.sandbox(h, s), fmt.Sprintf("task%d", i+1), 80)
	}
	t1 := l.box(1)
	l.spread(t1, "tcp6", "[fd00:10::12]:80", 1, "fd00:10::11")
	if got := l.spread(t1, "tcp6", "[fd00:10::2]:80", 30, ""); len(got) != 2 {
		t.Errorf("IPv6 VIP: %v", got)
	}
	if m, err := query(t1, "udp", "web", mdns.TypeAAAA); err != nil || answers(m) != "fd00:10::2" {
		t.Errorf("AAAA: %v, %v", m, err)
	}
}

// noLeaks: a container on internal networks only asks nobody outside for a name, through its own resolver neither (CVE-2024-29018); no link of a
// container takes router advertisements, on either side (CVE-2020-13401).
func noLeaks(l *lab, h *labHost, open, shut BridgeLeg) {
	l.t.Helper()
	resolver, asked := "127.0.0.1:53", make(chan struct{}, 16)
	var conn net.PacketConn
	l.must(h.ns.Do(func() (err error) {
		conn, err = net.ListenPacket("udp", resolver)
		return err
	}))
	srv := &mdns.Server{PacketConn: conn, Handler: mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		asked <- struct{}{}
		m := new(mdns.Msg)
		_ = w.WriteMsg(m.SetRcode(q, mdns.RcodeNameError))
	})}
	started, done := make(chan struct{}), make(chan struct{})
	srv.NotifyStartedFunc = func() { close(started) }
	go func() { defer close(done); _ = srv.ActivateAndServe() }()
	<-started
	defer func() { _ = srv.Shutdown(); <-done }()
	for _, c := range []struct {
		id     string
		legs   []BridgeLeg
		leaves bool
	}{{"cont-shut", []BridgeLeg{shut}, false}, {"cont-both", []BridgeLeg{shut, open}, true}} {
		h.resolvers = func() []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort(resolver)} }
		ns := l.sandbox(h, Sandbox{ID: c.id, DNS: true, Bridges: c.legs})
		m, err := query(ns, "udp", "secret.example.com", mdns.TypeA)
		if err != nil || (m.Rcode == mdns.RcodeRefused) == c.leaves || (len(asked) > 0) != c.leaves {
			l.t.Errorf("%s: a foreign name: %v, %v; %d questions left the node", c.id, m, err, len(asked))
		}
		for _, dev := range []string{"default", "eth0"} {
			if v, err := ns.ReadSysctl("ipv6/conf/" + dev + "/accept_ra"); err == nil && v != "0" {
				l.t.Errorf("%s: %s accepts router advertisements: %s", c.id, dev, v)
			}
		}
		l.must(h.RemoveSandbox(context.Background(), c.id))
	}
	for _, b := range []string{"skt1", "skt2"} {
		if v, err := h.ns.ReadSysctl("ipv6/conf/" + b + "/accept_ra"); err == nil && v != "0" {
			l.t.Errorf("bridge %s accepts router advertisements: %s", b, v)
		}
	}
}
