package ca_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/ca"
)

// cfssl is a small server of the cfssl protocol with a root of its own.
type cfssl struct {
	t     *testing.T
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	srv   *httptest.Server
	asked atomic.Int32
	twist atomic.Pointer[func(http.ResponseWriter, *x509.Certificate) bool] // spoils an answer; true: it has answered
}

func newCFSSL(t *testing.T) *cfssl {
	t.Helper()
	e := &cfssl{t: t}
	var err error
	if e.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "external root"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(1000 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	e.cert = e.sign(tmpl, nil, &e.key.PublicKey)
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	web := e.sign(&x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "ca.example"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, e.cert, &own.PublicKey)
	e.srv = httptest.NewUnstartedServer(http.HandlerFunc(e.serve))
	e.srv.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{web.Raw}, PrivateKey: own}}}
	e.srv.Config.ErrorLog = nil
	e.srv.StartTLS()
	t.Cleanup(e.srv.Close)
	return e
}

func (e *cfssl) sign(tmpl, parent *x509.Certificate, pub *ecdsa.PublicKey) *x509.Certificate {
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, e.key)
	if err != nil {
		e.t.Error(err)
		return nil
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		e.t.Error(err)
	}
	return cert
}

func (e *cfssl) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: e.cert.Raw}))
}

func (e *cfssl) conf() *swarm.ExternalCA {
	return &swarm.ExternalCA{Protocol: "cfssl", URL: e.srv.URL + "/api/v1/cfssl/sign", CACert: e.pem()}
}

func (e *cfssl) serve(w http.ResponseWriter, r *http.Request) {
	e.asked.Add(1)
	var req struct {
		Request string `json:"certificate_request"`
		Hosts   []string
		Profile string
		Subject struct {
			CN    string
			Names []struct{ OU, O string }
		}
		Extensions []struct {
			ID       string
			Critical bool
			Value    string
		}
	}
	body, _ := io.ReadAll(r.Body)
	if err := json.Unmarshal(body, &req); err != nil || r.Method != http.MethodPost {
		http.Error(w, "bad", http.StatusBadRequest)
		return
	}
	block, _ := pem.Decode([]byte(req.Request))
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || csr.CheckSignature() != nil {
		http.Error(w, "bad request to sign", http.StatusBadRequest)
		return
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: req.Subject.CN}, DNSNames: req.Hosts,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(100 * time.Hour), BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	for _, n := range req.Subject.Names {
		if n.O != "" {
			tmpl.Subject.Organization = append(tmpl.Subject.Organization, n.O)
		}
		if n.OU != "" {
			tmpl.Subject.OrganizationalUnit = append(tmpl.Subject.OrganizationalUnit, n.OU)
		}
	}
	if req.Profile == "CA" {
		tmpl.ExtKeyUsage, tmpl.KeyUsage = nil, x509.KeyUsageCertSign
		tmpl.RawSubject = csr.RawSubject
		for _, x := range req.Extensions {
			v, _ := hex.DecodeString(x.Value)
			tmpl.ExtraExtensions = append(tmpl.ExtraExtensions, pkix.Extension{Id: []int{2, 5, 29, 19}, Critical: x.Critical, Value: v})
		}
	}
	cert := e.sign(tmpl, e.cert, csr.PublicKey.(*ecdsa.PublicKey))
	if f := e.twist.Load(); f != nil && (*f)(w, cert) {
		return
	}
	answer(w, cert)
}

func answer(w http.ResponseWriter, cert *x509.Certificate) {
	_ = json.NewEncoder(w).Encode(map[string]any{"success": true, "errors": []any{}, "messages": []any{},
		"result": map[string]string{"certificate": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))}})
}

