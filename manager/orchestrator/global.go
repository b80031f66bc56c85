package orchestrator

import (
	"slices"

	"skein/manager/api"
	"skein/scheduler"
)

// admitNodes gives each node that may run the service a slot, and ends what runs on nodes that may not. A node that is paused, or was not
// heard of yet, keeps what it has.
func (p *pass) admitNodes() {
	if p.whole {
		for _, rec := range p.view.Nodes() {
			at := place{service: p.svc.Id, node: rec.Id}
			if _, found := slices.BinarySearchFunc(p.slots[:p.loaded], at, func(s *slot, a place) int { return s.place.compare(a) }); !found {
				p.slots = append(p.slots, &slot{place: at})
			}
		}
	}
	for _, s := range p.slots {
		p.admit(s)
	}
}

func (p *pass) admit(s *slot) {
	if s.slot != 0 {
		p.remove(s) // left over from another mode
		return
	}
	n := p.o.node(p.view, s.node)
	if n == nil {
		p.remove(s) // its node was removed
		return
	}
	req := p.o.facts(p.svc.Spec).req
	switch {
	case req == nil || n.node.State == scheduler.Paused || n.node.State == scheduler.Unknown:
		s.skip, s.paused = true, req != nil
		for _, t := range s.wanted {
			if t.State < api.TaskAssigned { // it would never get there
				p.shutdown(s, t)
			}
		}
		p.out.cut()
	case n.node.State == scheduler.Down && n.downSince()+int64(p.downGrace(n)) > p.now:
		s.wakeAt(n.downSince() + int64(p.downGrace(n)))
		s.skip = true
	case n.node.State != scheduler.Ready || !req.MatchesAll(&n.node):
		p.shutdown(s, s.wanted...)
		p.shutdown(s, s.lost...)
		s.skip = true
		p.out.cut()
	}
}
