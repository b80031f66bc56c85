// Package store holds all cluster state in memory, replicated by a Proposer (package consensus): one transactional, watchable store,
// one way in. Reads see a consistent view; writes run on a throw-away transaction whose changes are proposed with the versions they
// expect, and applied by the same deterministic code on every manager. No lock is held while an entry commits.
package store

import (
	"context"

	"skein/manager/api"
)

// Proposer replicates one encoded entry and returns once this manager applied it, with the result of each transaction in order.
// Errors: unavailable (no leader, leadership lost: the outcome is unknown), resource exhausted (disk reserve), canceled.
type Proposer interface {
	Propose(ctx context.Context, txns []*api.Txn) (version uint64, results []error, err error)
}

// ReadTx is a consistent view. Returned records are immutable and may be kept. Iteration is in a deterministic order (by id).
type ReadTx interface {
	Version() uint64   // Raft index the view is of
	Cluster() *Cluster // nil before init
	Node(id string) *Node
	Nodes() []*Node
	Service(id string) *Service
	ServiceByName(name string) *Service
	Services() []*Service
	Network(id string) *Network
	NetworkByName(name string) *Network
	Networks() []*Network
	Dependency(id string) *Dependency // a secret or config
	Dependencies(kind string) []*Dependency
	// Tasks are made anew by each call that returns some: compare their ids, not pointers. The methods that take a function, and
	// TaskRef, look at tasks where they are stored and allocate nothing.
	Task(id string) *Task
	Tasks() []*Task // all at once: with a million tasks this takes half a gigabyte; EachTask takes nothing
	TasksByService(id string) []*Task
	TasksByNode(id string) []*Task
	TasksBySlot(serviceID string, slot uint64, nodeID string) []*Task // all generations, oldest first
	TaskRef(id string) (TaskRef, bool)
	NewestTask(serviceID string, slot uint64, nodeID string) (TaskRef, bool)
	EachTask(f func(TaskRef) bool)
	EachTaskOfService(id string, f func(TaskRef) bool) // by slot (or node id) and generation
	EachTaskOfNode(id string, f func(TaskRef) bool)
	CountTasks() int
	VolumeHome(serviceID string, slot uint64, volume string) string // node id, empty if it has none
	TaskExtra(id string) *api.TaskExtra                             // nil for most tasks
	// Attachments are of containers that are no tasks.
	Attachment(id string) *Attachment
	Attachments() []*Attachment
	AttachmentsOfNode(nodeID string) []*Attachment
	AttachmentsOfNetwork(networkID string) []*Attachment
	// NodeByPrefix etc.: id, unique id prefix (tasks: too), or name, in docker's order. Not found and ambiguous are errdefs errors.
	FindNode(ref string) (*Node, error)
	FindService(ref string) (*Service, error)
	FindNetwork(ref string) (*Network, error)
	FindDependency(kind, ref string) (*Dependency, error)
	FindTask(ref string) (*Task, error)
	// Revisions calls f for each revision of a service that is kept, the newest, which is the current one, first, until it returns false.
	Revisions(serviceID string, f func(*api.Revision) bool)
	// ServicesUsing lists services that refer to the network.
	ServicesUsing(networkID string) []*Service
}

// WriteTx collects changes on top of a view. Nothing is visible to others before the entry applied.
type WriteTx interface {
	ReadTx
	// Add appends a change to the transaction. Preconditions are explicit: add an Expect change for every object that was read
	// and must not have changed.
	Add(*api.Change)
}

// Kind of object in a dirty key.
type Kind uint8

// The kinds of objects that can be watched.
const (
	KindCluster Kind = iota
	KindNode
	KindService
	KindNetwork
	KindTask
	KindDependency
	KindAttachment
	kinds // how many there are
)

// Key names a changed object. For tasks ServiceID, Slot and NodeID are filled in, so that watchers need not look a deleted task up.
type Key struct {
	Kind      Kind
	ID        string
	ServiceID string
	Slot      uint64
	NodeID    string
}

// The package's main type is Store:
//
//	New(p Proposer) *Store                                            // p may be set later with SetProposer
//	(*Store).View(func(ReadTx))                                       // short; no I/O inside
//	(*Store).Update(ctx, func(WriteTx) error) (version uint64, err error) // one transaction; a stale Expect is a conflict error (errdefs)
//	(*Store).Batch(ctx, []*api.Txn) (version uint64, results []error, err error) // many small transactions, each atomic alone
//	(*Store).Watch(kinds ...Kind) *Watcher                            // coalesced dirty keys: C() <-chan struct{}, Take() (keys []Key, overflow bool), Close()
//	(*Store).Version() uint64
//	(*Store).Apply(index uint64, entry []byte) []error                // called by consensus only
//	(*Store).Snapshot() (func(io.Writer) error)                       // copy-on-write view, streamed
//	(*Store).Restore(io.Reader) error
