package dispatcher_test

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

func (l *lab) attach(container, node string, active bool, networks ...string) {
	l.t.Helper()
	w := &api.AttachmentWish{Id: container, NodeId: id(node), Name: container, Active: active}
	for _, n := range networks {
		w.Networks = append(w.Networks, &api.AttachedNetwork{NetworkId: id(n), Names: []string{container}})
	}
	l.apply(&api.Change{Kind: &api.Change_PutAttachment{PutAttachment: w}})
}

// TestAttachedContainersAreInTables: a container that is no task is an endpoint like any other while it is active, and its node needs the table.
func TestAttachedContainersAreInTables(t *testing.T) {
	bubble(t, func(l *lab) {
		var c *api.ClusterRecord
		l.store.View(func(tx store.ReadTx) { c = proto.Clone(tx.Cluster()).(*api.ClusterRecord) })
		c.FeatureLevel = api.LevelNetworks
		l.apply(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})
		l.node("w1", "w2")
		l.apply(&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: &api.NetworkRecord{Id: id("net"), Name: "net", Attachable: true}}})
		l.attach("k1", "w1", false, "net")
		p1, p2 := l.dial("w1").hello(&api.Hello{}), l.dial("w2").hello(&api.Hello{})
		defer p1.cancel()
		defer p2.cancel()
		l.attach("k2", "w2", true, "net")
		if u := table(p2, id("net")); !u.Full || len(u.Endpoints) != 1 || u.Endpoints[0].TaskId != "k2" || u.Endpoints[0].State != "ready" || u.Endpoints[0].Names[0] != "k2" {
			t.Errorf("the first: %v", u)
		}
		l.attach("k1", "w1", true, "net")
		if u := table(p1, id("net")); !u.Full || len(u.Endpoints) != 2 || len(u.Nodes) != 2 {
			t.Errorf("all of it for the node that joins: %v", u)
		}
		if u := table(p2, id("net")); u.Full || len(u.Endpoints) != 1 || u.Endpoints[0].TaskId != "k1" {
			t.Errorf("the second: %v", u)
		}
		l.apply(&api.Change{Kind: &api.Change_NodeStatus{NodeStatus: &api.NodeStatus{NodeId: id("w1"), State: "ready"}}})
		l.attach("k1", "w1", false, "net")
		taken(p1, "the node needs it no more")
		if u := table(p2, id("net")); len(u.RemovedEndpoints) != 1 || len(u.RemovedNodes) != 1 {
			t.Errorf("the second went: %v", u)
		}
		l.apply(&api.Change{Kind: &api.Change_DeleteAttachment{DeleteAttachment: &api.AttachmentRef{Id: "k2", NodeId: id("w2")}}})
		taken(p2, "the first went")
	})
}

func taken(p *peer, why string) {
	p.l.t.Helper()
	until(p, why, func(m *api.ManagerMessage) (bool, bool) {
		return true, m.GetTable().GetTable() == id("net") && m.GetTable().Gone
	})
}

// TestIngressGoesWithTheMesh: nodes learn how the mesh is to be from the ingress network, and that there is none any more.
func TestIngressGoesWithTheMesh(t *testing.T) {
	bubble(t, func(l *lab) {
		l.node("w1")
		put := func(mtu uint32) {
			l.apply(&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: &api.NetworkRecord{Id: id("in"), Name: "ingress", Driver: "overlay", Ingress: true, Mtu: mtu}}})
		}
		put(1200)
		p := l.dial("w1").hello(&api.Hello{})
		defer p.cancel()
		if u := table(p, api.MeshTable); u.Network.GetMtu() != 1200 {
			t.Errorf("at first: %v", u)
		}
		put(1300)
		if u := table(p, api.MeshTable); u.Network.GetMtu() != 1300 || u.Full {
			t.Errorf("changed: %v", u)
		}
		l.apply(&api.Change{Kind: &api.Change_DeleteNetwork{DeleteNetwork: id("in")}})
		if u := table(p, api.MeshTable); u.Network == nil || u.Network.Id != "" || u.Network.Mtu != 0 {
			t.Errorf("removed: %v", u)
		}
	})
}
