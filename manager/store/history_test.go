package store_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"skein/manager/api"
	"skein/manager/store"
)

func put(author, note, id string, spec []byte) *api.Change {
	return &api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: id, SpecJson: spec, Author: author, Note: note}}}
}

func (c *cluster) revisions(id string) (out []*api.Revision) {
	c.View(func(tx store.ReadTx) {
		tx.Revisions(id, func(r *api.Revision) bool {
			out = append(out, r)
			return true
		})
	})
	return out
}

func (c *cluster) level(n uint32) {
	c.do(putCluster(&api.ClusterRecord{Id: "c1", UlaPrefix: "fd12:3456:789a::/48", FeatureLevel: n}))
}

func TestRevisionsAreKept(t *testing.T) {
	c := newCluster(t)
	c.level(api.FeatureLevel)
	var want [][]byte
	for i := range 40 {
		b := spec("app", image(fmt.Sprintf("app:%d", i*i*i)))
		if i%7 == 3 {
			b = spec("app", image(fmt.Sprintf("app:%d", i)), publish(uint32(i), 0, ""), on("none"))
		}
		want = append(want, b)
		c.clock.advance(time.Second)
		c.do(put(fmt.Sprint("node n", i), fmt.Sprint("note ", i), "s1", b))
		c.do(put("nobody", "nothing changed", "s1", b))
		c.do(putService("s2", spec("other", image(fmt.Sprint("v", i)))))
	}
	got := c.revisions("s1")
	if len(got) != len(want) {
		t.Fatalf("%d revisions are kept of %d", len(got), len(want))
	}
	for i, r := range got {
		n := len(want) - 1 - i
		at := time.Unix(1_800_000_000, 0).Add(time.Duration(n+1) * time.Second).UnixNano()
		if r.Number != uint64(n+1) || !bytes.Equal(r.SpecJson, want[n]) || r.Author != fmt.Sprint("node n", n) || r.Note != fmt.Sprint("note ", n) || r.Created != at {
			t.Errorf("revision %d: got %v, want spec %s at %d", n+1, r, want[n], at)
		}
	}
	if svc := c.service("s1"); svc.Author != "" || svc.Note != "" || len(svc.ServiceRecord.Revisions) != 2 {
		t.Errorf("record %v", svc.ServiceRecord)
	}
	c.sameAfterRestore()
	c.do(deleteService("s1"), putService("s1", spec("app")))
	if got := c.revisions("s1"); len(got) != 1 {
		t.Errorf("the service that was removed left %d revisions to its successor", len(got)-1)
	}
	c.sameAfterRestore()
}

func TestRevisionsAreBoundedBySize(t *testing.T) {
	c := newCluster(t)
	c.level(api.FeatureLevel)
	for i := range 12 {
		big := bytes.Repeat([]byte{'a' + byte(i)}, 500_000)
		c.do(put("n", "", "s1", spec("app", image(string(big)))))
	}
	got := c.revisions("s1")
	if len(got) != 9 || got[8].Number != 4 { // the current one, and 4 MiB of others
		t.Errorf("%d revisions are kept, the oldest is %d", len(got), got[len(got)-1].Number)
	}
	c.sameAfterRestore()
}

func TestNoHistoryBelowItsLevel(t *testing.T) {
	c := newCluster(t)
	c.level(1)
	c.do(putNode("n1", "host1"))
	c.do(&api.Change{Kind: &api.Change_NodeStatus{NodeStatus: &api.NodeStatus{NodeId: "n1", State: "ready"}}})
	for i := range 4 {
		rec := put("n", "note", "s1", spec("app", image(fmt.Sprint("v", i))))
		rec.GetPutService().ForgetPrevious = true
		c.do(rec)
	}
	got := c.revisions("s1")
	if len(got) != 1 || got[0].Author != "" || c.service("s1").Previous == nil {
		t.Errorf("a manager of before could not follow: %v", got)
	}
	var since int64
	c.View(func(tx store.ReadTx) { since = tx.Node("n1").Status.Since })
	if since != 0 {
		t.Errorf("a manager of before does not know since when the node is ready")
	}
	c.level(api.FeatureLevel)
	c.do(put("n", "note", "s1", spec("app", image("v9"))))
	if got := c.revisions("s1"); len(got) != 2 || got[0].Author != "n" {
		t.Errorf("revisions %v", got)
	}
	c.sameAfterRestore()
}

// A refused transaction leaves no revision behind.
func TestRefusedRevision(t *testing.T) {
	c := newCluster(t)
	c.level(api.FeatureLevel)
	c.do(put("n", "", "s1", spec("app")))
	if err := c.try(put("n", "", "s1", spec("app", image("v2"))), expect("service", "s1", 12345)); err == nil {
		t.Fatal("applied")
	}
	if got := c.revisions("s1"); len(got) != 1 {
		t.Errorf("revisions %v", got)
	}
	c.sameAfterRestore()
}

func TestStatusSince(t *testing.T) {
	c := newCluster(t)
	c.level(api.FeatureLevel)
	c.do(putNode("n1", "host1"))
	since := func() (at int64) {
		c.View(func(tx store.ReadTx) { at = tx.Node("n1").Status.GetSince() })
		return at
	}
	say := func(state, text string) {
		c.clock.advance(time.Minute)
		c.do(&api.Change{Kind: &api.Change_NodeStatus{NodeStatus: &api.NodeStatus{NodeId: "n1", State: state, Message: text}}})
	}
	say("ready", "")
	say("down", "silent")
	at := c.clock.now.UnixNano()
	say("down", "still silent")
	c.clock.advance(time.Minute)
	c.do(putNode("n1", "host1"))
	if since() != at {
		t.Errorf("down since %d, want %d", since(), at)
	}
	say("ready", "")
	if since() != c.clock.now.UnixNano() {
		t.Error("not ready since now")
	}
}
