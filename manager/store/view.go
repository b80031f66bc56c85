package store

import (
	"slices"
	"strconv"
	"strings"

	"skein/manager/api"
)

// view is a ReadTx, valid while the store's read lock is held.
type view struct{ s *state }

func (v view) Version() uint64                    { return v.s.version }
func (v view) Cluster() *Cluster                  { return v.s.cluster }
func (v view) Node(id string) *Node               { return v.s.nodes.get(id) }
func (v view) Nodes() []*Node                     { return v.s.nodes.all() }
func (v view) Service(id string) *Service         { return v.s.services.get(id) }
func (v view) ServiceByName(name string) *Service { return v.s.services.get(v.s.serviceNames[name]) }
func (v view) Services() []*Service               { return v.s.services.all() }
func (v view) Network(id string) *Network         { return v.s.networks.get(id) }
func (v view) NetworkByName(name string) *Network { return v.s.networks.get(v.s.networkNames[name]) }
func (v view) Networks() []*Network               { return v.s.networks.all() }
func (v view) Dependency(id string) *Dependency   { return v.s.deps.get(id) }
func (v view) Task(id string) *Task               { return v.s.tasks.task(v.s.tasks.findText(id)) }
func (v view) TasksByNode(id string) []*Task      { return v.s.tasks.all(v.s.tasks.ofNode(id)) }

// Tasks lists all tasks, in order of their ids.
func (v view) Tasks() []*Task { return v.s.tasks.all(v.s.tasks.byID("0", "z", v.s.tasks.count)) }

// TasksByService lists a service's tasks by slot, or node, and generation.
func (v view) TasksByService(id string) []*Task {
	var ids []rowID
	v.s.tasks.ofService(id, func(t rowID) bool {
		ids = append(ids, t)
		return true
	})
	return v.s.tasks.all(ids)
}

// TasksBySlot lists the generations of a slot, oldest first.
func (v view) TasksBySlot(service string, slot uint64, node string) []*Task {
	var ids []rowID
	v.s.tasks.chain(v.s.tasks.lists.newest(service, slot, node), func(t rowID) bool {
		ids = append(ids, t)
		return true
	})
	return v.s.tasks.all(ids)
}

// EachTask calls f for every task, in no useful order, until it returns false.
func (v view) EachTask(f func(TaskRef) bool) {
	more := true
	v.s.tasks.each(func(id rowID, _ *taskPage, _ *taskRow) {
		if more {
			more = f(v.s.tasks.ref(id))
		}
	})
}

// EachTaskOfService calls f for a service's tasks by slot, or node, and generation, until it returns false.
func (v view) EachTaskOfService(id string, f func(TaskRef) bool) {
	v.s.tasks.ofService(id, func(t rowID) bool { return f(v.s.tasks.ref(t)) })
}

// EachTaskOfNode calls f for a node's tasks, in no useful order, until it returns false.
func (v view) EachTaskOfNode(id string, f func(TaskRef) bool) {
	n := v.s.tasks.lists.nodes.number[id]
	if n == 0 {
		return
	}
	for _, t := range v.s.tasks.lists.nodes.val[n].rows {
		if !f(v.s.tasks.ref(t)) {
			return
		}
	}
}

// TaskRef is a task without making one.
func (v view) TaskRef(id string) (TaskRef, bool) {
	t := v.s.tasks.findText(id)
	if t == 0 {
		return TaskRef{}, false
	}
	return v.s.tasks.ref(t), true
}

// NewestTask is the newest task of a slot.
func (v view) NewestTask(service string, slot uint64, node string) (TaskRef, bool) {
	t := v.s.tasks.lists.newest(service, slot, node)
	if t == 0 {
		return TaskRef{}, false
	}
	return v.s.tasks.ref(t), true
}

// CountTasks counts all tasks.
func (v view) CountTasks() int { return v.s.tasks.count }

func (v view) ServicesUsing(networkID string) []*Service {
	var out []*Service
	for _, id := range v.s.servicesUsing(networkID) {
		out = append(out, v.s.services.get(id))
	}
	return out
}

