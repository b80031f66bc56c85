// Package identity is who this node is: its key, its certificate, the cluster's root, and how it came by them.
//
// Join asks a manager for a certificate: it checks the root against the token's digest before it says anything secret. Load reads what
// Join or Install wrote. Run renews at a random point between 50 and 80 % of the certificate's life, or at once when asked. ServerTLS and
// ClientTLS give configurations that follow renewals by themselves and trust nothing but the cluster's root.
//
// Keys are in files of mode 0600 and never in logs or errors; with a Vault the node's key is encrypted as well. A key and its certificate are one file, replaced by rename, so that a crash
// leaves the old pair or the new. It does not decide what a role may do. Who uses it: cmd/daemon; agent and transport get TLS
// configurations from there.
package identity

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// Files below the state directory.
const (
	dirName     = "certificates"
	nodeFile    = "node.pem"    // key, then certificate
	rootFile    = "root.pem"    // the cluster's root certificate
	pendingFile = "pending.pem" // key of a join that has no answer yet
	gossipFile  = "gossip.key"
)

// maxFileBytes bounds what is read back from disk.
const maxFileBytes = 64 << 10

// Vault encrypts the file of the node's key: a manager whose log is locked must not leave beside it what opens other managers' doors.
type Vault interface {
	Seal(plain, bound []byte) []byte
	Unseal(sealed, bound []byte) ([]byte, error)
}

// sealedMagic begins an encrypted file; a plain one begins with PEM's dashes.
const sealedMagic = "SKEIN-SEALED-1\n"

// Identity is this node's identity in its cluster. Safe for concurrent use.
type Identity struct {
	dir    string
	gossip []byte
	root   *x509.Certificate
	pool   *x509.CertPool
	now    func() time.Time
	cur    atomic.Pointer[material]
	renew  chan struct{} // capacity 1: a renewal is wanted

	file  sync.Mutex // held over the replacement of the node file
	vault Vault      // under file; nil: plain
}

// material is what a renewal replaces.
type material struct {
	cert tls.Certificate
	id   api.NodeIdentity
	pem  []byte // key, then certificate
}

