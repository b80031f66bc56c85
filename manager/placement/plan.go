package placement

import (
	"skein/manager/api"
	"skein/manager/store"
	"skein/scheduler"

	"github.com/moby/moby/api/types/swarm"
)

// LabelRebalance on a service says when its tasks may move to level the nodes: "off" never, "on" when that is asked for, also with one
// replica, "join" also by itself when nodes join. On the cluster it speaks for services that say nothing.
const LabelRebalance = "skein.rebalance"

// ValidRebalance reports whether LabelRebalance can have the value.
func ValidRebalance(v string) bool { return v == "on" || v == "join" || v == "off" }

// maxMoves bounds the moves of one service in one plan.
const maxMoves = 1000

// Move is a task that would be better placed elsewhere, and where it would go today.
type Move struct {
	Task *store.Task
	To   string
}

// Plan lists the moves that level services out, all of them or one by its id. It is made from the store alone; once its moves are done, the
// next one is empty. A service with moves on the way, with an update on the way, or with volumes that live on its nodes is left alone.
func Plan(view store.ReadTx, service string) []Move {
	p := New()
	p.reset(view)
	var moves []Move
	for _, svc := range view.Services() {
		if service == "" || svc.Id == service {
			more, _ := p.level(view, svc)
			moves = append(moves, more...)
		}
	}
	return moves
}

// mayMove: a service with one replica might not bear two side by side, so it moves only if it says so.
func mayMove(svc *store.Service) bool {
	label := svc.Spec.Labels[LabelRebalance]
	strategy, _ := wishes(svc)
	r := svc.Spec.Mode.Replicated
	return label != "off" && strategy == scheduler.Spread && r != nil && r.Replicas != nil && (*r.Replicas > 1 || label != "") &&
		len(store.HomeVolumes(svc, svc.Revision)) == 0
}

// level lists the moves of one service, and holds them in the mirror as if they were done. A service that is busy can be levelled later.
func (p *Placement) level(view store.ReadTx, svc *store.Service) (moves []Move, busy bool) {
	if !mayMove(svc) {
		return nil, false
	}
	if state := swarm.UpdateState(svc.UpdateStatus.GetState()); state == swarm.UpdateStateUpdating || state == swarm.UpdateStateRollbackStarted {
		return nil, true
	}
	tasks, movable := map[string][]*store.Task{}, map[string]int{}
	req := p.requirements(view, &store.Task{ServiceID: svc.Id, Revision: svc.Revision}) // successors are of this revision
	for _, t := range view.TasksByService(svc.Id) {
		if t.Desired > api.TaskRunning {
			continue
		}
		if t.State != api.TaskRunning || t.Desired != api.TaskRunning || t.Slot == 0 || view.TaskExtra(t.ID).GetMoving() {
			return nil, true // something of it is on the way
		}
		if r := p.requirements(view, t); r.err != nil || req.err != nil || !r.HoldsAs(req.Requirements) {
			return nil, false
		}
		tasks[t.NodeID] = append(tasks[t.NodeID], t)
		movable[t.NodeID]++
	}
	for _, m := range p.sched.Level(scheduler.Group{Service: svc.Id, Req: req.Requirements}, movable, maxMoves) {
		last := len(tasks[m.From]) - 1
		moves = append(moves, Move{tasks[m.From][last], m.To})
		tasks[m.From] = tasks[m.From][:last]
	}
	return moves, len(moves) == maxMoves
}
