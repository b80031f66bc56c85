package dispatcher_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/dispatcher"
	"skein/manager/store"
)

func (p *peer) facts(f *api.NodeFacts) {
	p.send(&api.AgentMessage{Kind: &api.AgentMessage_Facts{Facts: f}})
}

// Facts are kept as nodes say them; who wants them fresh waits for those that answer, and not for ever.
func TestFacts(t *testing.T) {
	bubble(t, func(l *lab) {
		l.node("a", "b", "c")
		a, b, old := l.dial("a").hello(&api.Hello{RpcAddr: "a", Hostname: "alpha"}), l.dial("b").hello(&api.Hello{RpcAddr: "b", Hostname: "beta"}), l.dial("c").hello(&api.Hello{RpcAddr: "c"})
		defer a.cancel()
		defer b.cancel()
		defer old.cancel()
		port := func(n uint32) []*api.FactPort {
			return []*api.FactPort{{Protocol: "tcp", Port: n, Holder: "x", Pid: 1}}
		}
		a.facts(&api.NodeFacts{Ports: port(1)})
		b.facts(&api.NodeFacts{Ports: port(2)})
		time.Sleep(100 * time.Millisecond)
		get := func(fresh bool) []dispatcher.NodeFacts {
			f, err := l.front.Current().Facts(l.ctx, fresh)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
		if f := get(false); len(f) != 2 || f[0].Hostname != "alpha" || f[0].Ports[0].Port != 1 || f[1].Ports[0].Port != 2 {
			t.Errorf("facts %v", f)
		}
		answer := func(p *peer, n uint32) {
			r := until(p, "request", func(m *api.ManagerMessage) (*api.FactsRequest, bool) { return m.GetFacts(), m.GetFacts() != nil })
			p.facts(&api.NodeFacts{Ports: port(n), Answers: r.Sequence})
		}
		go answer(a, 11)
		go answer(b, 12)
		began := time.Now()
		if f := get(true); f[0].Ports[0].Port != 11 || f[1].Ports[0].Port != 12 || time.Since(began) >= time.Second {
			t.Errorf("fresh facts %v after %v", f, time.Since(began))
		}
		go answer(a, 21)
		began = time.Now()
		if f := get(true); f[0].Ports[0].Port != 21 || f[1].Ports[0].Port != 12 || time.Since(began) > 2*time.Second {
			t.Errorf("with a node that is silent: %v after %v", f, time.Since(began))
		}
		b.facts(&api.NodeFacts{Ports: []*api.FactPort{{Holder: strings.Repeat("x", 1000)}}})
		if b.failure() == nil {
			t.Error("a text without bound was taken")
		}
		time.Sleep(100 * time.Millisecond)
		if f := get(false); len(f) != 1 {
			t.Errorf("a node without a session: %v", f)
		}
	})
}

// Networks are recorded to carry what fits between all nodes, which only becomes less.
func TestNetworksAreLowered(t *testing.T) {
	bubble(t, func(l *lab) {
		l.node("a", "b")
		l.tasks("svc", "a")
		mtu := func() (m uint32) {
			l.store.View(func(tx store.ReadTx) { m = tx.Network(id("net")).PathMtu })
			return m
		}
		a, b := l.dial("a").hello(&api.Hello{RpcAddr: "a", UnderlayAddr: "192.0.2.1"}), l.dial("b").hello(&api.Hello{RpcAddr: "b", UnderlayAddr: "2001:db8::1"})
		defer a.cancel()
		defer b.cancel()
		say := func(p *peer, underlay, path uint32) {
			p.facts(&api.NodeFacts{UnderlayMtu: underlay, PathMtu: path})
			for range 11 { // sessions must last
				time.Sleep(time.Second)
				for _, q := range []*peer{a, b} {
					q.send(&api.AgentMessage{Kind: &api.AgentMessage_Heartbeat{Heartbeat: &api.Heartbeat{}}})
				}
			}
		}
		say(a, 1500, 0)
		if m := mtu(); m != 0 {
			t.Errorf("managers of older versions were told %d", m)
		}
		var c *api.ClusterRecord
		l.store.View(func(tx store.ReadTx) { c = proto.Clone(tx.Cluster()).(*api.ClusterRecord) })
		c.FeatureLevel = api.LevelNetworks
		l.apply(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})
		for _, k := range []struct {
			p              *peer
			underlay, path uint32
			want           uint32
		}{{a, 1500, 0, 1450}, {b, 1500, 0, 1430}, {a, 1500, 1400, 1350}, {a, 1500, 1500, 1350}, {a, 9000, 9000, 1350}, {b, 1500, 1300, 1230}} {
			if say(k.p, k.underlay, k.path); mtu() != k.want {
				t.Errorf("device %d, path %d: %d, want %d", k.underlay, k.path, mtu(), k.want)
			}
		}
	})
}
