package orchestrator

import (
	"skein/scheduler"
)

// admitNodes gives each node that may run the service a slot, and ends what runs on nodes that may not. A node that is paused, or was not
// heard of yet, keeps what it has.
func (p *pass) admitNodes() {
	byNode := map[string]*slot{}
	for _, s := range p.slots {
		if s.number != 0 {
			p.remove(s) // left over from another mode
			continue
		}
		byNode[s.node] = s
	}
	req := p.o.facts(p.svc.Spec).req
	for _, rec := range p.view.Nodes() {
		n := p.o.node(p.view, rec.Id)
		s := byNode[n.ID]
		delete(byNode, n.ID)
		if s == nil {
			s = &slot{node: n.ID}
			p.slots = append(p.slots, s)
		}
		switch {
		case req == nil || n.State == scheduler.Paused || n.State == scheduler.Unknown:
			s.skip, s.paused = true, req != nil
		case n.State != scheduler.Ready || !req.MatchesAll(n):
			p.shutdown(s, s.wanted...)
			p.shutdown(s, s.lost...)
			s.skip = true
			p.out.cut()
		}
	}
	for _, s := range p.slots {
		if byNode[s.node] == s {
			p.remove(s) // its node was removed
		}
	}
}
