package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	"skein/agent/transport"
	"skein/manager/api"
)

// Request is a fresh key and the signing request for it.
type Request struct {
	// CSRPEM is what the CA needs. Its subject is empty: the CA decides on names and roles.
	CSRPEM []byte
	keyPEM []byte
}

// NewRequest makes a key and a signing request.
func NewRequest() (*Request, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	return requestFor(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func requestFor(key *ecdsa.PrivateKey, keyPEM []byte) (*Request, error) {
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("make signing request: %w", err)
	}
	return &Request{CSRPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}), keyPEM: keyPEM}, nil
}

type dialFunc = func(addr string, conf *tls.Config) (*grpc.ClientConn, error)

// JoinOptions describe the node that joins.
type JoinOptions struct {
	// StateDir is where the identity is kept.
	StateDir string
	Hostname string
	// RPCAddr is host:port at which other nodes reach this node's port. An empty host is filled in with the local address of the way to
	// the manager.
	RPCAddr string
	// UnderlayAddr is the address for VXLAN packets; empty: the host of RPCAddr.
	UnderlayAddr string
	// Availability is active (also if empty), pause or drain.
	Availability string
	// Dial makes a connection to a node's port; nil: transport.DialGRPC.
	Dial func(addr string, conf *tls.Config) (*grpc.ClientConn, error)
}

// Join makes this node a member of the cluster of the manager at addr and stores its identity. A join that failed half-way can be
// repeated: the same node joins.
func Join(ctx context.Context, addr, token string, o JoinOptions) (*Identity, error) {
	i, err := join(ctx, addr, token, o)
	if err != nil {
		return nil, fmt.Errorf("join the cluster of manager %s: %w", addr, err)
	}
	return i, nil
}

func join(ctx context.Context, addr, token string, o JoinOptions) (*Identity, error) {
	tok, err := api.ParseJoinToken(token)
	if err != nil {
		return nil, err
	}
	if Exists(o.StateDir) {
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "This node is already part of a swarm. Use \"docker swarm leave\" to leave this swarm and join another one.")
	}
	if err := fillAddresses(addr, &o); err != nil {
		return nil, err
	}
	if o.Dial == nil {
		o.Dial = transport.DialGRPC
	}
	root, err := fetchRoot(ctx, addr, tok, o.Dial)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(o.StateDir, dirName)
	req, err := pendingRequest(dir)
	if err != nil {
		return nil, err
	}
	reply, err := requestCertificate(ctx, addr, root, o.Dial, &api.IssueRequest{
		Token: token, CsrPem: req.CSRPEM, Hostname: o.Hostname, RpcAddr: o.RPCAddr, UnderlayAddr: o.UnderlayAddr, Availability: o.Availability,
	})
	if err != nil {
		return nil, err
	}
	_, rootPEM, err := contents(req, reply)
	if err != nil {
		return nil, err
	}
	if got, err := parseRoots(rootPEM); err != nil || !slices.ContainsFunc(got, root.Equal) {
		return nil, errors.New("the certificate comes with another root than the manager's own")
	}
	return install(o.StateDir, req, reply)
}

// fetchRoot asks a manager that is not trusted yet for the cluster's root and compares it with the token. Nothing secret is said here.
func fetchRoot(ctx context.Context, addr string, tok api.JoinToken, dial dialFunc) (*x509.Certificate, error) {
	conn, err := dial(addr, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}) // the digest is the check
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	reply, err := api.NewCAClient(conn).GetRootCA(ctx, &api.Empty{})
	if err != nil {
		return nil, fmt.Errorf("ask for the root certificate: %w", api.FromGRPC(err))
	}
	roots, err := parseRoots(reply.CertPem)
	if err != nil {
		return nil, err
	}
	root := roots[0]
	if len(roots) != 1 {
		return nil, errors.New("root certificate: not exactly one PEM certificate")
	}
	if !tok.MatchesRoot(root.Raw) {
		return nil, api.Errorf(errdefs.ErrPermissionDenied, "remote CA does not match the join token's digest: the address is of another cluster, or the token is old (the secret was not sent); compare the address, or get the token anew with \"docker swarm join-token worker\" on a manager")
	}
	return root, nil
}

// requestCertificate sends the token to a manager that has shown a certificate of the right root.
func requestCertificate(ctx context.Context, addr string, root *x509.Certificate, dial dialFunc, req *api.IssueRequest) (*api.IssueReply, error) {
	t := &trust{pool: x509.NewCertPool()}
	t.pool.AddCert(root)
	conn, err := dial(addr, &tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := verifyPeer(t, cs.PeerCertificates, x509.ExtKeyUsageServerAuth, api.RoleManager)
			return err
		},
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	reply, err := api.NewCAClient(conn).IssueCertificate(ctx, req)
	if err != nil {
		return nil, api.FromGRPC(err)
	}
	return reply, nil
}

// pendingRequest returns a request for the key of the last join that got no answer, or for a new key, which is stored first.
func pendingRequest(dir string) (*Request, error) {
	path := filepath.Join(dir, pendingFile)
	if keyPEM, err := readFile(path); err == nil {
		if block, _ := pem.Decode(keyPEM); block != nil {
			if k, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
				if key, ok := k.(*ecdsa.PrivateKey); ok {
					return requestFor(key, keyPEM)
				}
			}
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	req, err := NewRequest()
	if err != nil {
		return nil, err
	}
	if err := ensureDir(dir); err != nil {
		return nil, err
	}
	return req, writeFile(dir, pendingFile, req.keyPEM)
}

// fillAddresses completes our addresses from the route to the manager.
func fillAddresses(manager string, o *JoinOptions) error {
	host, port, err := net.SplitHostPort(o.RPCAddr)
	if err != nil {
		return api.Errorf(errdefs.ErrInvalidArgument, "advertise address %q: want host:port", o.RPCAddr)
	}
	if ip := net.ParseIP(host); host == "" || (ip != nil && ip.IsUnspecified()) {
		c, err := net.Dial("udp", manager) // sends nothing; asks the kernel for the route
		if err != nil {
			return fmt.Errorf("find the local address towards %s: %w", manager, err)
		}
		host, _, err = net.SplitHostPort(c.LocalAddr().String())
		_ = c.Close()
		if err != nil {
			return err
		}
		o.RPCAddr = net.JoinHostPort(host, port)
	}
	if o.UnderlayAddr == "" {
		o.UnderlayAddr = host
	}
	return nil
}
