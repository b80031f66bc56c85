package store

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"skein/manager/allocator"
	"skein/manager/api"
)

// Attachments are the places of containers that are no tasks on the cluster's networks: one record a container, by the container's id. It
// holds its addresses while the container exists, and is seen by others while it is active.

const (
	maxAttachedNames = 64  // of a container on one network
	maxAttachedName  = 255 // bytes
)

// putAttachment makes a container's record what the wish says; what stays keeps its addresses.
func (s *state) putAttachment(w *api.AttachmentWish) error {
	if s.level() < api.LevelNetworks {
		return api.Errorf(errPrecondition, "containers cannot be attached to networks of the cluster before all managers run this version of Skein: the cluster is at feature level %d, this needs %d", s.level(), api.LevelNetworks)
	}
	old := s.attachments.get(w.Id)
	if err := s.checkWish(w, old); err != nil {
		return err
	}
	if len(w.Networks) == 0 {
		if old != nil {
			s.dropAttachment(old)
		}
		return nil
	}
	rec, err := s.alloc.SetAttachment(old, w, wayOut(view{s}, w), s.time)
	if err != nil {
		return err
	}
	if old != nil {
		rec.Meta = old.Meta
		if proto.Equal(old, rec) {
			return nil
		}
	}
	rec.Meta = nextMeta(old.GetMeta(), s.version, s.time)
	s.storeAttachment(rec)
	return nil
}

func (s *state) checkWish(w *api.AttachmentWish, old *api.AttachmentRecord) error {
	if err := checkID("container", w.Id); err != nil {
		return err
	}
	switch {
	case s.nodes.get(w.NodeId) == nil:
		return api.Errorf(errNotFound, "node %s not found", w.NodeId)
	case old != nil && old.NodeId != w.NodeId:
		return api.Errorf(errDenied, "container %s belongs to node %s", w.Id, old.NodeId)
	case len(w.Name) > maxAttachedName:
		return api.Errorf(errInvalid, "container %s: its name has %d bytes, the limit is %d", w.Id, len(w.Name), maxAttachedName)
	case len(w.Networks) > maxNetworks:
		return api.Errorf(errInvalid, "container %s: attached to %d networks, the limit is %d", w.Name, len(w.Networks), maxNetworks)
	}
	var ids []string
	for i, a := range w.Networks {
		n := s.networks.get(a.NetworkId)
		has := slices.ContainsFunc(old.GetNetworks(), func(o *api.AttachedNetwork) bool { return o.NetworkId == a.NetworkId })
		switch {
		case n == nil:
			return api.Errorf(errNotFound, "network %s not found", a.NetworkId)
		case !has && (n.Ingress || !n.Attachable):
			return api.Errorf(errDenied, "Could not attach to network %s: network %s not manually attachable", n.Name, n.Name)
		case len(a.Names) > maxAttachedNames || slices.ContainsFunc(a.Names, func(x string) bool { return len(x) > maxAttachedName }):
			return api.Errorf(errInvalid, "container %s on network %s: more than %d names, or one of more than %d bytes", w.Name, n.Name, maxAttachedNames, maxAttachedName)
		}
		for _, b := range w.Networks[:i] {
			if b.NetworkId == n.Id {
				return api.Errorf(errInvalid, "container %s: network %s is named twice", w.Name, n.Name)
			}
		}
		ids = append(ids, n.Id)
	}
	if err := s.alloc.Apart(ids); err != nil {
		return api.Errorf(errInvalid, "container %s: %v", w.Name, err)
	}
	return nil
}

// deleteAttachment forgets a container. One that is not there needs nothing.
func (s *state) deleteAttachment(r *api.AttachmentRef) error {
	rec := s.attachments.get(r.Id)
	switch {
	case rec == nil:
		return nil
	case rec.NodeId != r.NodeId:
		return api.Errorf(errDenied, "container %s belongs to node %s", r.Id, rec.NodeId)
	}
	s.dropAttachment(rec)
	return nil
}

func (s *state) storeAttachment(rec *api.AttachmentRecord) {
	if old := s.attachments.get(rec.Id); old != nil {
		for _, n := range old.Networks {
			s.attachedTo.del(pair{n.NetworkId, rec.Id})
		}
	}
	for _, n := range rec.Networks {
		s.attachedTo.put(pair{n.NetworkId, rec.Id}, struct{}{})
	}
	s.attachedTo.put(pair{nodePair + rec.NodeId, rec.Id}, struct{}{})
	s.attachments.put(rec.Id, rec)
	s.changedObject(KindAttachment, rec.Id)
}

