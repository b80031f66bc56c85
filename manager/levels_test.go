package manager

import (
	"context"
	"testing"

	"skein/manager/api"
	"skein/manager/consensus"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

// The level that all managers know counts those that are members, and those that shall be; workers do not matter.
func TestLevelKnownToAll(t *testing.T) {
	s, _ := storetest.New()
	put := func(id, role string, level uint32) {
		_, err := s.Update(context.Background(), func(tx store.WriteTx) error {
			tx.Add(&api.Change{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id, Role: role, FeatureLevel: level}}})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	want := func(level uint32, peers ...string) {
		t.Helper()
		var members []consensus.Peer
		for _, p := range peers {
			members = append(members, consensus.Peer{ID: p})
		}
		s.View(func(tx store.ReadTx) {
			if got := knownToAll(tx, members, 5); got != level {
				t.Errorf("got level %d, want %d", got, level)
			}
		})
	}
	put("m1", api.RoleManager, 7)
	want(5, "m1")
	put("w1", api.RoleWorker, 0)
	want(5, "m1")
	want(1, "m1", "w1") // demoted, and still a member
	put("m2", api.RoleManager, 4)
	want(4, "m1")
	put("m3", api.RoleManager, 0)
	want(1, "m1", "m2")
	put("m3", api.RoleManager, 5)
	want(4, "m1", "m2", "m3")
}
