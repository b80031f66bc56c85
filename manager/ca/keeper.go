package ca

import (
	"bytes"
	"crypto/sha256"
	"encoding/pem"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
)

// gossipStep is how long nodes have to hear of a gossip key before the next step: sessions tell them within moments, those without one are
// told when they have one again, and can do without gossip until then. Twice this is what a removed node's key is still good for.
const gossipStep = 3 * time.Second

// Keeper is the controller of the cluster's keys: it ends the replacement of a root certificate when no node has a certificate under the
// old one any more, and takes the steps of replacing the gossip key. All it needs is in the store, so that the next leader goes on.
type Keeper struct{}

// NewKeeper returns a controller for one term.
func NewKeeper() loop.Controller { return Keeper{} }

// Name implements loop.Controller.
func (Keeper) Name() string { return "keys" }

// Kinds implements loop.Controller.
func (Keeper) Kinds() []store.Kind { return []store.Kind{store.KindCluster, store.KindNode} }

// Step implements loop.Controller.
func (Keeper) Step(view store.ReadTx, _ loop.Keys, now time.Time) (loop.Changes, time.Time) {
	old := view.Cluster()
	if old == nil {
		return nil, time.Time{}
	}
	c := proto.Clone(old).(*api.ClusterRecord)
	next := stepGossip(c, now)
	if until, done := rotated(view, now); done {
		finishRotation(c)
	} else if next.IsZero() || !until.IsZero() && until.Before(next) {
		next = until
	}
	if proto.Equal(c, old) {
		return nil, next
	}
	return loop.Changes{{
		Key: store.Key{Kind: store.KindCluster, ID: c.Id},
		Txn: &api.Txn{Changes: []*api.Change{
			{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "cluster", Id: c.Id, Version: old.Meta.GetVersion()}}},
			{Kind: &api.Change_PutCluster{PutCluster: c}},
		}},
	}}, next
}

// rotated tells whether a rotation that is under way has reached all nodes. Those that are away are waited for until their certificates,
// with which they could come back, have expired; until is that instant.
func rotated(view store.ReadTx, now time.Time) (until time.Time, done bool) {
	c := view.Cluster()
	if c.Rotation == nil {
		return time.Time{}, false
	}
	want := NewWanted(c)
	for _, n := range view.Nodes() {
		fresh := n.Tls == nil && n.Meta.GetCreated() > c.Rotation.Started // registered since, and not heard of yet
		if want.Has(n.Tls) || fresh {
			continue
		}
		end := c.Rotation.Until
		if said := n.Tls.GetNotAfter(); said > 0 && said < end {
			end = said
		}
		if at := time.Unix(0, end); now.Before(at) && at.After(until) {
			until = at
		}
	}
	return until, until.IsZero()
}

// finishRotation makes the new root the only one. The tokens are those of the new root; limited ones, whose digest is that of the old one,
// end.
func finishRotation(c *api.ClusterRecord) {
	rot := c.Rotation
	c.CaCertPem, c.CaKeyPem, c.WorkerToken, c.ManagerToken = rot.CertPem, rot.KeyPem, rot.WorkerToken, rot.ManagerToken
	c.Rotation, c.LimitedTokens = nil, nil
}

// Wanted is what a node's certificate and trust should be.
type Wanted struct {
	subject, key []byte
	trust        [][]byte
}

// NewWanted reads a cluster's record.
func NewWanted(c *store.Cluster) Wanted {
	w := Wanted{}
	w.subject, w.key = Issuer(c)
	for rest := TrustOf(c); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return w
		}
		sum := sha256.Sum256(b.Bytes)
		w.trust = append(w.trust, sum[:])
	}
}

// Has reports whether a node's certificate is of the authority that signs now, and the node knows its root.
func (w Wanted) Has(t *api.NodeTLS) bool {
	return w.Issued(t) && contains(t.GetTrust(), w.trust[len(w.trust)-1])
}

// Issued reports whether a node's certificate is of the authority that signs now.
func (w Wanted) Issued(t *api.NodeTLS) bool {
	return len(w.trust) > 0 && len(w.key) > 0 && bytes.Equal(t.GetIssuerKey(), w.key) && bytes.Equal(t.GetIssuerSubject(), w.subject)
}

func contains(list [][]byte, b []byte) bool {
	for _, x := range list {
		if bytes.Equal(x, b) {
			return true
		}
	}
	return false
}

// RotateGossip begins to replace the key of memberlist's packets with a fresh one, because a node that knows the present one was removed.
func RotateGossip(c *api.ClusterRecord, fresh []byte, now time.Time) {
	if c.GossipRotation == nil {
		c.GossipRotation = &api.GossipRotation{}
	}
	c.GossipRotation.Next, c.GossipRotation.Changed = fresh, now.UnixNano()
}

// GossipKeys are the keys that nodes accept; the first is the one they use.
func GossipKeys(c *store.Cluster) [][]byte {
	keys := [][]byte{c.GossipKey}
	for _, k := range [][]byte{c.GossipRotation.GetNext(), c.GossipRotation.GetLast()} {
		if len(k) > 0 {
			keys = append(keys, k)
		}
	}
	return keys
}

// stepGossip takes the next step when its time has come, and returns when that will be; zero: never.
func stepGossip(c *api.ClusterRecord, now time.Time) time.Time {
	g := c.GossipRotation
	if g == nil {
		return time.Time{}
	}
	due := time.Unix(0, g.Changed).Add(gossipStep)
	if due.Sub(now) > gossipStep { // the clock of the leader before us was ahead
		g.Changed, due = now.UnixNano(), now.Add(gossipStep)
	}
	switch {
	case now.Before(due):
		return due
	case len(g.Next) > 0:
		c.GossipKey, g.Last, g.Next, g.Changed = g.Next, c.GossipKey, nil, now.UnixNano()
		return now.Add(gossipStep)
	}
	c.GossipRotation = nil
	return time.Time{}
}
