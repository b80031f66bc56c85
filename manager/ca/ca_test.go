package ca_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/ca"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

type fixture struct {
	store *store.Store
	srv   *ca.Server
	now   time.Time
}

func setup(t *testing.T) *fixture {
	t.Helper()
	st, _ := storetest.New()
	f := &fixture{store: st, now: time.Now()}
	f.srv = ca.NewServer(st, nil, func() time.Time { return f.now })
	id := api.NewID()
	root, err := ca.NewRoot(id, f.now)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := root.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	f.put(t, &api.ClusterRecord{Id: id, SpecJson: []byte("{}"), CaCertPem: root.CertPEM(), CaKeyPem: keyPEM, WorkerToken: root.NewToken(), ManagerToken: root.NewToken(),
		OverlayPool: "10.0.0.0/9", MeshPool: "10.192.0.0/10", OverlayBits: 20, DataPort: 4789, GossipKey: []byte("gossip"), FeatureLevel: api.FeatureLevel})
	return f
}

func (f *fixture) put(t *testing.T, c *api.ClusterRecord) {
	t.Helper()
	_, err := f.store.Update(t.Context(), func(tx store.WriteTx) error {
		tx.Add(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) cluster() (c *store.Cluster) {
	f.store.View(func(tx store.ReadTx) { c = tx.Cluster() })
	return c
}

func (f *fixture) nodes() (n []*store.Node) {
	f.store.View(func(tx store.ReadTx) { n = tx.Nodes() })
	return n
}

func request(t *testing.T, key any, token string) *api.IssueRequest {
	t.Helper()
	if key == nil {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		key = k
	}
	// The subject asks for more than it may have.
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root", OrganizationalUnit: []string{"skein-manager"}}, DNSNames: []string{"evil"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return &api.IssueRequest{Token: token, CsrPem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
		Hostname: "n1", RpcAddr: "192.0.2.7:2377", UnderlayAddr: "192.0.2.7"}
}

func from(addr string) context.Context {
	return authz.WithCaller(context.Background(), authz.Caller{Addr: addr})
}

func leaf(t *testing.T, certPEM []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(certPEM)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestIssue(t *testing.T) {
	f := setup(t)
	c := f.cluster()
	for token, role := range map[string]string{c.WorkerToken: api.RoleWorker, c.ManagerToken: api.RoleManager} {
		reply, err := f.srv.IssueCertificate(from("192.0.2.7"), request(t, nil, token))
		if err != nil {
			t.Fatal(err)
		}
		cert := leaf(t, reply.CertPem)
		id, err := api.IdentityOf(cert)
		want := api.NodeIdentity{NodeID: reply.NodeId, Role: role, ClusterID: c.Id}
		if err != nil || id != want || reply.Role != role {
			t.Errorf("certificate says %+v (%v), want %+v", id, err, want)
		}
		if len(cert.DNSNames) != 1 || cert.DNSNames[0] != reply.NodeId || cert.IsCA {
			t.Errorf("certificate has names %v, CA %v; want its node id, no CA", cert.DNSNames, cert.IsCA)
		}
		if life := cert.NotAfter.Sub(f.now).Round(time.Minute); life != 90*24*time.Hour || f.now.Sub(cert.NotBefore).Round(time.Minute) != time.Hour {
			t.Errorf("certificate lives %v from %v; want 90 days, back-dated 1 h", life, cert.NotBefore)
		}
		var n *store.Node
		f.store.View(func(tx store.ReadTx) { n = tx.Node(reply.NodeId) })
		if n.GetRole() != role || n.GetHostname() != "n1" || n.GetIndex() == 0 || n.GetAvailability() != "active" {
			t.Errorf("node record is %v", n)
		}
	}
}

func TestIssueTwiceIsOneNode(t *testing.T) {
	f := setup(t)
	c := f.cluster()
	r := request(t, nil, c.WorkerToken)
	first, err := f.srv.IssueCertificate(from("192.0.2.7"), r)
	if err != nil {
		t.Fatal(err)
	}
	second, err := f.srv.IssueCertificate(from("192.0.2.7"), r)
	if err != nil || second.NodeId != first.NodeId || len(f.nodes()) != 1 {
		t.Errorf("the same request made nodes %s and %s (%v), %d in the store", first.NodeId, second.GetNodeId(), err, len(f.nodes()))
	}
	r.Token = c.ManagerToken
	if _, err := f.srv.IssueCertificate(from("192.0.2.7"), r); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a worker's key got a manager's certificate: %v", err)
	}
}

func TestWrongTokens(t *testing.T) {
	f := setup(t)
	old := f.cluster()
	other, err := ca.NewRoot("other", f.now)
	if err != nil {
		t.Fatal(err)
	}
	root, err := ca.ParseRoot(old.CaCertPem, old.CaKeyPem)
	if err != nil {
		t.Fatal(err)
	}
	rotated := proto.Clone(old).(*api.ClusterRecord)
	rotated.WorkerToken = root.NewToken()
	f.put(t, rotated)
	for name, tc := range map[string]struct{ token, want string }{
		"empty":         {"", "not 85 characters"},
		"truncated":     {old.WorkerToken[:80], "not 85 characters"},
		"other cluster": {other.NewToken(), "of another cluster"},
		"rotated":       {old.WorkerToken, "secret is wrong"},
		"mistyped":      {old.ManagerToken[:84] + "*", "characters that no token has"},
	} {
		_, err := f.srv.IssueCertificate(from("198.51.100."+fmt.Sprint(len(name))), request(t, nil, tc.token))
		if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "docker swarm join-token worker") {
			t.Errorf("%s: %v; want a denial that says %q and the fix", name, err, tc.want)
		}
		if err != nil && tc.token != "" && strings.Contains(err.Error(), tc.token) {
			t.Errorf("%s: the error quotes the token", name)
		}
	}
	if len(f.nodes()) != 0 {
		t.Errorf("%d nodes registered with wrong tokens", len(f.nodes()))
	}
	if _, err := f.srv.IssueCertificate(from("198.51.100.1"), request(t, nil, f.cluster().WorkerToken)); err != nil {
		t.Errorf("new token: %v", err)
	}
}

func TestGuessingIsLimitedPerHost(t *testing.T) {
	f := setup(t)
	wrong := f.cluster().WorkerToken[:84] + "0"
	limited := 0
	for range 1000 {
		_, err := f.srv.IssueCertificate(from("198.51.100.66"), request2(wrong))
		if errdefs.IsResourceExhausted(err) {
			limited++
		}
	}
	if limited != 990 {
		t.Errorf("%d of 1000 guesses were limited, want all but the first 10", limited)
	}
	if _, err := f.srv.IssueCertificate(from("192.0.2.1"), request(t, nil, f.cluster().WorkerToken)); err != nil {
		t.Errorf("a good node on another host: %v", err)
	}
	if _, err := f.srv.IssueCertificate(from("198.51.100.66"), request(t, nil, f.cluster().WorkerToken)); err != nil {
		t.Errorf("a good node behind the same address: %v", err)
	}
	f.now = f.now.Add(2 * time.Second)
	if _, err := f.srv.IssueCertificate(from("198.51.100.66"), request(t, nil, f.cluster().WorkerToken)); err != nil {
		t.Errorf("a good node on the same host, 2 s later: %v", err)
	}
}

func request2(token string) *api.IssueRequest { return &api.IssueRequest{Token: token} }

func TestBadRequests(t *testing.T) {
	f := setup(t)
	token := f.cluster().WorkerToken
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	change := func(g func(*api.IssueRequest)) *api.IssueRequest {
		r := request(t, nil, token)
		g(r)
		return r
	}
	for name, r := range map[string]*api.IssueRequest{
		"rsa key":       request(t, weak, token),
		"no csr":        change(func(r *api.IssueRequest) { r.CsrPem = nil }),
		"huge csr":      change(func(r *api.IssueRequest) { r.CsrPem = make([]byte, 1<<20) }),
		"forged csr":    change(func(r *api.IssueRequest) { r.CsrPem = forge(t, r.CsrPem) }),
		"no hostname":   change(func(r *api.IssueRequest) { r.Hostname = "" }),
		"hostname":      change(func(r *api.IssueRequest) { r.Hostname = "a\nb" }),
		"address":       change(func(r *api.IssueRequest) { r.RpcAddr = "0.0.0.0:2377" }),
		"port":          change(func(r *api.IssueRequest) { r.RpcAddr = "192.0.2.7:0" }),
		"name address":  change(func(r *api.IssueRequest) { r.RpcAddr = "localhost:2377" }),
		"data address":  change(func(r *api.IssueRequest) { r.UnderlayAddr = "::" }),
		"availability":  change(func(r *api.IssueRequest) { r.Availability = "sometimes" }),
		"data address2": change(func(r *api.IssueRequest) { r.UnderlayAddr = "" }),
	} {
		if _, err := f.srv.IssueCertificate(from("192.0.2.7"), r); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want invalid argument", name, err)
		}
	}
	if len(f.nodes()) != 0 {
		t.Errorf("%d nodes registered by bad requests", len(f.nodes()))
	}
}

