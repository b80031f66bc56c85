package store

import (
	"net/netip"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// Cluster, Node and Network are the log's own messages; stored values are immutable: clone (proto.Clone), change, write.
type (
	Cluster = api.ClusterRecord
	Node    = api.NodeRecord
	Network = api.NetworkRecord
	// Dependency is a secret or a config.
	Dependency = api.DependencyRecord
	// Attachment is what a container that is no task holds of the cluster's networks.
	Attachment = api.AttachmentRecord
)

// Kinds of dependencies.
const (
	KindSecret = "secret"
	KindConfig = "config"
)

// Service is a service record with its revisions decoded. Immutable.
type Service struct {
	*api.ServiceRecord
	// Spec is the current revision's spec; Previous that of the revision rollback returns to, nil if none.
	Spec     *swarm.ServiceSpec
	Previous *swarm.ServiceSpec
	// Revs holds every revision a task or a rollback refers to, by number.
	Revs map[uint64]*swarm.ServiceSpec
}

// Job reports whether the service's tasks are run to completion and not kept running.
func (v *Service) Job() bool { return isJob(v.Spec) }

func isJob(spec *swarm.ServiceSpec) bool {
	return spec.Mode.ReplicatedJob != nil || spec.Mode.GlobalJob != nil
}

// Task is one unit of work of a service, bound for life to one node. Small and immutable; the spec lives in its service's revision.
type Task struct {
	ID         string
	ServiceID  string
	Slot       uint64 // 0 for global services
	Generation uint32
	Revision   uint64
	NodeID     string // empty until placed
	State      api.TaskState
	Desired    api.TaskState
	Version    uint64
	Created    int64 // unix nanos
	Updated    int64
	StartAfter int64
	Started    int64 // entry time of the first RUNNING report, 0 before
	// Restarts is nil when nothing of its slot counts.
	Restarts *api.Restarts
	// Status is nil until an agent or the scheduler said something.
	Status *api.TaskReport
	// Attachments and gateways are allocated with the placement.
	Attachments        []*api.Attachment
	Gateway4, Gateway6 netip.Addr
	// HostPorts are the host-mode ports it holds on its node.
	HostPorts []*api.PortConfig
}

// Live reports whether the task holds its node's resources and addresses: placed and not ended.
func (t *Task) Live() bool {
	return t.NodeID != "" && t.State >= api.TaskAssigned && !t.State.Terminal()
}
