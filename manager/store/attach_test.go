package store_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/store"
)

func attach(id, node string, active bool, networks ...*api.AttachedNetwork) *api.Change {
	return &api.Change{Kind: &api.Change_PutAttachment{PutAttachment: &api.AttachmentWish{
		Id: id, NodeId: node, Name: "name-of-" + id, Active: active, Networks: networks, Gateway: len(networks) > 0}}}
}

func detach(id, node string) *api.Change {
	return &api.Change{Kind: &api.Change_DeleteAttachment{DeleteAttachment: &api.AttachmentRef{Id: id, NodeId: node}}}
}

func onNet(id string, addrs ...string) *api.AttachedNetwork {
	n := &api.AttachedNetwork{NetworkId: id, Names: []string{"name"}}
	for _, a := range addrs {
		if strings.Contains(a, ":") {
			n.Addr6 = a
		} else {
			n.Addr4 = a
		}
	}
	return n
}

func attachable(id, subnet string) *api.Change {
	return putNetwork(&api.NetworkRecord{Id: id, Name: id, Attachable: true, Subnet4: subnet})
}

func (c *cluster) attachment(id string) (a *store.Attachment) {
	c.View(func(tx store.ReadTx) { a = tx.Attachment(id) })
	return a
}

func newAttachCluster(t *testing.T) *cluster {
	c := newCluster(t)
	c.do(putCluster(&api.ClusterRecord{Id: "c1", UlaPrefix: "fd12:3456:789a::/48", FeatureLevel: api.FeatureLevel}))
	c.do(putNode("n1", "host1"), putNode("n2", "host2"), attachable("web", "10.7.0.0/24"), attachable("db", "10.8.0.0/24"), network("closed"))
	return c
}

// TestAttach follows one container: addresses stay while it is on a network, and rest when it left.
func TestAttach(t *testing.T) {
	c := newAttachCluster(t)
	c.do(attach("k1", "n1", true, onNet("web")))
	a := c.attachment("k1")
	if a.Networks[0].Addr4 != "10.7.0.2/24" || a.Networks[0].Addr6 != "fd12:3456:789a:1::2/64" || a.Gateway4 == "" || !a.Active {
		t.Fatalf("attached: %v", a)
	}
	version := a.Meta.Version
	c.do(attach("k1", "n1", true, onNet("web")))
	if got := c.attachment("k1"); got.Meta.Version != version {
		t.Errorf("the same wish moved the version from %d to %d", version, got.Meta.Version)
	}
	c.do(attach("k1", "n1", true, onNet("db"), onNet("web")))
	if b := c.attachment("k1"); b.Networks[1].Addr4 != "10.7.0.2/24" || b.Networks[0].Addr4 != "10.8.0.2/24" || b.Gateway4 != a.Gateway4 {
		t.Errorf("on two networks: %v", b)
	}
	c.sameAfterRestore()
	c.do(attach("k1", "n1", false, onNet("db")))
	c.do(attach("k2", "n2", true, onNet("web")))
	if b := c.attachment("k2"); b.Networks[0].Addr4 != "10.7.0.3/24" {
		t.Errorf("an address was given anew before it had rested: %v", b)
	}
	c.clock.advance(61 * time.Second)
	c.do(detach("k1", "n1"), attach("k3", "n2", true, onNet("web")))
	if b := c.attachment("k3"); b.Networks[0].Addr4 != "10.7.0.2/24" || c.attachment("k1") != nil {
		t.Errorf("after a minute: %v, %v", b, c.attachment("k1"))
	}
	c.sameAfterRestore()
}

// TestAttachFixed: addresses of one's choice, also such as rest, and what is refused.
func TestAttachFixed(t *testing.T) {
	c := newAttachCluster(t)
	c.do(attach("k1", "n1", true, onNet("web", "10.7.0.9")))
	if a := c.attachment("k1"); a.Networks[0].Addr4 != "10.7.0.9/24" || a.Networks[0].Addr6 != "fd12:3456:789a:1::9/64" {
		t.Errorf("%v", a)
	}
	conflict := func(n *api.AttachedNetwork) {
		t.Helper()
		c.refused(errdefs.IsConflict, []string{"already in use", "web"}, attach("k9", "n2", true, n))
	}
	conflict(onNet("web", "10.7.0.9"))
	conflict(onNet("web", "fd12:3456:789a:1::9"))
	c.do(attach("k2", "n2", true, onNet("web", "fd12:3456:789a:1::abcd:1")), attach("k3", "n2", true, onNet("web", "10.7.0.20", "fd12:3456:789a:1::15")))
	conflict(onNet("web", "fd12:3456:789a:1::abcd:1"))
	conflict(onNet("web", "10.7.0.21")) // its IPv6 address is held
	if a := c.attachment("k2"); a.Networks[0].Addr4 != "10.7.0.2/24" || a.Networks[0].Addr6 != "fd12:3456:789a:1::abcd:1/64" {
		t.Errorf("%v", a)
	}
	c.sameAfterRestore()
	for _, bad := range []string{"10.7.0.0", "10.7.0.1", "10.7.0.255", "10.9.0.1", "x", "fd00::1", "fd12:3456:789a:1::1"} {
		c.refused(errdefs.IsInvalidArgument, []string{"web"}, attach("k9", "n1", true, onNet("web", bad)))
	}
	c.do(detach("k1", "n1"), detach("k2", "n2"), detach("k3", "n2"))
	c.do(attach("k4", "n1", true, onNet("web", "10.7.0.9")), attach("k5", "n1", true, onNet("web", "10.7.0.21", "fd12:3456:789a:1::abcd:1")))
	c.sameAfterRestore()
	c.clock.advance(61 * time.Second)
	c.do(attach("k6", "n1", true, onNet("db")))
	conflict(onNet("web", "10.7.0.9")) // it did not become free when its rest would have been over
	c.sameAfterRestore()
}

