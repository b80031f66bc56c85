package overlay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// identities names what a namespace has in a way that differs when something was made anew: indexes of devices, handles of tables, chains, sets and rules,
// and the routes, neighbours and rules themselves.
func (l *lab) identities(name string, ns *link.NS, into map[string]string) {
	l.t.Helper()
	c := l.conn(ns)
	links, err := c.Links()
	l.must(err)
	for _, k := range links {
		into[fmt.Sprintf("%s: device %s", name, k.Name)] = fmt.Sprintf("%d up %v mtu %d", k.Index, k.Up, k.MTU)
	}
	routes, err := c.Routes()
	l.must(err)
	for k, r := range routes {
		into[fmt.Sprintf("%s: route %v", name, k)] = fmt.Sprint(r)
	}
	rules, err := c.Rules()
	l.must(err)
	for k, r := range rules {
		into[fmt.Sprintf("%s: rule %v", name, k)] = fmt.Sprint(r)
	}
	neighs, err := c.Neighs(0)
	l.must(err)
	for k, m := range neighs {
		into[fmt.Sprintf("%s: neighbour %v", name, k)] = m.String()
	}
	s, err := link.OpenSocket(ns, unix.NETLINK_NETFILTER)
	l.must(err)
	defer s.Close()
	for what, m := range map[string]struct {
		get               uint16
		table, of, handle uint16
	}{
		"table": {unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, unix.NFTA_TABLE_NAME, 4},
		"chain": {unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, unix.NFTA_CHAIN_HANDLE},
		"rule":  {unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, unix.NFTA_RULE_HANDLE},
		"set":   {unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, 16},
	} {
		l.must(s.Dump(link.Message{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | m.get, Body: []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0}}, func(_ uint16, b []byte) error {
			var table, of string
			var handle uint64
			for t, v := range link.Parse(b[4:]) {
				switch {
				case t == m.handle && len(v) == 8:
					handle = binary.BigEndian.Uint64(v)
				case t == m.table && t == m.of:
					table = string(v)
				case t == m.table:
					table = string(v)
				case t == m.of:
					of = string(v)
				}
			}
			into[fmt.Sprintf("%s: %s of family %d %q %q %d", name, what, b[0], table, of, handle)] = ""
			return nil
		}))
	}
}

// A daemon is killed under load and another takes over: no request and no lookup fails, and everything in the kernel is what it was, not made
// anew.
func TestAdoption(t *testing.T) {
	l := newLab(t, 2)
	store := &memoryStore{fds: map[string]int{}}
	l.must(l.hosts[0].Driver.Close())
	l.hosts[0].Driver = l.driver(1, store)
	networks, mesh := []Network{webNetwork(Ready, Ready)}, webMesh(1, 2)
	l.setAll(networks, mesh)
	h, ctx := l.hosts[0], context.Background()
	l.must(h.SetBridges(ctx, []Bridge{testBridge()}))
	boxes := []Sandbox{webSandbox(1), webSandbox(2)}
	boxes[0].Bridges = []BridgeLeg{{BridgeID: testBridge().ID, Addr4: onBridge("x", 9).Bridges[0].Addr4}}
	for i, o := range l.hosts {
		l.serve(l.sandbox(o, boxes[i]), fmt.Sprintf("task%d", i+1), 80)
	}
	t1 := l.box(1)
	all := func() map[string]string {
		out := map[string]string{}
		l.identities("node", h.ns, out)
		l.identities("router", openNS(t, h.routerFile(networks[0].ID)), out)
		l.identities("container", t1, out)
		return out
	}
	before := all()
	stop, failed := make(chan struct{}), make(chan error, 4)
	var load sync.WaitGroup
	for what, ask := range map[string]func() error{
		"published port": func() error { _, _, err := get(l.cl, "tcp4", "192.0.2.1:8080"); return err },
		"VIP":            func() error { _, _, err := get(t1, "tcp4", "10.10.0.2:80"); return err },
		"name": func() error {
			m, err := query(t1, "udp", "web", 1)
			if err != nil { // what the dead daemon had read is lost: resolvers ask again
				m, err = query(t1, "udp", "web", 1)
			}
			if err == nil && answers(m) != "10.10.0.2" {
				err = errors.New(answers(m))
			}
			return err
		},
	} {
		load.Go(func() {
			n := 0
			for ; ; n++ {
				select {
				case <-stop:
					if n == 0 {
						failed <- fmt.Errorf("%s: nothing was asked", what)
					}
					return
				default:
				}
				if err := ask(); err != nil {
					failed <- fmt.Errorf("%s: %w", what, err)
					return
				}
			}
		})
	}
	time.Sleep(50 * time.Millisecond) // of load before, between and after
	l.must(h.Driver.Close())
	time.Sleep(100 * time.Millisecond)
	h.Driver = l.driver(1, store)
	_, err := h.AddSandbox(ctx, boxes[0])
	l.must(err)
	l.must(h.SetBridges(ctx, []Bridge{testBridge()}))
	l.set(h, networks, mesh)
	l.must(h.Check(ctx))
	time.Sleep(50 * time.Millisecond)
	close(stop)
	load.Wait()
	select {
	case err := <-failed:
		t.Error(err)
	default:
	}
	after := all()
	for k, v := range maps.All(before) {
		if is, there := after[k]; !there || is != v {
			t.Errorf("%s is %q (there: %v), was %q", k, is, there, v)
		}
	}
	for k := range after {
		if _, was := before[k]; !was {
			t.Errorf("%s is new", k)
		}
	}
}
