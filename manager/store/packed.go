package store

import (
	"slices"

	"skein/manager/api"
)

// packer turns plain changes into packed ones, when the cluster has agreed on them. Results come back in the form of what was given.
type packer struct {
	s    *state
	out  []*api.Txn
	back []place // of each given transaction
}

// place says where a given transaction went.
type place struct {
	txn  int    // of out
	item string // the task whose report it was, in a packed transaction
}

// pack returns what to propose for txns, and what turns its results into theirs.
func (s *state) pack(txns []*api.Txn) ([]*api.Txn, func([]error) []error) {
	if s.level() < api.LevelPacked {
		return txns, func(r []error) []error { return r }
	}
	k := packer{s: s, back: make([]place, len(txns))}
	for i := 0; i < len(txns); {
		if n := k.reports(txns[i:], i); n > 0 {
			i += n
			continue
		}
		k.back[i] = place{txn: len(k.out)}
		k.out = append(k.out, k.txn(txns[i]))
		i++
	}
	return k.out, k.results
}

// reports gathers transactions that are single reports, from the first on, and tells how many.
func (k *packer) reports(txns []*api.Txn, at int) (n int) {
	var p *reportPacker
	for n < min(len(txns), maxPacked) {
		r := onlyReport(txns[n])
		if r == nil {
			break
		}
		node := k.s.nodes.get(r.NodeId)
		if p == nil {
			p = newReportPacker()
		}
		if !p.add(r, node.GetIndex()) {
			break
		}
		k.back[at+n] = place{txn: len(k.out), item: r.TaskId}
		n++
	}
	if n > 0 {
		k.out = append(k.out, &api.Txn{Changes: []*api.Change{p.change()}})
	}
	return n
}

func onlyReport(t *api.Txn) *api.TaskReport {
	if len(t.Changes) != 1 {
		return nil
	}
	return t.Changes[0].GetReportTask()
}

func (k *packer) results(got []error) []error {
	items := make([]map[string]error, len(got))
	out := make([]error, len(k.back))
	for i, b := range k.back {
		err := got[b.txn]
		partial, ok := err.(*PartialError)
		if b.item == "" || !ok {
			out[i] = err
			continue
		}
		if items[b.txn] == nil {
			items[b.txn] = map[string]error{}
			for _, it := range partial.Items {
				items[b.txn][it.TaskID] = it.Err
			}
		}
		out[i] = items[b.txn][b.item]
	}
	return out
}

func (k *packer) txn(t *api.Txn) *api.Txn {
	var out *api.Txn
	for i, c := range t.Changes {
		if p := k.change(c); p != nil {
			if out == nil {
				out = &api.Txn{Changes: slices.Clone(t.Changes)}
			}
			out.Changes[i] = p
		}
	}
	if out == nil {
		return t
	}
	return out
}

// change packs a change; nil if it stays as it is.
func (k *packer) change(c *api.Change) *api.Change {
	switch c := c.Kind.(type) {
	case *api.Change_CreateTasks:
		if p := k.create(c.CreateTasks); p != nil {
			return &api.Change{Kind: &api.Change_PackedCreate{PackedCreate: p}}
		}
	case *api.Change_PlaceTasks:
		if p := k.placement(c.PlaceTasks); p != nil {
			return &api.Change{Kind: &api.Change_PackedPlacement{PackedPlacement: p}}
		}
	case *api.Change_DeleteTasks:
		if p := k.tasks(c.DeleteTasks.TaskIds); p != nil {
			return &api.Change{Kind: &api.Change_PackedDelete{PackedDelete: &api.PackedDelete{Tasks: p}}}
		}
	case *api.Change_DesireTasks:
		if p := k.tasks(c.DesireTasks.TaskIds); p != nil && c.DesireTasks.Reason == "" {
			return &api.Change{Kind: &api.Change_PackedDesire{PackedDesire: &api.PackedDesire{Tasks: p, Desired: c.DesireTasks.Desired}}}
		}
	}
	return nil
}

