package control

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/ca"
	"skein/manager/store"
)

const (
	maxLabels      = 1000
	maxLabelLength = 4096
)

// GetNode shows one node.
func (s *Server) GetNode(ctx context.Context, r *api.GetRequest) (*api.Object, error) {
	var out swarm.Node
	err := s.read(ctx, func(tx store.ReadTx) error {
		n, err := tx.FindNode(r.Ref)
		if err != nil {
			return err
		}
		out = s.nodeObject(tx.Cluster(), n)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return object(out)
}

// ListNodes shows the nodes that match all filters.
func (s *Server) ListNodes(ctx context.Context, r *api.ListRequest) (*api.Objects, error) {
	f, err := newFilters(r.Filters, "id", "name", "label", "node.label", "engine.label", "role", "membership")
	if err != nil {
		return nil, err
	}
	if err := f.oneOf("role", api.RoleManager, api.RoleWorker); err != nil {
		return nil, err
	}
	if err := f.oneOf("membership", "accepted", "pending"); err != nil {
		return nil, err
	}
	p := newPage(r.After, r.PageBytes)
	err = s.read(ctx, func(tx store.ReadTx) error {
		for _, n := range behind(tx.Nodes(), r.After, func(n *store.Node) string { return n.Id }) {
			o := s.nodeObject(tx.Cluster(), n)
			names := []string{o.Description.Hostname}
			if n.Name != "" {
				names = append(names, n.Name)
			}
			engine := o.Description.Engine.Labels
			if f.prefix("id", n.Id) && f.prefix("name", names...) && f.labels("label", engine) && f.labels("engine.label", engine) &&
				f.labels("node.label", n.Labels) && f.exact("role", n.Role) && f.exact("membership", "accepted") {
				if p.full() {
					return nil
				}
				if err := p.add(n.Id, o); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return p.out, nil
}

// UpdateNode changes a node's availability, labels, name and role. The role is a wish: the leader and the node follow it.
func (s *Server) UpdateNode(ctx context.Context, r *api.UpdateRequest) (*api.Empty, error) {
	var spec swarm.NodeSpec
	if err := decode("node spec", r.SpecJson, &spec); err != nil {
		return nil, err
	}
	if err := validateNode(&spec); err != nil {
		return nil, err
	}
	s.roles.Lock() // two demotions side by side could take the last two managers
	defer s.roles.Unlock()
	role := ""
	err := s.write(ctx, func(tx store.WriteTx) error {
		old, err := tx.FindNode(r.Ref)
		if err != nil {
			return err
		}
		if err := checkVersion("node "+old.Hostname, r.Version, old.Meta.GetVersion()); err != nil {
			return err
		}
		if role = string(spec.Role); role == "" {
			role = old.Role
		}
		if role == api.RoleWorker && old.Role == api.RoleManager {
			if err := s.mayDemote(tx, old); err != nil {
				return err
			}
		}
		if uses := tx.Cluster().GetFeatureLevel(); role == api.RoleManager && old.Role != role && old.FeatureLevel > 0 && old.FeatureLevel < uses {
			return api.Errorf(errdefs.ErrFailedPrecondition, "promote node %s: its version of skein knows feature level %d, the cluster uses level %d: "+
				"install the version of the managers on it first", old.Hostname, old.FeatureLevel, uses)
		}
		n := proto.Clone(old).(*api.NodeRecord)
		n.Name, n.Labels, n.Availability, n.Role = spec.Name, spec.Labels, string(spec.Availability), role
		if n.Availability != old.Availability && spec.Availability == swarm.NodeAvailabilityActive {
			n.ActiveSince = s.cfg.Now().UnixNano()
		}
		tx.Add(expect("node", old.Id, r.Version))
		tx.Add(&api.Change{Kind: &api.Change_PutNode{PutNode: n}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("node updated", "node", r.Ref, "availability", spec.Availability, "role", role)
	return &api.Empty{}, nil
}

// mayDemote refuses what would leave the cluster without a manager, or without a majority of those that remain.
func (s *Server) mayDemote(tx store.ReadTx, n *store.Node) error {
	rest, up := 0, 0
	for _, o := range tx.Nodes() {
		if o.Id == n.Id || o.Role != api.RoleManager {
			continue
		}
		member, _, reachable := s.cfg.Managers.ManagerStatus(o.Id)
		if member {
			rest++
		}
		if member && reachable {
			up++
		}
	}
	switch {
	case rest == 0:
		return api.Errorf(errdefs.ErrFailedPrecondition, "attempting to demote the last manager of the swarm: node %s; promote another node first", n.Hostname)
	case up <= rest/2:
		return api.Errorf(errdefs.ErrFailedPrecondition, "can't remove member from the raft: this would result in a loss of quorum: without node %s, %d of the remaining %d managers are reachable", n.Hostname, up, rest)
	}
	return nil
}

func validateNode(spec *swarm.NodeSpec) error {
	a := at{object: "node spec"}
	switch spec.Availability {
	case swarm.NodeAvailabilityActive, swarm.NodeAvailabilityPause, swarm.NodeAvailabilityDrain:
	case "":
		return a.field("Availability").missing("invalid Availability: want active, pause or drain")
	default:
		return a.field("Availability").bad(spec.Availability, "invalid Availability: %q: want active, pause or drain", clip(string(spec.Availability)))
	}
	switch spec.Role {
	case "", swarm.NodeRoleManager, swarm.NodeRoleWorker:
	default:
		return a.field("Role").bad(spec.Role, "invalid Role: %q: want manager or worker", clip(string(spec.Role)))
	}
	if spec.Name != "" && (len(spec.Name) > maxNameLength || !networkName.MatchString(spec.Name)) {
		return a.field("Name").bad(spec.Name, "want at most %d letters, digits, _ . - and a letter or digit first", maxNameLength)
	}
	return validateOptions(a.field("Labels"), onNode, spec.Labels)
}

func validateLabels(a at, labels map[string]string) error {
	if len(labels) > maxLabels {
		return a.bad(labels, "more than %d labels", maxLabels)
	}
	for _, k := range sortedKeys(labels) {
		if v := labels[k]; k == "" || len(k)+len(v) > maxLabelLength || strings.ContainsFunc(k, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return a.key(k).bad(v, "want a name without control characters, and at most %d bytes of name and value", maxLabelLength)
		}
	}
	return nil
}

// RemoveNode removes a node that is gone. A member of the Raft group goes only with force.
func (s *Server) RemoveNode(ctx context.Context, r *api.RemoveRequest) (*api.Empty, error) {
	var n *store.Node
	err := s.read(ctx, func(tx store.ReadTx) error {
		var err error
		n, err = tx.FindNode(r.Ref)
		return err
	})
	if err != nil {
		return nil, err
	}
	member, leader, reachable := s.cfg.Managers.ManagerStatus(n.Id)
	switch up := n.Status.GetState() == "ready"; {
	case leader:
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "node %s is the leader of the raft cluster. It must be demoted to worker before removal (docker node demote)", n.Hostname)
	case member && !r.Force:
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "node %s is a cluster manager and is a member of the raft cluster. It must be demoted to worker before removal (docker node demote); if it is lost for good, remove it with --force", n.Hostname)
	case member && reachable:
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "node %s is a cluster manager that is reachable. It must be demoted to worker before removal (docker node demote)", n.Hostname)
	case up && !r.Force:
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "node %s is not down and can't be removed: let it leave the swarm first, or use --force", n.Hostname)
	}
	if member {
		if err := s.cfg.Managers.RemoveManager(ctx, n.Id); err != nil {
			return nil, err
		}
	}
	err = s.write(ctx, func(tx store.WriteTx) error {
		tx.Add(expect("node", n.Id, tx.Node(n.Id).GetMeta().GetVersion()))
		tx.Add(&api.Change{Kind: &api.Change_DeleteNode{DeleteNode: n.Id}})
		return s.shutOut(tx, n.Id)
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("node removed", "node", n.Id, "hostname", n.Hostname, "force", r.Force)
	return &api.Empty{}, nil
}

// shutOut lists a removed node until its last certificate has expired, forgets those whose certificates have, and begins to replace the
// gossip key that the node knows.
func (s *Server) shutOut(tx store.WriteTx, nodeID string) error {
	old := tx.Cluster()
	if old == nil {
		return api.Errorf(errdefs.ErrUnavailable, "the cluster's state is not there yet; try again")
	}
	var spec swarm.Spec
	if err := json.Unmarshal(old.SpecJson, &spec); err != nil {
		return api.Errorf(errdefs.ErrDataLoss, "cluster %s: its spec is not JSON: %v", old.Id, err)
	}
	now := s.cfg.Now()
	c := proto.Clone(old).(*api.ClusterRecord)
	c.Removed = slices.DeleteFunc(c.Removed, func(r *api.RemovedNode) bool { return r.Until < now.UnixNano() })
	life := max(spec.CAConfig.NodeCertExpiry, DefaultClusterSpec().CAConfig.NodeCertExpiry) // it may have been shortened since
	c.Removed = append(c.Removed, &api.RemovedNode{NodeId: nodeID, Until: max(now.Add(life).UnixNano(), tx.Node(nodeID).GetTls().GetNotAfter())})
	fresh := make([]byte, len(c.GossipKey))
	if _, err := rand.Read(fresh); err != nil {
		return err
	}
	ca.RotateGossip(c, fresh, now)
	tx.Add(expect("cluster", old.Id, old.Meta.GetVersion()))
	tx.Add(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})
	return nil
}
