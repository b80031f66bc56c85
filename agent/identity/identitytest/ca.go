// Package identitytest makes clusters of identities for tests, without a manager. Only tests use it.
package identitytest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"skein/agent/identity"
	"skein/manager/api"
)

// CA is a certificate authority; as api.CAServer it also lets nodes join with its tokens and renews anybody's certificate.
type CA struct {
	api.UnimplementedCAServer
	ClusterID string
	Life      time.Duration // of node certificates

	cert *x509.Certificate
	key  *ecdsa.PrivateKey

	mu       sync.Mutex
	tokens   map[string]api.JoinToken // role → token
	requests []*api.IssueRequest
}

// New makes a CA.
func New(t testing.TB) *CA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	id := api.NewID()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "skein-ca", Organization: []string{id}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	ca := &CA{ClusterID: id, Life: time.Hour, cert: cert, key: key, tokens: map[string]api.JoinToken{}}
	for _, role := range []string{api.RoleManager, api.RoleWorker} {
		ca.tokens[role] = api.NewJoinToken(der)
	}
	return ca
}

// Token is the join token of a role.
func (ca *CA) Token(role string) string { return ca.tokens[role].String() }

// RootPEM is the root certificate.
func (ca *CA) RootPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
}

// Requests are the join requests that arrived, tokens and all.
func (ca *CA) Requests() []*api.IssueRequest {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return append([]*api.IssueRequest(nil), ca.requests...)
}

// Identity makes an identity of the role in a directory of the test.
func (ca *CA) Identity(t testing.TB, role string) *identity.Identity {
	t.Helper()
	req, err := identity.NewRequest()
	check(t, err)
	certPEM, err := ca.sign(req.CSRPEM, api.NewID(), role)
	check(t, err)
	id, err := identity.Install(t.TempDir(), req, certPEM, []byte("gossip key"))
	check(t, err)
	return id
}

func (ca *CA) sign(csrPEM []byte, nodeID, role string) ([]byte, error) {
	block, _ := pem.Decode(csrPEM)
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), DNSNames: []string{nodeID},
		Subject:   pkix.Name{CommonName: nodeID, OrganizationalUnit: []string{api.CertRole(role)}, Organization: []string{ca.ClusterID}},
		NotBefore: time.Now().Add(-time.Second), NotAfter: time.Now().Add(ca.Life), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, csr.PublicKey, ca.key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), ca.RootPEM()...), nil
}

// GetRootCA implements api.CAServer.
func (ca *CA) GetRootCA(context.Context, *api.Empty) (*api.RootCA, error) {
	return &api.RootCA{CertPem: ca.RootPEM()}, nil
}

// IssueCertificate implements api.CAServer.
func (ca *CA) IssueCertificate(_ context.Context, r *api.IssueRequest) (*api.IssueReply, error) {
	ca.mu.Lock()
	ca.requests = append(ca.requests, r)
	ca.mu.Unlock()
	for role, tok := range ca.tokens {
		if tok.Matches(r.Token) {
			block, _ := pem.Decode(r.CsrPem)
			csr, err := x509.ParseCertificateRequest(block.Bytes)
			if err != nil {
				return nil, err
			}
			return ca.reply(r.CsrPem, api.NodeIDFor(ca.ClusterID, csr.RawSubjectPublicKeyInfo), role)
		}
	}
	return nil, api.ToGRPC(api.Errorf(errdefs.ErrPermissionDenied, "join: wrong token"))
}

// RenewCertificate implements api.CAServer: the caller stays what its certificate says.
func (ca *CA) RenewCertificate(ctx context.Context, r *api.IssueRequest) (*api.IssueReply, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return nil, errors.New("no certificate")
	}
	id, err := api.IdentityOf(info.State.PeerCertificates[0])
	if err != nil {
		return nil, err
	}
	return ca.reply(r.CsrPem, id.NodeID, id.Role)
}

func (ca *CA) reply(csrPEM []byte, nodeID, role string) (*api.IssueReply, error) {
	certPEM, err := ca.sign(csrPEM, nodeID, role)
	if err != nil {
		return nil, err
	}
	return &api.IssueReply{NodeId: nodeID, Role: role, CertPem: certPEM, ClusterId: ca.ClusterID, GossipKey: []byte("gossip key")}, nil
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
