package ca

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/store"
)

const (
	maxHostname = 255
	// Wrong tokens: a burst for typing errors, then one a second per host. 128 bits would take for ever anyway; this keeps the leader quiet.
	guessBurst  = 10
	guessPeriod = time.Second
	guessHosts  = 1024
)

// Store is what the CA needs of the cluster's store.
type Store interface {
	View(func(store.ReadTx))
	Update(context.Context, func(store.WriteTx) error) (uint64, error)
}

// Server implements api.CAServer. All but GetRootCA run on the leader.
type Server struct {
	api.UnimplementedCAServer
	store   Store
	log     *slog.Logger
	now     func() time.Time
	guesses *limiter
	demoted func(ctx context.Context, nodeID string) error
}

// NewServer returns the CA service. now is the clock, nil: the real one.
func NewServer(st Store, log *slog.Logger, now func() time.Time) *Server {
	if log == nil {
		log = slog.Default()
	}
	if now == nil {
		now = time.Now
	}
	return &Server{store: st, log: log.With("component", "ca"), now: now, guesses: newLimiter(guessBurst, guessPeriod, guessHosts)}
}

// BeforeDemoted sets what a renewal waits for that gives a node the role of a worker. Before the server is used.
func (s *Server) BeforeDemoted(await func(ctx context.Context, nodeID string) error) {
	s.demoted = await
}

// GetRootCA returns the root certificate, which is public.
func (s *Server) GetRootCA(context.Context, *api.Empty) (*api.RootCA, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	return &api.RootCA{CertPem: c.CaCertPem}, nil
}

// IssueCertificate lets a node with a valid token join: it registers the node and signs its certificate. The node's ID follows from its
// key, so that the same request sent twice is one node.
func (s *Server) IssueCertificate(ctx context.Context, r *api.IssueRequest) (*api.IssueReply, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	role, err := s.roleOf(ctx, c, r.Token)
	if err != nil {
		return nil, err
	}
	csr, err := ParseRequest(r.CsrPem)
	if err != nil {
		return nil, err
	}
	rec, err := nodeRecord(r, role)
	if err != nil {
		return nil, err
	}
	rec.Id = api.NodeIDFor(c.Id, csr.RawSubjectPublicKeyInfo)
	if err := s.register(ctx, rec); err != nil {
		return nil, err
	}
	reply, err := s.issue(c, csr, rec.Id, role)
	if err != nil {
		return nil, err
	}
	s.log.Info("node joined", "node", rec.Id, "hostname", rec.Hostname, "role", role, "addr", rec.RpcAddr)
	return reply, nil
}

// RenewCertificate gives a node a new certificate, with the role that the store gives it.
func (s *Server) RenewCertificate(ctx context.Context, r *api.IssueRequest) (*api.IssueReply, error) {
	caller, ok := authz.CallerFrom(ctx)
	if !ok || caller.NodeID == "" {
		return nil, api.Errorf(errdefs.ErrUnauthenticated, "renew certificate: the caller has none")
	}
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	csr, err := ParseRequest(r.CsrPem)
	if err != nil {
		return nil, err
	}
	node := s.node(caller.NodeID)
	if node != nil && node.Role != api.RoleManager && s.demoted != nil {
		if err := s.demoted(ctx, node.Id); err != nil {
			return nil, err
		}
		node = s.node(caller.NodeID)
	}
	if node == nil {
		return nil, api.Errorf(errdefs.ErrPermissionDenied, "renew certificate: node %s was removed from the cluster; leave with \"docker swarm leave --force\" and join again", caller.NodeID)
	}
	return s.issue(c, csr, node.Id, node.Role)
}

func (s *Server) node(id string) (n *store.Node) {
	s.store.View(func(tx store.ReadTx) { n = tx.Node(id) })
	return n
}

func (s *Server) issue(c *store.Cluster, csr *x509.CertificateRequest, nodeID, role string) (*api.IssueReply, error) {
	root, err := ParseRoot(c.CaCertPem, c.CaKeyPem)
	if err != nil {
		return nil, err
	}
	certPEM, err := root.Issue(csr, api.NodeIdentity{NodeID: nodeID, Role: role, ClusterID: c.Id}, s.now(), certLife(c))
	if err != nil {
		return nil, err
	}
	return &api.IssueReply{NodeId: nodeID, Role: role, CertPem: certPEM, ClusterId: c.Id, GossipKey: c.GossipKey}, nil
}

// certLife is what the cluster's spec says.
func certLife(c *store.Cluster) time.Duration {
	var spec swarm.Spec
	if err := json.Unmarshal(c.SpecJson, &spec); err != nil || spec.CAConfig.NodeCertExpiry == 0 {
		return NodeCertLife
	}
	return spec.CAConfig.NodeCertExpiry
}

