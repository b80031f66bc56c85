package manager

import (
	"cmp"
	"context"
	"maps"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// settled is how long after its start a manager may still be told of what happened before: its log is replayed then.
const settled = 5 * time.Second

// herald tells what happened to the cluster's objects as docker does, from this manager's own store: every manager tells the same, in the
// order of the log. What was before this manager began is not news. Changes of one object that are taken in one go are one event.
type herald struct {
	tell  func(events.Message)
	since time.Time
	now   func() time.Time
	known map[store.Key]aspect
}

// aspect is what events say of an object.
type aspect struct {
	name    string
	version uint64
	fields  map[string]string // an update tells those that changed, as NAME.old and NAME.new
}

// proclaim tells events until ctx is done.
func (m *Manager) proclaim(ctx context.Context) {
	if m.cfg.Events == nil {
		return
	}
	h := &herald{tell: m.cfg.Events, since: time.Now(), now: time.Now, known: map[store.Key]aspect{}}
	w := m.store.Watch(store.KindService, store.KindNode, store.KindNetwork, store.KindDependency)
	defer w.Close()
	h.look(m.store, nil, true)
	for {
		select {
		case <-w.C():
			keys, overflow := w.Take()
			h.look(m.store, keys, overflow)
		case <-ctx.Done():
			return
		}
	}
}

// look compares objects with what they were, and tells the difference: those of the keys, or all.
func (h *herald) look(s *store.Store, keys []store.Key, all bool) {
	var news []events.Message
	s.View(func(tx store.ReadTx) {
		if all {
			keys = allKeys(tx, h.known)
		}
		for _, k := range keys {
			k = store.Key{Kind: k.Kind, ID: k.ID}
			if e, ok := h.news(tx, k); ok {
				news = append(news, e)
			}
		}
	})
	for _, e := range news {
		h.tell(e)
	}
}

func allKeys(tx store.ReadTx, known map[store.Key]aspect) []store.Key {
	keys := maps.Clone(known)
	if keys == nil {
		keys = map[store.Key]aspect{}
	}
	add := func(kind store.Kind, id string) { keys[store.Key{Kind: kind, ID: id}] = aspect{} }
	for _, o := range tx.Services() {
		add(store.KindService, o.Id)
	}
	for _, o := range tx.Nodes() {
		add(store.KindNode, o.Id)
	}
	for _, o := range tx.Networks() {
		add(store.KindNetwork, o.Id)
	}
	for _, kind := range []string{store.KindSecret, store.KindConfig} {
		for _, o := range tx.Dependencies(kind) {
			add(store.KindDependency, o.Id)
		}
	}
	var out []store.Key
	for k := range keys {
		out = append(out, k)
	}
	return out
}

// news is the event of one object, if there is one, and remembers what it is now.
func (h *herald) news(tx store.ReadTx, k store.Key) (e events.Message, ok bool) {
	old, had := h.known[k]
	typ, meta, now := look(tx, k)
	e.Scope, e.Actor.ID = "swarm", k.ID
	switch {
	case meta == nil && !had:
		return e, false
	case meta == nil:
		delete(h.known, k)
		at := h.now()
		e.Type, e.Action, e.Actor.Attributes = events.Type(old.fields["type"]), events.ActionRemove, map[string]string{"name": old.name}
		e.Time, e.TimeNano = at.Unix(), at.UnixNano()
		return e, at.Sub(h.since) > settled
	}
	h.known[k] = now
	e.Type, e.Action, e.Actor.Attributes = typ, events.ActionUpdate, map[string]string{"name": now.name}
	if !had {
		e.Action = events.ActionCreate
	} else {
		for f, v := range now.fields {
			if old.fields[f] != v {
				e.Actor.Attributes[f+".old"], e.Actor.Attributes[f+".new"] = old.fields[f], v
			}
		}
	}
	e.Time, e.TimeNano = meta.Updated/int64(time.Second), meta.Updated
	return e, now.version != old.version && meta.Updated >= h.since.UnixNano()
}

// look is what events say of an object now; no meta: it is gone.
func look(tx store.ReadTx, k store.Key) (events.Type, *api.Meta, aspect) {
	typ, a := events.Type(""), aspect{fields: map[string]string{}}
	var meta *api.Meta
	switch k.Kind {
	case store.KindService:
		if o := tx.Service(k.ID); o != nil {
			typ, meta, a.name = events.ServiceEventType, o.Meta, o.Name
			serviceFields(o, a.fields)
		}
	case store.KindNode:
		if o := tx.Node(k.ID); o != nil {
			typ, meta, a.name = events.NodeEventType, o.Meta, cmp.Or(o.Name, o.Hostname)
			a.fields["availability"], a.fields["role"], a.fields["state"] = o.Availability, o.Role, o.Status.GetState()
		}
	case store.KindNetwork:
		if o := tx.Network(k.ID); o != nil {
			typ, meta, a.name = events.NetworkEventType, o.Meta, o.Name
		}
	case store.KindDependency:
		if o := tx.Dependency(k.ID); o != nil {
			typ, meta, a.name = events.Type(o.Kind), o.Meta, o.Name
		}
	}
	a.version, a.fields["type"] = meta.GetVersion(), string(typ)
	return typ, meta, a
}

func serviceFields(o *store.Service, fields map[string]string) {
	if c := o.Spec.TaskTemplate.ContainerSpec; c != nil {
		fields["image"] = c.Image
	}
	if r := o.Spec.Mode.Replicated; r != nil && r.Replicas != nil {
		fields["replicas"] = strconv.FormatUint(*r.Replicas, 10)
	}
	if s := o.UpdateStatus.GetState(); s != "" {
		fields["updatestate"] = string(swarm.UpdateState(s))
	}
}
