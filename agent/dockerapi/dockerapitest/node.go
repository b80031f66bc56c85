// Package dockerapitest has backends in memory for tests of the API's router and of its clients.
package dockerapitest

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/system"

	"skein/agent/dockerapi"
	"skein/manager/api"
)

// Digest is what the fake's registry says of every image.
const Digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// Container is a fake container: an echo of its input, or a few lines.
type Container struct {
	ID, Name string
	TTY      bool
	Lines    []dockerapi.LogLine
	Running  bool
	Exit     chan container.WaitResponse
}

// Node is a fake of everything a node has. Fields may be set before its use.
type Node struct {
	mu         sync.Mutex
	Containers map[string]*Container // by name
	Nets       []network.Inspect
	PullErr    error // after the first message, as a registry's refusal comes
	PullLate   error // after the second
	Auth       *registry.AuthConfig
	Filters    dockerapi.Filters
	EventsCh   chan events.Message
	execs      map[string]*execution
}

// NewNode returns a node with the container "web" (two lines of log) and docker's networks.
func NewNode() *Node {
	n := &Node{Containers: map[string]*Container{}, execs: map[string]*execution{}, EventsCh: make(chan events.Message, 16)}
	at := time.Date(2026, 11, 21, 10, 0, 0, 5, time.UTC)
	n.Add(&Container{ID: strings.Repeat("ab", 32), Name: "web", Running: true, Lines: []dockerapi.LogLine{
		{Time: at, Line: []byte("hello\n")}, {Time: at.Add(time.Second), Stderr: true, Line: []byte("oops\n")},
	}})
	for _, name := range []string{"bridge", "host", "none"} {
		n.Nets = append(n.Nets, network.Inspect{Network: network.Network{Name: name, ID: name + strings.Repeat("0", 60), Driver: name, Scope: "local"}})
	}
	return n
}

// Add adds a container.
func (n *Node) Add(c *Container) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c.Exit = make(chan container.WaitResponse, 1)
	n.Containers[c.Name] = c
}

func (n *Node) find(ref string) (*Container, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.Containers {
		if c.Name == ref || strings.HasPrefix(c.ID, ref) {
			return c, nil
		}
	}
	return nil, api.Errorf(errdefs.ErrNotFound, "No such container: %s", ref)
}

// ContainerCreate refuses a name in use, as docker does.
func (n *Node) ContainerCreate(_ context.Context, name string, req container.CreateRequest, _ string) (container.CreateResponse, error) {
	if c, err := n.find(name); err == nil {
		return container.CreateResponse{}, api.Errorf(errdefs.ErrConflict,
			"Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+name, c.ID)
	}
	id := fmt.Sprintf("%064x", len(n.Containers)+1)
	if name == "" {
		name = "fake_" + id[60:]
	}
	n.Add(&Container{ID: id, Name: name, TTY: req.Tty})
	return container.CreateResponse{ID: id}, nil
}

// ContainerStart answers ErrNotModified for a running container.
func (n *Node) ContainerStart(_ context.Context, ref string) error {
	c, err := n.find(ref)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.Running {
		return dockerapi.ErrNotModified
	}
	c.Running = true
	return nil
}

// ContainerStop ends the container with status 0.
func (n *Node) ContainerStop(_ context.Context, ref string, _ dockerapi.StopOptions) error {
	c, err := n.find(ref)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if !c.Running {
		return dockerapi.ErrNotModified
	}
	c.Running = false
	c.Exit <- container.WaitResponse{StatusCode: 0}
	return nil
}

// ContainerRestart does nothing to a container that exists.
func (n *Node) ContainerRestart(_ context.Context, ref string, _ dockerapi.StopOptions) error {
	_, err := n.find(ref)
	return err
}

// ContainerKill ends the container with status 137.
func (n *Node) ContainerKill(_ context.Context, ref, _ string) error {
	c, err := n.find(ref)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if !c.Running {
		return api.Errorf(errdefs.ErrConflict, "cannot kill container: %s: container %s is not running", ref, c.ID)
	}
	c.Running = false
	c.Exit <- container.WaitResponse{StatusCode: 137}
	return nil
}

// ContainerPause does nothing to a container that exists.
func (n *Node) ContainerPause(_ context.Context, ref string) error {
	_, err := n.find(ref)
	return err
}

// ContainerUnpause does nothing to a container that exists.
func (n *Node) ContainerUnpause(_ context.Context, ref string) error {
	_, err := n.find(ref)
	return err
}

// ContainerRename renames.
func (n *Node) ContainerRename(_ context.Context, ref, name string) error {
	c, err := n.find(ref)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.Containers, c.Name)
	c.Name = name
	n.Containers[name] = c
	return nil
}

