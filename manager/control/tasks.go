package control

import (
	"context"
	"encoding/json"
	"strconv"

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
	var out []swarm.Task
	o := s.observer()
	err = s.read(ctx, func(tx store.ReadTx) error {
		l := lister{tx: tx, f: f, fresh: map[string]map[uint64]bool{}}
		for _, t := range l.candidates() {
			if l.matches(t) {
				out = append(out, taskObject(tx, t, softState(o, t.ID)))
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return objects(out)
}

// lister is one ListTasks.
type lister struct {
	tx    store.ReadTx
	f     filters
	fresh map[string]map[uint64]bool // service → revision → its tasks are what the current spec asks for
}

// candidates narrows by an index where a filter allows it.
func (l *lister) candidates() []*store.Task {
	if want := l.f["service"]; len(want) == 1 {
		if svc, err := l.tx.FindService(want[0]); err == nil {
			return l.tx.TasksByService(svc.Id)
		}
		return l.tx.TasksByService(want[0]) // of a service that was removed
	}
	if want := l.f["node"]; len(want) == 1 {
		if n, err := l.tx.FindNode(want[0]); err == nil {
			return l.tx.TasksByNode(n.Id)
		}
	}
	return l.tx.Tasks()
}

func (l *lister) matches(t *store.Task) bool {
	svc := l.tx.Service(t.ServiceID)
	name := ""
	var labels map[string]string
	if svc != nil {
		name = svc.Name
		if spec := svc.Revs[t.Revision]; spec != nil && spec.TaskTemplate.ContainerSpec != nil {
			labels = spec.TaskTemplate.ContainerSpec.Labels
		}
	}
	where := strconv.FormatUint(t.Slot, 10)
	if t.Slot == 0 {
		where = t.NodeID
	}
	full := name + "." + where + "." + t.ID
	return l.f.prefix("id", t.ID) && l.f.prefix("name", full) && l.f.labels("label", labels) &&
		l.f.exact("service", t.ServiceID, name) && l.f.match("node", func(ref string) bool { return l.onNode(t, ref) }) &&
		l.f.exact("desired-state", shownDesire(svc, t).String()) && l.f.exact("runtime", "container") &&
		(!l.f.on("_up-to-date") || (svc != nil && l.upToDate(svc, t.Revision)))
}

// on reports whether a flag-like filter is on.
func (f filters) on(key string) bool {
	return len(f[key]) > 0 && (f[key][0] == "true" || f[key][0] == "1")
}

func (l *lister) onNode(t *store.Task, ref string) bool {
	if t.NodeID == ref {
		return true
	}
	n, err := l.tx.FindNode(ref)
	return err == nil && n.Id == t.NodeID
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
