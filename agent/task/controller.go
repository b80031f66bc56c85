// Package task drives one task from its assignment to its end over a Controller: a portable state machine without Linux in it.
package task

import (
	"context"
	"time"

	"skein/manager/api"
)

// Executor is this node's ability to run tasks; agent/engine implements it, tasktest fakes it.
type Executor interface {
	// Describe returns the node's description (JSON of moby swarm.NodeDescription).
	Describe(ctx context.Context) ([]byte, error)
	// Controller returns the controller of the task's container. It does nothing yet; a container that exists for the task is adopted.
	// dependency tells, when it is asked, what the managers have sent by then.
	Controller(a *api.Assignment, networks map[string]*api.NetworkRecord, dependency Dependency) (Controller, error)
	// Tasks lists the ids of tasks that have a container here, for adoption and for removing what nobody asked for.
	Tasks(ctx context.Context) ([]string, error)
	// RemoveTask removes the container of a task that is assigned no more and has no controller. Idempotent.
	RemoveTask(ctx context.Context, taskID string) error
}

// Dependency returns a secret or config that tasks of this node need, nil while the managers have not sent it.
type Dependency func(id string) *api.DependencyRecord

// Controller carries one task out. Methods are called in order by one goroutine, Shutdown and Remove from it too; every method may be
// called again after a crash of the daemon and must then find its work done. Errors that can never heal are Fatal (rejected task).
type Controller interface {
	// State tells what exists already: a fresh daemon calls it first.
	State(ctx context.Context) (State, error)
	// Prepare pulls the image and makes network namespace, legs and container.
	Prepare(ctx context.Context) error
	// Start executes the container.
	Start(ctx context.Context) error
	// Ready returns when the container can serve: healthy, or all target ports listen, or at once when there are none (DECISIONS 16).
	// Bounded; an elapsed bound is no error, note then says so.
	Ready(ctx context.Context) (note string, err error)
	// Wait returns when the container's process ended, or when its health check gave it up though it runs (Exit.Sick).
	Wait(ctx context.Context) (Exit, error)
	// Quiet returns when no client's connection is open to the container, or it has ended. Asked only once no new clients are sent to it.
	// Unless all is set, a connection on which one short request follows the other is not waited for: it would never end.
	Quiet(ctx context.Context, all bool) error
	// Shutdown ends the container: stop signal, grace, kill.
	Shutdown(ctx context.Context) error
	// Remove deletes container, namespace, legs.
	Remove(ctx context.Context) error
	// Info is what is known of the container for reports.
	Info() Info
}

// State of a task's container as found.
type State struct {
	Created bool
	Running bool
	Ended   bool
	Exit    Exit
}

// Exit is how the container's process ended.
type Exit struct {
	Code int // -1: unknown
	OOM  bool
	At   time.Time
	Err  string
	Sick bool // it has not ended yet: it is to be, and has failed; Err tells why
}

// Info identifies the running container.
type Info struct {
	ContainerID string
	Pid         int
	Ports       []*api.PortConfig // host-mode ports with the published ones filled in
}

// Fatal marks an error that no retry can heal: the task is rejected with it.
type Fatal struct{ Err error }

func (f Fatal) Error() string { return f.Err.Error() }

// Unwrap returns the cause.
func (f Fatal) Unwrap() error { return f.Err }
