package dispatcher

import (
	"maps"
	"slices"
	"time"

	"skein/manager/api"
	"skein/manager/store"
)

// dirty is what must be looked at in the next round.
type dirty struct {
	all    bool
	drains bool
	keys   [store.KindAttachment + 1][]string // by kind; an object may be in it twice
	count  int
}

func (x *dirty) mark(kind store.Kind, id string) {
	if int(kind) < len(x.keys) {
		x.keys[kind] = append(x.keys[kind], id)
		x.count++
	}
}

func (x *dirty) add(keys []store.Key, overflow bool) {
	x.all = x.all || overflow
	for _, k := range keys {
		x.mark(k.Kind, k.ID)
	}
}

// everything marks all that is stored and all that was known.
func (x *dirty) everything(d *Dispatcher, tx store.ReadTx) {
	x.mark(store.KindCluster, "")
	for _, n := range tx.Nodes() {
		x.mark(store.KindNode, n.Id)
	}
	for id := range d.nodes {
		x.mark(store.KindNode, id)
	}
	for _, n := range tx.Networks() {
		x.mark(store.KindNetwork, n.Id)
	}
	for id := range d.spread.tables {
		if id != api.MeshTable {
			x.mark(store.KindNetwork, id)
		}
	}
	for _, s := range tx.Services() {
		x.mark(store.KindService, s.Id)
	}
	for id := range d.spread.services {
		x.mark(store.KindService, id)
	}
	tx.EachTask(func(t store.TaskRef) bool {
		x.mark(store.KindTask, t.ID())
		return true
	})
	for id := range d.tasks {
		x.mark(store.KindTask, id)
	}
	for _, a := range tx.Attachments() {
		x.mark(store.KindAttachment, a.Id)
	}
	for id := range d.attached {
		x.mark(store.KindAttachment, id)
	}
}

// taskEntry is what is known of a task that belongs to a node. There is one for each task of the cluster: it is kept small.
type taskEntry struct {
	node     *node
	template *template // nil: of a task that ended, or of a service that is gone
	nets     []string  // tables of networks it is in; with mesh, the mesh table too

	// What its agent was sent, and in which session.
	sent       *session
	startAfter int64
	desired    api.TaskState
	templated  bool // its template counts there
	saidDrain  bool

	mesh     bool
	stopping bool // wanted no more, or about to be ended by its node, and live
	drained  bool // every node with a say acknowledged it out of rotation
	queued   bool // in the node's changed
}

// flush is one round: look at what changed, tell tables before the assignments that need them, then greet some of the new sessions.
func (d *Dispatcher) flush() {
	began := time.Now()
	d.told = 0
	d.dirty.add(d.watcher.Take())
	x := d.dirty
	if x.all || x.drains || x.count > 0 || len(d.greets)+len(d.spread.reassign) > 0 {
		d.dirty = dirty{}
		d.cfg.Store.View(func(tx store.ReadTx) { d.round(tx, &x) })
	}
	d.flushed = time.Now()
	d.pause = pauseAfter(began.Sub(d.due), d.flushed.Sub(began), d.told)
	if len(d.greets)+len(d.spread.reassign) > 0 {
		d.schedule()
	}
}

// pauseAfter is the pause after a round that came so late, took so long and told so many nodes something.
func pauseAfter(late, took time.Duration, told int) time.Duration {
	return max(gather, min(max(took, time.Duration(told)*messageCost), gatherLimit), lateFactor*min(late, lateLimit/lateFactor))
}

func (d *Dispatcher) round(tx store.ReadTx, x *dirty) {
	if x.all {
		x.everything(d, tx)
	}
	if d.refresh(tx, x) {
		d.managers = nil
		m, size := d.managerList(tx)
		for _, n := range d.nodes {
			if n.session != nil && n.session.greeted {
				n.session.push(m, size)
			}
		}
	}
	if x.all || len(x.keys[store.KindCluster]) > 0 || len(x.keys[store.KindNode]) > 0 {
		d.spreadCredentials(tx)
	}
	d.sendTables(tx.Version())
	d.settleDrains()
	d.sendAssignments(tx)
	for range min(len(d.greets), greetsBound) {
		n := d.greets[0]
		d.greets = d.greets[1:]
		if n.session != nil && !n.session.greeted && d.nodes[n.id] == n {
			d.told++
			d.greet(tx, n)
		}
	}
}

// refresh brings the indexes and tables up to date with the view. It tells whether the list of managers changed.
func (d *Dispatcher) refresh(tx store.ReadTx, x *dirty) (managers bool) {
	if len(x.keys[store.KindCluster]) > 0 {
		d.refreshCluster(tx)
	}
	for _, id := range x.keys[store.KindNetwork] {
		d.spread.setNetwork(id, tx.Network(id))
	}
	for _, id := range x.keys[store.KindNode] {
		if d.refreshNode(tx, id, x) {
			managers = true
		}
	}
	for _, id := range x.keys[store.KindService] {
		if d.spread.setService(id, tx.Service(id)) {
			for _, t := range tx.TasksByService(id) {
				x.mark(store.KindTask, t.ID)
			}
		}
	}
	for _, id := range x.keys[store.KindTask] {
		d.refreshTask(tx, id)
	}
	for _, id := range x.keys[store.KindAttachment] {
		d.refreshAttachment(tx, id)
	}
	return managers
}

