package manager

import (
	"context"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/authz"
)

// Control is a client of the control service for this node's own API socket: without a network, but with the same checks and forwarding as
// any request. Errors are of errdefs kinds.
func (m *Manager) Control() api.ControlClient { return api.NewControlClient(m.local()) }

// local calls the services in this process as this node.
func (m *Manager) local() *localConn {
	return &localConn{
		caller: authz.Caller{NodeIdentity: api.NodeIdentity{NodeID: m.cfg.NodeID, Role: api.RoleManager, ClusterID: m.cfg.ClusterID}, Addr: authz.LocalAddr},
		outer:  m.authz.Unary(), inner: m.fwd.Unary(),
		services: map[*grpc.ServiceDesc]any{&api.Control_ServiceDesc: m.srv.control, &api.Membership_ServiceDesc: m.srv.members},
	}
}

// localConn is a grpc.ClientConnInterface on services in this process.
type localConn struct {
	caller       authz.Caller
	outer, inner grpc.UnaryServerInterceptor
	services     map[*grpc.ServiceDesc]any
}

// Invoke runs a unary method's handler behind the same interceptors as on the server.
func (c *localConn) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
	ctx = authz.WithCaller(ctx, c.caller)
	for desc, srv := range c.services {
		for _, md := range desc.Methods {
			if "/"+desc.ServiceName+"/"+md.MethodName != method {
				continue
			}
			decode := func(in any) error {
				proto.Merge(in.(proto.Message), args.(proto.Message))
				return nil
			}
			out, err := md.Handler(srv, ctx, decode, c.chain)
			if err != nil {
				return api.FromGRPC(err)
			}
			proto.Merge(reply.(proto.Message), out.(proto.Message))
			return nil
		}
	}
	return api.Errorf(errdefs.ErrNotImplemented, "%s: no such method here", method)
}

func (c *localConn) chain(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	return c.outer(ctx, req, info, func(ctx context.Context, req any) (any, error) {
		return c.inner(ctx, req, info, handler)
	})
}

// NewStream is not needed by any of them.
func (c *localConn) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, api.Errorf(errdefs.ErrNotImplemented, "no streams within this process")
}
