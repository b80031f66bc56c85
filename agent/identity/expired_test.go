package identity_test

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"skein/agent/identity"
	"skein/manager/api"
	"skein/manager/ca"
)

// A node that was away for longer than its certificate is good is told so, and how to come back.
func TestExpired(t *testing.T) {
	dir, began := t.TempDir(), time.Now().Add(-100*24*time.Hour)
	root, err := ca.NewRoot("c1", began)
	if err != nil {
		t.Fatal(err)
	}
	req, err := identity.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := ca.ParseRequest(req.CSRPEM)
	if err != nil {
		t.Fatal(err)
	}
	id := api.NodeIdentity{NodeID: api.NodeIDFor("c1", csr.RawSubjectPublicKeyInfo), Role: api.RoleWorker, ClusterID: "c1"}
	short, err := root.Issue(csr, id, time.Now().Add(-24*time.Hour+2*time.Second), 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.Install(dir, req, short, []byte("key")); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		_, err = identity.Load(dir, nil)
		if err != nil || time.Now().After(end) {
			break
		}
	}
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "expired on") || !strings.Contains(err.Error(), `"docker swarm leave --force"`) {
		t.Errorf("load: %v", err)
	}
}