// Load reads the identity below stateDir, which vault decrypts if it is encrypted; nil where there is none. Without an identity it fails
// with kind not found; with an expired one with failed precondition.
func Load(stateDir string, vault Vault) (*Identity, error) {
	dir := filepath.Join(stateDir, dirName)
	nodePEM, err := readFile(filepath.Join(dir, nodeFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, api.Errorf(errdefs.ErrNotFound, "load identity: %s holds none: this node is in no cluster", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("load identity: %w", err)
	}
	sealed := false
	if nodePEM, sealed, err = unseal(nodePEM, vault); err != nil {
		return nil, fmt.Errorf("load identity: %s: %w", filepath.Join(dir, nodeFile), err)
	}
	rootPEM, err := readFile(filepath.Join(dir, rootFile))
	if err != nil {
		return nil, fmt.Errorf("load identity: %w", err)
	}
	gossip, err := readFile(filepath.Join(dir, gossipFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("load identity: %w", err)
	}
	i, err := build(dir, rootPEM, nodePEM, gossip)
	if err != nil {
		file := nodeFile
		if _, bad := parseRoot(rootPEM); bad != nil {
			file = rootFile
		}
		return nil, fmt.Errorf("load identity: %s is damaged: %w", filepath.Join(dir, file), err)
	}
	if sealed {
		i.vault = vault
	}
	if leaf := i.cur.Load().cert.Leaf; i.now().After(leaf.NotAfter) {
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "load identity: the certificate of node %s expired on %s because the node was away too long; leave with \"docker swarm leave --force\" and join again",
			i.NodeID(), leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return i, nil
}

func unseal(b []byte, vault Vault) (plain []byte, sealed bool, err error) {
	rest, sealed := bytes.CutPrefix(b, []byte(sealedMagic))
	switch {
	case !sealed:
		return b, false, nil
	case vault == nil:
		return nil, true, errors.New("it is encrypted, and the keys of this manager's data are gone")
	}
	plain, err = vault.Unseal(rest, []byte(nodeFile))
	return plain, true, err
}

// Protect encrypts the file of the node's key with vault from now on; nil makes it plain again. It returns when that is durable.
func (i *Identity) Protect(vault Vault) error {
	i.file.Lock()
	defer i.file.Unlock()
	if (vault == nil) == (i.vault == nil) {
		i.vault = vault
		return nil
	}
	return i.store(i.cur.Load(), vault)
}

// store writes the node file and uses what it holds. It is called with file held.
func (i *Identity) store(m *material, vault Vault) error {
	content := m.pem
	if vault != nil {
		content = append([]byte(sealedMagic), vault.Seal(m.pem, []byte(nodeFile))...)
	}
	if err := writeFile(i.dir, nodeFile, content); err != nil {
		return err
	}
	i.vault = vault
	i.cur.Store(m)
	return nil
}

// Exists reports whether stateDir holds an identity.
func Exists(stateDir string) bool {
	_, err := os.Lstat(filepath.Join(stateDir, dirName, nodeFile))
	return err == nil
}

// Remove forgets the identity below stateDir: this node left its cluster.
func Remove(stateDir string) error { return os.RemoveAll(filepath.Join(stateDir, dirName)) }

// Install makes an identity of a request and the certificate issued for it (leaf, then root), and stores it: how the first node of a
// cluster gets its own.
func Install(stateDir string, req *Request, certPEM, gossipKey []byte) (*Identity, error) {
	dir := filepath.Join(stateDir, dirName)
	leafPEM, rootPEM, err := splitChain(certPEM)
	if err != nil {
		return nil, fmt.Errorf("install certificate: %w", err)
	}
	nodePEM := append(append([]byte(nil), req.keyPEM...), leafPEM...)
	i, err := build(dir, rootPEM, nodePEM, gossipKey)
	if err != nil {
		return nil, fmt.Errorf("install certificate: %w", err)
	}
	if err := i.verify([]*x509.Certificate{i.cur.Load().cert.Leaf}, x509.ExtKeyUsageClientAuth, ""); err != nil {
		return nil, fmt.Errorf("install certificate: %w", err)
	}
	if err := ensureDir(dir); err != nil {
		return nil, fmt.Errorf("install certificate: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{gossipFile, gossipKey}, {rootFile, rootPEM}, {nodeFile, nodePEM}} { // the node file last: it makes the identity exist
		if err := writeFile(dir, f.name, f.data); err != nil {
			return nil, fmt.Errorf("install certificate: %w", err)
		}
	}
	_ = os.Remove(filepath.Join(dir, pendingFile))
	return i, nil
}

func build(dir string, rootPEM, nodePEM, gossip []byte) (*Identity, error) {
	root, err := parseRoot(rootPEM)
	if err != nil {
		return nil, err
	}
	i := &Identity{dir: dir, gossip: gossip, root: root, pool: x509.NewCertPool(), now: time.Now, renew: make(chan struct{}, 1)}
	i.pool.AddCert(root)
	m, err := parseMaterial(nodePEM)
	if err != nil {
		return nil, err
	}
	i.cur.Store(m)
	return i, nil
}

func parseMaterial(nodePEM []byte) (*material, error) {
	cert, err := tls.X509KeyPair(nodePEM, nodePEM)
	if err != nil {
		return nil, fmt.Errorf("key and certificate: %w", err)
	}
	if cert.Leaf == nil {
		if cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
			return nil, err
		}
	}
	id, err := api.IdentityOf(cert.Leaf)
	if err != nil {
		return nil, err
	}
	return &material{cert: cert, id: id, pem: nodePEM}, nil
}

func parseRoot(rootPEM []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(rootPEM)
	if block == nil || block.Type != "CERTIFICATE" || len(rest) != 0 {
		return nil, errors.New("root certificate: not exactly one PEM certificate")
	}
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("root certificate: %w", err)
	}
	if !root.IsCA || !root.BasicConstraintsValid {
		return nil, errors.New("root certificate: not a certificate authority")
	}
	return root, nil
}

// splitChain takes apart leaf and root.
func splitChain(certPEM []byte) (leafPEM, rootPEM []byte, err error) {
	leaf, rest := pem.Decode(certPEM)
	if leaf == nil || leaf.Type != "CERTIFICATE" {
		return nil, nil, errors.New("certificate: no PEM block")
	}
	root, rest := pem.Decode(rest)
	if root == nil || root.Type != "CERTIFICATE" || len(rest) != 0 {
		return nil, nil, errors.New("certificate: want leaf and root, nothing else")
	}
	return pem.EncodeToMemory(leaf), pem.EncodeToMemory(root), nil
}

// NodeID is this node's ID.
func (i *Identity) NodeID() string { return i.cur.Load().id.NodeID }

// Role is the role in the certificate, "manager" or "worker". The store's role decides what the node may do.
func (i *Identity) Role() string { return i.cur.Load().id.Role }

// ClusterID is the cluster's ID.
func (i *Identity) ClusterID() string { return i.cur.Load().id.ClusterID }

// GossipKey is the key of memberlist's packets.
func (i *Identity) GossipKey() []byte { return append([]byte(nil), i.gossip...) }

// Root is the cluster's root certificate.
func (i *Identity) Root() *x509.Certificate { return i.root }

// RootPEM is the cluster's root certificate in PEM.
func (i *Identity) RootPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.root.Raw})
}

// Validity is the time in which the current certificate is good.
func (i *Identity) Validity() (notBefore, notAfter time.Time) {
	leaf := i.cur.Load().cert.Leaf
	return leaf.NotBefore, leaf.NotAfter
}
