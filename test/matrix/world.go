package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/overlay/link"
	"skein/test/images"
)

const (
	upTime   = 2 * time.Minute
	pollStep = 100 * time.Millisecond
	dataPort = 80 // inside the tasks; control is another, so that questions on what a task sees do not go the way that is measured
	control  = 81

	spreadPort  = 8100 // of the service with a task on each node
	secondPort  = 8200 // the same service's other target
	hostPort    = 8300 // host mode: on the task's own node only
	pinnedPort  = 8000 // + number of the node that the task is on
	controlPort = 9000 // + number of the node: control of the pinned task
)

type options struct {
	name, binary             string
	ipv6                     bool
	nodes, requests, clients int
}

// world is a cluster with services whose tasks lie where the matrix wants them.
type world struct {
	*dev.Cluster
	opts   options
	dir    string
	api    *client.Client
	images *http.Server
	image  string
	spaces []*link.NS // of the nodes
	say    func(string, ...any)
}

func newWorld(ctx context.Context, o options, say func(string, ...any)) (w *world, err error) {
	w = &world{opts: o, say: say}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.down())
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, upTime)
	defer cancel()
	if err := w.build(ctx); err != nil {
		return w, err
	}
	if err := dev.Down(o.name); err != nil { // of a run that was killed
		return w, err
	}
	if w.Cluster, err = dev.Up(ctx, dev.Options{Name: o.name, Managers: 1, Workers: o.nodes - 1, Binary: w.opts.binary, IPv6: w.opts.ipv6}); err != nil {
		return w, err
	}
	for _, n := range w.Nodes {
		ns, err := link.OpenNS(filepath.Join("/run/netns", n.Namespace))
		if err != nil {
			return w, err
		}
		w.spaces = append(w.spaces, ns)
	}
	if w.api, err = w.Nodes[0].Client(); err != nil {
		return w, err
	}
	var repo string
	w.images, repo, err = images.Serve(w.HostAddr(), images.Program{Ref: "inside:v1", Path: "/inside", File: filepath.Join(w.dir, "inside")})
	if err != nil {
		return w, err
	}
	w.image = repo + "/inside:v1"
	return w, w.deploy(ctx)
}

// build compiles the programs; a given executable is used as it is.
func (w *world) build(ctx context.Context) (err error) {
	if w.dir, err = os.MkdirTemp("", "skein-matrix-"); err != nil {
		return err
	}
	w.opts.binary, err = images.BuildAll(ctx, w.dir, w.opts.binary, map[string]string{"inside": "skein/test/matrix/inside"})
	return err
}

// deploy makes the services and waits until all tasks run.
func (w *world) deploy(ctx context.Context) error {
	if _, err := w.api.NetworkCreate(ctx, "matrix", client.NetworkCreateOptions{Driver: "overlay"}); err != nil {
		return err
	}
	both := func(published, target uint32, mode swarm.PortConfigPublishMode) []swarm.PortConfig {
		var out []swarm.PortConfig
		for _, proto := range []string{"tcp", "udp"} {
			out = append(out, swarm.PortConfig{Protocol: network.IPProtocol(proto), TargetPort: target, PublishedPort: published, PublishMode: mode})
		}
		return out
	}
	const ingress, host = swarm.PortConfigPublishModeIngress, swarm.PortConfigPublishModeHost
	specs := []swarm.ServiceSpec{w.spec("spread", "", append(both(spreadPort, dataPort, ingress), both(secondPort, control, ingress)...))}
	for i, n := range w.Nodes {
		at := uint32(i + 1)
		name := "on-" + n.Name
		specs = append(specs, w.spec(name, w.opts.name+"-"+n.Name, append(both(pinnedPort+at, dataPort, ingress), both(controlPort+at, control, ingress)...)))
	}
	specs = append(specs, w.spec("hostmode", w.opts.name+"-"+w.Nodes[len(w.Nodes)-1].Name, both(hostPort, dataPort, host)))
	for _, s := range specs {
		if _, err := w.api.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: s}); err != nil {
			return fmt.Errorf("service %s: %w", s.Name, err)
		}
	}
	return w.awaitTasks(ctx, len(specs)-1+len(w.Nodes))
}

// spec is a service with one task on the node, or without one on each.
func (w *world) spec(name, node string, ports []swarm.PortConfig) swarm.ServiceSpec {
	s := swarm.ServiceSpec{
		Annotations: swarm.Annotations{Name: name},
		TaskTemplate: swarm.TaskSpec{
			ContainerSpec: &swarm.ContainerSpec{Image: w.image, Args: []string{strconv.Itoa(dataPort), strconv.Itoa(control)}},
			Networks:      []swarm.NetworkAttachmentConfig{{Target: "matrix"}},
		},
		EndpointSpec: &swarm.EndpointSpec{Ports: ports},
	}
	if node == "" {
		s.Mode.Global = &swarm.GlobalService{}
		return s
	}
	one := uint64(1)
	s.Mode.Replicated = &swarm.ReplicatedService{Replicas: &one}
	s.TaskTemplate.Placement = &swarm.Placement{Constraints: []string{"node.hostname==" + node}}
	return s
}

func (w *world) awaitTasks(ctx context.Context, want int) error {
	tick := time.NewTicker(pollStep)
	defer tick.Stop()
	for {
		res, err := w.api.TaskList(ctx, client.TaskListOptions{})
		if err != nil {
			return err
		}
		running, last := 0, ""
		for _, t := range res.Items {
			if t.Status.State == swarm.TaskStateRunning {
				running++
			} else if t.Status.Err != "" {
				last = t.Status.Err
			}
		}
		if running == want {
			return w.awaitPorts(ctx)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d tasks run (last reason %q): %w", running, want, last, ctx.Err())
		case <-tick.C:
		}
	}
}

// awaitPorts returns when every node answers on every port: its tables have arrived.
func (w *world) awaitPorts(ctx context.Context) error {
	tick := time.NewTicker(pollStep)
	defer tick.Stop()
	for {
		var missing error
		for _, s := range w.services() {
			for entry := range w.Nodes {
				if _, err := w.ask(outside, "tcp6", w.address("tcp6", entry, s.port)); err != nil && s.entry(entry) {
					missing = fmt.Errorf("port %d through %s: %w", s.port, w.Nodes[entry].Name, err)
				}
			}
		}
		if missing == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return missing
		case <-tick.C:
		}
	}
}

// down removes everything and tells what is left.
func (w *world) down() error {
	if w.api != nil {
		_ = w.api.Close()
	}
	if w.images != nil {
		_ = w.images.Close()
	}
	for _, ns := range w.spaces {
		_ = ns.Close()
	}
	err := errors.Join(dev.Down(w.opts.name), os.RemoveAll(w.dir))
	for _, x := range dev.Leftovers(w.opts.name) {
		err = errors.Join(err, fmt.Errorf("left behind: %s", x))
	}
	return err
}