func TestAttachRefused(t *testing.T) {
	c := newAttachCluster(t)
	c.do(attach("k1", "n1", true, onNet("web"), onNet("db")), attach("k2", "n2", false, onNet("db")))
	c.refused(errdefs.IsPermissionDenied, []string{"closed", "not manually attachable"}, attach("k3", "n1", true, onNet("closed")))
	c.refused(errdefs.IsPermissionDenied, []string{"belongs to node n1"}, attach("k1", "n2", true, onNet("web")))
	c.refused(errdefs.IsPermissionDenied, []string{"belongs to node n1"}, detach("k1", "n2"))
	c.refused(errdefs.IsNotFound, []string{"node n9"}, attach("k3", "n9", true, onNet("web")))
	c.refused(errdefs.IsNotFound, []string{"network gone"}, attach("k3", "n1", true, onNet("gone")))
	c.refused(errdefs.IsFailedPrecondition, []string{"in use", "name-of-k1 on node host1"}, deleteNetwork("db"))
	c.do(attach("k1", "n1", true, onNet("web")))
	c.do(deleteNetwork("db")) // that of a container that does not run
	if a := c.attachment("k2"); a != nil {
		t.Errorf("without a network: %v", a)
	}
	c.do(deleteNode("n1"))
	if a := c.attachment("k1"); a != nil {
		t.Errorf("its node is gone: %v", a)
	}
	c.do(deleteNetwork("web"))
	c.sameAfterRestore()
}

// TestAttachBelowLevel: an older manager would not know the change.
func TestAttachBelowLevel(t *testing.T) {
	c := newCluster(t)
	c.do(putCluster(&api.ClusterRecord{Id: "c1", FeatureLevel: api.LevelNetworks - 1}), putNode("n1", "host1"), attachable("web", "10.7.0.0/24"))
	c.refused(errdefs.IsFailedPrecondition, []string{"feature level"}, attach("k1", "n1", true, onNet("web")))
}

func (g *generator) attachment() *api.Change {
	id := g.id("k", 12)
	node := "n" + id[1:2]
	if g.IntN(5) == 0 {
		return detach(id, node)
	}
	var nets []*api.AttachedNetwork
	for range g.IntN(4) {
		n := onNet(g.id("net", 5))
		g.View(func(tx store.ReadTx) {
			rec := tx.Network(n.NetworkId)
			if rec == nil {
				return
			}
			if g.IntN(3) == 0 {
				n.Addr4 = nth(rec.Subnet4, g.IntN(20))
			}
			if g.IntN(3) == 0 && rec.Subnet6 != "" {
				n.Addr6 = nth(rec.Subnet6, g.IntN(20)+g.IntN(2)*100000)
			}
		})
		if !slices.ContainsFunc(nets, func(o *api.AttachedNetwork) bool { return o.NetworkId == n.NetworkId }) {
			nets = append(nets, n)
		}
	}
	return attach(id, node, g.IntN(2) == 0, nets...)
}

func nth(prefix string, n int) string {
	a := netip.MustParsePrefix(prefix).Addr()
	for range n {
		a = a.Next()
	}
	return a.String()
}

func checkAttachments(t *testing.T, tx store.ReadTx, hold func(what, by string)) {
	nodes, networks := 0, 0
	for _, a := range tx.Attachments() {
		for _, n := range a.Networks {
			for _, p := range []string{n.Addr4, n.Addr6} {
				if p != "" {
					hold(fmt.Sprint(n.NetworkId, " ", netip.MustParsePrefix(p).Addr()), a.Id)
				}
			}
			if tx.Network(n.NetworkId) == nil {
				t.Fatalf("container %s is on network %s, which is gone", a.Id, n.NetworkId)
			}
			networks++
		}
		if len(a.Networks) == 0 || tx.Node(a.NodeId) == nil {
			t.Fatalf("container %s has no network or no node", a.Id)
		}
		if a.Gateway4 != "" {
			hold("gateway "+a.Gateway4, a.Id)
		}
	}
	for _, n := range tx.Nodes() {
		nodes += len(tx.AttachmentsOfNode(n.Id))
	}
	for _, n := range tx.Networks() {
		networks -= len(tx.AttachmentsOfNetwork(n.Id))
	}
	if nodes != len(tx.Attachments()) || networks != 0 {
		t.Fatalf("%d containers, %d of them on nodes; %d more on networks than networks have", len(tx.Attachments()), nodes, networks)
	}
}
