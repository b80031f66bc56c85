package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// authority is what signs now, according to a cluster's record.
type authority struct {
	root     *Root              // what new certificates are under
	chain    []byte             // PEM to show behind a leaf: the root's cross-signed certificate, if others may not know the root yet
	trust    []byte             // PEM of all roots that nodes trust now
	external []swarm.ExternalCA // of this root, in the order to be asked; empty: the key is here
	life     time.Duration
}

// authorityOf reads a cluster's record.
func authorityOf(c *store.Cluster) (*authority, error) {
	a := &authority{trust: TrustOf(c), life: NodeCertLife}
	var err error
	if rot := c.Rotation; rot != nil {
		a.chain = rot.CrossPem
		a.root, err = ParseRoot(rot.CertPem, rot.KeyPem)
	} else {
		a.root, err = ParseRoot(c.CaCertPem, c.CaKeyPem)
	}
	if err != nil {
		return nil, api.Errorf(errdefs.ErrDataLoss, "cluster %s: %v", c.Id, err)
	}
	var spec swarm.Spec
	if err := json.Unmarshal(c.SpecJson, &spec); err != nil {
		return nil, api.Errorf(errdefs.ErrDataLoss, "cluster %s: its spec is not JSON: %v", c.Id, err)
	}
	if spec.CAConfig.NodeCertExpiry != 0 {
		a.life = spec.CAConfig.NodeCertExpiry
	}
	a.external = externalsOf(spec.CAConfig.ExternalCAs, a.root.cert, c.Rotation == nil)
	return a, nil
}

// externalsOf are the external authorities that sign for a root: those that name its certificate, and if it is the current one, also those
// that name none.
func externalsOf(list []*swarm.ExternalCA, root *x509.Certificate, current bool) []swarm.ExternalCA {
	var out []swarm.ExternalCA
	for _, e := range list {
		if e == nil {
			continue
		}
		if e.CACert == "" && current || e.CACert != "" && samePEM([]byte(e.CACert), root) {
			out = append(out, *e)
		}
	}
	return out
}

func samePEM(certPEM []byte, cert *x509.Certificate) bool {
	b, _ := pem.Decode(certPEM)
	return b != nil && bytes.Equal(b.Bytes, cert.Raw)
}

// TrustOf is the PEM of the roots that nodes of a cluster trust: the current one first, then the one that replaces it.
func TrustOf(c *store.Cluster) []byte {
	if c.Rotation == nil {
		return c.CaCertPem
	}
	return slices.Concat(c.CaCertPem, c.Rotation.CertPem)
}

// Issuer is who signs a cluster's certificates now: subject and public key of the current root, or of the one that replaces it, in DER.
func Issuer(c *store.Cluster) (subject, key []byte) {
	p := c.CaCertPem
	if c.Rotation != nil {
		p = c.Rotation.CertPem
	}
	if b, _ := pem.Decode(p); b != nil {
		if cert, err := x509.ParseCertificate(b.Bytes); err == nil {
			return cert.RawSubject, cert.RawSubjectPublicKeyInfo
		}
	}
	return nil, nil
}

// sign issues a certificate: with the root's key, or by asking the external authorities. It returns leaf and root in PEM.
func (a *authority) sign(ctx context.Context, ext *External, csr *x509.CertificateRequest, id api.NodeIdentity, now time.Time) ([]byte, error) {
	if len(a.external) == 0 {
		if a.root.key == nil {
			return nil, api.Errorf(errdefs.ErrFailedPrecondition, "issue certificate for node %s: the key of the root certificate is not here and no external certificate authority is named: name one with \"docker swarm update --external-ca\", or replace the root with \"docker swarm ca --rotate\"", id.NodeID)
		}
		return a.root.Issue(csr, id, now, a.life)
	}
	leaf, err := ext.sign(ctx, a.trust, a.external, leafRequest(csr, id))
	if err != nil {
		return nil, fmt.Errorf("issue certificate for node %s: %w", id.NodeID, err)
	}
	if err := a.check(leaf, csr.PublicKey, id, now); err != nil {
		return nil, api.Errorf(errdefs.ErrUnavailable, "issue certificate for node %s: the external certificate authority's answer cannot be used: %v", id.NodeID, err)
	}
	return append(certPEM(leaf.Raw), a.root.CertPEM()...), nil
}

// check refuses a certificate that is not what was asked for: an external authority may be set up wrongly.
func (a *authority) check(leaf *x509.Certificate, key crypto.PublicKey, id api.NodeIdentity, now time.Time) error {
	if pub, ok := key.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(leaf.PublicKey) {
		return fmt.Errorf("the certificate is for another key than the request's")
	}
	got, err := api.IdentityOf(leaf)
	if err != nil {
		return err
	}
	if got != id {
		return fmt.Errorf("the certificate names node %s, role %s, cluster %s; want node %s, role %s, cluster %s", got.NodeID, got.Role, got.ClusterID, id.NodeID, id.Role, id.ClusterID)
	}
	if leaf.IsCA {
		return fmt.Errorf("the certificate is that of an authority")
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.root.cert)
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use}}); err != nil {
			return fmt.Errorf("it is not good under the cluster's root certificate %q for both client and server authentication: %w", a.root.cert.Subject, err)
		}
	}
	return nil
}
