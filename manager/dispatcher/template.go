package dispatcher

import (
	"encoding/json"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

type templateKey struct {
	service  string
	revision uint64
}

// template is what the tasks of one revision have in common, made once for all nodes. It lives while a task of a node is of it.
type template struct {
	key  templateKey
	msg  *api.Template
	size int
	uses int
}

// templateOf returns the template of a task that runs or is to run; nil when its revision is gone.
func (d *Dispatcher) templateOf(tx store.ReadTx, t *store.Task) *template {
	key := templateKey{t.ServiceID, t.Revision}
	if known := d.templates[key]; known != nil {
		return known
	}
	svc := tx.Service(t.ServiceID)
	if svc == nil || svc.Revs[t.Revision] == nil {
		return nil
	}
	spec := svc.Revs[t.Revision]
	m := &api.Template{ServiceId: t.ServiceID, Revision: t.Revision, ServiceName: svc.Name, Ports: svc.Ports, Dependencies: store.DependencyIDs(spec)}
	var err error
	if m.SpecJson, err = json.Marshal(spec.TaskTemplate); err != nil {
		d.cfg.Log.Error("encode task spec", "service", svc.Id, "revision", t.Revision, "err", err)
	}
	if len(spec.Labels) > 0 {
		m.ServiceLabelsJson, _ = json.Marshal(spec.Labels) // a map of strings always has a JSON form
	}
	made := &template{key: key, msg: m, size: proto.Size(m)}
	d.templates[key] = made
	return made
}

// use counts a task of a node.
func (d *Dispatcher) use(t *template, by int) {
	if t == nil {
		return
	}
	if t.uses += by; t.uses <= 0 {
		delete(d.templates, t.key)
	}
}

// provide notes that the agent is sent one more task of a template, and returns the template if it has to go along. The secrets and
// configs in it that the agent does not hold are sent at once, before any task.
func (d *Dispatcher) provide(s *session, tx store.ReadTx, t *template) *api.Template {
	if s.templates[t]++; s.templates[t] > 1 {
		return nil
	}
	for _, id := range t.msg.Dependencies {
		if s.deps[id]++; s.deps[id] > 1 {
			continue
		}
		if rec := tx.Dependency(id); rec != nil {
			m := &api.ManagerMessage{Kind: &api.ManagerMessage_Dependencies{Dependencies: &api.DependencyUpdate{Set: []*api.DependencyRecord{rec}}}}
			s.push(m, len(rec.Data))
		}
	}
	return t.msg
}

// release notes that the agent forgets a task of a template, and with the last one the template, and the secrets and configs that no
// other needs.
func (s *session) release(t *template) {
	if s.templates[t]--; s.templates[t] > 0 {
		return
	}
	delete(s.templates, t)
	for _, id := range t.msg.Dependencies {
		if s.deps[id]--; s.deps[id] <= 0 {
			delete(s.deps, id)
		}
	}
}

// encoded is a message that is encoded once, however many nodes it is sent to: its bytes are what the decoder of the original's type reads.
func encoded(m *api.ManagerMessage) (once *api.ManagerMessage, size int) {
	b, err := proto.Marshal(m)
	if err != nil {
		return m, proto.Size(m) // the sender will say so
	}
	once = &api.ManagerMessage{}
	once.ProtoReflect().SetUnknown(b)
	return once, len(b)
}
