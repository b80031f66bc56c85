package orchestrator

import (
	"cmp"
	"slices"

	"skein/manager/api"
	"skein/manager/store"
	"skein/scheduler"
)

// fit finds out which tasks a node has no room for any more, because it has less than it had: the newest ones, as few as make the others
// fit. They are replaced elsewhere. Tasks of global services are left alone: there is no elsewhere for them.
func (o *Orchestrator) fit(view store.ReadTx, id string) {
	before := o.nodes[id]
	var total scheduler.Resources
	known := before != nil && before.rec != nil
	if known {
		total = before.node.Total
	}
	n := o.node(view, id)
	if n == nil {
		delete(o.unfit, id)
		return
	}
	if known && n.node.Total == total {
		return
	}
	delete(o.unfit, id)
	if n.node.Total == (scheduler.Resources{}) {
		return // it has not said yet
	}
	var tasks []*store.Task
	var used scheduler.Resources
	for _, t := range view.TasksByNode(id) {
		if r := o.reserved(view, t); r != (scheduler.Resources{}) {
			tasks = append(tasks, t)
			used.NanoCPUs += r.NanoCPUs
			used.MemoryBytes += r.MemoryBytes
		}
	}
	slices.SortFunc(tasks, func(a, b *store.Task) int { return cmp.Or(cmp.Compare(b.Created, a.Created), cmp.Compare(b.ID, a.ID)) })
	for _, t := range tasks {
		overCPU, overMemory := used.NanoCPUs > n.node.Total.NanoCPUs, used.MemoryBytes > n.node.Total.MemoryBytes
		if !overCPU && !overMemory {
			return
		}
		r := o.reserved(view, t)
		if (!overCPU || r.NanoCPUs == 0) && (!overMemory || r.MemoryBytes == 0) {
			continue
		}
		o.unfit[id] = append(o.unfit[id], t.ID)
		used.NanoCPUs -= r.NanoCPUs
		used.MemoryBytes -= r.MemoryBytes
	}
}

// reserved is what a task holds of its node, if it is one that could go elsewhere.
func (o *Orchestrator) reserved(view store.ReadTx, t *store.Task) scheduler.Resources {
	svc := view.Service(t.ServiceID)
	if t.Slot == 0 || !t.Live() || t.Desired > api.TaskRunning || svc == nil || svc.Revs[t.Revision] == nil {
		return scheduler.Resources{}
	}
	if req := o.facts(svc.Revs[t.Revision]).req; req != nil {
		return req.Reserve
	}
	return scheduler.Resources{}
}
