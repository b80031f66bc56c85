package api

// TaskState is a task's state or desired state. States only grow; numbers leave gaps of 64 so that states can be inserted.
type TaskState uint32

// The task states, in order.
const (
	TaskNew       TaskState = 0
	TaskPending   TaskState = 64
	TaskAssigned  TaskState = 192
	TaskAccepted  TaskState = 256
	TaskPreparing TaskState = 320
	TaskReady     TaskState = 384
	TaskStarting  TaskState = 448
	TaskRunning   TaskState = 512
	TaskComplete  TaskState = 576
	TaskShutdown  TaskState = 640
	TaskFailed    TaskState = 704
	TaskRejected  TaskState = 768
	TaskRemove    TaskState = 800
	TaskOrphaned  TaskState = 832
)

var taskStateNames = map[TaskState]string{
	TaskNew: "new", TaskPending: "pending", TaskAssigned: "assigned", TaskAccepted: "accepted", TaskPreparing: "preparing",
	TaskReady: "ready", TaskStarting: "starting", TaskRunning: "running", TaskComplete: "complete", TaskShutdown: "shutdown",
	TaskFailed: "failed", TaskRejected: "rejected", TaskRemove: "remove", TaskOrphaned: "orphaned",
}

// String is the name the Docker API uses for the state.
func (s TaskState) String() string {
	if n, ok := taskStateNames[s]; ok {
		return n
	}
	return "unknown"
}

// Terminal reports whether nothing runs any more in this observed state.
func (s TaskState) Terminal() bool { return s > TaskRunning }

// Formats and levels of the log (DECISIONS 8).
const (
	// FormatV1 is the layout of Entry and of snapshot chunks.
	FormatV1 = 1
	// FeatureLevel is the highest level this binary writes and reads.
	FeatureLevel = 4
	// LevelHistory is the level from which services keep all their revisions with their registry credentials, writes name their authors, nodes know since when they
	// have their status, and restarts are counted on tasks.
	LevelHistory = 2
	// LevelPacked is the level from which changes of many tasks are packed in the log, and tasks are columns of snapshots.
	LevelPacked = 3
	// LevelPlacement is the level from which placements claim generic resources and give volumes a home, tasks are asked to move, and
	// desires have reasons.
	LevelPlacement = 3
	// LevelMembers is the level from which the root certificate can be replaced, join tokens be limited, and clusters have more than 4,094 nodes.
	LevelMembers = 3
	// LevelNetworks is the level from which networks have further ranges, address options and an MTU, standalone containers have addresses on
	// them, and nodes have keys of encrypted networks.
	LevelNetworks = 4
)

// MessageLeaving is what a node says of a task that runs and that it is about to end by itself. Such a task gets no new clients.
const MessageLeaving = "unhealthy: leaves rotation"

// MeshTable is the name of the table that carries nodes and published ports; other tables are named by network id.
const MeshTable = "mesh"

// Bounds that both ends of a connection check.
const (
	MaxNodeAddrs     = 64      // addresses of one node
	MaxSpecBytes     = 1 << 20 // of one object's spec JSON
	MaxMessageBytes  = 4 << 20 // of one gRPC message
	MaxStatusReports = 1000    // of one StatusBatch
	ListPageBytes    = 1 << 20 // of the objects of one answer to a list request, but for the last of them
)

// CryptPort is the first of the two UDP ports on which nodes exchange encrypted networks' packets.
const CryptPort = 51840
