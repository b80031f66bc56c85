package dockerapi

import (
	"net/http"

	"skein/manager/api"
)

// TaskMove is a task that should be replaced elsewhere to level the nodes.
type TaskMove struct {
	TaskID, ServiceID, ServiceName string
	Slot                           uint64
	FromNode, FromHostname         string
	ToNode, ToHostname             string // where it would go now
	Moving                         bool   // it was asked for
}

// rebalance lists the moves that would level the nodes (GET), or asks for them (POST); "service" limits it to one.
func (h *handlers) rebalance(w http.ResponseWriter, r *http.Request) error {
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	reply, err := ctl.Rebalance(r.Context(), &api.RebalanceRequest{Service: r.URL.Query().Get("service"), Apply: r.Method == http.MethodPost})
	if err != nil {
		return err
	}
	moves := make([]TaskMove, 0, len(reply.GetMoves()))
	for _, m := range reply.GetMoves() {
		moves = append(moves, TaskMove{
			TaskID: m.GetTaskId(), ServiceID: m.GetServiceId(), ServiceName: m.GetServiceName(), Slot: m.GetSlot(), FromNode: m.GetFromNode(),
			FromHostname: m.GetFromHostname(), ToNode: m.GetToNode(), ToHostname: m.GetToHostname(), Moving: m.GetMoving(),
		})
	}
	return writeJSON(w, http.StatusOK, moves)
}
