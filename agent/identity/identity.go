// Package identity is who this node is: its key, its certificate, the cluster's root, and how it came by them.
//
// Join asks a manager for a certificate: it checks the root against the token's digest before it says anything secret. Load reads what
// Join or Install wrote. Run renews at a random point between 50 and 80 % of the certificate's life, or at once when asked. ServerTLS and
// ClientTLS give configurations that follow renewals by themselves and trust nothing but the cluster's root, or while it is replaced, the
// old and the new one (Trust).
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
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// Files below the state directory.
const (
	dirName     = "certificates"
	nodeFile    = "node.pem"    // key, certificate, then what is to be shown behind it
	rootFile    = "root.pem"    // the cluster's root certificate, two while it is replaced
	pendingFile = "pending.pem" // key of a join that has no answer yet
	gossipFile  = "gossip.key"  // 32 bytes each, the one to use first
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
	now    func() time.Time
	cur    atomic.Pointer[material]
	trust  atomic.Pointer[trust]
	gossip atomic.Pointer[[][]byte]
	renew  chan struct{} // capacity 1: a renewal is wanted

	file  sync.Mutex // held over the replacement of a file
	vault Vault      // under file; nil: plain
}

// material is what a renewal replaces.
type material struct {
	cert certificate
	id   api.NodeIdentity
	pem  []byte // the file's content
}

// certificate is a node's, with what is shown behind it.
type certificate struct {
	tls.Certificate
	behind []*x509.Certificate
}

func (c *certificate) chain() []*x509.Certificate {
	return append([]*x509.Certificate{c.Leaf}, c.behind...)
}

// Load reads the identity below stateDir, which vault decrypts if it is encrypted; nil where there is none. Without an identity it fails
// with kind not found; with an expired one with failed precondition.
func Load(stateDir string, vault Vault) (*Identity, error) {
	dir := filepath.Join(stateDir, dirName)
	if err := sweep(dir); err != nil {
		return nil, fmt.Errorf("load identity: %w", err)
	}
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
		if _, bad := parseRoots(rootPEM); bad != nil {
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
	return install(stateDir, req, &api.IssueReply{CertPem: certPEM, GossipKey: gossipKey})
}

func install(stateDir string, req *Request, reply *api.IssueReply) (*Identity, error) {
	dir := filepath.Join(stateDir, dirName)
	nodePEM, rootPEM, err := contents(req, reply)
	if err != nil {
		return nil, fmt.Errorf("install certificate: %w", err)
	}
	i, err := build(dir, rootPEM, nodePEM, reply.GossipKey)
	if err != nil {
		return nil, fmt.Errorf("install certificate: %w", err)
	}
	if err := i.verify(i.trust.Load(), i.cur.Load().cert.chain(), x509.ExtKeyUsageClientAuth, ""); err != nil {
		return nil, fmt.Errorf("install certificate: %w", err)
	}
	if err := ensureDir(dir); err != nil {
		return nil, fmt.Errorf("install certificate: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{gossipFile, reply.GossipKey}, {rootFile, rootPEM}, {nodeFile, nodePEM}} { // the node file last: it makes the identity exist
		if err := writeFile(dir, f.name, f.data); err != nil {
			return nil, fmt.Errorf("install certificate: %w", err)
		}
	}
	_ = os.Remove(filepath.Join(dir, pendingFile))
	return i, nil
}

// contents are the files that an answer makes.
func contents(req *Request, reply *api.IssueReply) (nodePEM, rootPEM []byte, err error) {
	leafPEM, rootPEM, err := splitChain(reply.CertPem)
	if err != nil {
		return nil, nil, err
	}
	if len(reply.TrustPem) > 0 {
		rootPEM = reply.TrustPem
	}
	return slices.Concat(req.keyPEM, leafPEM, reply.ChainPem), rootPEM, nil
}

func build(dir string, rootPEM, nodePEM, gossip []byte) (*Identity, error) {
	roots, err := parseRoots(rootPEM)
	if err != nil {
		return nil, err
	}
	i := &Identity{dir: dir, now: time.Now, renew: make(chan struct{}, 1)}
	i.trust.Store(i.newTrust(roots))
	keys, err := splitGossip(gossip)
	if err != nil {
		keys = [][]byte{gossip} // gossip is a help, not a need: managers will say the keys again
	}
	i.gossip.Store(&keys)
	m, err := parseMaterial(nodePEM)
	if err != nil {
		return nil, err
	}
	i.cur.Store(m)
	return i, nil
}

func parseMaterial(nodePEM []byte) (*material, error) {
	pair, err := tls.X509KeyPair(nodePEM, nodePEM)
	if err != nil {
		return nil, fmt.Errorf("key and certificate: %w", err)
	}
	cert := certificate{Certificate: pair}
	for n, der := range pair.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			cert.Leaf = c
		} else {
			cert.behind = append(cert.behind, c)
		}
	}
	id, err := api.IdentityOf(cert.Leaf)
	if err != nil {
		return nil, err
	}
	return &material{cert: cert, id: id, pem: nodePEM}, nil
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

// Validity is the time in which the current certificate is good.
func (i *Identity) Validity() (notBefore, notAfter time.Time) {
	leaf := i.cur.Load().cert.Leaf
	return leaf.NotBefore, leaf.NotAfter
}
