package task

// How a task lives here
//
// Manager owns one worker per assigned task; a worker is one goroutine that walks the stages of worker.go over a Controller:
//
//	accept → prepare → hold (READY: desired RUNNING, StartAfter) → start → serve (STARTING: Ready) → observe (RUNNING) → ended
//
// Any stage is left for stop as soon as stopping is due. A task that took part in traffic is stopped only after the managers said that
// every live node took it out of rotation (Assignment.drained), or after a bound, so that no client is sent to a process that ends; and then
// not before the clients that it still has are done, within the service's time for that (drain).
//
// Guarantees: states of one task only grow; a container that runs is never started a second time; an ended task's container stays until
// the assignment asks for its removal; containers nobody asked for are removed only after a manager sent the whole set.
// Must not: know Linux, talk to managers, keep a list of managers. Used by package agent; agent/engine implements Executor.
