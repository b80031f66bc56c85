// Package runtime runs containers on this machine: namespaces, cgroups, mounts, limits, lifecycle. It knows OCI words only, never
// clusters, images' names or networks' addresses: it is given a root filesystem as mounts and a network namespace by path.
//
// A node's containers are children of one supervisor process (package supervisor) that outlives the daemon; this package holds the
// types that both sides and the users share. Used by agent/engine and cmd/skein-oci.
package runtime

import (
	"context"
	"io"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Config is one container to create. Spec is complete: whoever makes it has merged image config, defaults and the user's wishes.
type Config struct {
	// ID names the container, its cgroups and its state directory: [a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}.
	ID string
	// Spec is the OCI runtime configuration, Linux part included. Spec.Root.Path must be a mounted root filesystem or a mount point on
	// which Rootfs is mounted inside the container's mount namespace only. Network namespaces are joined by path.
	Spec *specs.Spec
	// Rootfs, when set, is mounted on Spec.Root.Path in the container's own mount namespace (overlayfs of the image's layers), so that
	// no mount stays on the host when everything is killed.
	Rootfs []Mount
	// CgroupParent holds the container's groups instead of the supervisor's own: an absolute path below the root of the hierarchies.
	CgroupParent string
	// Subpaths names, by the destination of a bind mount, what below its source is mounted: resolved when the container is created, by handle,
	// never out of the source.
	Subpaths map[string]string
	// LogPath, when set, receives stdout and stderr, rotated by LogMaxSize (bytes, 0 never) and LogMaxFiles. Empty: no log is kept.
	LogPath     string
	LogMaxSize  int64
	LogMaxFiles int
	// LogFormat is "json-file" (also when empty) or "local", a compact binary format; package logs reads both.
	LogFormat string `json:",omitempty"`
	// LogCompress makes rotated files gzip files.
	LogCompress bool `json:",omitempty"`
	// LogNonBlocking lets the container go on while the disk is slow: up to LogBufferSize bytes (0: 1 MiB) wait, more lines are dropped
	// and counted. Otherwise the container waits. A full disk never makes it wait.
	LogNonBlocking bool  `json:",omitempty"`
	LogBufferSize  int64 `json:",omitempty"`
	// OpenStdin keeps a pipe for standard input; otherwise it is /dev/null. With Spec.Process.Terminal a pty serves all three.
	OpenStdin bool
	// Init makes the first process a small init of ours, which reaps orphans and passes signals on, and Spec.Process its child.
	Init bool
}

// ContainerPath begins the path of a namespace in a Config's Spec that is another container's: "container:ID". It is joined through the
// handle of that container's process, never by a number that may be another's. The source of a bind mount may be the same words when one
// of the namespaces is joined so: what that container has mounted at the mount's destination.
const ContainerPath = "container:"

// Mount is a filesystem to mount, as data.
type Mount struct {
	Type    string
	Source  string
	Options []string
}

// Status of a container: created → running → stopped; paused is running with a frozen cgroup.
type Status string

// The states of the OCI runtime specification.
const (
	Created Status = "created"
	Running Status = "running"
	Paused  Status = "paused"
	Stopped Status = "stopped"
)

// State is what is known of a container.
type State struct {
	ID         string
	Status     Status
	Pid        int // 0 when not running
	CreatedAt  time.Time
	StartedAt  time.Time
	FinishedAt time.Time
	Exit       Exit // meaningful when Status is Stopped
	// SetUp is how long the first process took from clone3 to execve, without its wait for Start; 0 before, and when no start was seen.
	SetUp time.Duration `json:",omitempty"`
	// LogDropped is how many lines could not be written to the log since the supervisor took the container over.
	LogDropped uint64 `json:",omitempty"`
}

// Exit is how a process ended.
type Exit struct {
	// Code is 0–255, 128+n for signal n, or UnknownExit when nobody saw the end.
	Code      int
	OOMKilled bool
	At        time.Time
	// Err says why the process could not be executed (Code 126 or 127), else it is empty.
	Err string
}

// UnknownExit is the code of a process whose end was not seen by anyone.
const UnknownExit = -1

// Event is one record of the supervisor's exit journal. Sequence numbers are consecutive per supervisor state directory.
type Event struct {
	Seq         uint64
	ContainerID string
	ExecID      string // empty for the container's first process
	Exit        Exit
}

// Streams connects a client to a process. Nil members are not connected. Attach returns when the outputs ended or ctx is done.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// CloseStdin propagates end of file on Stdin to the process (half close).
	CloseStdin bool
	// Attached, when set, is called once after the connection stands and before output flows, so that a created container can be
	// attached to before it starts and no byte is missed.
	Attached func()
}

// Process is an additional process in a running container.
type Process struct {
	ID       string
	Args     []string
	Env      []string
	Cwd      string
	User     specs.User
	Terminal bool
	// ConsoleSize is the terminal's first size, nil: 0 by 0.
	ConsoleSize *specs.Box `json:",omitempty"`
	OpenStdin   bool
	// Detach says that nobody is going to attach: output is discarded from the start.
	Detach bool `json:",omitempty"`
	// Privileged gives all capabilities of the daemon's bounding set and no seccomp filter.
	Privileged bool
}

// Supervisor is the client's view of the supervisor process. Methods are safe for concurrent use. Every error names the container.
// Errors carry a kind of containerd/errdefs: not found, already exists, failed precondition (wrong state), invalid argument, unavailable.
type Supervisor interface {
	// Create checks the config, prepares cgroups and mounts, and leaves the container created, its process not yet executed.
	Create(ctx context.Context, c Config) error
	// Start executes the container's process and returns its host pid once execve succeeded. A failed execve is an error with Exit
	// code 126 or 127 recorded, and the container stopped.
	Start(ctx context.Context, id string) (pid int, err error)
	Signal(ctx context.Context, id string, sig int) error
	Pause(ctx context.Context, id string) error
	Resume(ctx context.Context, id string) error
	// Update changes cgroup limits of a container that is not stopped.
	Update(ctx context.Context, id string, r *specs.LinuxResources) error
	// Delete removes a stopped (or created) container's cgroups, mounts, state. Its log files stay. Unknown id: not found.
	Delete(ctx context.Context, id string) error
	State(ctx context.Context, id string) (State, error)
	List(ctx context.Context) ([]State, error)
	// Events streams the journal from the record after seq, in order, until ctx is done; nothing is lost over restarts of either side.
	Events(ctx context.Context, after uint64) (<-chan Event, error)
	// Attach connects to the running process's streams from now on. Output also goes to the log.
	Attach(ctx context.Context, id, execID string, s Streams) error
	Resize(ctx context.Context, id, execID string, rows, cols uint16) error
	// Exec starts p inside the running container and returns its host pid; its end is an Event.
	Exec(ctx context.Context, id string, p Process) (pid int, err error)
	SignalExec(ctx context.Context, id, execID string, sig int) error
	// StoreFD keeps a duplicate of fd under name until ReleaseFD or the supervisor's end; LoadFDs returns duplicates of all whose name has
	// the prefix. They let sockets inside containers outlive the daemon.
	StoreFD(ctx context.Context, name string, fd int) error
	LoadFDs(ctx context.Context, prefix string) (map[string]int, error)
	ReleaseFD(ctx context.Context, name string) error
	// Shutdown ends the supervisor; refused (failed precondition) while containers run, unless force, which kills them first.
	Shutdown(ctx context.Context, force bool) error
	Close() error
}
