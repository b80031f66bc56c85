package orchestrator

import (
	"skein/manager/api"
	"skein/manager/store"
	"skein/scheduler"
)

// giveWay ends a task whose successor was to run beside it, start-first, and finds no node because there may be only so many replicas on
// each: the limit holds while a service is updated, too, so this slot goes on stop-first. What would not find room even then is left waiting.
func (p *pass) giveWay() {
	facts := p.o.facts(p.svc.Spec)
	if facts.req == nil || facts.req.MaxPerNode == 0 {
		return
	}
	for _, s := range p.slots {
		n := len(s.wanted)
		if s.skip || n < 2 {
			continue
		}
		next := s.wanted[n-1]
		if next.State >= api.TaskAssigned || next.Status.GetErr() == "" || next.Revision != p.svc.Revision || s.ending[next] {
			continue // it has its node, or was not looked at yet
		}
		for _, t := range s.wanted[:n-1] {
			if !s.ending[t] && p.standsInTheWay(t, facts.req) {
				p.shutdown(s, t)
				p.out.cut()
				break
			}
		}
	}
}

// standsInTheWay reports whether a task's node has as many replicas as it may, and room for one like req in the place of this one.
func (p *pass) standsInTheWay(t *store.Task, req *scheduler.Requirements) bool {
	n := p.o.node(p.view, t.NodeID)
	if n == nil || n.node.State != scheduler.Ready || !req.MatchesAll(&n.node) {
		return false
	}
	replicas := 0
	used := req.Reserve
	for _, other := range p.view.TasksByNode(t.NodeID) {
		if !other.Live() || other.Desired > api.TaskRunning {
			continue // what ends makes room
		}
		if other.ServiceID == p.svc.Id {
			replicas++
		}
		if svc := p.view.Service(other.ServiceID); other.ID != t.ID && svc != nil && svc.Revs[other.Revision] != nil {
			if r := p.o.facts(svc.Revs[other.Revision]).req; r != nil {
				used.NanoCPUs += r.Reserve.NanoCPUs
				used.MemoryBytes += r.Reserve.MemoryBytes
			}
		}
	}
	return replicas >= req.MaxPerNode && (req.Reserve.NanoCPUs == 0 || used.NanoCPUs <= n.node.Total.NanoCPUs) &&
		(req.Reserve.MemoryBytes == 0 || used.MemoryBytes <= n.node.Total.MemoryBytes)
}
