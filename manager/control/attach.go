package control

import (
	"context"
	"slices"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/store"
)

// maxAttach bounds the containers of one request, and so the size of its log entry.
const maxAttach = 4096

// Attach sets and removes what a node's containers that are no tasks hold of the networks. authz sees to it that a node speaks for itself. What
// is set already is not written again. With full, a wish that cannot be met spoils no other: its container is not in the answer.
func (s *Server) Attach(ctx context.Context, r *api.AttachRequest) (*api.AttachReply, error) {
	if len(r.Set)+len(r.Removed) > maxAttach {
		return nil, invalid("attach: %d containers in one request, the limit is %d", len(r.Set)+len(r.Removed), maxAttach)
	}
	for _, w := range r.Set {
		if w.NodeId != r.NodeId {
			return nil, api.Errorf(errdefs.ErrPermissionDenied, "attach: node %s may speak only for its own containers", r.NodeId)
		}
	}
	var open []*api.AttachmentWish
	err := s.write(ctx, func(tx store.WriteTx) error {
		gone := r.Removed
		if r.Full {
			gone = nil
			for _, a := range tx.AttachmentsOfNode(r.NodeId) {
				if !slices.ContainsFunc(r.Set, func(w *api.AttachmentWish) bool { return w.Id == a.Id }) {
					gone = append(gone, a.Id)
				}
			}
		}
		for _, id := range gone {
			if tx.Attachment(id) != nil {
				tx.Add(&api.Change{Kind: &api.Change_DeleteAttachment{DeleteAttachment: &api.AttachmentRef{Id: id, NodeId: r.NodeId}}})
			}
		}
		open = slices.DeleteFunc(slices.Clone(r.Set), func(w *api.AttachmentWish) bool { return store.Meets(tx, tx.Attachment(w.Id), w) })
		if !r.Full {
			addWishes(tx, open)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if r.Full {
		if err := s.attachEach(ctx, open); err != nil {
			return nil, err
		}
	}
	reply := &api.AttachReply{}
	s.cfg.Store.View(func(tx store.ReadTx) {
		for _, w := range r.Set {
			if a := tx.Attachment(w.Id); a != nil && store.Meets(tx, a, w) {
				reply.Attachments = append(reply.Attachments, a)
			}
		}
	})
	return reply, nil
}

func addWishes(tx store.WriteTx, wishes []*api.AttachmentWish) {
	for _, w := range wishes {
		tx.Add(&api.Change{Kind: &api.Change_PutAttachment{PutAttachment: w}})
	}
}

// attachEach sets them one by one. Only those that cannot be met at present are left out.
func (s *Server) attachEach(ctx context.Context, wishes []*api.AttachmentWish) error {
	for _, w := range wishes {
		err := s.write(ctx, func(tx store.WriteTx) error {
			addWishes(tx, []*api.AttachmentWish{w})
			return nil
		})
		switch {
		case err == nil:
		case errdefs.IsNotFound(err), errdefs.IsInvalidArgument(err), errdefs.IsPermissionDenied(err), errdefs.IsConflict(err), errdefs.IsResourceExhausted(err):
			s.log.Warn("a container keeps no place on its networks", "container", w.Id, "node", w.NodeId, "err", err)
		default:
			return err
		}
	}
	return nil
}

// ListNodeNetworks shows the networks that concern a node: attachable ones, and those that something on it is on. Others are no worker's business.
func (s *Server) ListNodeNetworks(ctx context.Context, r *api.NodeNetworksRequest) (*api.Objects, error) {
	p := newPage(r.After, r.PageBytes)
	err := s.read(ctx, func(tx store.ReadTx) error {
		if r.Ref != "" {
			n, err := tx.FindNetwork(r.Ref)
			if err != nil {
				return err
			}
			return p.add(n.Id, networkObject(n))
		}
		on := networksOf(tx, r.NodeId)
		for _, n := range behind(tx.Networks(), r.After, func(n *store.Network) string { return n.Id }) {
			if !n.Attachable && !n.Ingress && !on[n.Id] {
				continue
			}
			if p.full() {
				return nil
			}
			if err := p.add(n.Id, networkObject(n)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return p.out, nil
}

// networksOf are the ids of the networks that something on a node is on.
func networksOf(tx store.ReadTx, node string) map[string]bool {
	on := map[string]bool{}
	for _, t := range tx.TasksByNode(node) {
		if !t.Live() {
			continue
		}
		for _, a := range t.Attachments {
			on[a.NetworkId] = true
		}
	}
	for _, a := range tx.AttachmentsOfNode(node) {
		for _, n := range a.Networks {
			on[n.NetworkId] = true
		}
	}
	return on
}
