package store_test

import (
	"fmt"
	"testing"

	"skein/manager/api"
	"skein/manager/store"
)

func TestWatchCoalesces(t *testing.T) {
	c := newCluster(t)
	w := c.Watch(store.KindTask)
	defer w.Close()
	c.do(putNode("n1", "host1"), putService("s1", spec("app")))
	select {
	case <-w.C():
		t.Error("woken for a kind it does not watch")
	default:
	}
	c.do(createTask("s1", 1, 1, "", 1), createTask("s1", 1, 2, "", 1))
	id := api.TaskID("s1", 1, "", 1)
	c.do(place(id, "n1"))
	<-w.C()
	keys, overflow := w.Take()
	if overflow || len(keys) != 2 {
		t.Fatalf("keys %v, overflow %v", keys, overflow)
	}
	if want := (store.Key{Kind: store.KindTask, ID: id, ServiceID: "s1", Slot: 1, NodeID: "n1"}); keys[0] != want {
		t.Errorf("got key %+v, want %+v", keys[0], want)
	}
	if keys, overflow := w.Take(); len(keys) != 0 || overflow {
		t.Errorf("taken twice: %v %v", keys, overflow)
	}
	before := c.Version()
	c.do(desire(api.TaskRunning, id)) // says nothing new
	if c.Version() == before {
		t.Fatal("no entry")
	}
	if keys, _ := w.Take(); len(keys) != 0 {
		t.Errorf("keys of an entry that changed nothing: %v", keys)
	}
}

func TestWatchOverflow(t *testing.T) {
	c := newCluster(t)
	w := c.Watch()
	defer w.Close()
	const perEntry = 4096
	for base := 0; base <= 1<<16; base += perEntry {
		var changes []*api.Change
		for i := range perEntry {
			changes = append(changes, putCluster(&api.ClusterRecord{Id: "c1"}))
			if base == 0 && i == 0 {
				changes = append(changes, putService("s1", spec("app")))
			}
			changes = append(changes, createTask("s1", 1, uint64(base+i+1), "", 1))
		}
		c.do(changes...)
	}
	<-w.C()
	if keys, overflow := w.Take(); !overflow || len(keys) != 0 {
		t.Errorf("%d keys, overflow %v", len(keys), overflow)
	}
	c.do(desire(api.TaskRemove, api.TaskID("s1", 1, "", 1)))
	<-w.C()
	if keys, overflow := w.Take(); overflow || len(keys) != 1 {
		t.Errorf("after the overflow: %v, overflow %v", keys, overflow)
	}
}

func TestWatchBoundGrowsWithTasks(t *testing.T) {
	c := newCluster(t)
	const tasks, perEntry = 150_000, 5000
	each := func(n int, change func(slot uint64) *api.Change) {
		for base := 0; base < n; base += perEntry {
			var changes []*api.Change
			for i := range perEntry {
				changes = append(changes, change(uint64(base+i+1)))
			}
			c.do(changes...)
		}
	}
	c.do(putCluster(&api.ClusterRecord{Id: "c1"}), putService("s1", spec("app")))
	each(tasks, func(slot uint64) *api.Change { return createTask("s1", 1, slot, "", 1) })
	w := c.Watch()
	defer w.Close()
	each(70_000, func(slot uint64) *api.Change { return desire(api.TaskShutdown, api.TaskID("s1", slot, "", 1)) })
	if keys, overflow := w.Take(); overflow || len(keys) != 70_000 {
		t.Errorf("less than half of the tasks changed: %d keys, overflow %v", len(keys), overflow)
	}
	each(80_000, func(slot uint64) *api.Change { return desire(api.TaskRemove, api.TaskID("s1", slot, "", 1)) })
	if keys, overflow := w.Take(); !overflow || len(keys) != 0 {
		t.Errorf("more than half changed: %d keys, overflow %v", len(keys), overflow)
	}
}

func TestFind(t *testing.T) {
	c := newCluster(t)
	c.do(putNode("abc1", "host1"), putNode("abd2", "host2"), putNode("xyz3", "twin"), putNode("xyz4", "twin"), network("net"))
	c.do(putService("svc1", spec("web.front")), putService("svc2", spec("svc1x")), createTask("svc1", 1, 7, "", 1), createTask("svc2", 1, 0, "abc1", 1))
	slot, global := api.TaskID("svc1", 7, "", 1), api.TaskID("svc2", 0, "abc1", 1)
	node := func(tx store.ReadTx, ref string) (string, error) {
		n, err := tx.FindNode(ref)
		if err != nil {
			return "", err
		}
		return n.Id, nil
	}
	service := func(tx store.ReadTx, ref string) (string, error) {
		n, err := tx.FindService(ref)
		if err != nil {
			return "", err
		}
		return n.Id, nil
	}
	net := func(tx store.ReadTx, ref string) (string, error) {
		n, err := tx.FindNetwork(ref)
		if err != nil {
			return "", err
		}
		return n.Id, nil
	}
	task := func(tx store.ReadTx, ref string) (string, error) {
		n, err := tx.FindTask(ref)
		if err != nil {
			return "", err
		}
		return n.ID, nil
	}
	for _, k := range []struct {
		find func(store.ReadTx, string) (string, error)
		ref  string
		want string
		err  string
	}{
		{node, "abc1", "abc1", ""},
		{node, "host2", "abd2", ""},
		{node, "abd", "abd2", ""},
		{node, "ab", "", "node ab is ambiguous (2 matches found)"},
		{node, "twin", "", "node twin is ambiguous (2 matches found)"},
		{node, "nope", "", "node nope not found"},
		{node, "", "", "node  not found"},
		{service, "svc1", "svc1", ""}, // an id goes before a prefix and a name
		{service, "web.front", "svc1", ""},
		{service, "svc1x", "svc2", ""},
		{service, "svc", "", "service svc is ambiguous (2 matches found)"},
		{net, "net-net", "net", ""},
		{net, "ne", "net", ""},
		{task, slot, slot, ""},
		{task, slot[:12], slot, ""},
		{task, "web.front.7", slot, ""},
		{task, "web.front.7." + slot, slot, ""},
		{task, "svc1x.abc1", global, ""},
		{task, "web.front.8", "", "task web.front.8 not found"},
	} {
		c.View(func(tx store.ReadTx) {
			got, err := k.find(tx, k.ref)
			if text := fmt.Sprint(err); got != k.want || (k.err == "") != (err == nil) || (err != nil && text != k.err) {
				t.Errorf("find %q: got %q, %v, want %q, %s", k.ref, got, err, k.want, k.err)
			}
		})
	}
}
