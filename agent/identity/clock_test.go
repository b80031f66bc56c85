package identity_test

import (
	"strings"
	"testing"
	"time"

	"skein/agent/identity"
	"skein/manager/api"
	"skein/manager/ca"
)

// Clocks may differ by an hour; by a year, the error says that they do.
func TestClocksDiffer(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for ahead, ok := range map[time.Duration]bool{-time.Hour: true, 59 * time.Minute: true, -year: false, year: false} {
		theirs := time.Now().Add(ahead)
		root, err := ca.NewRoot("c1", time.Now().Add(-2*year))
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
		cert, err := root.Issue(csr, id, theirs, ca.NodeCertLife)
		if err != nil {
			t.Fatal(err)
		}
		_, err = identity.Install(t.TempDir(), req, cert, nil)
		if ok != (err == nil) || !ok && !strings.Contains(err.Error(), "one of the clocks is wrong") {
			t.Errorf("manager's clock %v ahead: %v", ahead, err)
		}
	}
}
