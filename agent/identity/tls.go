package identity

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// ServerTLS is the configuration of this node's port: our newest certificate; clients may come without one (authz and transport decide
// what they may do then), but a certificate that is shown must be of this cluster.
func (i *Identity) ServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true, // a resumed session would outlive a removed node's certificate
		ClientAuth:             tls.VerifyClientCertIfGiven,
		ClientCAs:              i.pool,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &i.cur.Load().cert, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil
			}
			return i.verify(cs.PeerCertificates, x509.ExtKeyUsageClientAuth, "")
		},
	}
}

// ClientTLS is the configuration to reach another node with: it must show a certificate of this cluster and, unless role is empty, of
// that role. Addresses are not in certificates; whoever wants one certain node compares the peer's identity.
func (i *Identity) ClientTLS(role string) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // replaced by VerifyConnection: certificates name nodes, not hosts
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &i.cur.Load().cert, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			return i.verify(cs.PeerCertificates, x509.ExtKeyUsageServerAuth, role)
		},
	}
}

// verify checks that a chain's leaf is a node of this cluster with the given role (any, if empty).
func (i *Identity) verify(certs []*x509.Certificate, usage x509.ExtKeyUsage, role string) error {
	id, err := verifyPeer(i.pool, certs, usage, role)
	if err != nil {
		return err
	}
	if id.ClusterID != i.ClusterID() {
		return api.Errorf(errdefs.ErrUnauthenticated, "node %s is of cluster %s, we are of %s", id.NodeID, id.ClusterID, i.ClusterID())
	}
	return nil
}

func verifyPeer(pool *x509.CertPool, certs []*x509.Certificate, usage x509.ExtKeyUsage, role string) (api.NodeIdentity, error) {
	if len(certs) == 0 {
		return api.NodeIdentity{}, api.Errorf(errdefs.ErrUnauthenticated, "the other side shows no certificate")
	}
	if _, err := certs[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return api.NodeIdentity{}, fmt.Errorf("the other side's certificate is not of this cluster or out of date (compare the clocks): %w", err)
	}
	id, err := api.IdentityOf(certs[0])
	if err != nil {
		return api.NodeIdentity{}, err
	}
	if role != "" && id.Role != role {
		return api.NodeIdentity{}, api.Errorf(errdefs.ErrUnauthenticated, "node %s is a %s, want a %s", id.NodeID, id.Role, role)
	}
	return id, nil
}
