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
	keys   map[store.Kind]map[string]struct{}
}

func newDirty() dirty { return dirty{keys: map[store.Kind]map[string]struct{}{}} }

func (x *dirty) mark(kind store.Kind, id string) {
	m := x.keys[kind]
	if m == nil {
		m = map[string]struct{}{}
		x.keys[kind] = m
	}
	m[id] = struct{}{}
}

func (x *dirty) add(keys []store.Key, overflow bool) {
	x.all = x.all || overflow
	for _, k := range keys {
		x.mark(k.Kind, k.ID)
	}
}

// everything marks all that is stored and all that was known.
func (x *dirty) everything(d *Dispatcher, tx store.ReadTx) {
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
	for _, t := range tx.Tasks() {
		x.mark(store.KindTask, t.ID)
	}
	for id := range d.tasks {
		x.mark(store.KindTask, id)
	}
}

// taskEntry is what is known of a task that belongs to a node.
type taskEntry struct {
	node     string
	nets     []string // tables of networks it is in; with mesh, the mesh table too
	mesh     bool
	stopping bool // wanted no more, and live
	drained  bool // every node with a say acknowledged it out of rotation
}

// flush is one round: look at what changed, tell tables before the assignments that need them.
func (d *Dispatcher) flush() {
	d.flushed = time.Now()
	d.dirty.add(d.watcher.Take())
	x := d.dirty
	if !x.all && !x.drains && len(x.keys) == 0 {
		return
	}
	d.dirty = newDirty()
	d.cfg.Store.View(func(tx store.ReadTx) {
		if x.all {
			x.everything(d, tx)
		}
		managers := d.refresh(tx, x)
		if x.all || len(x.keys[store.KindCluster]) > 0 || len(x.keys[store.KindNode]) > 0 {
			d.spreadCredentials(tx)
		}
		d.sendTables(tx.Version())
		d.settleDrains()
		d.sendAssignments(tx)
		if managers {
			list := d.managerList(tx)
			for _, n := range d.nodes {
				if n.session != nil {
					n.session.push(list)
				}
			}
		}
	})
}

// refresh brings the indexes and tables up to date with the view. It tells whether the list of managers changed.
func (d *Dispatcher) refresh(tx store.ReadTx, x dirty) (managers bool) {
	for id := range x.keys[store.KindNetwork] {
		d.spread.setNetwork(id, tx.Network(id))
	}
	for id := range x.keys[store.KindNode] {
		if d.refreshNode(tx, id, x) {
			managers = true
		}
	}
	for id := range x.keys[store.KindService] {
		if d.spread.setService(id, tx.Service(id)) {
			for _, t := range tx.TasksByService(id) {
				x.mark(store.KindTask, t.ID)
			}
		}
	}
	for id := range x.keys[store.KindTask] {
		d.refreshTask(tx, id)
	}
	return managers
}

func (d *Dispatcher) refreshNode(tx store.ReadTx, id string, x dirty) (managers bool) {
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
		if old.Role != rec.Role || old.Availability != rec.Availability || old.Name != rec.Name || !maps.Equal(old.Labels, rec.Labels) {
			n.session.push(d.welcome(tx, n))
		}
	}
	return old.Role != rec.Role || (rec.Role == api.RoleManager && old.RpcAddr != rec.RpcAddr)
}

func (d *Dispatcher) markTasks(tx store.ReadTx, node string, x dirty) {
	for _, t := range tx.TasksByNode(node) {
		x.mark(store.KindTask, t.ID)
	}
}

// refreshTask brings one task's entry, endpoints, and its node's needs up to date.
func (d *Dispatcher) refreshTask(tx store.ReadTx, id string) {
	t := tx.Task(id)
	d.soft.settled(id, t)
	old, entry := d.tasks[id], d.entryOf(tx, t)
	if old != nil {
		d.need(old, -1)
		if entry == nil || entry.node != old.node {
			d.touch(old.node, id)
		} else {
			entry.drained = old.drained && entry.stopping
		}
	}
	var tables []string
	if entry != nil {
		d.tasks[id] = entry
		d.need(entry, +1)
		d.touch(entry.node, id)
		tables = entry.tables()
	} else {
		delete(d.tasks, id)
	}
	for _, table := range tables {
		d.spread.setEndpoint(table, d.endpoint(tx, t, table))
	}
	if old != nil {
		for _, table := range old.tables() {
			if !slices.Contains(tables, table) {
				d.spread.removeEndpoint(table, id)
			}
		}
	}
	if entry != nil && entry.stopping && !entry.drained {
		d.spread.stopping[id] = struct{}{}
	} else {
		delete(d.spread.stopping, id)
	}
}

// entryOf returns nil for a task that no node has to know.
func (d *Dispatcher) entryOf(tx store.ReadTx, t *store.Task) *taskEntry {
	if t == nil || t.NodeID == "" || t.State < api.TaskAssigned || t.State == api.TaskOrphaned || d.nodes[t.NodeID] == nil {
		return nil
	}
	e := &taskEntry{node: t.NodeID}
	if !t.Live() {
		return e
	}
	e.stopping = t.Desired >= api.TaskShutdown
	for _, a := range t.Attachments {
		if d.spread.tables[a.NetworkId] != nil {
			e.nets = append(e.nets, a.NetworkId)
		}
	}
	svc := tx.Service(t.ServiceID)
	e.mesh = svc != nil && len(svc.Ports) > 0 && (t.Gateway4.IsValid() || t.Gateway6.IsValid())
	return e
}

func (e *taskEntry) tables() []string {
	if e.mesh {
		return append(slices.Clone(e.nets), api.MeshTable)
	}
	return e.nets
}

// need counts the tables that a node needs for a task.
func (d *Dispatcher) need(e *taskEntry, by int) {
	n := d.nodes[e.node]
	if n == nil {
		return
	}
	for _, id := range e.nets {
		n.nets[id] += by
		if n.nets[id] <= 0 {
			delete(n.nets, id)
		}
		d.spread.resubscribe[n] = struct{}{}
	}
}

// touch has a task's assignment looked at.
func (d *Dispatcher) touch(nodeID, task string) {
	if n := d.nodes[nodeID]; n != nil && n.session != nil {
		n.changed[task] = struct{}{}
		d.spread.reassign[n] = struct{}{}
	}
}
