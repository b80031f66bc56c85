package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/flow/load"
	"skein/test/images"
)

const (
	callTime   = 10 * time.Second // of one API call
	pollStep   = 100 * time.Millisecond
	settledFor = 700 * time.Millisecond
	settleTime = 4 * time.Minute // of one operation: streams are waited for, two tasks at a time
	network    = "back"
)

// The services: ports that they are published at.
const (
	graceful, gracefulPort = "web", 8080
	abrupt, abruptPort     = "abrupt", 8081
	asker                  = "ask"
)

// world is a cluster under test.
type world struct {
	*dev.Cluster
	opts    options
	rand    *rand.Rand
	begun   time.Time
	dir     string // of built programs
	images  *http.Server
	reports *http.Server
	report  string // URL for reports
	repo    string // host:port
	tally   *tally
	version map[string]string // of each service
	want    map[string]int    // replicas of each service
	six     *bool             // whether there are clients of IPv6
}

func newWorld(ctx context.Context, o options) (w *world, err error) {
	w = &world{opts: o, rand: rand.New(rand.NewPCG(o.seed, 0xf10)), begun: time.Now(), version: map[string]string{}, want: map[string]int{}}
	w.tally = newTally(w.say, o.verbose)
	w.say("seed %d", o.seed)
	if w.dir, err = os.MkdirTemp("", "skein-flow-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.down()
		}
	}()
	if o.binary, err = images.BuildAll(ctx, w.dir, o.binary, map[string]string{"app": "skein/test/flow/app"}); err != nil {
		return nil, err
	}
	if err := dev.Down(o.name); err != nil {
		return nil, err
	}
	uctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if w.Cluster, err = dev.Up(uctx, dev.Options{Name: o.name, Managers: o.managers, Workers: o.workers, Binary: o.binary}); err != nil {
		return nil, err
	}
	if err := errors.Join(w.serveImages(), w.listen(), w.deploy(ctx)); err != nil {
		return nil, err
	}
	w.say("%d nodes are up, services run", len(w.Nodes))
	return w, nil
}

func (w *world) serveImages() (err error) {
	file := filepath.Join(w.dir, "app")
	var programs []images.Program
	for _, v := range []string{"v1", "v2"} {
		programs = append(programs, images.Program{Ref: "app:" + v, Path: "/app", File: file, Env: []string{"VERSION=" + v}})
	}
	w.images, w.repo, err = images.Serve(w.HostAddr(), programs...)
	return err
}

// listen takes reports of clients inside the cluster.
func (w *world) listen() error {
	l, err := net.Listen("tcp", net.JoinHostPort(w.HostAddr().String(), "0"))
	if err != nil {
		return err
	}
	w.report = "http://" + l.Addr().String()
	w.reports = &http.Server{Handler: http.HandlerFunc(w.tally.report), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = w.reports.Serve(l) }() // ends with the server's Close
	return nil
}

// deploy creates the services.
func (w *world) deploy(ctx context.Context) error {
	err := w.call(ctx, func(ctx context.Context, api *client.Client) error {
		_, err := api.NetworkCreate(ctx, network, client.NetworkCreateOptions{Driver: "overlay"})
		return err
	})
	if err != nil {
		return err
	}
	if w.opts.pace > 0 {
		return errors.Join(w.create(ctx, w.spec(abrupt, abruptPort, 10)), w.settled(ctx))
	}
	if err := errors.Join(w.create(ctx, w.spec(graceful, gracefulPort, w.opts.replicas)), w.create(ctx, w.spec(abrupt, abruptPort, w.opts.replicas))); err != nil {
		return err
	}
	if err := w.settled(ctx); err != nil {
		return err
	}
	s := w.spec(asker, 0, 2)
	s.TaskTemplate.ContainerSpec.Args = []string{"ask"}
	s.TaskTemplate.ContainerSpec.Healthcheck = nil
	s.TaskTemplate.ContainerSpec.Env = []string{"TARGETS=" + graceful + ":8080," + abrupt + ":8080", "REPORT=" + w.report, "STREAM=" + w.opts.stream.String()}
	longest := w.opts.stream + 30*time.Second
	s.TaskTemplate.ContainerSpec.StopGracePeriod = &longest // its streams end first
	return errors.Join(w.create(ctx, s), w.settled(ctx))
}

