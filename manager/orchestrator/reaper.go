package orchestrator

import (
	"fmt"
	"time"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
)

// defaultHistory is how many ended tasks a slot keeps when the cluster's spec says nothing.
const defaultHistory = 5

// Reaper deletes tasks that are done with: those marked for removal once they ended or if they were never placed, those that were
// retired before they were placed, and ended ones beyond the history of their slot. What ran on a node that has been down for long
// counts as ended: it is told so.
type Reaper struct {
	cluster clusterOptions
	down    loop.Agenda[string] // nodes
}

// NewReaper returns the controller.
func NewReaper() *Reaper { return &Reaper{} }

// Name implements loop.Controller.
func (r *Reaper) Name() string { return "reaper" }

// Kinds implements loop.Controller.
func (r *Reaper) Kinds() []store.Kind {
	return []store.Kind{store.KindCluster, store.KindNode, store.KindTask}
}

// Step implements loop.Controller.
func (r *Reaper) Step(view store.ReadTx, dirty loop.Keys, now time.Time) (loop.Changes, time.Time) {
	all := r.cluster.read(view.Cluster()) || dirty.All
	var slots []place
	seen := map[place]bool{}
	look := func(service string, slot uint64, node string) {
		n := place{service, slot, node}
		if slot != 0 {
			n.node = ""
		}
		if !seen[n] {
			seen[n] = true
			slots = append(slots, n)
		}
	}
	var nodes []string
	for _, k := range dirty.Keys {
		switch k.Kind {
		case store.KindCluster: // also what is marked when a transaction was refused
			all = true
		case store.KindTask:
			look(k.ServiceID, k.Slot, k.NodeID)
		case store.KindNode:
			nodes = append(nodes, k.ID)
		}
	}
	if all {
		view.EachTask(func(t store.TaskRef) bool {
			look(t.ServiceID(), t.Slot(), t.NodeID())
			return true
		})
		nodes = nil
		for _, n := range view.Nodes() {
			nodes = append(nodes, n.Id)
		}
	}
	w := reaped{}
	for _, n := range slots {
		if tasks := view.TasksBySlot(n.service, n.slot, n.node); len(tasks) > 0 {
			w.reap(tasks, r.cluster.history)
		}
	}
	w.flush()
	for _, id := range append(nodes, r.down.Due(now)...) {
		w.changes = append(w.changes, r.giveUp(view, id, now)...)
	}
	return w.changes, r.down.Next()
}

// giveUp orphans what still runs, as far as the store knows, on a node that has been down for long: it frees its resources and names.
func (r *Reaper) giveUp(view store.ReadTx, id string, now time.Time) loop.Changes {
	rec := view.Node(id)
	since := downSince(rec)
	if since == 0 {
		r.down.SetNano(id, 0)
		return nil
	}
	after := defaultOrphanAfter
	if set := nodeOptionsOf(rec).orphanAfter; set != nil {
		after = *set
	} else if r.cluster.orphanAfter != nil {
		after = *r.cluster.orphanAfter
	}
	if at := since + int64(after); at > now.UnixNano() {
		r.down.SetNano(id, at)
		return nil
	}
	r.down.SetNano(id, 0)
	var changes loop.Changes
	txn := &api.Txn{}
	cut := func() {
		if len(txn.Changes) > 0 {
			changes = append(changes, loop.Change{Txn: txn, Key: store.Key{Kind: store.KindNode, ID: id}})
			txn = &api.Txn{}
		}
	}
	for _, t := range view.TasksByNode(id) {
		if !t.Live() {
			continue
		}
		txn.Changes = append(txn.Changes, &api.Change{Kind: &api.Change_ReportTask{ReportTask: &api.TaskReport{
			TaskId: t.ID, State: uint32(api.TaskOrphaned), Time: now.UnixNano(), NodeId: id,
			Message: "orphaned", Err: fmt.Sprintf("node %s has been down for %v", id, after),
		}}})
		if len(txn.Changes) >= maxItems {
			cut()
		}
	}
	cut()
	return changes
}

type reaped struct {
	changes loop.Changes
	ids     []string
}

func (w *reaped) reap(tasks []*store.Task, limit int) {
	var ended []*store.Task
	newest := tasks[len(tasks)-1]
	for _, t := range tasks {
		placed := t.State >= api.TaskAssigned
		switch {
		case t.Live():
		case t.Desired >= api.TaskRemove, !placed && t.Desired > api.TaskRunning:
			w.delete(t)
		case t.State.Terminal() && t.Desired > api.TaskRunning && t != newest:
			ended = append(ended, t)
		}
	}
	if limit < 0 {
		return
	}
	if newest.State.Terminal() && newest.Desired > api.TaskRunning {
		limit = max(limit-1, 0) // it is history too, and stays in any case: it tells that the slot has run its course
	}
	for len(ended) > limit {
		w.delete(ended[0])
		ended = ended[1:]
	}
}

func (w *reaped) delete(t *store.Task) {
	if w.ids = append(w.ids, t.ID); len(w.ids) >= maxItems {
		w.flush()
	}
}

func (w *reaped) flush() {
	if len(w.ids) == 0 {
		return
	}
	txn := &api.Txn{Changes: []*api.Change{{Kind: &api.Change_DeleteTasks{DeleteTasks: &api.TaskDelete{TaskIds: w.ids}}}}}
	// A transaction is of many slots: should it fail, which is rare, look at all again.
	w.changes = append(w.changes, loop.Change{Txn: txn, Key: store.Key{Kind: store.KindCluster}})
	w.ids = nil
}