// FindNode takes an id, a name or hostname, or the beginning of an id.
func (v view) FindNode(ref string) (*Node, error) {
	if n := v.Node(ref); n != nil {
		return n, nil
	}
	var named []*Node
	for _, n := range v.Nodes() {
		if ref != "" && (n.Hostname == ref || n.Name == ref) {
			named = append(named, n)
		}
	}
	if len(named) > 0 {
		return one("node", ref, named)
	}
	return one("node", ref, withPrefix(v.s.nodes, ref))
}

// FindService takes an id, a name, or the beginning of an id.
func (v view) FindService(ref string) (*Service, error) {
	if s := v.Service(ref); s != nil {
		return s, nil
	}
	if s := v.ServiceByName(ref); s != nil {
		return s, nil
	}
	return one("service", ref, withPrefix(v.s.services, ref))
}

// FindNetwork takes an id, a name, or the beginning of an id.
func (v view) FindNetwork(ref string) (*Network, error) {
	if n := v.Network(ref); n != nil {
		return n, nil
	}
	if n := v.NetworkByName(ref); n != nil {
		return n, nil
	}
	return one("network", ref, withPrefix(v.s.networks, ref))
}

// Dependencies lists the secrets or the configs.
func (v view) Dependencies(kind string) []*Dependency {
	return slices.DeleteFunc(v.s.deps.all(), func(d *Dependency) bool { return d.Kind != kind })
}

// FindDependency takes an id, a name, or the beginning of an id.
func (v view) FindDependency(kind, ref string) (*Dependency, error) {
	if d := v.Dependency(ref); d.GetKind() == kind {
		return d, nil
	}
	if d := v.Dependency(v.s.depNames[depName{kind, ref}]); d != nil {
		return d, nil
	}
	return one(kind, ref, slices.DeleteFunc(withPrefix(v.s.deps, ref), func(d *Dependency) bool { return d.Kind != kind }))
}

// FindTask takes an id, a name (web.1 for the newest of the slot, web.1.ID, or web.NODE), or the beginning of an id.
func (v view) FindTask(ref string) (*Task, error) {
	if t := v.Task(ref); t != nil {
		return t, nil
	}
	if t := v.taskByName(ref); t != nil {
		return t, nil
	}
	return one("task", ref, v.s.tasks.all(v.s.tasks.byID(ref, ref, enough)))
}

func (v view) taskByName(ref string) *Task {
	for i := len(ref) - 1; i > 0; i-- { // service names may hold dots
		if ref[i] != '.' {
			continue
		}
		svc := v.ServiceByName(ref[:i])
		if svc == nil {
			continue
		}
		slotText, id, full := strings.Cut(ref[i+1:], ".")
		slot, err := strconv.ParseUint(slotText, 10, 64)
		node := ""
		if err != nil || slot == 0 {
			slot, node = 0, slotText
		}
		ts := v.TasksBySlot(svc.Id, slot, node)
		if full {
			ts = slices.DeleteFunc(ts, func(t *Task) bool { return t.ID != id })
		}
		if len(ts) > 0 {
			return ts[len(ts)-1]
		}
	}
	return nil
}

// enough ids with one beginning are ambiguous enough.
const enough = 100

// withPrefix finds at most a few objects whose id begins with the prefix.
func withPrefix[V any](t table[string, V], prefix string) []V {
	var out []V
	if prefix == "" {
		return nil
	}
	t.from(prefix, func(k string, v V) bool {
		if !strings.HasPrefix(k, prefix) || len(out) == enough {
			return false
		}
		out = append(out, v)
		return true
	})
	return out
}

func one[V any](kind, ref string, found []V) (V, error) {
	var none V
	switch len(found) {
	case 0:
		return none, api.Errorf(errNotFound, "%s %s not found", kind, ref)
	case 1:
		return found[0], nil
	}
	return none, api.Errorf(errInvalid, "%s %s is ambiguous (%d matches found)", kind, ref, len(found))
}

// writeTx collects changes.
type writeTx struct {
	view
	changes []*api.Change
}

func (w *writeTx) Add(c *api.Change) { w.changes = append(w.changes, c) }