// forge breaks the signature of a request.
func forge(t *testing.T, csrPEM []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(csrPEM)
	block.Bytes[len(block.Bytes)-1] ^= 1
	return pem.EncodeToMemory(block)
}

// Tunnels are of one family in a cluster: a node that would be an island is refused, with the other named.
func TestOneFamily(t *testing.T) {
	f := setup(t)
	token := f.cluster().WorkerToken
	if _, err := f.srv.IssueCertificate(from("192.0.2.7"), request(t, nil, token)); err != nil {
		t.Fatal(err)
	}
	r := request(t, nil, token)
	r.UnderlayAddr = "2001:db8::1"
	if _, err := f.srv.IssueCertificate(from("192.0.2.7"), r); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "n1") {
		t.Errorf("%v, want a refusal that names the other node", err)
	}
	r.UnderlayAddr = "192.0.2.9"
	if _, err := f.srv.IssueCertificate(from("192.0.2.7"), r); err != nil {
		t.Error(err)
	}
}

func TestRenew(t *testing.T) {
	f := setup(t)
	c := f.cluster()
	joined, err := f.srv.IssueCertificate(from("192.0.2.7"), request(t, nil, c.ManagerToken))
	if err != nil {
		t.Fatal(err)
	}
	// The certificate and the request say manager; the store says worker by now.
	as := authz.WithCaller(context.Background(), authz.Caller{NodeIdentity: api.NodeIdentity{NodeID: joined.NodeId, Role: api.RoleManager, ClusterID: c.Id}})
	_, err = f.store.Update(t.Context(), func(tx store.WriteTx) error {
		n := proto.Clone(tx.Node(joined.NodeId)).(*store.Node)
		n.Role = api.RoleWorker
		tx.Add(&api.Change{Kind: &api.Change_PutNode{PutNode: n}})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	reply, err := f.srv.RenewCertificate(as, request(t, nil, ""))
	if err != nil {
		t.Fatal(err)
	}
	if id, _ := api.IdentityOf(leaf(t, reply.CertPem)); id.Role != api.RoleWorker || id.NodeID != joined.NodeId {
		t.Errorf("renewed as %+v, want the store's role", id)
	}
	_, err = f.store.Update(t.Context(), func(tx store.WriteTx) error {
		tx.Add(&api.Change{Kind: &api.Change_DeleteNode{DeleteNode: joined.NodeId}})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.srv.RenewCertificate(as, request(t, nil, "")); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a removed node renewed: %v", err)
	}
	if _, err := f.srv.RenewCertificate(from("192.0.2.7"), request(t, nil, "")); !errdefs.IsUnauthorized(err) {
		t.Errorf("a stranger renewed: %v", err)
	}
}
