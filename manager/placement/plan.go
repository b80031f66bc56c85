package placement

import (
	"skein/manager/api"
	"skein/manager/store"
	"skein/scheduler"

	"github.com/moby/moby/api/types/swarm"
)

// LabelRebalance on a service, "off", keeps its tasks where they are; "on" lets also a service with one replica move.
const LabelRebalance = "skein.rebalance"

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
		if (service == "" || svc.Id == service) && mayMove(svc) {
			moves = append(moves, p.level(view, svc)...)
		}
	}
	return moves
}

// mayMove: a service with one replica might not bear two side by side, so it moves only if it says so.
func mayMove(svc *store.Service) bool {
	label := svc.Spec.Labels[LabelRebalance]
	strategy, _ := wishes(svc)
	r := svc.Spec.Mode.Replicated
	if label == "off" || strategy != scheduler.Spread || r == nil || r.Replicas == nil || (*r.Replicas < 2 && label != "on") || len(store.HomeVolumes(svc, svc.Revision)) > 0 {
		return false
	}
	state := swarm.UpdateState(svc.UpdateStatus.GetState())
	return state != swarm.UpdateStateUpdating && state != swarm.UpdateStateRollbackStarted
}

func (p *Placement) level(view store.ReadTx, svc *store.Service) []Move {
	tasks, movable := map[string][]*store.Task{}, map[string]int{}
	var req *requirements
	for _, t := range view.TasksByService(svc.Id) {
		if t.Desired > api.TaskRunning {
			continue
		}
		if t.State != api.TaskRunning || t.Desired != api.TaskRunning || t.Slot == 0 || view.TaskExtra(t.ID).GetMoving() {
			return nil // something of it is on the way
		}
		r := p.requirements(view, t)
		if req == nil {
			req = r
		}
		if r.err != nil || r.need != req.need {
			return nil
		}
		tasks[t.NodeID] = append(tasks[t.NodeID], t)
		movable[t.NodeID]++
	}
	if req == nil {
		return nil
	}
	var moves []Move
	for _, m := range p.sched.Level(scheduler.Group{Service: svc.Id, Req: req.Requirements}, movable, maxMoves) {
		last := len(tasks[m.From]) - 1
		moves = append(moves, Move{tasks[m.From][last], m.To})
		tasks[m.From] = tasks[m.From][:last]
	}
	return moves
}
