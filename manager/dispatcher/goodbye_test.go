package dispatcher_test

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

func (l *lab) record(name string) (n *store.Node) {
	l.store.View(func(tx store.ReadTx) { n = tx.Node(id(name)) })
	return n
}

// A node that says goodbye is down before its lease ends, and the agents do not hear of it as a manager any more until it is back.
func TestGoodbye(t *testing.T) {
	bubble(t, func(l *lab) {
		l.node("m1", "m2")
		for _, name := range []string{"m1", "m2"} {
			manager := proto.Clone(l.record(name)).(*api.NodeRecord)
			manager.Role, manager.RpcAddr = api.RoleManager, name+":2377"
			l.apply(&api.Change{Kind: &api.Change_PutNode{PutNode: manager}})
		}
		lists := func(p *peer, n int) {
			until(p, "managers", func(m *api.ManagerMessage) (*api.ManagerList, bool) {
				return m.GetManagers(), m.GetManagers() != nil && len(m.GetManagers().Managers) == n
			})
		}
		stays, goes := l.dial("m1").hello(&api.Hello{RpcAddr: "m1:2377"}), l.dial("m2").hello(&api.Hello{RpcAddr: "m2:2377", Hostname: "two", FeatureLevel: 2})
		defer stays.cancel()
		defer goes.cancel()
		lists(stays, 2)
		time.Sleep(100 * time.Millisecond)
		goes.send(&api.AgentMessage{Kind: &api.AgentMessage_Tls{Tls: &api.NodeTLS{}}})
		goes.send(&api.AgentMessage{Kind: &api.AgentMessage_Goodbye{Goodbye: &api.Goodbye{}}})
		if goes.failure() == nil {
			t.Error("the session goes on")
		}
		time.Sleep(100 * time.Millisecond)
		if n := l.record("m2"); n.Status.State != "down" || n.Status.Message != "the node left" || n.FeatureLevel != 2 {
			t.Errorf("node: %v", n)
		}
		lists(stays, 1)
		back := l.dial("m2").hello(&api.Hello{RpcAddr: "m2:2377"})
		defer back.cancel()
		lists(stays, 2)
		if n := l.record("m2"); n.Status.State != "ready" || n.Status.Message != "" {
			t.Errorf("back: %v", n.Status)
		}
	})
}
