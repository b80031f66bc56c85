package forward

import (
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
)

// method is a unary method that only the leader answers.
type method struct {
	reply func() proto.Message
	again bool // it only reads or does the same when repeated: it may be sent again whatever happened
}

func read[T any, P interface {
	*T
	proto.Message
}]() method {
	return method{reply: func() proto.Message { return P(new(T)) }, again: true}
}

// idempotent is a write that changes nothing the second time.
func idempotent[T any, P interface {
	*T
	proto.Message
}]() method {
	return read[T, P]()
}

func write[T any, P interface {
	*T
	proto.Message
}]() method {
	return method{reply: func() proto.Message { return P(new(T)) }}
}

// methods lists them all. Not here: CA.GetRootCA, which each manager answers; the dispatcher's stream, which agents take to the leader
// themselves; Agent, which is about one node.
func methods() map[string]method {
	return map[string]method{
		api.CA_IssueCertificate_FullMethodName: idempotent[api.IssueReply](),
		api.CA_RenewCertificate_FullMethodName: idempotent[api.IssueReply](),

		api.Membership_Join_FullMethodName:  idempotent[api.MemberReply](),
		api.Membership_Leave_FullMethodName: idempotent[api.Empty](),

		api.Control_GetCluster_FullMethodName:    read[api.Object](),
		api.Control_UpdateCluster_FullMethodName: write[api.Empty](),
		api.Control_GetUnlockKey_FullMethodName:  read[api.UnlockKey](),
		api.Control_ListNodes_FullMethodName:     read[api.Objects](),
		api.Control_GetNode_FullMethodName:       read[api.Object](),
		api.Control_UpdateNode_FullMethodName:    write[api.Empty](),
		api.Control_RemoveNode_FullMethodName:    write[api.Empty](),
		api.Control_ListServices_FullMethodName:  read[api.Objects](),
		api.Control_GetService_FullMethodName:    read[api.Object](),
		api.Control_CreateService_FullMethodName: write[api.Created](),
		api.Control_UpdateService_FullMethodName: write[api.Updated](),
		api.Control_RemoveService_FullMethodName: write[api.Empty](),
		api.Control_ListTasks_FullMethodName:     read[api.Objects](),
		api.Control_GetTask_FullMethodName:       read[api.Object](),
		api.Control_ListNetworks_FullMethodName:  read[api.Objects](),
		api.Control_GetNetwork_FullMethodName:    read[api.Object](),
		api.Control_CreateNetwork_FullMethodName: write[api.Created](),
		api.Control_RemoveNetwork_FullMethodName: write[api.Empty](),
		api.Control_NetStatus_FullMethodName:     read[api.NetStatusReply](),
		api.Control_NetCheck_FullMethodName:      idempotent[api.NetCheckReply](),
		api.Control_Rebalance_FullMethodName:     idempotent[api.RebalanceReply](),
		api.Control_ListRevisions_FullMethodName: read[api.Objects](),

		api.Control_CreateJoinToken_FullMethodName: write[api.TokenInfo](),
		api.Control_ListJoinTokens_FullMethodName:  read[api.TokenInfos](),
		api.Control_RemoveJoinToken_FullMethodName: write[api.Empty](),

		api.Control_ListNodeNetworks_FullMethodName: read[api.Objects](),
		api.Control_Attach_FullMethodName:           idempotent[api.AttachReply](),

		api.Control_ListDependencies_FullMethodName: read[api.Objects](),
		api.Control_GetDependency_FullMethodName:    read[api.Object](),
		api.Control_CreateDependency_FullMethodName: write[api.Created](),
		api.Control_UpdateDependency_FullMethodName: write[api.Empty](),
		api.Control_RemoveDependency_FullMethodName: write[api.Empty](),
	}
}

// Forwards reports whether a method is answered by the leader only.
func Forwards(fullMethod string) bool {
	_, ok := methods()[fullMethod]
	return ok
}
