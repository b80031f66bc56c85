package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"sync"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/images"
)

const (
	callTime  = 8 * time.Second // of one API call
	pollStep  = 50 * time.Millisecond
	ackLabel  = "chaos.ack" // its value tells which write was the last acknowledged one
	networkID = "back"
)

// service is what the run believes of a service.
type service struct {
	name     string
	port     uint32
	replicas int // wanted; the number of nodes for a global one
	global   bool
	order    swarm.UpdateOrder
	ack      int  // newest acknowledged value of ackLabel
	tried    int  // newest attempted one: it may or may not be there
	unsure   bool // a write whose outcome is unknown may have changed replicas
}

// world is a cluster under test.
type world struct {
	*dev.Cluster
	opts   options
	rand   *rand.Rand
	begun  time.Time
	images *http.Server
	repo   string // host:port
	dir    string // of built programs
	owned  bool   // whether dir is ours
	fault  string

	mu       sync.Mutex
	services map[string]*service
	down_    map[string]bool // nodes that are away on purpose
	version  map[string]string

	broken    int
	complains []string
	heals     map[string][]time.Duration
	writes    map[string][]time.Duration // fault to the first accepted write
	before    map[string]int             // pid of each container before a fault that may not restart any
}

func newWorld(ctx context.Context, o options) (*world, error) {
	w := &world{opts: o, rand: newRand(o.seed), begun: time.Now(), services: map[string]*service{}, down_: map[string]bool{}, version: map[string]string{},
		heals: map[string][]time.Duration{}, writes: map[string][]time.Duration{}}
	w.say("seed %d", o.seed)
	if err := w.build(ctx); err != nil {
		return nil, err
	}
	if err := dev.Down(o.name); err != nil { // of a run that was killed
		return nil, err
	}
	uctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var err error
	if w.Cluster, err = dev.Up(uctx, dev.Options{Name: o.name, Managers: o.managers, Workers: o.workers, Binary: filepath.Join(w.dir, "skein")}); err != nil {
		return nil, err
	}
	if err := errors.Join(w.serveImages(), w.deploy(ctx)); err != nil {
		w.down()
		return nil, err
	}
	w.say("%d nodes are up, services run", len(w.Nodes))
	return w, nil
}

// build compiles the programs; a given executable is used as it is.
func (w *world) build(ctx context.Context) error {
	var err error
	if w.dir, err = os.MkdirTemp("", "skein-chaos-"); err != nil {
		return err
	}
	programs := map[string][]string{
		"webapp-v1": {"-ldflags", "-s -w -X main.version=v1", "skein/cmd/demo/webapp"},
		"webapp-v2": {"-ldflags", "-s -w -X main.version=v2", "skein/cmd/demo/webapp"},
	}
	if w.opts.binary == "" {
		programs["skein"] = []string{"skein/cmd/skein"}
	} else if err := os.Symlink(w.opts.binary, filepath.Join(w.dir, "skein")); err != nil {
		return err
	}
	for out, args := range programs {
		cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-o", filepath.Join(w.dir, out)}, args...)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w: %s", out, err, msg)
		}
	}
	return nil
}

func (w *world) serveImages() (err error) {
	w.images, w.repo, err = images.Serve(w.HostAddr(),
		images.Program{Ref: "web:v1", Path: "/webapp", File: filepath.Join(w.dir, "webapp-v1")},
		images.Program{Ref: "web:v2", Path: "/webapp", File: filepath.Join(w.dir, "webapp-v2")})
	return err
}

func (w *world) image(v string) string { return w.repo + "/web:" + v }

// deploy creates the services every round looks at.
func (w *world) deploy(ctx context.Context) error {
	err := w.call(ctx, w.Nodes[0], func(ctx context.Context, api *client.Client) error {
		_, err := api.NetworkCreate(ctx, networkID, client.NetworkCreateOptions{Driver: "overlay"})
		return err
	})
	if err != nil {
		return err
	}
	for _, s := range []*service{
		{name: "web", port: 8080, replicas: 6, order: swarm.UpdateOrderStartFirst},
		{name: "sf", port: 8081, replicas: 4, order: swarm.UpdateOrderStopFirst},
		{name: "probe", port: 9090, replicas: len(w.Nodes), global: true, order: swarm.UpdateOrderStopFirst},
	} {
		if err := w.create(ctx, w.Nodes[0], s); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) spec(s *service) swarm.ServiceSpec {
	delay, parallel := time.Duration(0), uint64(2)
	if s.order == swarm.UpdateOrderStopFirst {
		parallel = 1
	}
	spec := swarm.ServiceSpec{
		Annotations: swarm.Annotations{Name: s.name, Labels: map[string]string{ackLabel: "0"}},
		TaskTemplate: swarm.TaskSpec{
			ContainerSpec: &swarm.ContainerSpec{Image: w.image("v1")}, RestartPolicy: &swarm.RestartPolicy{Delay: &delay},
			Networks: []swarm.NetworkAttachmentConfig{{Target: networkID}},
		},
		UpdateConfig: &swarm.UpdateConfig{Parallelism: parallel, Order: s.order, Monitor: time.Second, FailureAction: swarm.UpdateFailureActionContinue},
	}
	if s.port != 0 {
		spec.EndpointSpec = &swarm.EndpointSpec{Ports: []swarm.PortConfig{{Protocol: "tcp", TargetPort: 8080, PublishedPort: s.port, PublishMode: swarm.PortConfigPublishModeIngress}}}
	}
	if s.global {
		spec.Mode = swarm.ServiceMode{Global: &swarm.GlobalService{}}
	} else {
		n := uint64(s.replicas)
		spec.Mode = swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &n}}
	}
	return spec
}

