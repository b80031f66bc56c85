package authz

import (
	"context"
	"net/netip"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/metadata"

	"skein/manager/api"
)

// Metadata keys of a forwarded request. All or none are present.
const (
	mdNode = "skein-forwarded-node" // empty for a stranger
	mdRole = "skein-forwarded-role"
	mdAddr = "skein-forwarded-addr"
)

// Outgoing puts the caller into the metadata of a request that this manager passes on. Nothing of the incoming metadata goes along.
func Outgoing(ctx context.Context, c Caller) context.Context {
	return metadata.NewOutgoingContext(ctx, metadata.Pairs(mdNode, c.NodeID, mdRole, c.Role, mdAddr, c.Addr))
}

// callerFromMetadata reads a forwarded caller, nil if the request carries none. Anything half is an error.
func callerFromMetadata(md metadata.MD) (*Caller, error) {
	node, role, addr := md.Get(mdNode), md.Get(mdRole), md.Get(mdAddr)
	if len(node) == 0 && len(role) == 0 && len(addr) == 0 {
		return nil, nil
	}
	bad := api.Errorf(errdefs.ErrPermissionDenied, "forwarded identity denied: it is incomplete or malformed")
	if len(node) != 1 || len(role) != 1 || len(addr) != 1 {
		return nil, bad
	}
	c := &Caller{Forwarded: true}
	if _, err := netip.ParseAddr(addr[0]); err == nil {
		c.Addr = addr[0]
	} else if addr[0] != "" && addr[0] != LocalAddr {
		return nil, bad
	}
	switch {
	case node[0] == "" && role[0] == "":
		return c, nil
	case api.ValidID(node[0]) && api.ValidRole(role[0]):
		c.NodeID, c.Role = node[0], role[0]
		return c, nil
	}
	return nil, bad
}

// LocalAddr is the address of callers within a manager's own process.
const LocalAddr = "local"
