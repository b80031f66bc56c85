package control

import (
	"context"
	"slices"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/store"
)

// NetStatus tells which node applied which version of which table; a worker hears of itself.
func (s *Server) NetStatus(ctx context.Context, _ *api.ListRequest) (*api.NetStatusReply, error) {
	if err := s.cfg.Managers.Linearize(ctx); err != nil {
		return nil, err
	}
	o := s.observer()
	if o == nil {
		return nil, api.Errorf(errdefs.ErrUnavailable, "network status: the leader is just starting; try again in a moment")
	}
	all, err := o.NetStatus(ctx)
	own, worker := s.workerAsks(ctx)
	if err != nil || !worker {
		return all, err
	}
	return &api.NetStatusReply{
		Rows:  slices.DeleteFunc(slices.Clone(all.Rows), func(r *api.NetStatusRow) bool { return r.NodeId != own.Id }),
		Nodes: slices.DeleteFunc(slices.Clone(all.Nodes), func(n *api.NetStatusNode) bool { return n.NodeId != own.Id }),
	}, nil
}

// NetCheck has nodes compare their kernels with the record; a worker may ask it of itself.
func (s *Server) NetCheck(ctx context.Context, req *api.NetCheckRequest) (*api.NetCheckReply, error) {
	if err := s.cfg.Managers.Linearize(ctx); err != nil {
		return nil, err
	}
	o := s.observer()
	if o == nil {
		return nil, api.Errorf(errdefs.ErrUnavailable, "network check: the leader is just starting; try again in a moment")
	}
	if own, worker := s.workerAsks(ctx); worker {
		for _, n := range req.Nodes {
			if n != own.Id && n != own.Hostname {
				return nil, api.Errorf(errdefs.ErrPermissionDenied, "network check of node %s: denied: this node is a worker and may compare itself only: ask at a manager", n)
			}
		}
		req = &api.NetCheckRequest{Repair: req.Repair, Nodes: []string{own.Id}}
	}
	return o.NetCheck(ctx, req)
}

// workerAsks tells the node that asks, if it is no manager.
func (s *Server) workerAsks(ctx context.Context) (*store.Node, bool) {
	c, ok := authz.CallerFrom(ctx)
	if !ok { // within this process
		return nil, false
	}
	own := &store.Node{Id: c.NodeID}
	s.cfg.Store.View(func(tx store.ReadTx) {
		if n := tx.Node(c.NodeID); n != nil {
			own = n
		}
	})
	return own, c.Role != api.RoleManager || own.Role != api.RoleManager
}
