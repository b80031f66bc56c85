package agent

import (
	"sync"

	"skein/manager/api"
)

// outbox keeps the newest report of each task until it is taken. Its bound is the number of tasks on this node.
type outbox struct {
	mu    sync.Mutex
	order []string
	items map[string]*api.TaskReport
	wake  chan struct{}
}

func newOutbox() *outbox {
	return &outbox{items: map[string]*api.TaskReport{}, wake: make(chan struct{}, 1)}
}

func (o *outbox) add(r *api.TaskReport) {
	o.mu.Lock()
	if o.items[r.TaskId] == nil {
		o.order = append(o.order, r.TaskId)
	}
	o.items[r.TaskId] = r
	o.mu.Unlock()
	o.poke()
}

// addOld adds a report unless there is one of its task, which is newer.
func (o *outbox) addOld(r *api.TaskReport) {
	o.mu.Lock()
	if o.items[r.TaskId] == nil {
		o.order = append(o.order, r.TaskId)
		o.items[r.TaskId] = r
	}
	o.mu.Unlock()
	o.poke()
}

func (o *outbox) poke() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// take removes and returns up to n reports, oldest task first, and whether more are left.
func (o *outbox) take(n int) ([]*api.TaskReport, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n = min(n, len(o.order))
	out := make([]*api.TaskReport, 0, n)
	for _, id := range o.order[:n] {
		out = append(out, o.items[id])
		delete(o.items, id)
	}
	o.order = append([]string(nil), o.order[n:]...)
	return out, len(o.order) > 0
}

// clear forgets everything: a Hello is about to carry all of it.
func (o *outbox) clear() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.order, o.items = nil, map[string]*api.TaskReport{}
}
