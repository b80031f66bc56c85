package scheduler

import (
	"cmp"
	"slices"
)

// Move is a task of a service that would be better placed elsewhere.
type Move struct {
	From, To string
}

// Level lists moves that level a spread service out: each takes one of its tasks from the most loaded node to where the scheduler would put it
// today, if that is strictly better, in the order of the preferences: fewer tasks in the branch, of the service, on the node. Each move makes
// the cluster more even, so there is an end, and after all of them the list is empty. movable is how many tasks may leave a node. What it
// decides is held, as if the tasks had moved; at most limit moves.
func (s *Scheduler) Level(g Group, movable map[string]int, limit int) []Move {
	var moves []Move
	g.Count, g.Strategy = 1, Spread
	sv := s.service(g.Service)
	for len(moves) < limit {
		move, found := s.levelOne(&g, sv, movable)
		if !found {
			break
		}
		movable[move.From]--
		moves = append(moves, move)
	}
	return moves
}

func (s *Scheduler) levelOne(g *Group, sv *service, movable map[string]int) (Move, bool) {
	var from []int32
	for id, n := range movable {
		if i, known := s.index[id]; known && n > 0 {
			from = append(from, i)
		}
	}
	slices.SortFunc(from, func(a, b int32) int {
		return cmp.Or(cmp.Compare(sv.count.get(b), sv.count.get(a)), cmp.Compare(s.tasks[b], s.tasks[a]), cmp.Compare(a, b))
	})
	for _, i := range from {
		s.hold(i, sv, g.Req, true, -1)
		before := s.loads(i, g, sv)
		nodes := s.Place(g)
		if len(nodes) == 1 {
			to := s.index[nodes[0]]
			s.hold(to, sv, g.Req, true, -1)
			if slices.Compare(s.loads(to, g, sv), before) < 0 {
				s.hold(to, sv, g.Req, true, 1)
				return Move{From: s.nodes[i].ID, To: nodes[0]}, true
			}
		}
		s.hold(i, sv, g.Req, true, 1)
		if len(g.Req.Spread) == 0 {
			break // the others have less
		}
	}
	return Move{}, false
}

// loads are what makes a node less wanted, the weightiest first.
func (s *Scheduler) loads(i int32, g *Group, sv *service) []int {
	var out []int
	if len(g.Req.Spread) > 0 {
		t := s.tree(g.Req.Spread)
		load := make([]int, len(t.branches))
		sv.count.each(func(i, n int32) {
			for b := t.leaf[i]; b >= 0; b = t.branches[b].parent {
				load[b] += int(n)
			}
		})
		for b := t.leaf[i]; b > 0; b = t.branches[b].parent {
			out = append(out, load[b])
		}
		slices.Reverse(out)
	}
	return append(out, int(sv.count.get(i)), int(s.tasks[i]))
}

// HoldsAs reports whether tasks of both hold the same on their nodes.
func (r *Requirements) HoldsAs(o *Requirements) bool {
	return r.Reserve == o.Reserve && slices.Equal(r.Generic, o.Generic) && slices.Equal(r.Ports, o.Ports)
}
