package control

import (
	"context"

	"skein/manager/api"
	"skein/manager/placement"
	"skein/manager/store"
)

// Rebalance plans which tasks should move to level the nodes and, asked to apply, marks them: each stays until its successor runs, and no
// more of a service move at once than its update settings allow.
func (s *Server) Rebalance(ctx context.Context, r *api.RebalanceRequest) (*api.RebalanceReply, error) {
	var reply *api.RebalanceReply
	var ids []string
	plan := func(tx store.ReadTx) error {
		service := ""
		if r.Service != "" {
			svc, err := tx.FindService(r.Service)
			if err != nil {
				return err
			}
			service = svc.Id
		}
		reply, ids = &api.RebalanceReply{}, nil
		for _, m := range placement.Plan(tx, service) {
			ids = append(ids, m.Task.ID)
			reply.Moves = append(reply.Moves, &api.TaskMovePlan{
				TaskId: m.Task.ID, ServiceId: m.Task.ServiceID, ServiceName: tx.Service(m.Task.ServiceID).Name, Slot: m.Task.Slot,
				FromNode: m.Task.NodeID, FromHostname: tx.Node(m.Task.NodeID).GetHostname(), ToNode: m.To, ToHostname: tx.Node(m.To).GetHostname(), Moving: r.Apply,
			})
		}
		return nil
	}
	if err := s.read(ctx, plan); err != nil || !r.Apply || len(ids) == 0 {
		return reply, err
	}
	err := s.write(ctx, func(tx store.WriteTx) error {
		if err := plan(tx); err != nil || len(ids) == 0 {
			return err
		}
		tx.Add(&api.Change{Kind: &api.Change_MoveTasks{MoveTasks: &api.TaskMove{TaskIds: ids, Reason: "moved to level the nodes"}}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("tasks move to level the nodes", "tasks", len(ids))
	return reply, nil
}
