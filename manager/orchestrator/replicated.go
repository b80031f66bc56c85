package orchestrator

import (
	"cmp"
	"slices"

	"skein/manager/api"
)

func (p *pass) replicas() int {
	if r := p.svc.Spec.Mode.Replicated; r != nil && r.Replicas != nil {
		return int(min(*r.Replicas, 1<<31))
	}
	return 1
}

// scaleDown removes the slots that are too many: first those that do not run, then so that the nodes level out, then the highest numbers.
func (p *pass) scaleDown() {
	type candidate struct {
		s    *slot
		runs bool
		rank int // among the slots on its node
	}
	var present []candidate
	onNode := map[string]int{}
	for _, s := range p.slots {
		if s.newest() == nil {
			continue
		}
		if s.slot == 0 {
			p.remove(s) // left over from another mode
			continue
		}
		c := candidate{s: s}
		for _, t := range s.wanted { // those that are about to leave their node go first
			if t.State == api.TaskRunning {
				c.runs, c.rank = true, onNode[t.NodeID]
				onNode[t.NodeID]++
				break
			}
		}
		present = append(present, c)
	}
	excess := len(present) - p.replicas()
	if excess <= 0 {
		return
	}
	slices.SortFunc(present, func(a, b candidate) int {
		if a.runs != b.runs {
			if b.runs {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(b.rank, a.rank), cmp.Compare(b.s.slot, a.s.slot))
	})
	for _, c := range present[:excess] {
		p.remove(c.s)
	}
}

// fill creates tasks for slots that have none: the lowest free numbers of a replicated service, the nodes of a global one.
func (p *pass) fill() {
	if p.svc.Spec.Mode.Global == nil {
		p.fillNumbers()
		return
	}
	for _, s := range p.slots {
		if s.skip || len(s.wanted) > 0 || len(s.lost) > 0 || p.finished(s) {
			continue
		}
		if p.full() {
			return
		}
		p.create(s, 0, p.inherit(s.newest()))
		p.out.cut()
	}
}

func (p *pass) fillNumbers() {
	for _, s := range p.slots {
		// A task that was told to end, without a successor: a leader of before may have left it so.
		if s.skip || s.newest() == nil || len(s.wanted) > 0 || len(s.leave) > 0 || len(s.lost) > 0 || p.finished(s) {
			continue
		}
		if p.full() {
			return
		}
		p.create(s, 0, p.inherit(s.newest()))
		p.out.cut()
	}
	for number := uint64(0); p.sum.filled.count < p.replicas(); {
		if p.full() {
			return
		}
		number = p.sum.filled.free(number)
		p.create(p.at(place{service: p.svc.Id, slot: number}), 0, nil)
		p.out.cut()
	}
}
