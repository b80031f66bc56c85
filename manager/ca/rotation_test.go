package ca_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/ca"
	"skein/manager/loop"
	"skein/manager/store"
)

// reconfigure does what an update of the cluster's spec does.
func (f *fixture) reconfigure(t *testing.T, conf swarm.CAConfig) error {
	t.Helper()
	p, err := f.srv.PlanConfig(t.Context(), f.cluster(), conf)
	if err != nil {
		return err
	}
	c := proto.Clone(f.cluster()).(*api.ClusterRecord)
	spec, err := json.Marshal(swarm.Spec{CAConfig: p.Config})
	if err != nil {
		t.Fatal(err)
	}
	c.SpecJson = spec
	p.Apply(c)
	f.put(t, c)
	return nil
}

// keep lets the controller work until it has nothing to do.
func (f *fixture) keep(t *testing.T) (next time.Time) {
	t.Helper()
	for range 10 {
		var changes loop.Changes
		f.store.View(func(tx store.ReadTx) { changes, next = ca.NewKeeper().Step(tx, loop.Keys{All: true}, f.now) })
		if len(changes) == 0 {
			return next
		}
		for _, c := range changes {
			if _, results, err := f.store.Batch(t.Context(), []*api.Txn{c.Txn}); err != nil || results[0] != nil {
				t.Fatal(err, results)
			}
		}
	}
	t.Fatal("the controller goes on for ever")
	return next
}

