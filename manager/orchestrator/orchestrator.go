// Package orchestrator decides which tasks exist and what they shall reach.
//
// Two controllers: the orchestrator compares each service with its tasks (slots, scale, restarts, rolling updates, rollback, moves off
// nodes) and the reaper deletes what is done with and gives up what long dead nodes held. Both are pure: everything they decide on is in
// the store, also delays, restart attempts and how far an update is, so a new leader goes on where the last one stopped. What they
// remember between steps are sums over tasks that were looked at, kept up slot by slot. Tasks are never moved or restarted, only replaced
// in their slot by one of the next generation. It writes tasks' creation and desired states, the update status of services, and the end
// of tasks on nodes that were given up; it never writes a spec except the previous one, for an automatic rollback.
package orchestrator

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/loop"
	"skein/manager/placement"
	"skein/manager/store"
	"skein/scheduler"
)

// maxCreates bounds the tasks that one step creates; the next step, which follows at once, goes on. More would make the entries of others
// wait, and more keys dirty than are listed.
const maxCreates = 10_000

// Controllers returns fresh controllers for one leadership term, placement included; run each with loop.Run.
func Controllers() []loop.Controller {
	return []loop.Controller{New(), NewReaper(), placement.New()}
}

// Orchestrator is the controller's value for one leadership term.
type Orchestrator struct {
	agenda   loop.Agenda[place]
	nodes    map[string]*knownNode
	specs    map[*swarm.ServiceSpec]*specFacts
	services map[string]*summary
	again    map[string]bool     // services whose last pass stopped at a bound; whether they must be looked at whole
	unfit    map[string][]string // node → tasks for which it has no room any more
	cluster  clusterOptions
	room     int   // tasks that this step may still create
	step     int64 // counts steps: nodes are read once in each
}

// place names a slot of a service: a number, or the node for a global service. A service itself is the place without either.
type place struct {
	service string
	slot    uint64
	node    string
}

func (a place) compare(b place) int {
	return cmp.Or(cmp.Compare(a.slot, b.slot), strings.Compare(a.node, b.node))
}

// knownNode is a node decoded, valid for one record.
type knownNode struct {
	rec  *store.Node // nil: gone
	node scheduler.Node
	opts nodeOptions
	step int64 // in which it was last read
}

// New returns a controller that knows nothing yet.
func New() *Orchestrator {
	return &Orchestrator{nodes: map[string]*knownNode{}, specs: map[*swarm.ServiceSpec]*specFacts{}, services: map[string]*summary{},
		again: map[string]bool{}, unfit: map[string][]string{}}
}

// Name implements loop.Controller.
func (o *Orchestrator) Name() string { return "orchestrator" }

// Kinds implements loop.Controller.
func (o *Orchestrator) Kinds() []store.Kind {
	return []store.Kind{store.KindCluster, store.KindNode, store.KindService, store.KindTask}
}

// Step implements loop.Controller.
func (o *Orchestrator) Step(view store.ReadTx, dirty loop.Keys, now time.Time) (loop.Changes, time.Time) {
	o.step++
	o.room = maxCreates
	var changes loop.Changes
	for _, w := range o.gather(view, dirty, now) {
		changes = append(changes, o.reconcile(view, w, now.UnixNano())...)
	}
	if len(o.again) > 0 {
		return changes, now
	}
	return changes, o.agenda.Next()
}

// work is what of a service has to be looked at.
type work struct {
	service string
	whole   bool
	slots   []place
}

