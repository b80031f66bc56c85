package dispatcher_test

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// A node's addresses go to the nodes that have published ports or a network in common with it, and follow what it says.
func TestNodeAddrs(t *testing.T) {
	bubble(t, func(l *lab) {
		var c *api.ClusterRecord
		l.store.View(func(tx store.ReadTx) { c = proto.Clone(tx.Cluster()).(*api.ClusterRecord) })
		c.FeatureLevel = api.LevelNetworks
		l.apply(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})
		l.node("w1", "w2")
		l.apply(&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: &api.NetworkRecord{Id: id("net"), Name: "net", Attachable: true}}})
		l.attach("k1", "w1", true, "net")
		l.attach("k2", "w2", true, "net")
		p1 := l.dial("w1").hello(&api.Hello{Hostname: "w1", RpcAddr: "w1:2377", Addrs: &api.NodeAddrs{Addrs: []string{"2001:db8::1"}}})
		defer p1.cancel()
		p2 := l.dial("w2").hello(&api.Hello{})
		defer p2.cancel()
		told := func(want ...string) {
			t.Helper()
			until(p2, "addresses of the first node", func(m *api.ManagerMessage) (bool, bool) {
				return true, slices.ContainsFunc(m.GetTable().GetNodes(), func(n *api.NodeEndpoint) bool { return n.Index == 1 && slices.Equal(n.Addrs, want) })
			})
		}
		told("2001:db8::1")
		say := func(addrs ...string) {
			p1.send(&api.AgentMessage{Kind: &api.AgentMessage_Addrs{Addrs: &api.NodeAddrs{Addrs: addrs}}})
		}
		say("192.0.2.7", "2001:db8::2")
		told("192.0.2.7", "2001:db8::2")
		for _, bad := range [][]string{{"fe80::1"}, {"x"}, {"127.0.0.1"}, slices.Repeat([]string{"192.0.2.9"}, api.MaxNodeAddrs+1)} {
			say(bad...)
		}
		time.Sleep(time.Second)
		if n := l.record("w1"); len(n.Addrs) != 2 || n.Hostname != "w1" {
			t.Errorf("after addresses that no client can have: %v", n)
		}
	})
}
