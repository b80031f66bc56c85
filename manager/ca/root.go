// Package ca is the cluster's certificate authority: its root, the certificates of nodes, and the join tokens.
//
// A node certificate says CN node id, OU role, O cluster id; it lives 90 days, or as the cluster's spec says, and begins an hour before it is made, so that clocks may
// differ a little. What a request's own subject asks for is ignored: the token decides the role at joining, the store at renewal. Secrets
// are compared in constant time; wrong ones are limited per host without locking out others. Root key and tokens are in the store. It must
// not log tokens or keys. Who uses it: package manager, and cmd/daemon for the first node of a cluster.
package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

const (
	rootLife    = 20 * 365 * 24 * time.Hour
	backDate    = time.Hour
	minCertLife = time.Hour
	maxCSRBytes = 16 << 10
)

// Root is the certificate authority: certificate and key.
type Root struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewRoot makes the root of a new cluster.
func NewRoot(clusterID string, now time.Time) (*Root, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make root certificate: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("make root certificate: %w", err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "skein-ca", Organization: []string{clusterID}},
		NotBefore: now.Add(-backDate), NotAfter: now.Add(rootLife),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make root certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make root certificate: %w", err)
	}
	return &Root{cert: cert, key: key}, nil
}

// ParseRoot reads a root from the PEM that CertPEM and KeyPEM gave.
func ParseRoot(certPEM, keyPEM []byte) (*Root, error) {
	cb, _ := pem.Decode(certPEM)
	kb, _ := pem.Decode(keyPEM)
	if cb == nil || kb == nil {
		return nil, errors.New("read root certificate: not PEM")
	}
	cert, err := x509.ParseCertificate(cb.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read root certificate: %w", err)
	}
	k, err := x509.ParsePKCS8PrivateKey(kb.Bytes)
	if err != nil {
		return nil, errors.New("read root key: not PKCS #8") // the parser's text might quote the key
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("read root key: it is not the key of the certificate")
	}
	return &Root{cert: cert, key: key}, nil
}

// CertPEM is the root certificate.
func (r *Root) CertPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.cert.Raw})
}

// KeyPEM is the root key, to be stored and never shown.
func (r *Root) KeyPEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(r.key)
	if err != nil {
		return nil, fmt.Errorf("write root key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// NewToken makes a join token of this root.
func (r *Root) NewToken() string { return api.NewJoinToken(r.cert.Raw).String() }

// NodeCertLife is how long node certificates live unless the cluster's spec says otherwise.
const NodeCertLife = 90 * 24 * time.Hour

// Issue signs a request's key as the key of a node: leaf, then root, in PEM.
func (r *Root) Issue(csr *x509.CertificateRequest, id api.NodeIdentity, now time.Time, life time.Duration) ([]byte, error) {
	if !api.ValidID(id.NodeID) || !api.ValidRole(id.Role) || id.ClusterID == "" {
		return nil, fmt.Errorf("issue certificate: identity %+v is incomplete", id)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("issue certificate for node %s: %w", id.NodeID, err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: id.NodeID, OrganizationalUnit: []string{api.CertRole(id.Role)}, Organization: []string{id.ClusterID}},
		DNSNames:     []string{id.NodeID},
		NotBefore:    now.Add(-backDate), NotAfter: now.Add(max(life, minCertLife)),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, r.cert, csr.PublicKey, r.key)
	if err != nil {
		return nil, fmt.Errorf("issue certificate for node %s: %w", id.NodeID, err)
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), r.CertPEM()...), nil
}

// ParseRequest reads a signing request and checks that it is signed with the key it asks a certificate for.
func ParseRequest(csrPEM []byte) (*x509.CertificateRequest, error) {
	bad := func(why string) error {
		return api.Errorf(errdefs.ErrInvalidArgument, "certificate request: %s", why)
	}
	if len(csrPEM) > maxCSRBytes {
		return nil, bad("too long")
	}
	block, rest := pem.Decode(csrPEM)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) != 0 {
		return nil, bad("not exactly one PEM certificate request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, bad("malformed")
	}
	key, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, bad("the key is not ECDSA P-256")
	}
	if csr.CheckSignature() != nil {
		return nil, bad("not signed with its own key")
	}
	return csr, nil
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}