// says records what a node's agent would say with a certificate.
func (f *fixture) says(t *testing.T, reply *api.IssueReply) {
	t.Helper()
	tls := &api.NodeTLS{NotAfter: leaf(t, reply.CertPem).NotAfter.UnixNano()}
	var root *pem.Block
	_, rest := pem.Decode(reply.CertPem)
	root, _ = pem.Decode(rest)
	issuer, err := x509.ParseCertificate(root.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	tls.IssuerSubject, tls.IssuerKey = issuer.RawSubject, issuer.RawSubjectPublicKeyInfo
	for rest = reply.TrustPem; len(rest) > 0; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b != nil {
			sum := sha256.Sum256(b.Bytes)
			tls.Trust = append(tls.Trust, sum[:])
		}
	}
	_, err = f.store.Update(t.Context(), func(tx store.WriteTx) error {
		n := proto.Clone(tx.Node(reply.NodeId)).(*store.Node)
		n.Tls = tls
		tx.Add(&api.Change{Kind: &api.Change_PutNode{PutNode: n}})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) join(t *testing.T) *api.IssueReply {
	t.Helper()
	r, err := f.srv.IssueCertificate(from("192.0.2.7"), request(t, nil, f.cluster().WorkerToken))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (f *fixture) renew(t *testing.T, nodeID string) *api.IssueReply {
	t.Helper()
	as := authz.WithCaller(context.Background(), authz.Caller{NodeIdentity: api.NodeIdentity{NodeID: nodeID, Role: api.RoleWorker, ClusterID: f.cluster().Id}})
	r, err := f.srv.RenewCertificate(as, request(t, nil, ""))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// accepted tells whether one who trusts some roots takes an issued certificate with what is shown behind it.
func (f *fixture) accepted(trustPEM []byte, r *api.IssueReply) error {
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM(trustPEM)
	between.AppendCertsFromPEM(r.ChainPem)
	b, _ := pem.Decode(r.CertPem)
	leaf, err := x509.ParseCertificate(b.Bytes)
	if err != nil {
		return err
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: f.now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return err
}

func TestRootRotation(t *testing.T) {
	f := setup(t)
	a, b := f.join(t), f.join(t)
	f.says(t, a)
	f.says(t, b)
	first := f.cluster()
	if err := f.reconfigure(t, swarm.CAConfig{ForceRotate: 1}); err != nil {
		t.Fatal(err)
	}
	f.keep(t)
	mid := f.cluster()
	if mid.Rotation == nil || mid.WorkerToken != first.WorkerToken || !bytes.Equal(mid.CaCertPem, first.CaCertPem) {
		t.Fatalf("the rotation ended before any node has a new certificate: %v", mid.Rotation)
	}
	a = f.renew(t, a.NodeId)
	for name, trust := range map[string][]byte{"old root only": first.CaCertPem, "both": a.TrustPem, "new root only": mid.Rotation.CertPem} {
		if err := f.accepted(trust, a); err != nil {
			t.Errorf("a new certificate is not accepted by a node that trusts %s: %v", name, err)
		}
	}
	f.says(t, a)
	f.keep(t)
	if f.cluster().Rotation == nil {
		t.Fatal("the rotation ended while a node has an old certificate")
	}
	// Started again midway: what was issued meanwhile is not enough, and everybody goes on believing everybody.
	if err := f.reconfigure(t, swarm.CAConfig{ForceRotate: 2}); err != nil {
		t.Fatal(err)
	}
	again := f.cluster()
	if bytes.Equal(again.Rotation.CertPem, mid.Rotation.CertPem) {
		t.Fatal("the second rotation changed nothing")
	}
	if err := f.accepted(ca.TrustOf(again), a); err != nil {
		t.Errorf("a certificate of the first rotation is not accepted in the second: %v", err)
	}
	fresh := f.join(t) // not heard of yet; it need not be
	f.says(t, f.renew(t, a.NodeId))
	f.keep(t)
	if f.cluster().Rotation == nil {
		t.Fatal("the second rotation ended while a node has an old certificate")
	}
	f.says(t, f.renew(t, b.NodeId))
	f.keep(t)
	end := f.cluster()
	if end.Rotation != nil || !bytes.Equal(end.CaCertPem, again.Rotation.CertPem) || end.WorkerToken == first.WorkerToken || end.ManagerToken == first.ManagerToken {
		t.Fatalf("the rotation did not end: %v", end)
	}
	if err := f.accepted(end.CaCertPem, fresh); err != nil {
		t.Errorf("a node that joined meanwhile is not accepted: %v", err)
	}
	if tok, err := api.ParseJoinToken(end.WorkerToken); err != nil || !tok.MatchesRoot(mustDER(t, end.CaCertPem)) {
		t.Errorf("the token is not for the new root: %v", err)
	}
	if _, err := f.srv.IssueCertificate(from("192.0.2.9"), request(t, nil, first.WorkerToken)); !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "root certificate was rotated") {
		t.Errorf("the old token: %v", err)
	}
}

func mustDER(t *testing.T, p []byte) []byte {
	t.Helper()
	b, _ := pem.Decode(p)
	if b == nil {
		t.Fatal("not PEM")
	}
	return b.Bytes
}

// A node that is away is waited for as long as it could come back with its certificate, and not for ever.
func TestRotationWithoutOneNode(t *testing.T) {
	f := setup(t)
	a, gone := f.join(t), f.join(t)
	f.says(t, a)
	f.says(t, gone)
	if err := f.reconfigure(t, swarm.CAConfig{ForceRotate: 1}); err != nil {
		t.Fatal(err)
	}
	f.says(t, f.renew(t, a.NodeId))
	until := f.keep(t)
	if f.cluster().Rotation == nil || !until.Equal(leaf(t, gone.CertPem).NotAfter) {
		t.Fatalf("waits until %v, want %v", until, leaf(t, gone.CertPem).NotAfter)
	}
	f.now = until
	f.keep(t)
	if f.cluster().Rotation != nil {
		t.Fatal("still waiting for a node whose certificate has expired")
	}
}

// Managers of an older version would not go on with a rotation.
func TestRotationNeedsItsLevel(t *testing.T) {
	f := setup(t)
	old := proto.Clone(f.cluster()).(*api.ClusterRecord)
	old.FeatureLevel = api.LevelMembers - 1
	if _, err := f.srv.PlanConfig(t.Context(), old, swarm.CAConfig{ForceRotate: 1}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "upgrade all managers") {
		t.Errorf("with managers of an older version: %v", err)
	}
}

func TestRotationToGivenRoot(t *testing.T) {
	f := setup(t)
	own, err := ca.NewRoot("mine", f.now)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ca.NewRoot("mine", f.now)
	if err != nil {
		t.Fatal(err)
	}
	key, _ := own.KeyPEM()
	otherKey, _ := other.KeyPEM()
	for name, tc := range map[string]struct {
		conf swarm.CAConfig
		want string
	}{
		"key alone":    {swarm.CAConfig{SigningCAKey: string(key)}, "signing CA cert must also be provided"},
		"cert alone":   {swarm.CAConfig{SigningCACert: string(own.CertPEM())}, "--ca-key"},
		"another key":  {swarm.CAConfig{SigningCACert: string(own.CertPEM()), SigningCAKey: string(otherKey)}, "not the key of the certificate"},
		"no PEM":       {swarm.CAConfig{SigningCACert: "x", SigningCAKey: string(key)}, "PEM"},
		"two":          {swarm.CAConfig{SigningCACert: string(own.CertPEM()) + string(other.CertPEM()), SigningCAKey: string(key)}, "exactly one"},
		"leaf":         {swarm.CAConfig{SigningCACert: string(f.join(t).CertPem[:bytes.Index(f.join(t).CertPem, []byte("-----END"))+26]), SigningCAKey: string(key)}, "root certificate"},
		"http":         {swarm.CAConfig{ExternalCAs: []*swarm.ExternalCA{{Protocol: "cfssl", URL: "http://192.0.2.1/sign"}}}, "ExternalCAs[0].URL"},
		"protocol":     {swarm.CAConfig{ExternalCAs: []*swarm.ExternalCA{{Protocol: "acme", URL: "https://192.0.2.1/sign"}}}, "the only protocol is cfssl"},
		"option":       {swarm.CAConfig{ExternalCAs: []*swarm.ExternalCA{{URL: "https://192.0.2.1/sign", Options: map[string]string{"a": "b"}}}}, "Options"},
		"another root": {swarm.CAConfig{ExternalCAs: []*swarm.ExternalCA{{URL: "https://192.0.2.1/sign", CACert: string(own.CertPEM())}}}, "docker swarm ca --rotate"},
	} {
		if err := f.reconfigure(t, tc.conf); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want invalid argument with %q", name, err, tc.want)
		}
	}
	if f.cluster().Rotation != nil {
		t.Fatal("a refused update began a rotation")
	}
	// As openssl writes keys.
	ec := mustEC(t, key)
	params := "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
	if err := f.reconfigure(t, swarm.CAConfig{SigningCACert: string(own.CertPEM()), SigningCAKey: params + string(ec)}); err != nil {
		t.Fatal(err)
	}
	f.now = f.now.Add(ca.NodeCertLife)
	f.keep(t)
	if got := f.cluster(); got.Rotation != nil || !bytes.Equal(got.CaCertPem, own.CertPEM()) || bytes.Contains(got.SpecJson, []byte("CERTIFICATE")) || bytes.Contains(got.SpecJson, []byte("PRIVATE")) {
		t.Errorf("the cluster has %s, spec %s", got.CaCertPem, got.SpecJson)
	}
}

func mustEC(t *testing.T, pkcs8 []byte) []byte {
	t.Helper()
	b, _ := pem.Decode(pkcs8)
	k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(k.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

// Rotating to the root that there is ends a rotation that is under way.
func TestRotationAborted(t *testing.T) {
	f := setup(t)
	a := f.join(t)
	f.says(t, a)
	first := f.cluster()
	if err := f.reconfigure(t, swarm.CAConfig{ForceRotate: 1}); err != nil {
		t.Fatal(err)
	}
	renewed := f.renew(t, a.NodeId)
	if err := f.reconfigure(t, swarm.CAConfig{ForceRotate: 1, SigningCACert: string(first.CaCertPem), SigningCAKey: string(first.CaKeyPem)}); err != nil {
		t.Fatal(err)
	}
	f.keep(t)
	if c := f.cluster(); c.Rotation != nil || !bytes.Equal(c.CaCertPem, first.CaCertPem) || c.WorkerToken != first.WorkerToken {
		t.Errorf("not back where it began: %v", c)
	}
	if err := f.accepted(ca.TrustOf(f.cluster()), renewed); err != nil {
		t.Errorf("a node that had a new certificate already is cut off: %v", err)
	}
}

func TestGossipKeyRotation(t *testing.T) {
	f := setup(t)
	keys := func() (out []string) {
		for _, k := range ca.GossipKeys(f.cluster()) {
			out = append(out, string(k))
		}
		return out
	}
	rotate := func(fresh string) {
		c := proto.Clone(f.cluster()).(*api.ClusterRecord)
		ca.RotateGossip(c, []byte(fresh), f.now)
		f.put(t, c)
	}
	step := func(want ...string) {
		t.Helper()
		next := f.keep(t)
		if !slices.Equal(keys(), want) {
			t.Fatalf("keys are %q, want %q", keys(), want)
		}
		f.now = next
	}
	began := f.now
	rotate("k2")
	step("gossip", "k2")
	step("k2", "gossip")
	ended := f.now
	f.keep(t)
	if !slices.Equal(keys(), []string{"k2"}) || ended.Sub(began) > 10*time.Second {
		t.Fatalf("after %v the keys are %q", ended.Sub(began), keys())
	}
	// Two removals in a row: the key that the first removed node knew is gone in time, too.
	f.now = ended.Add(time.Minute)
	rotate("k3")
	f.now = f.now.Add(2 * time.Second)
	rotate("k4")
	step("k2", "k4")
	step("k4", "k2")
	f.keep(t)
	if !slices.Equal(keys(), []string{"k4"}) {
		t.Errorf("in the end the keys are %q", keys())
	}
}

func TestRootKeys(t *testing.T) {
	root, err := ca.NewRoot("c", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	k384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, _ := x509.MarshalPKCS8PrivateKey(k384)
	for name, key := range map[string][]byte{
		"garbage":   []byte("x"),
		"other":     pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		"encrypted": pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: der}),
		"cert":      root.CertPEM(),
	} {
		_, err := ca.ParseRoot(root.CertPEM(), key)
		if err == nil || strings.Contains(err.Error(), string(key)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
