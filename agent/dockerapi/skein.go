package dockerapi

import (
	"net/http"

	"skein/manager/api"
)

// skeinRoutes are what docker has no words for; they sit under one prefix, with and without a version.
func (h *handlers) skeinRoutes() []route {
	return []route{
		{"GET /skein/net/status", h.netStatus},
		{"GET /skein/rebalance", h.rebalance},
		{"POST /skein/rebalance", h.rebalance},
		{"GET /skein/services/{id}/revisions", h.serviceRevisions},
		{"POST /skein/services/{id}/rollback", h.serviceRollback},
		{"POST /skein/join-tokens", h.joinTokenCreate},
		{"GET /skein/join-tokens", h.joinTokenList},
		{"DELETE /skein/join-tokens/{id}", h.joinTokenRemove},
	}
}

// NetStatusRow says which version of an endpoint table a node should have and which it has.
type NetStatusRow struct {
	NodeID  string
	Table   string
	Desired uint64
	Applied uint64
	Live    bool   // the node holds its lease
	Err     string `json:",omitempty"`
}

func (h *handlers) netStatus(w http.ResponseWriter, r *http.Request) error {
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	reply, err := ctl.NetStatus(r.Context(), &api.ListRequest{})
	if err != nil {
		return err
	}
	rows := make([]NetStatusRow, 0, len(reply.GetRows()))
	for _, row := range reply.GetRows() {
		rows = append(rows, NetStatusRow{
			NodeID: row.GetNodeId(), Table: row.GetTable(), Desired: row.GetDesired(), Applied: row.GetApplied(), Live: row.GetLive(), Err: row.GetErr(),
		})
	}
	return writeJSON(w, http.StatusOK, rows)
}