// gather lists what the dirty keys and the time concern, sorted.
func (o *Orchestrator) gather(view store.ReadTx, dirty loop.Keys, now time.Time) []*work {
	g := gathering{works: map[string]*work{}}
	first := len(o.services) == 0
	if o.cluster.read(view.Cluster()) || dirty.All {
		for _, svc := range view.Services() {
			g.of(svc.Id).whole = true
		}
	}
	if dirty.All {
		for id := range o.services {
			g.of(id).whole = true
		}
		if first {
			for _, n := range view.Nodes() {
				o.fit(view, n.Id)
			}
		}
	}
	for id, whole := range o.again {
		w := g.of(id)
		w.whole = w.whole || whole
	}
	clear(o.again)
	for _, p := range o.agenda.Due(now) {
		g.slot(p)
	}
	for _, k := range dirty.Keys {
		switch k.Kind {
		case store.KindService:
			g.of(k.ID).whole = true
		case store.KindTask:
			g.slot(place{service: k.ServiceID, slot: k.Slot, node: k.NodeID})
		case store.KindNode:
			o.nodeChanged(view, k.ID, &g)
		}
	}
	return g.sorted()
}

// nodeChanged looks at the slots that have tasks on the node, and at those that global services have, or may want, there.
func (o *Orchestrator) nodeChanged(view store.ReadTx, id string, g *gathering) {
	o.fit(view, id)
	if view.Node(id) == nil {
		delete(o.nodes, id)
	}
	for _, t := range view.TasksByNode(id) {
		g.slot(place{service: t.ServiceID, slot: t.Slot, node: t.NodeID})
	}
	for _, svc := range view.Services() {
		if svc.Spec.Mode.Global != nil || svc.Spec.Mode.GlobalJob != nil {
			g.slot(place{service: svc.Id, node: id})
		}
	}
}

type gathering struct {
	works map[string]*work
	last  *work
}

func (g *gathering) of(service string) *work {
	if g.last != nil && g.last.service == service {
		return g.last
	}
	w := g.works[service]
	if w == nil {
		w = &work{service: service}
		g.works[service] = w
	}
	g.last = w
	return w
}

func (g *gathering) slot(p place) {
	w := g.of(p.service)
	if p.slot != 0 {
		p.node = ""
	}
	if !w.whole && (p.slot != 0 || p.node != "") {
		w.slots = append(w.slots, p)
	}
}

func (g *gathering) sorted() []*work {
	out := make([]*work, 0, len(g.works))
	for _, w := range g.works {
		slices.SortFunc(w.slots, place.compare)
		w.slots = slices.Compact(w.slots)
		out = append(out, w)
	}
	slices.SortFunc(out, func(a, b *work) int { return strings.Compare(a.service, b.service) })
	return out
}

func (o *Orchestrator) reconcile(view store.ReadTx, w *work, now int64) loop.Changes {
	svc := view.Service(w.service)
	if svc == nil { // its tasks were asked to go by the entry that removed it
		delete(o.services, w.service)
		o.agenda.SetNano(place{service: w.service}, 0)
		for _, s := range w.slots {
			o.agenda.SetNano(s, 0)
		}
		return nil
	}
	sum := o.services[svc.Id]
	if sum == nil || sum.version != svc.Meta.GetVersion() {
		sum = newSummary(svc, sum)
		o.services[svc.Id] = sum
		w.whole = true
	}
	p := o.newPass(view, svc, sum, now)
	if w.whole || !p.loadSlots(w.slots) {
		*sum = *newSummary(svc, sum)
		p = o.newPass(view, svc, sum, now)
		p.loadAll()
	}
	p.run()
	p.remember()
	return p.out.finish()
}

// node decodes a node, nil when it is gone.
func (o *Orchestrator) node(view store.ReadTx, id string) *knownNode {
	known := o.nodes[id]
	if known != nil && known.step == o.step {
		if known.rec == nil {
			return nil
		}
		return known
	}
	rec := view.Node(id)
	if known == nil {
		known = &knownNode{}
		o.nodes[id] = known
	}
	known.step = o.step
	if known.rec != rec {
		known.rec = rec
		if rec != nil {
			known.node, known.opts = placement.NodeOf(rec), nodeOptionsOf(rec)
		}
	}
	if rec == nil {
		return nil
	}
	return known
}
