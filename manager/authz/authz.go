// Package authz decides who may call which RPC: one table, deny by default.
//
// The caller is the node in the peer's verified certificate. Its role counts only as far as certificate and store agree, so a removed node
// is refused though its certificate is good, and a demoted manager is a worker at once. A manager may speak for a caller it has checked
// itself (package forward); nobody else may. Handlers find the caller in their context and never look at certificates.
//
// It guarantees that a method missing from the table is denied, and maps error kinds to gRPC codes on the way out. It must not decide on
// anything but the caller, the method and the node a request speaks for. Who uses it: every node's gRPC server, ca, forward, dispatcher.
package authz

import (
	"context"
	"log/slog"
	"net"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"skein/manager/api"
)

// Caller is who asks: the verified identity of a node, or of nobody (NodeID empty) for the two methods of joining.
type Caller struct {
	api.NodeIdentity
	// Addr is the host the request came from first, for limits and logs.
	Addr string
	// Forwarded is set when another manager passed the request on: it must not be passed on again.
	Forwarded bool
}

type callerKey struct{}

// CallerFrom returns the caller of a request.
func CallerFrom(ctx context.Context) (Caller, bool) {
	c, ok := ctx.Value(callerKey{}).(Caller)
	return c, ok
}

// WithCaller sets the caller of a request made within this process.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// Config of an Authorizer.
type Config struct {
	// Role returns the role that the store gives a node which says that it is id.Role. Unknown nodes are an error: denied where the store is
	// known to be current, unavailable where it may lag and does not catch up in time. Where the store may lag and gives less than the
	// node says, Role waits for it, too: the node may have been promoted a moment ago. Nil: the certificate alone counts.
	Role   func(ctx context.Context, id api.NodeIdentity) (string, error)
	Logger *slog.Logger
}

// Authorizer checks each request before its handler sees it.
type Authorizer struct {
	role  func(context.Context, api.NodeIdentity) (string, error)
	log   *slog.Logger
	table map[string]rule
}

// New returns an Authorizer.
func New(cfg Config) *Authorizer {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Authorizer{role: cfg.Role, log: cfg.Logger.With("component", "authz"), table: rules()}
}

// Unary is the outermost interceptor of unary methods.
func (a *Authorizer) Unary() grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		ctx, err := a.admit(ctx, info.FullMethod, req)
		if err != nil {
			return nil, api.ToGRPC(err)
		}
		reply, err := handler(ctx, req)
		return reply, api.ToGRPC(err)
	}
}

// Stream is the outermost interceptor of streaming methods. Rules about the request do not apply to streams: their handlers take the
// node from the caller.
func (a *Authorizer) Stream() grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		ctx, err := a.admit(ss.Context(), info.FullMethod, nil)
		if err != nil {
			return api.ToGRPC(err)
		}
		return api.ToGRPC(handler(srv, &stream{ServerStream: ss, ctx: ctx}))
	}
}

type stream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context carries the caller.
func (s *stream) Context() context.Context { return s.ctx }

// admit finds the caller out and applies the method's rule.
func (a *Authorizer) admit(ctx context.Context, method string, req any) (context.Context, error) {
	caller, err := a.identify(ctx)
	if err == nil {
		err = a.check(ctx, caller, method, req)
	}
	if err != nil {
		level := slog.LevelInfo
		if caller.NodeID == "" {
			level = slog.LevelDebug // strangers may not fill the log
		}
		a.log.Log(ctx, level, "refused", "method", method, "node", caller.NodeID, "addr", caller.Addr, "err", err)
		return nil, err
	}
	return WithCaller(ctx, caller), nil
}

// check applies the method's rule to a caller whose certificate is good.
func (a *Authorizer) check(ctx context.Context, c Caller, method string, req any) error {
	r, ok := a.table[method]
	if !ok {
		return api.Errorf(errdefs.ErrPermissionDenied, "%s: denied: no rule allows this method to anybody", method)
	}
	if r.who == anyone {
		return nil
	}
	if c.NodeID == "" {
		return api.Errorf(errdefs.ErrUnauthenticated, "%s: denied: this needs a node certificate; join the cluster first (docker swarm join)", method)
	}
	says := c.NodeIdentity
	if r.who != managers {
		says.Role = api.RoleWorker // all that this method asks for: a manager demoted a moment ago need not wait
	}
	role, err := a.effectiveRole(ctx, says)
	if err != nil {
		return err
	}
	if r.who == managers && role != api.RoleManager {
		return api.Errorf(errdefs.ErrPermissionDenied, "%s: denied: node %s is a %s, only managers may do this; ask a manager, or promote the node with \"docker node promote\"", method, c.NodeID, role)
	}
	if r.speaksFor != nil && r.speaksFor(req) != c.NodeID {
		return api.Errorf(errdefs.ErrPermissionDenied, "%s: denied: node %s may speak only for itself", method, c.NodeID)
	}
	return nil
}

// effectiveRole is the least that certificate and store agree on.
func (a *Authorizer) effectiveRole(ctx context.Context, id api.NodeIdentity) (string, error) {
	if a.role == nil {
		return id.Role, nil
	}
	stored, err := a.role(ctx, id)
	if err != nil {
		return "", err
	}
	if stored != api.RoleManager || id.Role != api.RoleManager {
		return api.RoleWorker, nil
	}
	return api.RoleManager, nil
}

// identify finds out who asks: a caller set within this process, else the peer's certificate, else whom that peer, a manager, speaks for.
func (a *Authorizer) identify(ctx context.Context) (Caller, error) {
	if c, ok := CallerFrom(ctx); ok {
		return c, nil
	}
	c, err := peerCaller(ctx)
	if err != nil {
		return c, err
	}
	md, _ := metadata.FromIncomingContext(ctx)
	carried, err := callerFromMetadata(md)
	if err != nil {
		return c, err
	}
	if carried == nil {
		return c, nil
	}
	if c.NodeID == "" {
		return c, api.Errorf(errdefs.ErrPermissionDenied, "forwarded identity denied: it does not come from a manager")
	}
	role, err := a.effectiveRole(ctx, c.NodeIdentity)
	if err != nil {
		return c, err
	}
	if role != api.RoleManager {
		return c, api.Errorf(errdefs.ErrPermissionDenied, "forwarded identity denied: node %s is a %s, only managers may speak for others", c.NodeID, role)
	}
	if carried.NodeID != "" {
		carried.ClusterID = c.ClusterID
	}
	return *carried, nil
}

// peerCaller reads the peer's verified certificate.
func peerCaller(ctx context.Context) (Caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Caller{}, api.Errorf(errdefs.ErrUnauthenticated, "request without a peer")
	}
	c := Caller{Addr: hostOf(p.Addr)}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return c, api.Errorf(errdefs.ErrUnauthenticated, "request over a connection without TLS")
	}
	if len(info.State.PeerCertificates) == 0 {
		return c, nil
	}
	if len(info.State.VerifiedChains) == 0 {
		return c, api.Errorf(errdefs.ErrUnauthenticated, "the peer's certificate was not verified")
	}
	id, err := api.IdentityOf(info.State.PeerCertificates[0])
	if err != nil {
		return c, err
	}
	c.NodeIdentity = id
	return c, nil
}

func hostOf(a net.Addr) string {
	if a == nil {
		return ""
	}
	if host, _, err := net.SplitHostPort(a.String()); err == nil {
		return host
	}
	return a.String()
}
