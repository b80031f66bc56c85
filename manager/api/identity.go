package api

import (
	"crypto/sha256"
	"crypto/x509"
	"strings"

	"github.com/containerd/errdefs"
)

// The roles of a node, as the store names them.
const (
	RoleManager = "manager"
	RoleWorker  = "worker"
)

// certRolePrefix makes roles recognisable in certificates: OU "skein-manager".
const certRolePrefix = "skein-"

// The protocols of the node-to-node listener, by ALPN.
const (
	ALPNGRPC   = "h2"
	ALPNRaft   = "skein-raft"
	ALPNGossip = "skein-gossip"
)

// ValidRole reports whether role is one of the two.
func ValidRole(role string) bool { return role == RoleManager || role == RoleWorker }

// CertRole is the organisational unit that stands for a role.
func CertRole(role string) string { return certRolePrefix + role }

// NodeIdentity is what a node's certificate says: CN, OU and O of its subject.
type NodeIdentity struct {
	NodeID    string
	Role      string
	ClusterID string
}

// IdentityOf reads a node certificate's subject. The certificate must have been verified against the cluster's root by the caller.
func IdentityOf(cert *x509.Certificate) (NodeIdentity, error) {
	s := cert.Subject
	if len(s.OrganizationalUnit) != 1 || len(s.Organization) != 1 || !ValidID(s.CommonName) {
		return NodeIdentity{}, Errorf(errdefs.ErrUnauthenticated, "certificate %q is no node certificate: want one CN (node id), one OU (role), one O (cluster id)", s.String())
	}
	role, ok := strings.CutPrefix(s.OrganizationalUnit[0], certRolePrefix)
	if !ok || !ValidRole(role) {
		return NodeIdentity{}, Errorf(errdefs.ErrUnauthenticated, "certificate of node %s has unknown role %q", s.CommonName, s.OrganizationalUnit[0])
	}
	return NodeIdentity{NodeID: s.CommonName, Role: role, ClusterID: s.Organization[0]}, nil
}

// NodeIDFor derives a node's ID from its first public key, so that a join that is sent again (its answer was lost, or it was recorded and
// replayed) is the same node and not a second one.
func NodeIDFor(clusterID string, publicKeyDER []byte) string {
	h := sha256.New()
	h.Write([]byte("skein node id\x00" + clusterID + "\x00"))
	h.Write(publicKeyDER)
	return idFrom(h.Sum(nil)[:17])
}

// ValidID reports whether s has the form of an object ID.
func ValidID(s string) bool {
	if len(s) != idLength {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return true
}