func (s *Server) cluster() (*store.Cluster, error) {
	var c *store.Cluster
	s.store.View(func(tx store.ReadTx) { c = tx.Cluster() })
	if c == nil {
		return nil, api.Errorf(errdefs.ErrUnavailable, "certificate authority: the cluster's state is not there yet; try again")
	}
	return c, nil
}

// roleOf is the role that a token gives.
func (s *Server) roleOf(ctx context.Context, c *store.Cluster, token string) (string, error) {
	caller, _ := authz.CallerFrom(ctx)
	if wait := s.guesses.blocked(caller.Addr, s.now()); wait > 0 {
		return "", api.Errorf(errdefs.ErrResourceExhausted, "join: too many wrong tokens from %s; try again in %s", caller.Addr, wait.Round(time.Second))
	}
	why := ""
	tok, err := api.ParseJoinToken(token)
	switch {
	case err != nil:
		why = err.Error()
	case matches(c.WorkerToken, token):
		return api.RoleWorker, nil
	case matches(c.ManagerToken, token):
		return api.RoleManager, nil
	case !matchesDigest(c.WorkerToken, tok):
		why = "the join token is of another cluster, or from before its root certificate was rotated; run \"docker swarm join-token worker\" on a manager of this cluster for the current one"
	default:
		why = "the join token's secret is wrong: it was mistyped or has been rotated; run \"docker swarm join-token worker\" (or manager) on a manager for the current one"
	}
	s.guesses.charge(caller.Addr, s.now())
	s.log.Info("join refused: wrong token", "addr", caller.Addr)
	return "", api.Errorf(errdefs.ErrPermissionDenied, "join: %s", why)
}

// matches compares in constant time; a stored token that is malformed or empty matches nothing.
func matches(stored, given string) bool {
	t, err := api.ParseJoinToken(stored)
	return err == nil && t.Matches(given)
}

func matchesDigest(stored string, given api.JoinToken) bool {
	t, err := api.ParseJoinToken(stored)
	return err == nil && t.CADigest == given.CADigest
}

// register puts the node into the store. A node that is there already keeps what it is; its addresses are brought up to date.
func (s *Server) register(ctx context.Context, rec *store.Node) error {
	_, err := s.store.Update(ctx, func(tx store.WriteTx) error {
		put, version := rec, uint64(0)
		if old := tx.Node(rec.Id); old != nil {
			if old.Role != rec.Role {
				return api.Errorf(errdefs.ErrPermissionDenied, "join: node %s is a %s of this cluster already; change its role with \"docker node promote\" or \"demote\"", old.Id, old.Role)
			}
			put, version = proto.Clone(old).(*store.Node), old.Meta.GetVersion()
			put.Hostname, put.RpcAddr, put.UnderlayAddr = rec.Hostname, rec.RpcAddr, rec.UnderlayAddr
		}
		tx.Add(&api.Change{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "node", Id: rec.Id, Version: version}}})
		tx.Add(&api.Change{Kind: &api.Change_PutNode{PutNode: put}})
		return nil
	})
	return err
}

// nodeRecord checks what the node says of itself.
func nodeRecord(r *api.IssueRequest, role string) (*store.Node, error) {
	bad := func(format string, args ...any) (*store.Node, error) {
		return nil, api.Errorf(errdefs.ErrInvalidArgument, "join: "+format, args...)
	}
	if r.Hostname == "" || len(r.Hostname) > maxHostname || !printable(r.Hostname) {
		return bad("hostname %.64q: want 1 to %d printable characters", r.Hostname, maxHostname)
	}
	host, port, err := net.SplitHostPort(r.RpcAddr)
	if err != nil {
		return bad("advertise address %.64q: want host:port", r.RpcAddr)
	}
	if ip, err := netip.ParseAddr(host); err != nil || ip.IsUnspecified() || ip.IsMulticast() {
		return bad("advertise address %.64q: want the IP address of one interface; give it with --advertise-addr", r.RpcAddr)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return bad("advertise address %.64q: port out of range", r.RpcAddr)
	}
	if ip, err := netip.ParseAddr(r.UnderlayAddr); err != nil || ip.IsUnspecified() || ip.IsMulticast() {
		return bad("data path address %.64q: want the IP address of one interface; give it with --data-path-addr", r.UnderlayAddr)
	}
	availability := r.Availability
	switch availability {
	case "":
		availability = "active"
	case "active", "pause", "drain":
	default:
		return bad("availability %.64q: want active, pause or drain", r.Availability)
	}
	return &store.Node{
		Role: role, Availability: availability, Hostname: r.Hostname, RpcAddr: r.RpcAddr, UnderlayAddr: r.UnderlayAddr,
		Status: &api.NodeStatus{State: "unknown"},
	}, nil
}

func printable(s string) bool {
	for _, r := range s {
		if r <= ' ' || r == 0x7f || r > 0x7e {
			return false
		}
	}
	return true
}
