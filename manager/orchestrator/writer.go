package orchestrator

import (
	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
)

// maxItems bounds the tasks of one transaction.
const maxItems = 500

// writer gathers what a pass decides into bounded transactions. What belongs together is added before cut is called.
type writer struct {
	service  string
	expect   *api.Expect // of the service as it was seen; nil when it is gone
	revision uint64      // of the tasks to create
	create   []*api.TaskCreate_Item
	later    bool // their nodes are known, but not whether what they reserve is there: placement decides
	shutdown []string
	remove   []string
	run      []string
	last     []*api.Change // of the service itself, after everything else: it changes the version
	changes  loop.Changes
}

// cut begins a new transaction when the current one is large enough.
func (w *writer) cut() {
	if len(w.create)+len(w.shutdown)+len(w.remove)+len(w.run) >= maxItems {
		w.flush()
	}
}

func (w *writer) flush() {
	var cs []*api.Change
	desire := func(ids []string, state api.TaskState) {
		if len(ids) > 0 {
			cs = append(cs, &api.Change{Kind: &api.Change_DesireTasks{DesireTasks: &api.TaskDesire{TaskIds: ids, Desired: uint32(state)}}})
		}
	}
	desire(w.shutdown, api.TaskShutdown)
	desire(w.remove, api.TaskRemove)
	desire(w.run, api.TaskRunning)
	if len(w.create) > 0 {
		cs = append(cs, &api.Change{Kind: &api.Change_CreateTasks{CreateTasks: &api.TaskCreate{
			ServiceId: w.expect.Id, Revision: w.revision, Items: w.create, Defer: w.later,
		}}})
	}
	w.shutdown, w.remove, w.run, w.create = nil, nil, nil, nil
	w.add(cs)
}

func (w *writer) add(cs []*api.Change) {
	if len(cs) == 0 {
		return
	}
	id := w.service
	if w.expect != nil {
		id = w.expect.Id
		cs = append([]*api.Change{{Kind: &api.Change_Expect{Expect: w.expect}}}, cs...)
	}
	w.changes = append(w.changes, loop.Change{Txn: &api.Txn{Changes: cs}, Key: store.Key{Kind: store.KindService, ID: id}})
}

func (w *writer) finish() loop.Changes {
	w.flush()
	w.add(w.last)
	w.last = nil
	return w.changes
}
