// Package ca is the cluster's certificate authority: its root, the certificates of nodes, and the join tokens.
//
// A node certificate says CN node id, OU role, O cluster id; it lives 90 days, or as the cluster's spec says, and begins an hour before it is made, so that clocks may
// differ a little. What a request's own subject asks for is ignored: the token decides the role at joining, the store at renewal. Secrets
// are compared in constant time; wrong ones are limited per host without locking out others. Root key and tokens are in the store. It must
// not log tokens or keys. Who uses it: package manager, and cmd/daemon for the first node of a cluster.
//
// The root can be replaced (RootRotation): nodes then trust the old and the new one, get certificates under the new one in waves, which
// the dispatcher paces, and the Keeper drops the old one when no certificate under it is left. The key may be with an external authority,
// which is asked by the cfssl protocol.
package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
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

// Root is a certificate authority: its certificate, and its key unless an external authority holds it.
type Root struct {
	cert *x509.Certificate
	key  crypto.Signer // nil: elsewhere
}

// NewRoot makes a root for a cluster.
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
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
		MaxPathLen: 1, // the cross-signed certificate of the root that follows
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

// ParseRoot reads a root from PEM: exactly one certificate of an authority, and its key in any usual form; without a key it cannot sign.
func ParseRoot(certPEM, keyPEM []byte) (*Root, error) {
	cb, rest := pem.Decode(certPEM)
	if cb == nil || cb.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) != 0 {
		return nil, errors.New("read root certificate: not exactly one PEM certificate")
	}
	cert, err := x509.ParseCertificate(cb.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read root certificate: %w", err)
	}
	if !cert.IsCA || !cert.BasicConstraintsValid {
		return nil, errors.New("read root certificate: it is not the certificate of an authority (CA:TRUE is missing)")
	}
	r := &Root{cert: cert}
	if len(keyPEM) > 0 {
		if r.key, err = parseKey(keyPEM, cert); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// minRSABits is the least that is taken of a user's root key.
const minRSABits = 2048

// parseKey reads a private key. Parsers' texts are not passed on: they might quote the key.
func parseKey(keyPEM []byte, cert *x509.Certificate) (crypto.Signer, error) {
	kb, rest := pem.Decode(keyPEM)
	if kb != nil && kb.Type == "EC PARAMETERS" { // as openssl writes them
		kb, _ = pem.Decode(rest)
	}
	if kb == nil {
		return nil, errors.New("read root key: not PEM")
	}
	if kb.Type == "ENCRYPTED PRIVATE KEY" || kb.Headers["DEK-Info"] != "" {
		return nil, errors.New("read root key: it is encrypted: decrypt it first")
	}
	var key any
	var err error
	switch kb.Type {
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(kb.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(kb.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(kb.Bytes)
	}
	if err != nil {
		return nil, errors.New("read root key: want PEM of PKCS #8, PKCS #1 or SEC 1")
	}
	var signer crypto.Signer
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		signer = k
	case *rsa.PrivateKey:
		if k.N.BitLen() < minRSABits {
			return nil, fmt.Errorf("read root key: RSA keys must have at least %d bits, it has %d", minRSABits, k.N.BitLen())
		}
		signer = k
	default:
		return nil, errors.New("read root key: want an ECDSA or RSA key")
	}
	if pub, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(cert.PublicKey) {
		return nil, errors.New("read root key: it is not the key of the certificate")
	}
	return signer, nil
}

// CertPEM is the root certificate.
func (r *Root) CertPEM() []byte { return certPEM(r.cert.Raw) }

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// CrossSign vouches for another root with this one: who trusts this one accepts what the other one issues.
func (r *Root) CrossSign(next *Root, now time.Time) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("cross-sign root certificate: %w", err)
	}
	until := next.cert.NotAfter
	if r.cert.NotAfter.Before(until) {
		until = r.cert.NotAfter
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, RawSubject: next.cert.RawSubject, SubjectKeyId: next.cert.SubjectKeyId,
		NotBefore: now.Add(-backDate), NotAfter: until,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, r.cert, next.cert.PublicKey, r.key)
	if err != nil {
		return nil, fmt.Errorf("cross-sign root certificate: %w", err)
	}
	return certPEM(der), nil
}

// KeyPEM is the root key, to be stored and never shown; nil if it is not here.
func (r *Root) KeyPEM() ([]byte, error) {
	if r.key == nil {
		return nil, nil
	}
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
	if r.key == nil {
		return nil, fmt.Errorf("issue certificate for node %s: the root's key is not here", id.NodeID)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("issue certificate for node %s: %w", id.NodeID, err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: id.NodeID, OrganizationalUnit: []string{api.CertRole(id.Role)}, Organization: []string{id.ClusterID}},
		DNSNames:     []string{id.NodeID},
		NotBefore:    now.Add(-backDate), NotAfter: r.until(now.Add(max(life, minCertLife))),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, r.cert, csr.PublicKey, r.key)
	if err != nil {
		return nil, fmt.Errorf("issue certificate for node %s: %w", id.NodeID, err)
	}
	return append(certPEM(der), r.CertPEM()...), nil
}

// until bounds the end of a certificate by the root's own.
func (r *Root) until(t time.Time) time.Time {
	if r.cert.NotAfter.Before(t) {
		return r.cert.NotAfter
	}
	return t
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
