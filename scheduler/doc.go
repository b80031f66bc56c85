// Package scheduler chooses nodes for tasks: hard rules first (state, constraints, platform, resources, ports, replicas per
// node), then an even spread. It is a pure library: no clock, no goroutine, no I/O, and the result depends only on the calls made.
//
// A Scheduler mirrors the cluster in dense arrays: the caller tells it nodes (SetNode) and what tasks already hold there (Hold,
// Release), then asks for groups of identical tasks (Schedule). What Schedule decides is held at once; a caller whose decision
// could not be carried out releases it again. Every refusal is explained in numbers.
//
// It knows nothing of stores, specs or Raft; manager/placement is its user. Not safe for concurrent use.
package scheduler
