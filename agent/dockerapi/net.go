package dockerapi

import (
	"net/http"
	"time"

	"skein/manager/api"
)

// NetStatusRow says which version of an endpoint table a node should have and which it has. Each node has one for the mesh.
type NetStatusRow struct {
	NodeID   string
	Hostname string
	Addr     string `json:",omitempty"` // where its tunnels end
	Table    string // network id, or "mesh"
	Network  string // name
	Desired  uint64
	Applied  uint64
	Behind   float64  // seconds since the desired version is there and not applied; 0: it is applied
	Live     bool     // the node has a say: drains wait for it
	Reason   string   `json:",omitempty"` // why it has none
	Silent   float64  // seconds since the node said something to the leader; -1: not since this leader leads
	Err      string   `json:",omitempty"` // why the table could not be applied
	Notes    []string `json:",omitempty"`
}

func (h *handlers) netStatus(w http.ResponseWriter, r *http.Request) error {
	reply, err := h.Swarm.SwarmNetStatus(r.Context())
	if err != nil {
		return err
	}
	nodes := map[string]*api.NetStatusNode{}
	for _, n := range reply.GetNodes() {
		nodes[n.GetNodeId()] = n
	}
	rows := make([]NetStatusRow, 0, len(reply.GetRows()))
	for _, row := range reply.GetRows() {
		n := nodes[row.GetNodeId()]
		out := NetStatusRow{
			NodeID: row.GetNodeId(), Hostname: n.GetHostname(), Addr: n.GetAddr(), Table: row.GetTable(), Network: row.GetNetwork(),
			Desired: row.GetDesired(), Applied: row.GetApplied(), Behind: time.Duration(row.GetBehindNanos()).Seconds(), Live: row.GetLive(),
			Reason: n.GetReason(), Silent: -1, Err: row.GetErr(),
		}
		if s := n.GetSilentNanos(); s >= 0 {
			out.Silent = time.Duration(s).Seconds()
		}
		if row.GetTable() == api.MeshTable {
			out.Notes = n.GetNotes()
		}
		rows = append(rows, out)
	}
	return writeJSON(w, http.StatusOK, rows)
}

// NetCheckNode is what one node's kernel has otherwise than the record says.
type NetCheckNode struct {
	NodeID      string
	Hostname    string
	Differences []NetDifference
	More        uint32  `json:",omitempty"` // differences beyond those listed
	Err         string  `json:",omitempty"` // why the node was not compared, or not wholly
	Took        float64 // seconds
	Mended      uint32  // differences that the node found and mended by itself since its daemon started
}

// NetDifference is one thing that the kernel has otherwise than the record says.
type NetDifference struct {
	Table  string
	Kind   string
	Object string
	State  string
	Mended bool
	Err    string `json:",omitempty"`
}

// netCheck compares; a POST mends as well.
func (h *handlers) netCheck(w http.ResponseWriter, r *http.Request) error {
	nodes, err := h.Swarm.SwarmNetCheck(r.Context(), r.Method == http.MethodPost, r.URL.Query()["node"])
	if err != nil {
		return err
	}
	out := make([]NetCheckNode, 0, len(nodes))
	for _, n := range nodes {
		c := NetCheckNode{NodeID: n.GetNodeId(), Hostname: n.GetHostname(), Differences: []NetDifference{}, More: n.GetMore(), Err: n.GetErr(),
			Took: time.Duration(n.GetTookNanos()).Seconds(), Mended: n.GetMended()}
		for _, f := range n.GetDifferences() {
			c.Differences = append(c.Differences, NetDifference{Table: f.GetTable(), Kind: f.GetKind(), Object: f.GetObject(), State: f.GetState(), Mended: f.GetMended(), Err: f.GetErr()})
		}
		out = append(out, c)
	}
	return writeJSON(w, http.StatusOK, out)
}
