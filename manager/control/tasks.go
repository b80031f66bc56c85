package control

import (
	"context"
	"encoding/json"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// GetTask shows one task.
func (s *Server) GetTask(ctx context.Context, r *api.GetRequest) (*api.Object, error) {
	var out swarm.Task
	o := s.observer()
	err := s.read(ctx, func(tx store.ReadTx) error {
		t, err := tx.FindTask(r.Ref)
		if err != nil {
			return err
		}
		out = taskObject(tx, t, softState(o, t.ID))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return object(out)
}

func softState(o Observer, id string) *api.TaskReport {
	if o == nil {
		return nil
	}
	return o.SoftState(id)
}

// ListTasks shows the tasks that match all filters.
func (s *Server) ListTasks(ctx context.Context, r *api.ListRequest) (*api.Objects, error) {
	f, err := newFilters(r.Filters, "id", "name", "label", "service", "node", "desired-state", "runtime", "_up-to-date")
	if err != nil {
		return nil, err
	}
	if err := f.oneOf("desired-state", "running", "shutdown", "accepted", "ready", "remove", "complete"); err != nil {
		return nil, err
	}
	after, err := parsePlace(r.After)
	if err != nil {
		return nil, err
	}
	p, o := newPage(r.After, r.PageBytes), s.observer()
	err = s.read(ctx, func(tx store.ReadTx) (err error) {
		l := lister{tx: tx, f: f, fresh: map[string]map[uint64]bool{}}
		l.eachTask(after, func(t store.TaskRef) bool {
			if !l.matches(t) {
				return true
			}
			if p.full() {
				return false
			}
			err = p.add(placeOf(t).String(), taskObject(tx, t.Task(), softState(o, t.ID())))
			return err == nil
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	return p.out, nil
}

// lister is one ListTasks.
type lister struct {
	tx    store.ReadTx
	f     filters
	fresh map[string]map[uint64]bool // service → revision → its tasks are what the current spec asks for
}

func (l *lister) matches(t store.TaskRef) bool {
	svc, name := l.tx.Service(t.ServiceID()), ""
	if svc != nil {
		name = svc.Name
	}
	return l.f.exact("service", t.ServiceID(), name) && l.f.match("node", func(ref string) bool { return l.onNode(t, ref) }) &&
		l.f.match("id", func(want string) bool { return strings.HasPrefix(t.ID(), want) }) && l.named(t, name) && l.labelled(t, svc) &&
		l.f.exact("desired-state", shownDesire(svc, t.Desired()).String()) && l.f.exact("runtime", "container") &&
		(!l.f.on("_up-to-date") || (svc != nil && l.upToDate(svc, t.Revision())))
}

// named matches a task's name: that of its service, its slot or node, its id.
func (l *lister) named(t store.TaskRef, service string) bool {
	return l.f.match("name", func(want string) bool {
		where := t.NodeID()
		if t.Slot() != 0 {
			where = strconv.FormatUint(t.Slot(), 10)
		}
		return strings.HasPrefix(service+"."+where+"."+t.ID(), want)
	})
}

func (l *lister) labelled(t store.TaskRef, svc *store.Service) bool {
	if len(l.f["label"]) == 0 {
		return true
	}
	var labels map[string]string
	if svc != nil {
		if spec := svc.Revs[t.Revision()]; spec != nil && spec.TaskTemplate.ContainerSpec != nil {
			labels = spec.TaskTemplate.ContainerSpec.Labels
		}
	}
	return l.f.labels("label", labels)
}

// on reports whether a flag-like filter is on.
func (f filters) on(key string) bool {
	return len(f[key]) > 0 && (f[key][0] == "true" || f[key][0] == "1")
}

func (l *lister) onNode(t store.TaskRef, ref string) bool {
	if t.NodeID() == ref {
		return true
	}
	n, err := l.tx.FindNode(ref)
	return err == nil && n.Id == t.NodeID()
}

// upToDate: a spec that differs only in what tasks are not made of leaves them up to date.
func (l *lister) upToDate(svc *store.Service, revision uint64) bool {
	if revision == svc.Revision {
		return true
	}
	known := l.fresh[svc.Id]
	if known == nil {
		known = map[uint64]bool{}
		l.fresh[svc.Id] = known
	}
	fresh, ok := known[revision]
	if !ok {
		old := svc.Revs[revision]
		fresh = old != nil && essence(old) == essence(svc.Spec)
		known[revision] = fresh
	}
	return fresh
}

// essence is what tasks of a spec are made of. Placement constraints are not: a node that still satisfies them keeps its task.
func essence(spec *swarm.ServiceSpec) string {
	parts := struct {
		Task     swarm.TaskSpec
		Endpoint *swarm.EndpointSpec
	}{spec.TaskTemplate, spec.EndpointSpec}
	parts.Task.Placement = nil
	b, err := json.Marshal(parts)
	if err != nil {
		panic(err) // the types of the API are JSON types
	}
	return string(b)
}
