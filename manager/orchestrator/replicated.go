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
		if s.number == 0 {
			p.remove(s) // left over from another mode
			continue
		}
		c := candidate{s: s}
		for _, t := range s.wanted {
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
		return cmp.Or(cmp.Compare(b.rank, a.rank), cmp.Compare(b.s.number, a.s.number))
	})
	for _, c := range present[:excess] {
		p.remove(c.s)
	}
}

// fill creates tasks for slots that have none: the lowest free numbers of a replicated service, the nodes of a global one.
func (p *pass) fill() {
	byNumber := map[uint64]*slot{}
	missing := p.replicas()
	global := p.svc.Spec.Mode.Global != nil
	created := 0
	for _, s := range p.slots {
		if !global && s.number == 0 {
			continue
		}
		byNumber[s.number] = s
		if s.newest() != nil {
			missing--
		}
		vacant := s.newest() != nil || global
		if s.skip || !vacant || len(s.wanted) > 0 || len(s.lost) > 0 || p.finished(s) || created >= maxCreates {
			continue
		}
		p.create(s, 0)
		p.out.cut()
		created++
	}
	if global {
		return
	}
	for number := uint64(1); missing > 0 && created < maxCreates; number++ {
		s := byNumber[number]
		if s == nil {
			s = &slot{number: number}
		} else if s.newest() != nil {
			continue
		}
		p.create(s, 0)
		p.out.cut()
		created++
		missing--
	}
}
