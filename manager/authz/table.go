package authz

import "skein/manager/api"

// who is the set of callers a method is open to.
type who uint8

const (
	anyone   who = iota + 1 // without a certificate
	nodes                   // every node of the cluster
	managers                // managers, by certificate and store
)

// rule says who may call a method, and for which node a request speaks, if it must be the caller's own.
type rule struct {
	who       who
	speaksFor func(req any) string
}

// rules is the whole table. A method that is not here is denied to everybody; a test compares it with the services' descriptors.
func rules() map[string]rule {
	member := func(req any) string {
		r, ok := req.(*api.MemberRequest)
		if !ok {
			return ""
		}
		return r.NodeId
	}
	t := map[string]rule{
		// Joining: the token and the digest are the proof.
		api.CA_GetRootCA_FullMethodName:        {who: anyone},
		api.CA_IssueCertificate_FullMethodName: {who: anyone},

		// The node is taken from the caller, the request does not name one.
		api.CA_RenewCertificate_FullMethodName: {who: nodes},
		api.Dispatcher_Session_FullMethodName:  {who: nodes},
		api.Membership_Join_FullMethodName:     {who: managers, speaksFor: member},
		api.Membership_Leave_FullMethodName:    {who: managers, speaksFor: member},
		api.Agent_TaskLogs_FullMethodName:      {who: managers},
		api.Agent_Ping_FullMethodName:          {who: managers},
		api.Agent_CheckNetworks_FullMethodName: {who: managers},

		// Each may ask what concerns its own networks: somebody who looks for a fault sits at the node that has it. The handler answers a worker
		// of itself only.
		api.Control_NetStatus_FullMethodName: {who: nodes},
		api.Control_NetCheck_FullMethodName:  {who: nodes},

		// A node asks for its own containers; which networks it may see is the handler's business.
		api.Control_ListNodeNetworks_FullMethodName: {who: nodes, speaksFor: nodeOf},
		api.Control_Attach_FullMethodName:           {who: nodes, speaksFor: nodeOf},
	}
	// Users reach Control through a manager's socket; the manager is the caller.
	for _, m := range []string{
		api.Control_GetCluster_FullMethodName, api.Control_UpdateCluster_FullMethodName, api.Control_GetUnlockKey_FullMethodName,
		api.Control_ListNodes_FullMethodName, api.Control_GetNode_FullMethodName,
		api.Control_UpdateNode_FullMethodName, api.Control_RemoveNode_FullMethodName,
		api.Control_ListServices_FullMethodName, api.Control_GetService_FullMethodName,
		api.Control_CreateService_FullMethodName, api.Control_UpdateService_FullMethodName, api.Control_RemoveService_FullMethodName,
		api.Control_ListTasks_FullMethodName, api.Control_GetTask_FullMethodName,
		api.Control_ListNetworks_FullMethodName, api.Control_GetNetwork_FullMethodName,
		api.Control_CreateNetwork_FullMethodName, api.Control_RemoveNetwork_FullMethodName,
		api.Control_ListRevisions_FullMethodName,
		api.Control_CreateJoinToken_FullMethodName, api.Control_ListJoinTokens_FullMethodName, api.Control_RemoveJoinToken_FullMethodName,
		api.Control_Rebalance_FullMethodName,
		api.Control_ListDependencies_FullMethodName, api.Control_GetDependency_FullMethodName, api.Control_CreateDependency_FullMethodName,
		api.Control_UpdateDependency_FullMethodName, api.Control_RemoveDependency_FullMethodName,
	} {
		t[m] = rule{who: managers}
	}
	return t
}

// nodeOf is the node for which requests speak that say so in their node_id.
func nodeOf(req any) string {
	if r, ok := req.(interface{ GetNodeId() string }); ok {
		return r.GetNodeId()
	}
	return ""
}