// nodePair begins the keys of nodes in attachedTo; object ids hold no colon.
const nodePair = "node:"

// dropAttachment puts all that a container holds to rest and forgets it.
func (s *state) dropAttachment(rec *api.AttachmentRecord) {
	s.alloc.RemoveAttachment(rec, s.time)
	for _, n := range rec.Networks {
		s.attachedTo.del(pair{n.NetworkId, rec.Id})
	}
	s.attachedTo.del(pair{nodePair + rec.NodeId, rec.Id})
	s.attachments.del(rec.Id)
	s.changedObject(KindAttachment, rec.Id)
}

// attachmentsOf lists the records of a network or, behind nodePair, of a node, by container id.
func (s *state) attachmentsOf(of string) []*api.AttachmentRecord {
	var out []*api.AttachmentRecord
	s.attachedTo.from(pair{a: of}, func(k pair, _ struct{}) bool {
		if k.a != of {
			return false
		}
		out = append(out, s.attachments.get(k.b))
		return true
	})
	return out
}

// leaveNetwork takes the containers off a network that goes. Those that run keep it: they must leave first.
func (s *state) leaveNetwork(n *api.NetworkRecord) error {
	all := s.attachmentsOf(n.Id)
	var users []string
	for _, a := range all {
		if a.Active {
			node := s.nodes.get(a.NodeId)
			users = append(users, a.Name+" on node "+either(node.GetHostname(), a.NodeId))
		}
	}
	if len(users) > 0 {
		const few = 5
		text := strings.Join(users[:min(few, len(users))], ", ")
		if len(users) > few {
			text += ", …"
		}
		return api.Errorf(errPrecondition, "network %s is in use: it has active endpoints of %d containers: %s: stop them, or disconnect them first", n.Name, len(users), text)
	}
	for _, a := range all {
		if len(a.Networks) == 1 {
			s.dropAttachment(a)
			continue
		}
		rec := proto.Clone(a).(*api.AttachmentRecord)
		rec.Networks = slices.DeleteFunc(rec.Networks, func(x *api.AttachedNetwork) bool {
			if x.NetworkId != n.Id {
				return false
			}
			s.alloc.LeaveNetwork(a.Id, x, s.time)
			return true
		})
		rec.Meta = nextMeta(a.Meta, s.version, s.time)
		s.storeAttachment(rec)
	}
	return nil
}

// loadAttachment takes a record of a snapshot.
func (s *state) loadAttachment(rec *api.AttachmentRecord) error {
	if s.nodes.get(rec.NodeId) == nil {
		return damaged("container %s is on node %s, which does not exist", rec.Id, rec.NodeId)
	}
	s.storeAttachment(rec)
	return s.alloc.RestoreAttachment(rec)
}

// Attachment is what a container that is no task holds, nil if nothing.
func (v view) Attachment(id string) *Attachment { return v.s.attachments.get(id) }

// Attachments lists all of them, by container id.
func (v view) Attachments() []*Attachment { return v.s.attachments.all() }

// AttachmentsOfNode lists those of a node's containers.
func (v view) AttachmentsOfNode(id string) []*Attachment { return v.s.attachmentsOf(nodePair + id) }

// AttachmentsOfNetwork lists those that are on a network.
func (v view) AttachmentsOfNetwork(id string) []*Attachment { return v.s.attachmentsOf(id) }

// wayOut reports whether a container gets an address of its node's block: it wishes one, and not all its networks are internal.
func wayOut(tx ReadTx, w *api.AttachmentWish) bool {
	return w.Gateway && slices.ContainsFunc(w.Networks, func(n *api.AttachedNetwork) bool { return !tx.Network(n.NetworkId).GetInternal() })
}

// Meets reports whether a container's record is what a wish asks for already.
func Meets(tx ReadTx, rec *Attachment, w *api.AttachmentWish) bool {
	if rec == nil || rec.NodeId != w.NodeId || rec.Name != w.Name || rec.Active != w.Active || len(rec.Networks) != len(w.Networks) || (rec.Gateway4 != "") != wayOut(tx, w) {
		return false
	}
	for i, n := range rec.Networks {
		if n.NetworkId != w.Networks[i].NetworkId || !allocator.Keeps(n, w.Networks[i]) || !slices.Equal(n.Names, w.Networks[i].Names) {
			return false
		}
	}
	return true
}