func (w *world) spec(name string, port uint32, replicas int) swarm.ServiceSpec {
	delay, n := time.Duration(0), uint64(replicas)
	s := swarm.ServiceSpec{
		Annotations: swarm.Annotations{Name: name},
		TaskTemplate: swarm.TaskSpec{
			ContainerSpec: &swarm.ContainerSpec{Image: w.repo + "/app:v1", Args: []string{"serve"}, Healthcheck: &container.HealthConfig{
				Test: []string{"CMD", "/app", "probe"}, Interval: 2 * time.Second, Timeout: 5 * time.Second, Retries: 2, StartPeriod: 20 * time.Second, StartInterval: 200 * time.Millisecond,
			}},
			RestartPolicy: &swarm.RestartPolicy{Delay: &delay},
			Networks:      []swarm.NetworkAttachmentConfig{{Target: network}},
		},
		Mode:           swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &n}},
		UpdateConfig:   &swarm.UpdateConfig{Parallelism: 2, Order: swarm.UpdateOrderStartFirst, Monitor: time.Second},
		RollbackConfig: &swarm.UpdateConfig{Parallelism: 2, Order: swarm.UpdateOrderStartFirst, Monitor: time.Second},
	}
	if w.opts.drain > 0 {
		s.Labels = map[string]string{"skein.drain.timeout": w.opts.drain.String()}
	}
	if name == abrupt {
		s.TaskTemplate.ContainerSpec.Env = []string{"ABRUPT=1"}
		s.TaskTemplate.ContainerSpec.Healthcheck = nil // ready is who listens
	}
	if port != 0 {
		s.EndpointSpec = &swarm.EndpointSpec{Ports: []swarm.PortConfig{{Protocol: "tcp", TargetPort: 8080, PublishedPort: port, PublishMode: swarm.PortConfigPublishModeIngress}}}
	}
	return s
}

func (w *world) create(ctx context.Context, s swarm.ServiceSpec) error {
	w.version[s.Name], w.want[s.Name] = "v1", int(*s.Mode.Replicated.Replicas)
	return w.call(ctx, func(ctx context.Context, api *client.Client) error {
		_, err := api.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: s})
		return err
	})
}

// startLoad has clients of every kind ask both services through every node.
func (w *world) startLoad() *load.Load {
	var targets []string
	for _, n := range w.Nodes {
		for _, p := range []int{gracefulPort, abruptPort} {
			targets = append(targets, fmt.Sprintf("%s:%d", n.Address, p), netip.AddrPortFrom(w.Addr6(n), uint16(p)).String())
		}
	}
	targets = slices.DeleteFunc(targets, func(at string) bool { return strings.HasPrefix(at, "[") && !w.sixes() })
	return load.Start(load.Config{From: "outside", Targets: targets, Pause: w.opts.pause, Stream: w.opts.stream, Failed: w.tally.note,
		Clients: map[string]int{load.KeepAlive: 1, load.Fresh: 1, load.Stream: 1}})
}

// sixes reports whether this machine has IPv6: an answer comes through a node.
func (w *world) sixes() bool {
	if w.six == nil {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(w.Addr6(w.Nodes[0]), gracefulPort).String(), 5*time.Second)
		if err == nil {
			c.Close()
		} else {
			w.say("no clients of IPv6: %v", err)
		}
		six := err == nil
		w.six = &six
	}
	return *w.six
}

// call speaks to the API of a manager; one that does not answer is left out for the next.
func (w *world) call(ctx context.Context, f func(context.Context, *client.Client) error) error {
	last := errors.New("no manager lives")
	for begun := time.Now(); time.Since(begun) < callTime && ctx.Err() == nil; sleep(ctx, pollStep) {
		for _, n := range w.Nodes {
			if n.Role != "manager" || n.PID == 0 {
				continue
			}
			api, err := n.Client()
			if err != nil {
				return err
			}
			cctx, cancel := context.WithTimeout(ctx, callTime)
			last = f(cctx, api)
			cancel()
			api.Close()
			if last == nil || (!client.IsErrConnectionFailed(last) && !strings.Contains(last.Error(), "leader") && !strings.Contains(last.Error(), "out of sequence")) {
				return last
			}
		}
	}
	return last
}

