// Package dockerapi serves the Docker Engine REST API: our own router over moby's API types. It translates between HTTP and small
// backend interfaces, decides nothing, and knows no kernel. agent/engine implements the node's part, cmd/daemon the swarm's.
package dockerapi

import (
	"context"
	"io"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"

	"skein/manager/api"
)

// Errors of every backend carry kinds of containerd/errdefs and docker's texts ("No such container: x"); the router maps kinds to status
// codes once. Refs are names, ids, or unique id prefixes.

// Filters are decoded query filters: key → values.
type Filters map[string][]string

// Containers is this node's containers.
type Containers interface {
	ContainerCreate(ctx context.Context, name string, req container.CreateRequest, platform string) (container.CreateResponse, error)
	ContainerStart(ctx context.Context, ref string) error // already started: errdefs not-modified is expressed by ErrNotModified
	ContainerStop(ctx context.Context, ref string, o StopOptions) error
	ContainerRestart(ctx context.Context, ref string, o StopOptions) error
	ContainerKill(ctx context.Context, ref, signal string) error
	ContainerPause(ctx context.Context, ref string) error
	ContainerUnpause(ctx context.Context, ref string) error
	ContainerRename(ctx context.Context, ref, name string) error
	ContainerRemove(ctx context.Context, ref string, force, volumes bool) error
	ContainerInspect(ctx context.Context, ref string, size bool) (container.InspectResponse, error)
	ContainerList(ctx context.Context, o ListOptions) ([]container.Summary, error)
	ContainerLogs(ctx context.Context, ref string, o LogOptions, emit func(LogLine) error) error
	// ContainerWait returns a channel that yields once; the wait is registered when it returns (docker run opens it before start).
	ContainerWait(ctx context.Context, ref string, condition container.WaitCondition) (<-chan container.WaitResponse, error)
	ContainerAttach(ctx context.Context, ref string, o AttachOptions, s Streams) error
	ContainerResize(ctx context.Context, ref string, rows, cols uint16) error
	ContainerTop(ctx context.Context, ref string, args []string) (container.TopResponse, error)
	ContainerPrune(ctx context.Context, f Filters) (container.PruneReport, error)
	ExecCreate(ctx context.Context, ref string, req container.ExecCreateRequest) (id string, err error)
	ExecStart(ctx context.Context, id string, req container.ExecStartRequest, s Streams) error // detach: s is zero
	ExecInspect(ctx context.Context, id string) (container.ExecInspectResponse, error)
	ExecResize(ctx context.Context, id string, rows, cols uint16) error
}

// StopOptions of stop and restart. Timeout in seconds, nil: the container's own (10 s), -1: for ever.
type StopOptions struct {
	Signal  string
	Timeout *int
}

// ListOptions of the container list.
type ListOptions struct {
	All     bool
	Limit   int
	Size    bool
	Filters Filters
}

// LogOptions of a log stream. Tail -1: all.
type LogOptions struct {
	Stdout, Stderr bool
	Follow         bool
	Since, Until   time.Time
	Tail           int64
}

// LogLine is one line, newline included unless the process wrote none.
type LogLine struct {
	Time   time.Time
	Stderr bool
	Line   []byte
	// Details are what the container's log options attach to its lines, the same for all of them.
	Details map[string]string
}

// AttachOptions of an attach.
type AttachOptions struct {
	Stdin, Stdout, Stderr bool
	Logs                  bool // replay what was written so far
	Stream                bool
	DetachKeys            string
	// Attached, when set, is to be called as soon as nothing that the container says from then on can be lost: the streams are joined, or
	// the next start will wait for them. Only then is the client told to go on; docker run starts the container right after.
	Attached func()
}

// Streams of a hijacked connection. Stdin's end of file is passed on to the process.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// Images is this node's images.
type Images interface {
	ImagePull(ctx context.Context, ref string, auth *registry.AuthConfig, platform string, emit func(jsonstream.Message)) error
	ImageList(ctx context.Context, all bool, f Filters) ([]image.Summary, error)
	ImageInspect(ctx context.Context, ref string) (image.InspectResponse, error)
	ImageHistory(ctx context.Context, ref string) ([]image.HistoryResponseItem, error)
	ImageTag(ctx context.Context, ref, newRef string) error
	ImageRemove(ctx context.Context, ref string, force bool) ([]image.DeleteResponse, error)
	ImageLoad(ctx context.Context, r io.Reader, emit func(jsonstream.Message)) error
	ImageSave(ctx context.Context, refs []string, w io.Writer) error
	ImagePrune(ctx context.Context, f Filters) (image.PruneReport, error)
	Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (registry.DistributionInspect, error)
}

// Networks is this node's single-host networks; the router merges the cluster's.
type Networks interface {
	NetworkList(ctx context.Context) ([]network.Inspect, error)
	NetworkCreate(ctx context.Context, req network.CreateRequest) (network.CreateResponse, error)
	NetworkRemove(ctx context.Context, ref string) error
	NetworkConnect(ctx context.Context, ref string, req network.ConnectRequest) error
	NetworkDisconnect(ctx context.Context, ref string, req network.DisconnectRequest) error
}

// System is what the node says of itself. Info lacks the Swarm part, which the router fills in from Swarm.
type System interface {
	Info(ctx context.Context) (system.Info, error)
	Version(ctx context.Context) (system.VersionResponse, error)
	// Events streams from since (zero: now) until ctx is done or until is reached.
	Events(ctx context.Context, since, until time.Time, f Filters) (<-chan events.Message, error)
}

// Swarm is the node's membership; cmd/daemon implements it.
type Swarm interface {
	SwarmInfo(ctx context.Context) swarm.Info
	SwarmInit(ctx context.Context, req swarm.InitRequest) (nodeID string, err error)
	SwarmJoin(ctx context.Context, req swarm.JoinRequest) error
	SwarmLeave(ctx context.Context, force bool) error
	// SwarmUnlock lets a manager whose data is locked take part again.
	SwarmUnlock(ctx context.Context, key string) error
	// Control returns the client of the cluster's control service, or an unavailable error with docker's text when this node is no
	// manager ("This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to connect this node to swarm and try again.").
	Control(ctx context.Context) (api.ControlClient, error)
	// SwarmNetCheck has nodes (ids or hostnames; none: all) compare their networks in the kernel with the record, and with repair mend them. Every node answers
	// it, also one that is in no cluster, for itself.
	SwarmNetCheck(ctx context.Context, repair bool, nodes []string) ([]*api.NetCheckNode, error)
	// SwarmNetStatus tells which node applied which version of which endpoint table. Every node of a cluster answers it.
	SwarmNetStatus(ctx context.Context) (*api.NetStatusReply, error)
	// NodeNetworks lists the cluster's networks that concern this node, be it a worker or a manager.
	NodeNetworks(ctx context.Context) ([]network.Inspect, error)
	// Agent returns a client of a node's agent service (logs).
	Agent(ctx context.Context, nodeID string) (api.AgentClient, error)
}
