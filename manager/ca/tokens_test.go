package ca_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// limited adds a token.
func (f *fixture) limited(t *testing.T, l *api.LimitedToken) string {
	t.Helper()
	token := api.NewJoinToken(mustDER(t, f.cluster().CaCertPem)).String()
	sum := sha256.Sum256([]byte(token))
	l.SecretSha256 = sum[:]
	c := proto.Clone(f.cluster()).(*api.ClusterRecord)
	c.LimitedTokens = append(c.LimitedTokens, l)
	f.put(t, c)
	return token
}

func (f *fixture) used(id string) uint64 {
	for _, l := range f.cluster().LimitedTokens {
		if l.Id == id {
			return l.Used
		}
	}
	return 0
}

func TestLimitedTokens(t *testing.T) {
	f := setup(t)
	two := f.limited(t, &api.LimitedToken{Id: "two", Role: api.RoleWorker, Uses: 2})
	old := f.limited(t, &api.LimitedToken{Id: "old", Role: api.RoleManager, Expires: f.now.Add(time.Hour).UnixNano()})
	out := f.limited(t, &api.LimitedToken{Id: "out", Role: api.RoleWorker, Uses: 9, Revoked: f.now.UnixNano()})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	first, err := f.srv.IssueCertificate(from("192.0.2.1"), request(t, key, two))
	if err != nil || first.Role != api.RoleWorker {
		t.Fatal(first, err)
	}
	if m, err := f.srv.IssueCertificate(from("192.0.2.1"), request(t, nil, old)); err != nil || m.Role != api.RoleManager {
		t.Fatal(m, err)
	}
	for range 3 { // the answer was lost, the node asks again
		again, err := f.srv.IssueCertificate(from("192.0.2.1"), request(t, key, two))
		if err != nil || again.NodeId != first.NodeId || f.used("two") != 1 {
			t.Fatalf("the same node again: %v, used %d times", err, f.used("two"))
		}
	}
	if _, err := f.srv.IssueCertificate(from("192.0.2.1"), request(t, nil, two)); err != nil || f.used("two") != 2 {
		t.Fatalf("second node: %v, used %d times", err, f.used("two"))
	}
	if _, err := f.srv.IssueCertificate(from("192.0.2.1"), request(t, key, two)); err != nil {
		t.Errorf("a node that was let in cannot ask for its certificate once more: %v", err)
	}
	f.now = f.now.Add(time.Hour)
	for token, why := range map[string]string{two: "it is used up", old: "it expired on", out: "it was revoked on"} {
		nodes := len(f.nodes())
		_, err := f.srv.IssueCertificate(from("192.0.2.1"), request(t, nil, token))
		if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), why) || strings.Contains(err.Error(), token) || len(f.nodes()) != nodes {
			t.Errorf("%v, want %q; nodes %d", err, why, len(f.nodes()))
		}
	}
	// A used-up token does not keep good nodes out: it is no guess.
	for range 50 {
		_, _ = f.srv.IssueCertificate(from("192.0.2.1"), request(t, nil, two))
	}
	if _, err := f.srv.IssueCertificate(from("192.0.2.1"), request(t, nil, f.cluster().WorkerToken)); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	// A removed node is a new one to a token.
	_, err = f.store.Update(t.Context(), func(tx store.WriteTx) error {
		tx.Add(&api.Change{Kind: &api.Change_DeleteNode{DeleteNode: first.NodeId}})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.srv.IssueCertificate(from("192.0.2.1"), request(t, key, two)); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a removed node came back with a used-up token: %v", err)
	}
}

// Many nodes at once use a token as often as it says, not once more.
func TestLimitedTokenInARush(t *testing.T) {
	f := setup(t)
	token := f.limited(t, &api.LimitedToken{Id: "five", Role: api.RoleWorker, Uses: 5})
	var wg sync.WaitGroup
	results := make(chan error, 40)
	for range 20 {
		r := request(t, nil, token)
		for range 2 { // each sends its request twice
			wg.Go(func() {
				_, err := f.srv.IssueCertificate(from("192.0.2.1"), r)
				results <- err
			})
		}
	}
	wg.Wait()
	close(results)
	for err := range results {
		if err != nil && !strings.Contains(err.Error(), "used up") {
			t.Error(err)
		}
	}
	if len(f.nodes()) != 5 || f.used("five") != 5 {
		t.Errorf("%d nodes joined, used %d times, want 5", len(f.nodes()), f.used("five"))
	}
}
