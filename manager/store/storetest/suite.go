package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/store"
)

// TestProposer checks what every Proposer owes the store. make returns an empty store that takes writes.
func TestProposer(t *testing.T, make func(*testing.T) *store.Store) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	for _, c := range []struct {
		name string
		test func(context.Context, *testing.T, *store.Store)
	}{
		{"results in order", resultsInOrder},
		{"applied when acknowledged", appliedWhenAcknowledged},
		{"cancelled", cancelled},
		{"concurrent", concurrent},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(ctx, t, make(t)) })
	}
}

func putNode(id string) *api.Txn {
	return &api.Txn{Changes: []*api.Change{
		{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "node", Id: id}}},
		{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id, Hostname: id}}},
	}}
}

func has(s *store.Store, id string) (has bool) {
	s.View(func(tx store.ReadTx) { has = tx.Node(id) != nil })
	return has
}

func resultsInOrder(ctx context.Context, t *testing.T, s *store.Store) {
	_, results, err := s.Batch(ctx, []*api.Txn{putNode("a"), putNode("a"), putNode("b")})
	if err != nil || len(results) != 3 || results[0] != nil || !errdefs.IsAlreadyExists(results[1]) || results[2] != nil {
		t.Errorf("got %v, %v", results, err)
	}
}

func appliedWhenAcknowledged(ctx context.Context, t *testing.T, s *store.Store) {
	last := uint64(0)
	for i := range 20 {
		id := fmt.Sprint("n", i)
		version, _, err := s.Batch(ctx, []*api.Txn{putNode(id)})
		if err != nil {
			t.Fatal(err)
		}
		if !has(s, id) || version <= last || s.Version() < version {
			t.Errorf("write %d acknowledged at version %d after %d; the store is at %d", i, version, last, s.Version())
		}
		last = version
	}
}

func cancelled(ctx context.Context, t *testing.T, s *store.Store) {
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, _, err := s.Batch(ctx, []*api.Txn{putNode("a")}); !errors.Is(err, context.Canceled) || has(s, "a") {
		t.Errorf("got %v", err)
	}
}

func concurrent(ctx context.Context, t *testing.T, s *store.Store) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for range 32 {
		wg.Go(func() {
			_, results, err := s.Batch(ctx, []*api.Txn{putNode("the-one")})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				t.Errorf("got %v", err)
			case results[0] == nil:
				won++
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d of 32 writers made the same object", won)
	}
}