// The cluster moves to an external authority, lives with it, and moves back to a root of its own.
func TestExternalAuthority(t *testing.T) {
	f, e := setup(t), newCFSSL(t)
	a := f.join(t)
	f.says(t, a)
	first := f.cluster()
	conf := swarm.CAConfig{SigningCACert: e.pem(), ExternalCAs: []*swarm.ExternalCA{e.conf()}}
	if err := f.reconfigure(t, conf); err != nil {
		t.Fatal(err)
	}
	a = f.renew(t, a.NodeId)
	if err := f.accepted(first.CaCertPem, a); err != nil {
		t.Errorf("a node that trusts the old root only does not accept the external authority's certificate: %v", err)
	}
	f.says(t, a)
	f.keep(t)
	moved := f.cluster()
	if moved.Rotation != nil || string(moved.CaCertPem) != e.pem() || len(moved.CaKeyPem) != 0 {
		t.Fatalf("not moved: %v", moved)
	}
	before := e.asked.Load()
	b := f.join(t)
	if id, err := api.IdentityOf(leaf(t, b.CertPem)); err != nil || id != (api.NodeIdentity{NodeID: b.NodeId, Role: api.RoleWorker, ClusterID: moved.Id}) || e.asked.Load() == before {
		t.Errorf("joined as %+v (%v), the authority was asked %d times", id, err, e.asked.Load()-before)
	}
	f.says(t, b)
	// Without it nothing could be signed.
	if err := f.reconfigure(t, swarm.CAConfig{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "--external-ca") {
		t.Errorf("without key and authority: %v", err)
	}
	// Back to a root of our own: the external authority vouches for it.
	if err := f.reconfigure(t, swarm.CAConfig{ForceRotate: 1, ExternalCAs: []*swarm.ExternalCA{e.conf()}}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*api.IssueReply{a, b} {
		r := f.renew(t, n.NodeId)
		if err := f.accepted([]byte(e.pem()), r); err != nil {
			t.Errorf("a node that trusts the external root only does not accept the new one: %v", err)
		}
		f.says(t, r)
	}
	f.keep(t)
	if c := f.cluster(); c.Rotation != nil || len(c.CaKeyPem) == 0 {
		t.Errorf("not moved back: %v", c)
	}
}

func TestExternalAuthorityFails(t *testing.T) {
	f, e := setup(t), newCFSSL(t)
	conf := swarm.CAConfig{SigningCACert: e.pem(), ExternalCAs: []*swarm.ExternalCA{e.conf()}}
	other := newCFSSL(t)
	twist := func(g func(http.ResponseWriter, *x509.Certificate) bool) { e.twist.Store(&g) }
	for want, g := range map[string]func(http.ResponseWriter, *x509.Certificate) bool{
		"500": func(w http.ResponseWriter, _ *x509.Certificate) bool { http.Error(w, "out of order", 500); return true },
		"policy": func(w http.ResponseWriter, _ *x509.Certificate) bool {
			_, _ = io.WriteString(w, `{"success":false,"errors":[{"code":1,"message":"policy"}]}`)
			return true
		},
		"not JSON": func(w http.ResponseWriter, _ *x509.Certificate) bool { _, _ = io.WriteString(w, "hello"); return true },
		"more than": func(w http.ResponseWriter, _ *x509.Certificate) bool {
			_, _ = w.Write(bytes.Repeat([]byte("x"), 1<<20))
			return true
		},
		"another key": func(w http.ResponseWriter, c *x509.Certificate) bool {
			c.PublicKey = &e.key.PublicKey
			answer(w, e.sign(c, e.cert, &e.key.PublicKey))
			return true
		},
		"names node":   func(w http.ResponseWriter, c *x509.Certificate) bool { return e.other(w, c, "skein-manager") },
		"unknown role": func(w http.ResponseWriter, c *x509.Certificate) bool { return e.other(w, c, "king") },
		"not good under": func(w http.ResponseWriter, c *x509.Certificate) bool {
			answer(w, other.sign(c, other.cert, c.PublicKey.(*ecdsa.PublicKey)))
			return true
		},
		"302": func(w http.ResponseWriter, _ *x509.Certificate) bool {
			w.Header().Set("Location", "https://127.0.0.1:1/")
			w.WriteHeader(302)
			return true
		},
	} {
		twist(g)
		err := f.reconfigure(t, conf)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) || len(err.Error()) > 2000 {
			t.Errorf("%s: %v", want, err)
		}
	}
	e.srv.Close()
	if err := f.reconfigure(t, conf); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("nobody there: %v", err)
	}
	if f.cluster().Rotation != nil {
		t.Error("a rotation began")
	}
}

// other answers with the certificate of another role.
func (e *cfssl) other(w http.ResponseWriter, c *x509.Certificate, role string) bool {
	c.Subject.OrganizationalUnit, c.RawSubject = []string{role}, nil
	answer(w, e.sign(c, e.cert, c.PublicKey.(*ecdsa.PublicKey)))
	return true
}

// An authority that says nothing costs a request its bound, and no more.
func TestExternalAuthorityIsSilent(t *testing.T) {
	f := setup(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	began := time.Now()
	root, err := ca.NewRoot("x", f.now)
	if err != nil {
		t.Fatal(err)
	}
	err = f.reconfigure(t, swarm.CAConfig{SigningCACert: string(root.CertPEM()), ExternalCAs: []*swarm.ExternalCA{{Protocol: "cfssl", URL: "https://user:canary@" + ln.Addr().String() + "/sign?auth=canary", CACert: string(root.CertPEM())}}})
	if took := time.Since(began); !errdefs.IsInvalidArgument(err) || took > 20*time.Second || strings.Contains(err.Error(), "canary") {
		t.Errorf("after %v: %v", took, err)
	}
}

// A new cluster may begin with an external authority or a root of the user's.
func TestFound(t *testing.T) {
	e := newCFSSL(t)
	csr, err := ca.ParseRequest(request(t, nil, "").CsrPem)
	if err != nil {
		t.Fatal(err)
	}
	id := api.NodeIdentity{NodeID: api.NewID(), Role: api.RoleManager, ClusterID: api.NewID()}
	root, cert, err := ca.Found(t.Context(), swarm.CAConfig{ExternalCAs: []*swarm.ExternalCA{e.conf()}}, csr, id, time.Now())
	if err != nil || string(root.CertPEM()) != e.pem() {
		t.Fatal(err)
	}
	if got, err := api.IdentityOf(leaf(t, cert)); err != nil || got != id {
		t.Errorf("%+v %v", got, err)
	}
	if key, err := root.KeyPEM(); err != nil || key != nil {
		t.Errorf("a key that we cannot have: %v", err)
	}
	nameless := e.conf()
	nameless.CACert = ""
	if _, _, err := ca.Found(t.Context(), swarm.CAConfig{ExternalCAs: []*swarm.ExternalCA{nameless}}, csr, id, time.Now()); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "cacert=") {
		t.Errorf("without its root: %v", err)
	}
	if root, cert, err = ca.Found(t.Context(), swarm.CAConfig{NodeCertExpiry: 2 * time.Hour}, csr, id, time.Now()); err != nil || time.Until(leaf(t, cert).NotAfter) > 2*time.Hour {
		t.Errorf("first certificate of a cluster with --cert-expiry: %v", err)
	}
}