// ContainerRemove refuses a running container without force.
func (n *Node) ContainerRemove(_ context.Context, ref string, force, _ bool) error {
	c, err := n.find(ref)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.Running && !force {
		return api.Errorf(errdefs.ErrConflict, "cannot remove container %q: container is running: stop the container before removing or force remove", "/"+c.Name)
	}
	delete(n.Containers, c.Name)
	return nil
}

// ContainerInspect knows id, name, state and tty.
func (n *Node) ContainerInspect(_ context.Context, ref string, _ bool) (container.InspectResponse, error) {
	c, err := n.find(ref)
	if err != nil {
		return container.InspectResponse{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return container.InspectResponse{
		ID: c.ID, Name: "/" + c.Name, State: &container.State{Running: c.Running, Status: "running"},
		Config: &container.Config{Tty: c.TTY, OpenStdin: true, Image: "busybox"}, HostConfig: &container.HostConfig{},
	}, nil
}

// ContainerList lists all and remembers the filters.
func (n *Node) ContainerList(_ context.Context, o dockerapi.ListOptions) ([]container.Summary, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.Filters = o.Filters
	var out []container.Summary
	for _, c := range n.Containers {
		if c.Running || o.All {
			out = append(out, container.Summary{ID: c.ID, Names: []string{"/" + c.Name}, Image: "busybox", State: "running", Status: "Up 1 second"})
		}
	}
	return out, nil
}

// ContainerLogs emits the container's lines.
func (n *Node) ContainerLogs(ctx context.Context, ref string, o dockerapi.LogOptions, emit func(dockerapi.LogLine) error) error {
	c, err := n.find(ref)
	if err != nil {
		return err
	}
	lines := c.Lines
	if o.Tail >= 0 && int(o.Tail) < len(lines) {
		lines = lines[len(lines)-int(o.Tail):]
	}
	for _, l := range lines {
		if l.Stderr && !o.Stderr || !l.Stderr && !o.Stdout {
			continue
		}
		if err := emit(l); err != nil {
			return err
		}
	}
	if o.Follow {
		<-ctx.Done()
	}
	return nil
}

// ContainerWait yields when the container is stopped.
func (n *Node) ContainerWait(_ context.Context, ref string, _ container.WaitCondition) (<-chan container.WaitResponse, error) {
	c, err := n.find(ref)
	if err != nil {
		return nil, err
	}
	return c.Exit, nil
}

// ContainerAttach echoes the input until its end, then says "bye" on the error stream and ends the container.
func (n *Node) ContainerAttach(ctx context.Context, ref string, o dockerapi.AttachOptions, s dockerapi.Streams) error {
	if _, err := n.find(ref); err != nil {
		return err
	}
	o.Attached()
	if s.Stdin != nil && s.Stdout != nil {
		if _, err := io.Copy(s.Stdout, s.Stdin); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil { // the end of the input is not the end of the client
		return err
	}
	if s.Stderr != nil {
		if _, err := io.WriteString(s.Stderr, "bye\n"); err != nil {
			return err
		}
	}
	return n.ContainerStop(context.Background(), ref, dockerapi.StopOptions{})
}

// ContainerResize does nothing to a container that exists.
func (n *Node) ContainerResize(_ context.Context, ref string, _, _ uint16) error {
	_, err := n.find(ref)
	return err
}

// ContainerTop lists one process.
func (n *Node) ContainerTop(_ context.Context, ref string, _ []string) (container.TopResponse, error) {
	_, err := n.find(ref)
	return container.TopResponse{Titles: []string{"PID", "CMD"}, Processes: [][]string{{"1", "sleep"}}}, err
}

// ContainerPrune removes nothing.
func (n *Node) ContainerPrune(context.Context, dockerapi.Filters) (container.PruneReport, error) {
	return container.PruneReport{}, nil
}

// execution is an additional process; code is set when it was started.
type execution struct {
	container string
	req       container.ExecCreateRequest
	code      *int
}

// ExecCreate remembers the request.
func (n *Node) ExecCreate(_ context.Context, ref string, req container.ExecCreateRequest) (string, error) {
	c, err := n.find(ref)
	if err != nil {
		return "", err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	id := fmt.Sprintf("%064x", 0xe000+len(n.execs))
	n.execs[id] = &execution{container: c.ID, req: req}
	return id, nil
}

// ExecStart prints the command line, then echoes the input. The command "missing" fails.
func (n *Node) ExecStart(_ context.Context, id string, _ container.ExecStartRequest, s dockerapi.Streams) error {
	n.mu.Lock()
	x := n.execs[id]
	req, code := x.req, 0
	if req.Cmd[0] == "missing" {
		code = 127
	}
	x.code = &code
	n.mu.Unlock()
	if req.Cmd[0] == "missing" {
		return api.Errorf(errdefs.ErrInvalidArgument, "exec: %q: executable file not found in $PATH", req.Cmd[0])
	}
	if s.Stdout != nil {
		fmt.Fprintln(s.Stdout, strings.Join(req.Cmd, " "))
		if s.Stdin != nil {
			_, _ = io.Copy(s.Stdout, s.Stdin)
		}
	}
	return nil
}

// ExecInspect answers exit code 0, or 127 for the command "missing".
func (n *Node) ExecInspect(_ context.Context, id string) (container.ExecInspectResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	x, ok := n.execs[id]
	if !ok {
		return container.ExecInspectResponse{}, api.Errorf(errdefs.ErrNotFound, "No such exec instance: %s", id)
	}
	return container.ExecInspectResponse{ID: id, ContainerID: x.container, ExitCode: x.code, OpenStdin: x.req.AttachStdin, OpenStdout: x.req.AttachStdout,
		OpenStderr: x.req.AttachStderr}, nil
}

// ExecResize does nothing.
func (n *Node) ExecResize(context.Context, string, uint16, uint16) error { return nil }

// ImagePull emits one message, and fails as told.
func (n *Node) ImagePull(_ context.Context, ref string, auth *registry.AuthConfig, _ string, emit func(jsonstream.Message)) error {
	n.mu.Lock()
	n.Auth = auth
	n.mu.Unlock()
	emit(jsonstream.Message{Status: "Pulling " + ref})
	if n.PullErr != nil {
		return n.PullErr
	}
	if n.PullLate != nil {
		emit(jsonstream.Message{Status: "Downloading"})
	}
	return n.PullLate
}

// ImageList has one image.
func (n *Node) ImageList(context.Context, bool, dockerapi.Filters) ([]image.Summary, error) {
	return []image.Summary{{ID: Digest, RepoTags: []string{"busybox:latest"}, Created: 1, Size: 7}}, nil
}

// ImageInspect knows every reference but "missing".
func (n *Node) ImageInspect(_ context.Context, ref string) (image.InspectResponse, error) {
	if strings.Contains(ref, "missing") {
		return image.InspectResponse{}, api.Errorf(errdefs.ErrNotFound, "No such image: %s", ref)
	}
	return image.InspectResponse{ID: Digest, RepoTags: []string{ref}}, nil
}

// ImageHistory is empty.
func (n *Node) ImageHistory(context.Context, string) ([]image.HistoryResponseItem, error) {
	return nil, nil
}

// ImageTag accepts all.
func (n *Node) ImageTag(context.Context, string, string) error { return nil }

// ImageRemove says what it untagged.
func (n *Node) ImageRemove(_ context.Context, ref string, _ bool) ([]image.DeleteResponse, error) {
	return []image.DeleteResponse{{Untagged: ref}}, nil
}

// ImageLoad reads all and says how much.
func (n *Node) ImageLoad(_ context.Context, r io.Reader, emit func(jsonstream.Message)) error {
	size, err := io.Copy(io.Discard, r)
	emit(jsonstream.Message{Stream: fmt.Sprintf("Loaded %d bytes\n", size)})
	return err
}

// ImageSave writes the references; "missing" is not found.
func (n *Node) ImageSave(_ context.Context, refs []string, w io.Writer) error {
	if refs[0] == "missing" {
		return api.Errorf(errdefs.ErrNotFound, "No such image: %s", refs[0])
	}
	_, err := io.WriteString(w, strings.Join(refs, ","))
	return err
}

// ImagePrune removes nothing.
func (n *Node) ImagePrune(context.Context, dockerapi.Filters) (image.PruneReport, error) {
	return image.PruneReport{}, nil
}

// Distribution knows one digest.
func (n *Node) Distribution(_ context.Context, _ string, auth *registry.AuthConfig) (registry.DistributionInspect, error) {
	n.mu.Lock()
	n.Auth = auth
	n.mu.Unlock()
	var d registry.DistributionInspect
	d.Descriptor.Digest = Digest
	return d, nil
}

// NetworkList is Nets.
func (n *Node) NetworkList(context.Context) ([]network.Inspect, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]network.Inspect(nil), n.Nets...), nil
}

// NetworkCreate appends to Nets.
func (n *Node) NetworkCreate(_ context.Context, req network.CreateRequest) (network.CreateResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	id := fmt.Sprintf("%064x", len(n.Nets))
	n.Nets = append(n.Nets, network.Inspect{Network: network.Network{Name: req.Name, ID: id, Driver: "bridge", Scope: "local", Labels: req.Labels}})
	return network.CreateResponse{ID: id}, nil
}

// NetworkRemove refuses docker's own networks.
func (n *Node) NetworkRemove(_ context.Context, ref string) error {
	return api.Errorf(errdefs.ErrPermissionDenied, "%s is a pre-defined network and cannot be removed", ref)
}

// NetworkConnect does nothing.
func (n *Node) NetworkConnect(context.Context, string, network.ConnectRequest) error { return nil }

// NetworkDisconnect does nothing.
func (n *Node) NetworkDisconnect(context.Context, string, network.DisconnectRequest) error {
	return nil
}

// Info is short.
func (n *Node) Info(context.Context) (system.Info, error) {
	return system.Info{ID: "node", Name: "n1", NCPU: 2, OSType: "linux", Architecture: "x86_64", ServerVersion: "0.1"}, nil
}

// Version is short.
func (n *Node) Version(context.Context) (system.VersionResponse, error) {
	return system.VersionResponse{
		Platform: system.PlatformInfo{Name: "Skein"}, Version: "0.1", Os: "linux", Arch: "amd64",
		Components: []system.ComponentVersion{{Name: "Engine", Version: "0.1", Details: map[string]string{"ApiVersion": "?"}}},
	}, nil
}

// Events are EventsCh; up to a time that is over there was one, told as an engine tells it.
func (n *Node) Events(ctx context.Context, _, until time.Time, _ dockerapi.Filters) (<-chan events.Message, error) {
	if until.IsZero() {
		return n.EventsCh, nil
	}
	ch := make(chan events.Message)
	go func() {
		defer close(ch)
		select {
		case ch <- events.Message{Type: events.ContainerEventType, Action: events.ActionDie, Actor: events.Actor{ID: "past"}}:
		case <-ctx.Done():
		}
	}()
	return ch, nil
}
