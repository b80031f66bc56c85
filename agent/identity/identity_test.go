package identity_test

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	"skein/agent/identity"
	"skein/agent/identity/identitytest"
	"skein/agent/transport"
	"skein/manager/api"
	"skein/manager/keyring"
)

// serve runs a manager's port whose CA service is given.
func serve(t *testing.T, id *identity.Identity, ca api.CAServer) (addr string) {
	t.Helper()
	mux, err := transport.Listen(transport.Config{Addr: "127.0.0.1:0", Server: id.ServerTLS(), Client: id.ClientTLS("")})
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(transport.ServerOptions()...)
	api.RegisterCAServer(srv, ca)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{}, 2)
	go func() { _ = mux.Run(ctx); done <- struct{}{} }()
	go func() { _ = srv.Serve(mux.GRPC()); done <- struct{}{} }()
	t.Cleanup(func() { srv.Stop(); cancel(); <-done; <-done })
	return mux.Addr().String()
}

func options(t *testing.T) identity.JoinOptions {
	return identity.JoinOptions{StateDir: t.TempDir(), Hostname: "n1", RPCAddr: ":2377"}
}

func TestJoinLoadRenew(t *testing.T) {
	ca := identitytest.New(t)
	addr := serve(t, ca.Identity(t, api.RoleManager), ca)
	o := options(t)
	id, err := identity.Join(t.Context(), addr, ca.Token(api.RoleWorker), o)
	if err != nil {
		t.Fatal(err)
	}
	if id.Role() != api.RoleWorker || id.ClusterID() != ca.ClusterID || string(id.GossipKeys()[0]) != "gossip key" {
		t.Errorf("joined as %s of %s", id.Role(), id.ClusterID())
	}
	if r := ca.Requests()[0]; r.RpcAddr != "127.0.0.1:2377" || r.UnderlayAddr != "127.0.0.1" {
		t.Errorf("announced %s and %s, want the local address of the way to the manager", r.RpcAddr, r.UnderlayAddr)
	}
	if _, err := identity.Join(t.Context(), addr, ca.Token(api.RoleWorker), o); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second join: %v, want failed precondition", err)
	}
	checkModes(t, o.StateDir)

	conn, err := transport.DialGRPC(addr, id.ClientTLS(api.RoleManager))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	before := *id.ServerTLS()
	old, _ := before.GetCertificate(nil)
	if err := id.Renew(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	fresh, _ := before.GetCertificate(nil)
	if bytes.Equal(old.Certificate[0], fresh.Certificate[0]) {
		t.Error("a configuration made before the renewal still shows the old certificate")
	}
	again, err := identity.Load(o.StateDir, nil)
	if err != nil {
		t.Fatal(err)
	}
	checkVault(t, o.StateDir, again, conn)
	again, err = identity.Load(o.StateDir, nil)
	if err != nil {
		t.Fatal(err)
	}
	fresh, _ = id.ServerTLS().GetCertificate(nil)
	got, _ := again.ServerTLS().GetCertificate(nil)
	if again.NodeID() != id.NodeID() || !bytes.Equal(got.Certificate[0], fresh.Certificate[0]) {
		t.Error("what is loaded is not what was renewed")
	}
	if err := identity.Remove(o.StateDir); err != nil || identity.Exists(o.StateDir) {
		t.Errorf("remove: %v", err)
	}
	if _, err := identity.Load(o.StateDir, nil); !errdefs.IsNotFound(err) {
		t.Errorf("load after remove: %v, want not found", err)
	}
}

// checkVault encrypts the node's key and makes it plain again; a renewal in between keeps it encrypted. The first identity is left as it is
// on the disk.
func checkVault(t *testing.T, dir string, id *identity.Identity, conn grpc.ClientConnInterface) {
	t.Helper()
	path := filepath.Join(dir, "certificates", "node.pem")
	was, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := keyring.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	other, err := keyring.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	encrypted := func(when string) {
		t.Helper()
		if b, err := os.ReadFile(path); err != nil || bytes.Contains(b, []byte("KEY")) || bytes.Contains(b, []byte("CERT")) {
			t.Errorf("%s: %v, the file is plain", when, err)
		}
		if again, err := identity.Load(dir, keys); err != nil || again.NodeID() != id.NodeID() {
			t.Errorf("%s: load: %v", when, err)
		}
		for name, vault := range map[string]identity.Vault{"no": nil, "other": other} {
			if _, err := identity.Load(dir, vault); err == nil || errdefs.IsNotFound(err) {
				t.Errorf("%s: load with %s keys: %v", when, name, err)
			}
		}
	}
	if err := id.Protect(keys); err != nil {
		t.Fatal(err)
	}
	encrypted("after Protect")
	if err := id.Renew(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	encrypted("after a renewal")
	if err := id.Protect(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := identity.Load(dir, nil); err != nil {
		t.Errorf("plain again: %v", err)
	}
	if err := os.WriteFile(path, was, 0o600); err != nil {
		t.Fatal(err)
	}
}

func checkModes(t *testing.T, dir string) {
	t.Helper()
	_ = filepath.WalkDir(filepath.Join(dir, "certificates"), func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		info, _ := d.Info()
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v: others can read it", p, info.Mode())
		}
		return nil
	})
}

