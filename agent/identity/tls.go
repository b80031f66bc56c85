package identity

import (
	"crypto/tls"
	"crypto/x509"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// ServerTLS is the configuration of this node's port: our newest certificate; clients may come without one (authz and transport decide
// what they may do then), but a certificate that is shown must be of this cluster, according to the roots that are believed at the time.
func (i *Identity) ServerTLS() *tls.Config {
	c := i.trust.Load().server.Clone()
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return i.trust.Load().server, nil }
	return c
}

func (i *Identity) serverTLS(t *trust) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{api.ALPNGRPC, api.ALPNRaft, api.ALPNGossip},
		SessionTicketsDisabled: true, // a resumed session would outlive a removed node's certificate
		ClientAuth:             tls.VerifyClientCertIfGiven,
		ClientCAs:              t.pool,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &i.cur.Load().cert.Certificate, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil
			}
			return i.verify(t, cs.PeerCertificates, x509.ExtKeyUsageClientAuth, "")
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
			return i.Certificate(), nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			return i.verify(i.trust.Load(), cs.PeerCertificates, x509.ExtKeyUsageServerAuth, role)
		},
	}
}

// Certificate is this node's newest certificate, with its key.
func (i *Identity) Certificate() *tls.Certificate { return &i.cur.Load().cert.Certificate }

// verify checks that a chain's leaf is a node of this cluster with the given role (any, if empty).
func (i *Identity) verify(t *trust, certs []*x509.Certificate, usage x509.ExtKeyUsage, role string) error {
	id, err := verifyPeer(t, certs, usage, role)
	if err != nil {
		return err
	}
	if id.ClusterID != i.ClusterID() {
		return api.Errorf(errdefs.ErrUnauthenticated, "node %s is of cluster %s, we are of %s", id.NodeID, id.ClusterID, i.ClusterID())
	}
	return nil
}
