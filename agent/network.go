// Package agent is a node's side of the cluster: it keeps a session with the leader's dispatcher, carries out assignments, applies
// endpoint tables, and reports. It goes on working when managers are gone: assignments and tables rest on disk.
package agent

import (
	"context"

	"skein/manager/api"
)

// Network makes this node's kernel and DNS agree with the cluster's tables; agent/engine implements it.
type Network interface {
	// SetTables applies the whole desired state. Level-triggered: calling it twice changes nothing. The result names, per table that
	// could not be applied, the reason; tables not in it are applied and may be acknowledged.
	SetTables(ctx context.Context, t Tables) map[string]error
}

// Tables is everything the manager told this node about the network, merged from snapshots and deltas. Maps are by table (network id),
// then by record key. Immutable once handed out.
type Tables struct {
	NodeIndex uint32
	DataPort  uint32
	MeshPool  string
	MeshPool6 string // empty: no IPv6
	Mesh      Table
	Networks  map[string]Table
}

// Table is the merged content of one endpoint table.
type Table struct {
	Version   uint64
	Network   *api.NetworkRecord // of the mesh: the ingress network; nil or without id if there is none
	Nodes     map[uint32]*api.NodeEndpoint
	Services  map[string]*api.ServiceEndpoint
	Endpoints map[string]*api.TaskEndpoint
}