// update changes a service.
func (w *world) update(ctx context.Context, name string, change func(*swarm.ServiceSpec)) error {
	return w.call(ctx, func(ctx context.Context, api *client.Client) error {
		in, err := api.ServiceInspect(ctx, name, client.ServiceInspectOptions{})
		if err != nil {
			return err
		}
		spec := in.Service.Spec
		change(&spec)
		_, err = api.ServiceUpdate(ctx, in.Service.ID, client.ServiceUpdateOptions{Version: in.Service.Version, Spec: spec})
		return err
	})
}

// settled waits until every service runs as wanted, and nothing else does, for a while: the cluster may not have begun yet.
func (w *world) settled(ctx context.Context) error {
	var last error
	var since time.Time
	for begun := time.Now(); time.Since(begun) < settleTime && ctx.Err() == nil; sleep(ctx, pollStep) {
		if last = w.unsettled(ctx); last != nil {
			since = time.Time{}
		} else if since.IsZero() {
			since = time.Now()
		} else if time.Since(since) >= settledFor {
			return nil
		}
	}
	return fmt.Errorf("not settled after %v: %w", settleTime, last)
}

func (w *world) unsettled(ctx context.Context) error {
	return w.call(ctx, func(ctx context.Context, api *client.Client) error {
		tasks, err := api.TaskList(ctx, client.TaskListOptions{})
		if err != nil {
			return err
		}
		nodes, err := api.NodeList(ctx, client.NodeListOptions{})
		if err != nil {
			return err
		}
		drained := map[string]bool{}
		for _, n := range nodes.Items {
			drained[n.ID] = n.Spec.Availability == swarm.NodeAvailabilityDrain
			if n.Status.State != swarm.NodeStateReady {
				return fmt.Errorf("node %s is %s", n.Description.Hostname, n.Status.State)
			}
		}
		services, err := api.ServiceList(ctx, client.ServiceListOptions{})
		if err != nil {
			return err
		}
		specs := map[string]swarm.ServiceSpec{}
		for _, s := range services.Items {
			specs[s.ID] = s.Spec
		}
		run := map[string]int{}
		for _, t := range tasks.Items {
			live := t.Status.State == swarm.TaskStateRunning
			switch {
			case live && drained[t.NodeID]:
				return fmt.Errorf("task %s of %s runs on a drained node", t.ID, t.ServiceID)
			case live && t.DesiredState == swarm.TaskStateRunning && differs(t.Spec, specs[t.ServiceID].TaskTemplate):
				return fmt.Errorf("task %s of %s is of an old revision", t.ID, t.ServiceID)
			case t.DesiredState == swarm.TaskStateRunning && live:
				run[t.ServiceID]++
			case t.DesiredState == swarm.TaskStateRunning:
				return fmt.Errorf("task %s of %s shall run and is %s (%s)", t.ID, t.ServiceID, t.Status.State, t.Status.Err)
			case live:
				return fmt.Errorf("task %s of %s shall be %s and runs", t.ID, t.ServiceID, t.DesiredState)
			}
		}
		for _, s := range services.Items {
			if n := run[s.ID]; n != w.want[s.Spec.Name] {
				return fmt.Errorf("%d of %d tasks of %s run", n, w.want[s.Spec.Name], s.Spec.Name)
			}
			if u := s.UpdateStatus; u != nil && slices.Contains([]swarm.UpdateState{swarm.UpdateStateUpdating, swarm.UpdateStateRollbackStarted}, u.State) {
				return fmt.Errorf("the update of %s is %s: %s", s.Spec.Name, u.State, u.Message)
			}
		}
		return nil
	})
}

// differs reports whether a task has still to be replaced.
func differs(t, s swarm.TaskSpec) bool {
	return t.ContainerSpec == nil || s.ContainerSpec == nil || t.ContainerSpec.Image != s.ContainerSpec.Image || t.ForceUpdate != s.ForceUpdate
}

func (w *world) say(format string, args ...any) {
	fmt.Printf("%7.1f "+format+"\n", append([]any{time.Since(w.begun).Seconds()}, args...)...)
}

// down removes everything and looks for leftovers.
func (w *world) down() {
	for _, s := range []*http.Server{w.images, w.reports} {
		if s != nil {
			_ = s.Close()
		}
	}
	if err := dev.Down(w.opts.name); err != nil {
		w.tally.violate(w, "take the cluster down: %v", err)
	}
	for _, x := range dev.Leftovers(w.opts.name) {
		w.tally.violate(w, "left behind: %s", x)
	}
	_ = os.RemoveAll(w.dir)
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
