package control

import (
	"bytes"
	"context"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// CreateService stores a new service.
func (s *Server) CreateService(ctx context.Context, r *api.CreateRequest) (*api.Created, error) {
	spec, err := s.decodeService(r.SpecJson)
	if err != nil {
		return nil, err
	}
	auth, err := registryAuth(r.RegistryAuth)
	if err != nil {
		return nil, err
	}
	named := spec.Name != ""
	rec := &api.ServiceRecord{Id: api.NewID(), RegistryAuth: auth}
	facts := s.portFacts(ctx, newPorts(spec, nil))
	err = s.write(ctx, func(tx store.WriteTx) error {
		if !named {
			spec.Name = freeName(tx)
		}
		if tx.ServiceByName(spec.Name) != nil {
			return api.Errorf(errdefs.ErrAlreadyExists, "name conflicts with an existing object: service %s already exists", spec.Name)
		}
		if err := mayKeep(tx, auth); err != nil {
			return err
		}
		if err := resolveNetworks(tx, spec); err != nil {
			return err
		}
		if err := settlePorts(tx, rec, spec, nil, facts); err != nil {
			return err
		}
		rec.Name, rec.ForceUpdate = spec.Name, spec.TaskTemplate.ForceUpdate
		if rec.SpecJson, err = encode(spec); err != nil {
			return err
		}
		rec.Author = author(ctx)
		tx.Add(expect("service", rec.Id, 0))
		tx.Add(&api.Change{Kind: &api.Change_PutService{PutService: rec}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("service created", "service", rec.Id, "name", spec.Name)
	return &api.Created{Id: rec.Id}, nil
}

// decodeService reads and checks all of a spec that needs no look at other objects.
func (s *Server) decodeService(specJSON []byte) (*swarm.ServiceSpec, error) {
	wire := struct {
		swarm.ServiceSpec
		// Networks is where clients of old put what belongs into the task template.
		Networks []swarm.NetworkAttachmentConfig
	}{}
	if err := decode("service spec", specJSON, &wire); err != nil {
		return nil, err
	}
	spec := &wire.ServiceSpec
	if len(spec.TaskTemplate.Networks) == 0 {
		spec.TaskTemplate.Networks = wire.Networks
	}
	if spec.Labels == nil { // as it is shown: what is shown and sent back must be no other spec
		spec.Labels = map[string]string{}
	}
	if err := validateService(spec); err != nil {
		return nil, err
	}
	for _, check := range s.cfg.Checks {
		if err := check(spec); err != nil {
			if errdefs.IsNotImplemented(err) {
				return nil, err
			}
			return nil, at{object: "service spec"}.bad(nil, "%s", err)
		}
	}
	return spec, nil
}

// UpdateService replaces a service's spec, or returns to the one before.
func (s *Server) UpdateService(ctx context.Context, r *api.UpdateRequest) (*api.Updated, error) {
	var spec *swarm.ServiceSpec
	switch r.Rollback {
	case "":
		var err error
		if spec, err = s.decodeService(r.SpecJson); err != nil {
			return nil, err
		}
	case "previous":
	case "revision":
		if r.RollbackTo == 0 {
			return nil, invalid("rollback to a revision does not name one: its numbers are in the service's history")
		}
	default:
		return nil, invalid("unrecognized rollback option %q: want \"previous\" or \"revision\"", r.Rollback)
	}
	auth, err := registryAuth(r.RegistryAuth)
	if err != nil {
		return nil, err
	}
	facts := s.portFacts(ctx, s.addedPorts(r.Ref, spec))
	var name string
	err = s.write(ctx, func(tx store.WriteTx) error {
		old, err := tx.FindService(r.Ref)
		if err != nil {
			return err
		}
		name = old.Name
		if err := mayKeep(tx, auth); err != nil {
			return err
		}
		if err := checkVersion("service "+old.Name, r.Version, old.Meta.GetVersion()); err != nil {
			return err
		}
		var rec *api.ServiceRecord
		if r.Rollback == "" {
			rec, err = s.updated(tx, old, spec)
		} else {
			rec, err = s.rolledBack(tx, old, r.RollbackTo)
		}
		if err != nil {
			return err
		}
		if err := settlePorts(tx, rec, spec, old, facts); err != nil {
			return err
		}
		rec.Author = author(ctx)
		if rec.RegistryAuth = auth; auth == nil && r.RegistryAuthFrom == string(swarm.RegistryAuthFromPreviousSpec) && r.Rollback == "" {
			if rec.RegistryAuth = old.RegistryAuth(old.ServiceRecord.Previous); rec.RegistryAuth == nil {
				rec.RegistryAuth = []byte("{}")
			}
		}
		tx.Add(expect("service", old.Id, r.Version))
		tx.Add(&api.Change{Kind: &api.Change_PutService{PutService: rec}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("service updated", "name", name, "rollback", r.Rollback != "")
	return &api.Updated{}, nil
}

// mayKeep refuses credentials that a manager of an older version would drop.
func mayKeep(tx store.ReadTx, auth []byte) error {
	if len(auth) <= len("{}") || tx.Cluster().GetFeatureLevel() >= api.LevelHistory {
		return nil
	}
	return api.Errorf(errdefs.ErrFailedPrecondition, "registry credentials of a service (--with-registry-auth) need feature level %d, the cluster has %d: upgrade all managers first",
		api.LevelHistory, tx.Cluster().GetFeatureLevel())
}

// updated is the record with the new spec.
func (s *Server) updated(tx store.ReadTx, old *store.Service, spec *swarm.ServiceSpec) (*api.ServiceRecord, error) {
	rec := proto.Clone(old.ServiceRecord).(*api.ServiceRecord)
	if spec.Name == "" {
		spec.Name = old.Name
	}
	if spec.Name != old.Name {
		return nil, api.Errorf(errdefs.ErrNotImplemented, "renaming services is not supported: create service %s and remove %s", spec.Name, old.Name)
	}
	if modeOf(spec) != modeOf(old.Spec) {
		return nil, api.Errorf(errdefs.ErrNotImplemented, "service mode change is not allowed: service %s is %s; remove it and create it anew", old.Name, modeOf(old.Spec))
	}
	if err := resolveNetworks(tx, spec); err != nil {
		return nil, err
	}
	b, err := encode(spec)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(b, old.SpecJson) {
		rec.UpdateStatus = nil // it spoke of the spec before
	}
	rec.SpecJson, rec.ForceUpdate = b, spec.TaskTemplate.ForceUpdate
	return rec, nil
}

// RemoveService removes a service; its tasks end and go by themselves.
func (s *Server) RemoveService(ctx context.Context, r *api.RemoveRequest) (*api.Empty, error) {
	var name string
	err := s.write(ctx, func(tx store.WriteTx) error {
		svc, err := tx.FindService(r.Ref)
		if err != nil {
			return err
		}
		name = svc.Name
		tx.Add(&api.Change{Kind: &api.Change_DeleteService{DeleteService: svc.Id}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("service removed", "name", name)
	return &api.Empty{}, nil
}

// GetService shows one service.
func (s *Server) GetService(ctx context.Context, r *api.GetRequest) (*api.Object, error) {
	var out swarm.Service
	err := s.read(ctx, func(tx store.ReadTx) error {
		svc, err := tx.FindService(r.Ref)
		if err != nil {
			return err
		}
		out = serviceObject(tx, svc)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if r.InsertDefaults {
		if err := insertDefaults(&out.Spec); err != nil {
			return nil, err
		}
	}
	return object(out)
}

// ListServices shows the services that match all filters.
func (s *Server) ListServices(ctx context.Context, r *api.ListRequest) (*api.Objects, error) {
	f, err := newFilters(r.Filters, "id", "name", "label", "mode", "runtime")
	if err != nil {
		return nil, err
	}
	p := newPage(r.After, r.PageBytes)
	err = s.read(ctx, func(tx store.ReadTx) error {
		for _, svc := range behind(tx.Services(), r.After, func(s *store.Service) string { return s.Id }) {
			if !f.prefix("id", svc.Id) || !f.prefix("name", svc.Name) || !f.labels("label", svc.Spec.Labels) ||
				!f.exact("mode", modeOf(svc.Spec)) || !f.exact("runtime", "container") {
				continue
			}
			if p.full() {
				return nil
			}
			o := serviceObject(tx, svc)
			if r.Status {
				o.ServiceStatus = s.serviceStatus(tx, svc)
			}
			if err := p.add(svc.Id, o); err != nil {
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

// serviceStatus counts as docker does: running are tasks that run and shall.
func (s *Server) serviceStatus(tx store.ReadTx, svc *store.Service) *swarm.ServiceStatus {
	if svc.Job() {
		return jobStatus(tx, svc)
	}
	st := &swarm.ServiceStatus{}
	if m := svc.Spec.Mode.Replicated; m != nil && m.Replicas != nil {
		st.DesiredTasks = *m.Replicas
	}
	global := svc.Spec.Mode.Global != nil
	tx.EachTaskOfService(svc.Id, func(t store.TaskRef) bool {
		if t.Desired() <= api.TaskRunning {
			if global {
				st.DesiredTasks++
			}
			if t.State() == api.TaskRunning {
				st.RunningTasks++
			}
		}
		return true
	})
	return st
}

// jobStatus counts the current execution; wanted are tasks that shall run now, completed ones not among them.
func jobStatus(tx store.ReadTx, svc *store.Service) *swarm.ServiceStatus {
	st := &swarm.ServiceStatus{}
	tx.EachTaskOfService(svc.Id, func(t store.TaskRef) bool {
		switch {
		case t.Revision() != svc.Revision:
		case t.State() == api.TaskComplete:
			st.CompletedTasks++
		case t.Desired() <= api.TaskRunning:
			st.DesiredTasks++
			if t.State() == api.TaskRunning {
				st.RunningTasks++
			}
		}
		return true
	})
	if j := svc.Spec.Mode.ReplicatedJob; j != nil {
		st.DesiredTasks = min(*j.MaxConcurrent, *j.TotalCompletions-min(*j.TotalCompletions, st.CompletedTasks))
	}
	return st
}

// resolveNetworks replaces names of networks by ids.
func resolveNetworks(tx store.ReadTx, spec *swarm.ServiceSpec) error {
	var seen []string
	for i, n := range spec.TaskTemplate.Networks {
		id, err := networkID(tx, n.Target)
		if errdefs.IsInvalidArgument(err) {
			return at{object: "service spec"}.field("TaskTemplate.Networks").index(i).field("Target").bad(n.Target, "%s", err)
		}
		if err != nil {
			return err
		}
		if slices.Contains(seen, id) {
			return at{object: "service spec"}.field("TaskTemplate.Networks").index(i).field("Target").bad(n.Target, "the network is listed twice: list it once")
		}
		seen = append(seen, id)
		spec.TaskTemplate.Networks[i].Target = id
	}
	return hasIngress(tx, spec)
}

// networkID finds the network that a service is to be on: one of the cluster's, or one that every node has by itself.
func networkID(tx store.ReadTx, ref string) (string, error) {
	switch ref {
	case store.NetworkHost, store.NetworkNone, store.NetworkBridge:
		return ref, nil
	}
	nw, err := tx.FindNetwork(ref)
	switch {
	case errdefs.IsNotFound(err):
		return "", api.Errorf(errdefs.ErrNotFound, "network %s not found", ref)
	case err != nil:
		return "", err
	case nw.Ingress:
		return "", invalid("Service cannot be explicitly attached to the ingress network %q", nw.Name)
	}
	return nw.Id, nil
}

func modeOf(spec *swarm.ServiceSpec) string {
	switch m := spec.Mode; {
	case m.Global != nil:
		return "global"
	case m.ReplicatedJob != nil:
		return "replicated-job"
	case m.GlobalJob != nil:
		return "global-job"
	}
	return "replicated"
}
