package ca

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
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

	external *External
}

// NewServer returns the CA service. now is the clock, nil: the real one.
func NewServer(st Store, log *slog.Logger, now func() time.Time) *Server {
	if log == nil {
		log = slog.Default()
	}
	if now == nil {
		now = time.Now
	}
	return &Server{store: st, log: log.With("component", "ca"), now: now, guesses: newLimiter(guessBurst, guessPeriod, guessHosts), external: NewExternal(nil)}
}

// AskWith sets the client of external authorities. Before the server is used.
func (s *Server) AskWith(e *External) { s.external = e }

// BeforeDemoted sets what a renewal waits for that gives a node the role of a worker. Before the server is used.
func (s *Server) BeforeDemoted(await func(ctx context.Context, nodeID string) error) {
	s.demoted = await
}

// GetRootCA returns the root certificate that join tokens are for; it is public.
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
	g, err := s.grantOf(ctx, c, r.Token)
	if err != nil {
		return nil, err
	}
	csr, err := ParseRequest(r.CsrPem)
	if err != nil {
		return nil, err
	}
	rec, err := nodeRecord(r, g.role)
	if err != nil {
		return nil, err
	}
	rec.Id = api.NodeIDFor(c.Id, csr.RawSubjectPublicKeyInfo)
	if err := s.register(ctx, rec, g); err != nil {
		return nil, err
	}
	reply, err := s.issue(ctx, csr, rec.Id, g.role)
	if err != nil {
		return nil, err
	}
	s.log.Info("node joined", "node", rec.Id, "hostname", rec.Hostname, "role", g.role, "addr", rec.RpcAddr, "limited_token", g.limited)
	return reply, nil
}

// RenewCertificate gives a node a new certificate, with the role that the store gives it.
func (s *Server) RenewCertificate(ctx context.Context, r *api.IssueRequest) (*api.IssueReply, error) {
	caller, ok := authz.CallerFrom(ctx)
	if !ok || caller.NodeID == "" {
		return nil, api.Errorf(errdefs.ErrUnauthenticated, "renew certificate: the caller has none")
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
	return s.issue(ctx, csr, node.Id, node.Role)
}

func (s *Server) node(id string) (n *store.Node) {
	s.store.View(func(tx store.ReadTx) { n = tx.Node(id) })
	return n
}

// issue signs with the authority that the cluster has by now.
func (s *Server) issue(ctx context.Context, csr *x509.CertificateRequest, nodeID, role string) (*api.IssueReply, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	a, err := authorityOf(c)
	if err != nil {
		return nil, err
	}
	pem, err := a.sign(ctx, s.external, csr, api.NodeIdentity{NodeID: nodeID, Role: role, ClusterID: c.Id}, s.now())
	if err != nil {
		return nil, err
	}
	return &api.IssueReply{NodeId: nodeID, Role: role, CertPem: pem, ClusterId: c.Id, GossipKey: c.GossipKey, TrustPem: a.trust, ChainPem: a.chain}, nil
}

func (s *Server) cluster() (*store.Cluster, error) {
	var c *store.Cluster
	s.store.View(func(tx store.ReadTx) { c = tx.Cluster() })
	if c == nil {
		return nil, api.Errorf(errdefs.ErrUnavailable, "certificate authority: the cluster's state is not there yet; try again")
	}
	return c, nil
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