func (k *packer) create(c *api.TaskCreate) *api.PackedCreate {
	if len(c.Items) == 0 || c.Defer {
		return nil
	}
	out := &api.PackedCreate{Revision: c.Revision, Desired: c.Items[0].Desired}
	r := runs{out: &api.TaskRuns{ServiceId: c.ServiceId}}
	for _, it := range c.Items {
		if it.StartAfter != 0 || it.Restarts != nil || it.Desired != out.Desired || (it.Slot != 0 && it.NodeId != "") {
			return nil
		}
		if !r.add(k.s, it.Slot, it.NodeId, it.Generation) {
			return nil
		}
	}
	out.Tasks = r.out
	return out
}

func (k *packer) placement(c *api.TaskPlacement) *api.PackedPlacement {
	if len(c.TaskIds) == 0 || len(c.NodeIds) != len(c.TaskIds) || (len(c.Refused) != 0 && len(c.Refused) != len(c.TaskIds)) {
		return nil
	}
	out := &api.PackedPlacement{Nodes: make([]uint32, 0, len(c.TaskIds))}
	r := runs{}
	texts := map[string]uint32{}
	for i, id := range c.TaskIds {
		t := k.s.tasks.findText(id)
		if t == 0 || !r.task(k.s, t) {
			return nil
		}
		if len(c.Refused) > 0 && c.Refused[i] != "" {
			n, ok := texts[c.Refused[i]]
			if !ok {
				n = uint32(len(out.Texts))
				texts[c.Refused[i]] = n
				out.Texts = append(out.Texts, c.Refused[i])
			}
			out.Nodes, out.Reasons = append(out.Nodes, 0), append(out.Reasons, n)
			continue
		}
		node := k.s.nodes.get(c.NodeIds[i])
		if node.GetIndex() == 0 {
			return nil
		}
		out.Nodes = append(out.Nodes, node.GetIndex())
	}
	out.Tasks = r.out
	return out
}

// tasks names tasks; nil if one of them is not there, or has a place that runs cannot say.
func (k *packer) tasks(ids []string) (out []*api.TaskRuns) {
	var r runs
	for _, id := range ids {
		t := k.s.tasks.findText(id)
		if t == 0 {
			return nil
		}
		if !r.task(k.s, t) {
			r = runs{}
			if !r.task(k.s, t) {
				return nil
			}
		}
		if len(out) == 0 || out[len(out)-1] != r.out {
			out = append(out, r.out)
		}
	}
	return out
}

// runs gathers tasks of one service, in order.
type runs struct {
	out  *api.TaskRuns
	next int64 // slot
	gen  int64
}

// task adds a stored task; false if it is one of another service, or cannot be named in runs.
func (r *runs) task(s *state, id rowID) bool {
	row := s.tasks.row(id)
	service := s.tasks.lists.services.id[row.service]
	if r.out == nil {
		r.out = &api.TaskRuns{ServiceId: service}
	}
	node := ""
	if row.slot == 0 {
		node = s.tasks.lists.nodes.id[row.node]
	}
	return r.out.ServiceId == service && r.add(s, row.slot, node, row.generation)
}

func (r *runs) add(s *state, slot uint64, node string, generation uint32) bool {
	if slot > 1<<62 {
		return false
	}
	if slot == 0 {
		n := s.nodes.get(node)
		if n.GetIndex() == 0 {
			return false
		}
		r.out.ByNode = append(r.out.ByNode, n.GetIndex())
	}
	at := len(r.out.Runs)
	if at > 0 && int64(slot) == r.next && int64(generation) == r.gen && r.out.Runs[at-2] < maxRun {
		r.out.Runs[at-2]++
	} else {
		r.out.Runs = append(r.out.Runs, int64(slot)-r.next, 1, int64(generation)-r.gen)
	}
	r.gen = int64(generation)
	if r.next = int64(slot); slot != 0 {
		r.next++
	}
	return true
}