// create makes a service and remembers it once it is acknowledged.
func (w *world) create(ctx context.Context, at *dev.Node, s *service) error {
	err := w.call(ctx, at, func(ctx context.Context, api *client.Client) error {
		_, err := api.ServiceCreate(ctx, client.ServiceCreateOptions{Spec: w.spec(s)})
		return err
	})
	if err == nil {
		w.mu.Lock()
		w.services[s.name] = s
		w.mu.Unlock()
	}
	return err
}

// update changes a service: one attempt, with the next value of its label. What was acknowledged must be there ever after.
func (w *world) update(ctx context.Context, at *dev.Node, name string, change func(*swarm.ServiceSpec)) error {
	s := w.services[name]
	return w.call(ctx, at, func(ctx context.Context, api *client.Client) error {
		in, err := api.ServiceInspect(ctx, name, client.ServiceInspectOptions{})
		if err != nil {
			return err
		}
		w.mu.Lock()
		s.tried++
		mark := s.tried
		w.mu.Unlock()
		spec := in.Service.Spec
		spec.Labels = map[string]string{ackLabel: fmt.Sprint(mark)}
		if change != nil {
			change(&spec)
		}
		if _, err = api.ServiceUpdate(ctx, in.Service.ID, client.ServiceUpdateOptions{Version: in.Service.Version, Spec: spec}); err != nil {
			return err
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		s.ack = max(s.ack, mark)
		return nil
	})
}

// persist repeats an update until it is accepted by one of the living managers.
func (w *world) persist(ctx context.Context, limit time.Duration, name string, change func(*swarm.ServiceSpec)) (time.Duration, error) {
	begun := time.Now()
	var last error
	for time.Since(begun) < limit && ctx.Err() == nil {
		for _, n := range w.managers() {
			cctx, cancel := context.WithTimeout(ctx, time.Second)
			last = w.update(cctx, n, name, change)
			cancel()
			if last == nil {
				return time.Since(begun), nil
			}
		}
		time.Sleep(pollStep)
	}
	return 0, fmt.Errorf("no manager took a write within %v: %w", limit, last)
}

// call speaks to a node's API.
func (w *world) call(ctx context.Context, n *dev.Node, f func(context.Context, *client.Client) error) error {
	api, err := n.Client()
	if err != nil {
		return err
	}
	defer api.Close()
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	return f(ctx, api)
}

// managers are those that are not away.
func (w *world) managers() []*dev.Node {
	var out []*dev.Node
	for _, n := range w.living() {
		if n.Role == "manager" {
			out = append(out, n)
		}
	}
	return out
}

func (w *world) living() []*dev.Node {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*dev.Node
	for _, n := range w.Nodes {
		if !w.down_[n.Name] {
			out = append(out, n)
		}
	}
	return out
}

func (w *world) away(n *dev.Node, away bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down_[n.Name] = away
}

// leader asks around who leads.
func (w *world) leader(ctx context.Context) (*dev.Node, error) {
	last := errors.New("nobody leads")
	for begun := time.Now(); time.Since(begun) < 10*time.Second; time.Sleep(pollStep) {
		for _, n := range w.managers() {
			var lead *dev.Node
			last = w.call(ctx, n, func(ctx context.Context, api *client.Client) error {
				res, err := api.NodeList(ctx, client.NodeListOptions{})
				for _, x := range res.Items {
					if x.ManagerStatus != nil && x.ManagerStatus.Leader {
						lead = w.byHost(x.Description.Hostname)
					}
				}
				return err
			})
			if last == nil && lead != nil {
				return lead, nil
			}
		}
	}
	return nil, fmt.Errorf("look for the leader: %w", last)
}

func (w *world) byHost(host string) *dev.Node {
	for _, n := range w.Nodes {
		if host == w.Name+"-"+n.Name {
			return n
		}
	}
	return nil
}

func (w *world) say(format string, args ...any) {
	fmt.Printf("%7.1f "+format+"\n", append([]any{time.Since(w.begun).Seconds()}, args...)...)
}

// violate notes a broken promise.
func (w *world) violate(format string, args ...any) {
	w.broken++
	msg := fmt.Sprintf(format, args...)
	w.complains = append(w.complains, msg)
	w.say("BROKEN: %s", msg)
}

// down removes everything and looks for leftovers.
func (w *world) down() {
	if w.images != nil {
		_ = w.images.Close()
	}
	if err := dev.Down(w.opts.name); err != nil {
		w.violate("take the cluster down: %v", err)
	}
	for _, x := range dev.Leftovers(w.opts.name) {
		w.violate("left behind: %s", x)
	}
	_ = os.RemoveAll(w.dir)
}

func (w *world) summary() {
	for _, table := range []struct {
		what string
		of   map[string][]time.Duration
	}{{"whole again after", w.heals}, {"first write after", w.writes}} {
		var names []string
		for n := range table.of {
			names = append(names, n)
		}
		sort.Strings(names)
		for _, n := range names {
			list := table.of[n]
			sort.Slice(list, func(i, j int) bool { return list[i] < list[j] })
			w.say("%s %-20s n=%d median %v max %v", table.what, n, len(list), list[len(list)/2].Round(10*time.Millisecond), list[len(list)-1].Round(10*time.Millisecond))
		}
	}
	w.say("%d promises broken (seed %d)", w.broken, w.opts.seed)
	for _, c := range w.complains {
		fmt.Println("  -", c)
	}
}
