package manager

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

func put(t *testing.T, st *store.Store, changes ...*api.Change) {
	t.Helper()
	_, err := st.Update(t.Context(), func(tx store.WriteTx) error {
		for _, c := range changes {
			tx.Add(c)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func cluster(removed ...string) *api.Change {
	c := &api.ClusterRecord{Id: "cluster", SpecJson: []byte("{}"), OverlayPool: DefaultOverlayPool, MeshPool: DefaultMeshPool, OverlayBits: DefaultOverlayBits, DataPort: DefaultDataPort}
	for _, id := range removed {
		c.Removed = append(c.Removed, &api.RemovedNode{NodeId: id, Until: time.Now().Add(time.Hour).UnixNano()})
	}
	return &api.Change{Kind: &api.Change_PutCluster{PutCluster: c}}
}

func node(id, role string) *api.Change {
	return &api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id, Role: role, Hostname: id}}}
}

func TestRaftStreamsFollowTheStore(t *testing.T) {
	st, _ := storetest.New()
	m := &Manager{cfg: Config{ClusterID: "cluster"}, store: st, changed: make(chan struct{})}
	id := func(node, role, cluster string) api.NodeIdentity {
		return api.NodeIdentity{NodeID: node, Role: role, ClusterID: cluster}
	}
	outsider := true
	check := func(when string, who api.NodeIdentity, want bool) {
		t.Helper()
		if err := m.mayStream(who, outsider); (err == nil) != want || (err != nil && !errdefs.IsPermissionDenied(err)) {
			t.Errorf("%s: %+v: %v, want admitted %v", when, who, err, want)
		}
	}
	check("empty store", id("m1", api.RoleManager, "cluster"), true)
	check("empty store", id("w1", api.RoleWorker, "cluster"), false)
	check("empty store", id("m1", api.RoleManager, "another"), false)
	check("empty store", api.NodeIdentity{}, false)
	put(t, st, cluster("gone"), node("m1", api.RoleManager), node("demoted", api.RoleWorker))
	check("full store", id("m1", api.RoleManager, "cluster"), true)
	check("full store", id("m1", api.RoleWorker, "cluster"), false)
	check("full store", id("demoted", api.RoleManager, "cluster"), false)
	check("full store", id("gone", api.RoleManager, "cluster"), false)
	check("full store", id("newer", api.RoleManager, "cluster"), true) // we may lag behind
	outsider = false                                                   // still in the group, or no leader tells us that it is not
	check("in the group", id("demoted", api.RoleManager, "cluster"), true)
	check("in the group", id("demoted", api.RoleWorker, "cluster"), false)
	check("in the group", id("gone", api.RoleManager, "cluster"), false)
}

func as(id, role string) api.NodeIdentity {
	return api.NodeIdentity{NodeID: id, Role: role, ClusterID: "cluster"}
}

// A manager that was promoted a moment ago has its certificate before every store knows.
func TestRoleWaitsForAPromotion(t *testing.T) {
	st, _ := storetest.New()
	m := &Manager{cfg: Config{ClusterID: "cluster"}, store: st, changed: make(chan struct{})}
	put(t, st, cluster(), node("n1", api.RoleWorker))
	if role, err := m.role(t.Context(), as("n1", api.RoleWorker)); err != nil || role != api.RoleWorker {
		t.Errorf("as a worker: %q, %v, want worker at once", role, err)
	}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if role, err := m.role(short, as("n1", api.RoleManager)); err != nil || role != api.RoleWorker {
		t.Errorf("demoted: %q, %v, want worker in the end", role, err)
	}
	got := make(chan string, 1)
	go func() {
		role, err := m.role(t.Context(), as("n1", api.RoleManager))
		if err != nil {
			t.Error(err)
		}
		got <- role
	}()
	put(t, st, node("n1", api.RoleManager))
	if role := <-got; role != api.RoleManager {
		t.Errorf("promoted: %q, want manager", role)
	}
}

func TestRoleWaitsForTheStore(t *testing.T) {
	st, _ := storetest.New()
	m := &Manager{cfg: Config{ClusterID: "cluster"}, store: st, changed: make(chan struct{})}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := m.role(short, as("n1", api.RoleWorker)); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no leader elected") {
		t.Errorf("nothing known: %v, want unavailable", err)
	}
	type answer struct {
		role string
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		r, err := m.role(t.Context(), as("n1", api.RoleWorker))
		got <- answer{r, err}
	}()
	put(t, st, cluster("gone"))
	put(t, st, node("n1", api.RoleWorker))
	if a := <-got; a.err != nil || a.role != api.RoleWorker {
		t.Errorf("known after a moment: %+v, want worker", a)
	}
	if _, err := m.role(t.Context(), as("gone", api.RoleManager)); !errdefs.IsPermissionDenied(err) {
		t.Errorf("removed: %v, want denied at once", err)
	}
}
