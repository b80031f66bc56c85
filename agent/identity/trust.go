package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

const (
	maxRoots       = 8
	maxChain       = 4 // certificates that the other side shows
	gossipKeyBytes = 32
	maxGossipKeys  = 4
)

// trust is the roots that this node believes: one, or while the cluster's root is replaced, the old and the new one.
type trust struct {
	roots  []*x509.Certificate
	pool   *x509.CertPool
	server *tls.Config // for connections that are accepted
}

func (i *Identity) newTrust(roots []*x509.Certificate) *trust {
	t := &trust{roots: roots, pool: x509.NewCertPool()}
	for _, r := range roots {
		t.pool.AddCert(r)
	}
	t.server = i.serverTLS(t)
	return t
}

// parseRoots reads the roots of a cluster.
func parseRoots(rootPEM []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := bytes.TrimSpace(rootPEM); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("root certificate: want PEM certificates, nothing else")
		}
		root, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("root certificate: %w", err)
		}
		if !root.IsCA || !root.BasicConstraintsValid {
			return nil, errors.New("root certificate: not a certificate authority")
		}
		if !slices.ContainsFunc(out, root.Equal) {
			out = append(out, root)
		}
	}
	if len(out) == 0 || len(out) > maxRoots {
		return nil, fmt.Errorf("root certificate: %d of them, want 1 to %d", len(out), maxRoots)
	}
	return out, nil
}

func rootsPEM(roots []*x509.Certificate) (out []byte) {
	for _, r := range roots {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Raw})...)
	}
	return out
}

func sameRoots(a, b []*x509.Certificate) bool {
	return slices.EqualFunc(a, b, (*x509.Certificate).Equal)
}

// Trust makes rootPEM the roots that this node believes, and tells whether that changed anything. It is refused, and a renewal asked for,
// while this node's own certificate is not under them.
func (i *Identity) Trust(rootPEM []byte) (changed bool, err error) {
	roots, err := parseRoots(rootPEM)
	if err != nil {
		return false, fmt.Errorf("trust other roots: %w", err)
	}
	i.file.Lock()
	defer i.file.Unlock()
	if sameRoots(roots, i.trust.Load().roots) {
		return false, nil
	}
	own := i.cur.Load().cert
	if _, err := verifyPeer(i.newTrust(roots), own.chain(), x509.ExtKeyUsageClientAuth, ""); err != nil {
		i.RenewSoon()
		return false, fmt.Errorf("trust other roots: this node's own certificate is not under them, a new one is asked for: %w", err)
	}
	return true, i.believe(roots)
}

// believe writes down and uses roots. It is called with file held.
func (i *Identity) believe(roots []*x509.Certificate) error {
	if err := writeFile(i.dir, rootFile, rootsPEM(roots)); err != nil {
		return fmt.Errorf("trust other roots: %w", err)
	}
	i.trust.Store(i.newTrust(roots))
	return nil
}

// TLS is what this node says of its certificate and the roots it believes.
func (i *Identity) TLS() *api.NodeTLS {
	t, own := i.trust.Load(), i.cur.Load().cert
	out := &api.NodeTLS{NotAfter: own.Leaf.NotAfter.UnixNano()}
	for _, r := range t.roots {
		sum := sha256.Sum256(r.Raw)
		out.Trust = append(out.Trust, sum[:])
	}
	for _, issuer := range append(own.chain()[1:], t.roots...) {
		if own.Leaf.CheckSignatureFrom(issuer) == nil {
			out.IssuerSubject, out.IssuerKey = issuer.RawSubject, issuer.RawSubjectPublicKeyInfo
			break
		}
	}
	return out
}

// GossipKeys are the keys of memberlist's packets that are accepted; the first is the one to use.
func (i *Identity) GossipKeys() [][]byte { return *i.gossip.Load() }

// SetGossipKeys replaces them, and tells whether that changed anything.
func (i *Identity) SetGossipKeys(keys [][]byte) (changed bool, err error) {
	joined := slices.Concat(keys...)
	if _, err := splitGossip(joined); err != nil || len(keys)*gossipKeyBytes != len(joined) {
		return false, errors.New("change gossip keys: malformed")
	}
	i.file.Lock()
	defer i.file.Unlock()
	if slices.EqualFunc(keys, i.GossipKeys(), bytes.Equal) {
		return false, nil
	}
	if err := writeFile(i.dir, gossipFile, joined); err != nil {
		return false, fmt.Errorf("change gossip keys: %w", err)
	}
	i.gossip.Store(&keys)
	return true, nil
}

// splitGossip takes the file of the gossip keys apart: keys, one behind the other.
func splitGossip(b []byte) ([][]byte, error) {
	if len(b) == 0 || len(b)%gossipKeyBytes != 0 || len(b) > maxGossipKeys*gossipKeyBytes {
		return nil, fmt.Errorf("gossip keys: %d bytes, want 1 to %d keys of %d", len(b), maxGossipKeys, gossipKeyBytes)
	}
	return slices.Collect(slices.Chunk(b, gossipKeyBytes)), nil
}

// verifyPeer checks that a chain's leaf is a node's certificate for the usage, of the role (any, if empty), under a root that is believed.
// Behind the leaf there may be certificates of a root that we do not know yet, signed by one that we do.
func verifyPeer(t *trust, certs []*x509.Certificate, usage x509.ExtKeyUsage, role string) (api.NodeIdentity, error) {
	if len(certs) == 0 {
		return api.NodeIdentity{}, api.Errorf(errdefs.ErrUnauthenticated, "the other side shows no certificate")
	}
	if len(certs) > maxChain {
		return api.NodeIdentity{}, api.Errorf(errdefs.ErrUnauthenticated, "the other side shows %d certificates, at most %d are looked at", len(certs), maxChain)
	}
	between := x509.NewCertPool()
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	if _, err := certs[0].Verify(x509.VerifyOptions{Roots: t.pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return api.NodeIdentity{}, explained(certs[0], err)
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

// explained says what is wrong with the other side's certificate, and what to do.
func explained(leaf *x509.Certificate, err error) error {
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return api.Errorf(errdefs.ErrUnauthenticated, "the other side's certificate is good from %s to %s, and this node's clock says %s: one of the clocks is wrong, or that node was away too long and must leave and join again",
			leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339), time.Now().UTC().Format(time.RFC3339))
	}
	return fmt.Errorf("the other side's certificate is not of this cluster, or its root certificate was replaced while this node was away (then leave with \"docker swarm leave --force\" and join again): %w", err)
}
