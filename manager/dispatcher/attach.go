package dispatcher

import (
	"slices"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// attachedEntry is what is known of a container that is no task: on which tables of which node it counts.
type attachedEntry struct {
	node *node
	nets []string
}

// refreshAttachment brings the endpoints of a container that is no task, and its node's needs, up to date. Only active ones have any.
func (d *Dispatcher) refreshAttachment(tx store.ReadTx, id string) {
	a, e := tx.Attachment(id), d.attached[id]
	var before []string
	if e != nil {
		before = e.nets
		d.needNets(e.node, e.nets, -1)
	}
	if a == nil || !a.Active || d.nodes[a.NodeId] == nil {
		delete(d.attached, id)
		for _, net := range before {
			d.spread.removeEndpoint(net, id)
		}
		return
	}
	now := &attachedEntry{node: d.nodes[a.NodeId]}
	for _, n := range a.Networks {
		if d.spread.tables[n.NetworkId] == nil {
			continue
		}
		now.nets = append(now.nets, n.NetworkId)
		state := stateReady
		if now.node.rec.Status.GetState() == nodeDown {
			state = stateLost
		}
		d.spread.setEndpoint(n.NetworkId, &api.TaskEndpoint{TaskId: id, NodeIndex: now.node.rec.Index, Addr4: bare(n.Addr4), Addr6: bare(n.Addr6), State: state, Names: n.Names})
	}
	d.needNets(now.node, now.nets, +1)
	d.attached[id] = now
	for _, net := range before {
		if !slices.Contains(now.nets, net) {
			d.spread.removeEndpoint(net, id)
		}
	}
}

// setIngress tells nodes of the ingress network, which says how the mesh is to be. One without an id says that there is none any more.
func (s *spread) setIngress(id string, rec *store.Network) {
	switch {
	case rec.GetIngress():
		s.ingress = id
	case rec == nil && id == s.ingress:
		s.ingress, rec = "", &store.Network{}
	default:
		return
	}
	if mesh := s.tables[api.MeshTable]; !proto.Equal(mesh.network, rec) {
		mesh.network = rec
		mesh.changed.any, mesh.changed.network = true, true
	}
}

// markAttachments has the containers of a node looked at that are no tasks.
func (d *Dispatcher) markAttachments(tx store.ReadTx, node string, x *dirty) {
	for _, a := range tx.AttachmentsOfNode(node) {
		x.mark(store.KindAttachment, a.Id)
	}
}