func (d *Dispatcher) refreshNode(tx store.ReadTx, id string, x *dirty) (managers bool) {
	rec, n := tx.Node(id), d.nodes[id]
	switch {
	case rec == nil && n == nil:
		return false
	case rec == nil:
		if n.session != nil {
			n.session.end(errNodeRemoved(id))
		}
		delete(d.nodes, id)
		d.spread.removeNode(n.rec.Index)
		return n.rec.Role == api.RoleManager
	case n == nil:
		n = newNode(rec)
		d.nodes[id] = n
		if !n.fenced {
			d.lease(n, time.Now().Add(grace))
		}
		d.spread.setNode(rec)
		d.markTasks(tx, id, x)
		return rec.Role == api.RoleManager
	}
	old := n.rec
	n.rec = rec
	d.spread.setNode(rec)
	if (old.Status.GetState() == nodeDown) != (rec.Status.GetState() == nodeDown) {
		d.markTasks(tx, id, x)
	}
	if n.session != nil {
		if rec.Status.GetState() == nodeDown {
			d.writer.status(&api.NodeStatus{NodeId: id, State: nodeReady}) // it is here: what was written on its absence is void
		}
		if told := n.session.welcomed; told != rec && tellsMore(told, rec) {
			d.sayWelcome(tx, n.session, rec)
		}
	}
	return old.Role != rec.Role || (rec.Role == api.RoleManager && (old.RpcAddr != rec.RpcAddr || hasLeft(old) != hasLeft(rec)))
}

func (d *Dispatcher) markTasks(tx store.ReadTx, node string, x *dirty) {
	for _, t := range tx.TasksByNode(node) {
		x.mark(store.KindTask, t.ID)
	}
	d.markAttachments(tx, node, x)
}

// tellsMore reports whether an agent has to hear of a change of its node's record.
func tellsMore(old, rec *store.Node) bool {
	return old.Role != rec.Role || old.Availability != rec.Availability || old.Name != rec.Name || old.Hostname != rec.Hostname ||
		old.UnderlayAddr != rec.UnderlayAddr || !maps.Equal(old.Labels, rec.Labels)
}

// refreshTask brings one task's entry, endpoints, and its node's needs up to date.
func (d *Dispatcher) refreshTask(tx store.ReadTx, id string) {
	t := tx.Task(id)
	d.soft.settled(id, t)
	e := d.tasks[id]
	var before []string
	var former *template
	if e != nil {
		before, former = e.tables(), e.template
		d.need(e, -1)
	}
	now, ok := d.entryOf(tx, t)
	switch {
	case !ok && e == nil:
		return
	case !ok:
		d.drop(e, id)
		delete(d.tasks, id)
		e = nil
	case e == nil:
		e = &now
		d.tasks[id] = e
	case e.node != now.node: // never a live one: tasks do not move
		d.drop(e, id)
		*e = now
	default:
		e.nets, e.mesh, e.stopping, e.drained = now.nets, now.mesh, now.stopping, e.drained && now.stopping
		if now.template != nil || e.sent == nil {
			e.template = now.template
		}
	}
	var tables []string
	if e != nil {
		d.need(e, +1)
		d.use(e.template, +1)
		d.touch(e, id)
		tables = e.tables()
	}
	d.use(former, -1) // after the new one: it may be the same
	for _, table := range tables {
		d.spread.setEndpoint(table, d.endpoint(tx, t, table))
	}
	for _, table := range before {
		if !slices.Contains(tables, table) {
			d.spread.removeEndpoint(table, id)
		}
	}
	if e != nil && e.stopping && !e.drained {
		d.spread.stopping[id] = struct{}{}
	} else {
		delete(d.spread.stopping, id)
	}
}

// drop has a task that is its node's no more taken back from the agent that was sent it.
func (d *Dispatcher) drop(e *taskEntry, id string) {
	n := e.node
	if n.session == nil || e.sent != n.session {
		return
	}
	if e.templated {
		n.session.release(e.template)
	}
	n.removed = append(n.removed, id)
	d.spread.tell(n)
}

// entryOf is false for a task that no node has to know.
func (d *Dispatcher) entryOf(tx store.ReadTx, t *store.Task) (e taskEntry, ok bool) {
	if t == nil || t.NodeID == "" || t.State < api.TaskAssigned || t.State == api.TaskOrphaned || d.nodes[t.NodeID] == nil {
		return e, false
	}
	e.node = d.nodes[t.NodeID]
	if !t.Live() {
		return e, true
	}
	e.template = d.templateOf(tx, t)
	e.stopping = leaving(t) || t.Desired >= api.TaskShutdown
	for _, a := range t.Attachments {
		if d.spread.tables[a.NetworkId] != nil {
			e.nets = append(e.nets, a.NetworkId)
		}
	}
	svc, before := tx.Service(t.ServiceID), d.tasks[t.ID]
	published := svc == nil || len(svc.Ports) > 0 || (before != nil && before.mesh) // of what is published no more clients are still there
	e.mesh = published && (t.Gateway4.IsValid() || t.Gateway6.IsValid())
	return e, true
}

func (e *taskEntry) tables() []string {
	if e.mesh {
		return append(slices.Clone(e.nets), api.MeshTable)
	}
	return e.nets
}

// need counts the tables that a node needs for a task.
func (d *Dispatcher) need(e *taskEntry, by int) { d.needNets(e.node, e.nets, by) }

func (d *Dispatcher) needNets(n *node, nets []string, by int) {
	for _, id := range nets {
		n.nets[id] += by
		if n.nets[id] <= 0 {
			delete(n.nets, id)
		}
		d.spread.resubscribe[n] = struct{}{}
	}
}

// touch has a task's assignment looked at.
func (d *Dispatcher) touch(e *taskEntry, task string) {
	if n := e.node; !e.queued && n.session != nil && n.session.greeted {
		e.queued = true
		n.changed = append(n.changed, task)
		d.spread.tell(n)
	}
}
