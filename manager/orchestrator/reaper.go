package orchestrator

import (
	"encoding/json"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
)

// defaultHistory is how many ended tasks a slot keeps when the cluster's spec says nothing.
const defaultHistory = 5

// maxHistory bounds what restart attempts may add to the history.
const maxHistory = 100

// Reaper deletes tasks that are done with: those marked for removal once they ended or if they were never placed, those that were
// retired before they were placed, and ended ones beyond the history of their slot.
type Reaper struct{}

// NewReaper returns the controller.
func NewReaper() *Reaper { return &Reaper{} }

// Name implements loop.Controller.
func (r *Reaper) Name() string { return "reaper" }

// Kinds implements loop.Controller.
func (r *Reaper) Kinds() []store.Kind {
	return []store.Kind{store.KindCluster, store.KindTask}
}

type slotName struct {
	service string
	slot    uint64
	node    string
}

// Step implements loop.Controller.
func (r *Reaper) Step(view store.ReadTx, dirty loop.Keys, _ time.Time) (loop.Changes, time.Time) {
	all := dirty.All
	var slots []slotName
	seen := map[slotName]bool{}
	look := func(service string, slot uint64, node string) {
		n := slotName{service, slot, node}
		if slot != 0 {
			n.node = ""
		}
		if !seen[n] {
			seen[n] = true
			slots = append(slots, n)
		}
	}
	for _, k := range dirty.Keys {
		if k.Kind == store.KindCluster {
			all = true
			continue
		}
		look(k.ServiceID, k.Slot, k.NodeID)
	}
	if all {
		for _, t := range view.Tasks() {
			look(t.ServiceID, t.Slot, t.NodeID)
		}
	}
	limit := historyLimit(view.Cluster())
	w := reaped{}
	for _, n := range slots {
		tasks := view.TasksBySlot(n.service, n.slot, n.node)
		if len(tasks) > 0 {
			w.reap(tasks, keep(limit, view.Service(n.service)))
		}
	}
	w.flush()
	return w.changes, time.Time{}
}

// historyLimit is negative for no limit.
func historyLimit(c *store.Cluster) int {
	var spec swarm.Spec
	if c == nil || json.Unmarshal(c.SpecJson, &spec) != nil || spec.Orchestration.TaskHistoryRetentionLimit == nil {
		return defaultHistory
	}
	return int(*spec.Orchestration.TaskHistoryRetentionLimit)
}

// keep is the history of a service's slots: enough to count restart attempts.
func keep(limit int, svc *store.Service) int {
	if limit < 0 || svc == nil {
		return limit
	}
	return max(limit, int(min(restartPolicyOf(svc.Spec).maxAttempts, maxHistory-1))+min(1, int(restartPolicyOf(svc.Spec).maxAttempts)))
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
	if newest.State < api.TaskRunning {
		limit = max(limit, 1) // a rolling update reads from it that the newest replaces something
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
