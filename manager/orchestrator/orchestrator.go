// Package orchestrator decides which tasks exist and what they shall reach.
//
// Two controllers: the orchestrator compares each service with its tasks (slots, scale, restarts, rolling updates, rollback) and the
// reaper deletes what is done with. Both are pure: everything they know is in the store, also delays, restart attempts and how far an
// update is, so a new leader goes on where the last one stopped. Tasks are never moved or restarted, only replaced in their slot by
// one of the next generation. It writes tasks' creation and desired states, and the update status of services; it never writes a
// spec except the previous one, for an automatic rollback.
package orchestrator

import (
	"slices"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/placement"
	"skein/manager/store"
	"skein/scheduler"
)

// Controllers returns fresh controllers for one leadership term, placement included; run each with loop.Run.
func Controllers() []loop.Controller {
	return []loop.Controller{New(), NewReaper(), placement.New()}
}

// Orchestrator is the controller's value for one leadership term.
type Orchestrator struct {
	agenda loop.Agenda
	nodes  map[string]knownNode
	specs  map[*swarm.ServiceSpec]*specFacts
}

// knownNode is a node decoded, valid for one record.
type knownNode struct {
	rec  *store.Node
	node scheduler.Node
}

// New returns a controller that knows nothing yet.
func New() *Orchestrator {
	return &Orchestrator{nodes: map[string]knownNode{}, specs: map[*swarm.ServiceSpec]*specFacts{}}
}

// Name implements loop.Controller.
func (o *Orchestrator) Name() string { return "orchestrator" }

// Kinds implements loop.Controller.
func (o *Orchestrator) Kinds() []store.Kind {
	return []store.Kind{store.KindNode, store.KindService, store.KindTask}
}

// Step implements loop.Controller.
func (o *Orchestrator) Step(view store.ReadTx, dirty loop.Keys, now time.Time) (loop.Changes, time.Time) {
	var changes loop.Changes
	for _, id := range o.services(view, dirty, now) {
		c, wake := o.reconcile(view, id, now)
		o.agenda.Set(id, wake)
		changes = append(changes, c...)
	}
	return changes, o.agenda.Next()
}

// services lists those that the dirty keys and the time concern, sorted.
func (o *Orchestrator) services(view store.ReadTx, dirty loop.Keys, now time.Time) []string {
	set := map[string]struct{}{}
	for _, id := range o.agenda.Due(now) {
		set[id] = struct{}{}
	}
	if dirty.All {
		for _, svc := range view.Services() {
			set[svc.Id] = struct{}{}
		}
		for _, t := range view.Tasks() {
			set[t.ServiceID] = struct{}{}
		}
	}
	nodes := false
	for _, k := range dirty.Keys {
		switch k.Kind {
		case store.KindService:
			set[k.ID] = struct{}{}
		case store.KindTask:
			set[k.ServiceID] = struct{}{}
		case store.KindNode:
			nodes = true
			if view.Node(k.ID) == nil {
				delete(o.nodes, k.ID)
			}
			for _, t := range view.TasksByNode(k.ID) {
				set[t.ServiceID] = struct{}{}
			}
		}
	}
	if nodes {
		for _, svc := range view.Services() {
			if svc.Spec.Mode.Global != nil || svc.Spec.Mode.GlobalJob != nil {
				set[svc.Id] = struct{}{}
			}
		}
	}
	ids := make([]string, 0, len(set))
	for id := range set {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func (o *Orchestrator) reconcile(view store.ReadTx, id string, now time.Time) (loop.Changes, time.Time) {
	svc := view.Service(id)
	if svc == nil {
		return removeAll(view, id), time.Time{}
	}
	p := &pass{o: o, view: view, svc: svc, now: now.UnixNano(), classes: map[uint64]class{}}
	p.out.expect = &api.Expect{Kind: "service", Id: svc.Id, Version: svc.Meta.Version}
	p.load()
	switch mode := svc.Spec.Mode; {
	case svc.Job():
		p.runJob()
		return p.out.finish(), p.wakeTime()
	case mode.Global != nil:
		p.admitNodes()
	default:
		p.scaleDown()
	}
	if !p.rollout() {
		p.replaceLost()
		p.fill()
		p.promote()
		p.endSurplus()
	}
	return p.out.finish(), p.wakeTime()
}

// removeAll asks the tasks of a deleted service to go.
func removeAll(view store.ReadTx, service string) loop.Changes {
	w := writer{service: service}
	for _, t := range view.TasksByService(service) {
		if t.Desired < api.TaskRemove {
			w.remove = append(w.remove, t.ID)
			w.cut()
		}
	}
	return w.finish()
}

// node decodes a node, nil when it is gone.
func (o *Orchestrator) node(view store.ReadTx, id string) *scheduler.Node {
	rec := view.Node(id)
	if rec == nil {
		return nil
	}
	known := o.nodes[id]
	if known.rec != rec {
		known = knownNode{rec, placement.NodeOf(rec)}
		o.nodes[id] = known
	}
	return &known.node
}