// A manager of another cluster must not learn the token's secret.
func TestJoinWrongDigestSendsNoSecret(t *testing.T) {
	ours, theirs := identitytest.New(t), identitytest.New(t)
	addr := serve(t, theirs.Identity(t, api.RoleManager), theirs)
	_, err := identity.Join(t.Context(), addr, ours.Token(api.RoleWorker), options(t))
	if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "does not match the join token's digest") {
		t.Errorf("join: %v, want a refusal over the digest", err)
	}
	if n := len(theirs.Requests()); n != 0 {
		t.Errorf("the manager received %d join requests, want none", n)
	}
}

// liar shows the right root, which is public, but has no certificate of it.
type liar struct {
	*identitytest.CA
	root []byte
}

func (l liar) GetRootCA(context.Context, *api.Empty) (*api.RootCA, error) {
	return &api.RootCA{CertPem: l.root}, nil
}

func TestJoinImpostorWithRightRootGetsNoSecret(t *testing.T) {
	ours, theirs := identitytest.New(t), identitytest.New(t)
	addr := serve(t, theirs.Identity(t, api.RoleManager), liar{theirs, ours.RootPEM()})
	if _, err := identity.Join(t.Context(), addr, ours.Token(api.RoleWorker), options(t)); err == nil {
		t.Error("join succeeded with an impostor")
	}
	if n := len(theirs.Requests()); n != 0 {
		t.Errorf("the impostor received %d join requests, want none", n)
	}
	// A worker must not be taken for a manager either.
	addr = serve(t, ours.Identity(t, api.RoleWorker), ours)
	if _, err := identity.Join(t.Context(), addr, ours.Token(api.RoleWorker), options(t)); err == nil || len(ours.Requests()) != 0 {
		t.Errorf("join through a worker: %v, %d requests; want an error and none", err, len(ours.Requests()))
	}
}

// An answer that got lost must not make a second node.
func TestJoinAgainIsTheSameNode(t *testing.T) {
	ca := identitytest.New(t)
	addr := serve(t, ca.Identity(t, api.RoleManager), ca)
	o := options(t)
	first, err := identity.Join(t.Context(), addr, ca.Token(api.RoleWorker), o)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(o.StateDir, "certificates")
	node, _ := os.ReadFile(filepath.Join(dir, "node.pem"))
	if err := identity.Remove(o.StateDir); err != nil {
		t.Fatal(err)
	}
	_ = os.MkdirAll(dir, 0o700)
	if err := os.WriteFile(filepath.Join(dir, "pending.pem"), node, 0o600); err != nil {
		t.Fatal(err)
	}
	second, err := identity.Join(t.Context(), addr, ca.Token(api.RoleWorker), o)
	if err != nil || second.NodeID() != first.NodeID() {
		t.Errorf("joined again as another node: %v", err)
	}
}

func TestRunRenewsInTime(t *testing.T) {
	ca := identitytest.New(t)
	ca.Life = 2 * time.Second
	addr := serve(t, ca.Identity(t, api.RoleManager), ca)
	id := ca.Identity(t, api.RoleWorker)
	_, before := id.Validity()
	tls := id.ServerTLS()
	old, _ := tls.GetCertificate(nil)
	renewed := make(chan struct{}, 8)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- id.Run(ctx, identity.Renewal{
			Dial: func(context.Context) (*grpc.ClientConn, error) {
				return transport.DialGRPC(addr, id.ClientTLS(api.RoleManager))
			},
			Renewed: func() { renewed <- struct{}{} },
		})
	}()
	select {
	case <-renewed:
	case <-time.After(10 * time.Second):
		t.Fatal("not renewed")
	}
	fresh, _ := tls.GetCertificate(nil)
	if now := time.Now(); bytes.Equal(old.Certificate[0], fresh.Certificate[0]) || now.After(before) {
		t.Errorf("renewed at %v: want a new certificate before the old one ends at %v", now, before)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestClientRefusesOtherClusterAndRole(t *testing.T) {
	ca, other := identitytest.New(t), identitytest.New(t)
	worker := ca.Identity(t, api.RoleWorker)
	mux, err := transport.Listen(transport.Config{Addr: "127.0.0.1:0", Server: worker.ServerTLS(), Client: worker.ClientTLS("")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { _ = mux.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	addr := mux.Addr().String()
	if _, err := transport.Dial(ctx, addr, api.ALPNGRPC, ca.Identity(t, api.RoleManager).ClientTLS(api.RoleManager)); err == nil || !strings.Contains(err.Error(), "is a worker") {
		t.Errorf("a worker was taken for a manager: %v", err)
	}
	if _, err := transport.Dial(ctx, addr, api.ALPNGRPC, other.Identity(t, api.RoleManager).ClientTLS("")); err == nil {
		t.Error("a node of another cluster was trusted")
	}
}

func FuzzJoinToken(f *testing.F) {
	f.Add("SWMTKN-1-")
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := identity.Join(t.Context(), "127.0.0.1:1", s, identity.JoinOptions{}); err == nil {
			t.Error("joined without a manager")
		}
	})
}
