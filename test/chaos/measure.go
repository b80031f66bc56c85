package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/nemesis"
)

const (
	figurePause = 10 * time.Millisecond // between looks
	calmWait    = 40 * time.Second      // for everything to be ready between two rounds
	writeWait   = 20 * time.Second      // for the first write
	tasksEach   = 6                     // of each of the two services
	onWorkers   = "onworkers"
	onManagers  = "onmanagers"
)

// measureOptions of `chaos measure`.
type measureOptions struct {
	name     string
	binary   string
	managers int
	workers  int
	parts    string
	rounds   int
	minutes  float64
	percent  int
}

// measurement is one part: what it measures and what is promised.
type measurement struct {
	name     string
	about    string
	p50, p99 time.Duration // bars; 0: none
	round    func(context.Context, *figures) (time.Duration, error)
}

var measurements = []measurement{
	{"leader-kill", "SIGKILL of the leader's daemon to the first accepted write", 2 * time.Second, failoverTime, leaderLost(nemesis.Kill)},
	{"leader-stop", "SIGSTOP of the leader's daemon to the first accepted write", 2 * time.Second, failoverTime, leaderLost(nemesis.Stop)},
	{"leader-cut", "the leader is cut off to the first accepted write", 2 * time.Second, failoverTime, leaderLost(nemesis.Cut)},
	{"worker-kill", "SIGKILL of everything of a worker to its tasks running elsewhere", 0, 6 * time.Second, workerLost(true)},
	{"worker-cut", "a worker is cut off to its tasks running elsewhere", 0, 6 * time.Second, workerLost(false)},
	{"leader-node", "SIGKILL of everything of the leader's node to its tasks running elsewhere", 0, 10 * time.Second, leaderNodeLost},
	{"heal", "the link of a node that was down is healed to the node being ready", 0, 3 * time.Second, healed},
}

// figures is a run of measurements.
type figures struct {
	*nemesis.Rig
	x      *nemesis.Nemesis
	n      int // writes so far
	back   []time.Duration
	broken int
}

// measure is `chaos measure`: it prints a table and returns how many bars were missed.
func measure(ctx context.Context, args []string) (int, error) {
	o := measureOptions{}
	fs := flag.NewFlagSet("chaos measure", flag.ExitOnError)
	fs.StringVar(&o.name, "name", "chm", "name of the development cluster")
	fs.StringVar(&o.binary, "binary", "", "the skein executable (default: build it)")
	fs.IntVar(&o.managers, "managers", 3, "number of managers")
	fs.IntVar(&o.workers, "workers", 3, "number of workers")
	fs.StringVar(&o.parts, "parts", "", "what to measure, separated by commas, \"load\" for the run under load (default: all)")
	fs.IntVar(&o.rounds, "n", 20, "rounds of each part")
	fs.Float64Var(&o.minutes, "minutes", 10, "length of the run under load")
	fs.IntVar(&o.percent, "load", 80, "share of the processors that the run under load keeps busy")
	_ = fs.Parse(args) // exits
	disk := 0
	if o.parts == "" || strings.Contains(o.parts, "disk") {
		disk = smallDisk
	}
	rig, err := nemesis.NewRig(ctx, nemesis.Options{Name: o.name, Managers: o.managers, Workers: o.workers, Binary: o.binary, DiskMiB: disk})
	if err != nil {
		return 0, err
	}
	f := &figures{Rig: rig, x: nemesis.New(rig)}
	err = f.all(ctx, o)
	return f.broken, errors.Join(err, rig.Close())
}

func (f *figures) all(ctx context.Context, o measureOptions) error {
	if err := f.deploy(ctx, o.workers > 0); err != nil {
		return err
	}
	asked := func(name string) bool { return o.parts == "" || slices.Contains(strings.Split(o.parts, ","), name) }
	for _, m := range append(slices.Clone(measurements), diskMeasurements...) {
		if !asked(m.name) || (o.workers == 0 && strings.HasPrefix(m.name, "worker")) {
			continue
		}
		if err := f.part(ctx, m, o.rounds); err != nil {
			return err
		}
	}
	if asked("load") {
		return f.underLoad(ctx, o)
	}
	return nil
}

// deploy makes a service on the workers and one on the managers; without workers there is only the latter.
func (f *figures) deploy(ctx context.Context, workers bool) error {
	for name, role := range map[string]string{onWorkers: "worker", onManagers: "manager"} {
		if role == "worker" && !workers {
			continue
		}
		n, delay := uint64(tasksEach), time.Duration(0)
		_, err := f.Client(f.Nodes[0]).ServiceCreate(ctx, client.ServiceCreateOptions{Spec: swarm.ServiceSpec{
			Annotations: swarm.Annotations{Name: name},
			TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{Image: f.Image}, RestartPolicy: &swarm.RestartPolicy{Delay: &delay},
				Placement: &swarm.Placement{Constraints: []string{"node.role==" + role}}},
			Mode: swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &n}},
		}})
		if err != nil {
			return err
		}
	}
	return nil
}

// part runs the rounds of one measurement and prints its row.
func (f *figures) part(ctx context.Context, m measurement, rounds int) error {
	f.Say("%s: %s", m.name, m.about)
	var took []time.Duration
	busy := newBusy()
	f.back = nil
	for i := 0; i < rounds && ctx.Err() == nil; i++ {
		if err := f.calm(ctx); err != nil {
			return fmt.Errorf("%s, round %d: %w", m.name, i+1, err)
		}
		nemesis.Sleep(ctx, time.Duration(i%10)*97*time.Millisecond) // heartbeats and rounds do not march in step
		d, err := m.round(ctx, f)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			f.broken++
			f.Say("  BROKEN: round %d: %v", i+1, err)
			continue
		}
		took = append(took, d)
		if d > m.p99 {
			f.Say("  round %d took %v", i+1, d.Round(time.Millisecond))
		}
	}
	f.row(m.name, took, m.p50, m.p99, busy)
	if len(f.back) > 0 {
		f.row(m.name+", node ready again", f.back, 0, 0, busy)
	}
	return nil
}

func (f *figures) row(name string, took []time.Duration, p50, p99 time.Duration, b *busy) {
	if len(took) == 0 {
		return
	}
	slices.Sort(took)
	at := func(p int) time.Duration { return took[min(len(took)-1, len(took)*p/100)] }
	missed := ""
	if (p50 > 0 && at(50) > p50) || (p99 > 0 && at(99) > p99) {
		missed = fmt.Sprintf(" MISSED: want p50 %v, p99 %v", p50, p99)
		f.broken++
	}
	f.Say("%-28s n=%d min %v p50 %v p90 %v p99 %v max %v; %s%s", name, len(took), ms(took[0]), ms(at(50)), ms(at(90)), ms(at(99)), ms(took[len(took)-1]), b, missed)
}

func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// calm waits until every node is ready, every manager reachable and every task running.
func (f *figures) calm(ctx context.Context) error {
	last := errors.New("not looked at")
	quiet := 0
	for begun := time.Now(); time.Since(begun) < calmWait && ctx.Err() == nil; nemesis.Sleep(ctx, 10*figurePause) {
		if last = f.ready(ctx); last != nil {
			quiet = 0
		} else if quiet++; quiet > 8 {
			return nil
		}
	}
	return fmt.Errorf("the cluster is not calm within %v: %w", calmWait, last)
}

func (f *figures) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	for _, m := range f.Managers() {
		res, err := f.Client(m).NodeList(ctx, client.NodeListOptions{})
		if err != nil {
			return err
		}
		for _, n := range res.Items {
			if n.Status.State != swarm.NodeStateReady || (n.ManagerStatus != nil && n.ManagerStatus.Reachability != swarm.ReachabilityReachable) {
				return fmt.Errorf("%s is %s", n.Description.Hostname, n.Status.State)
			}
		}
	}
	n, _, err := f.running(ctx, f.Managers()[0], "")
	if want := f.wanted(); err == nil && n != want {
		err = fmt.Errorf("%d tasks run, want %d", n, want)
	}
	return err
}

func (f *figures) wanted() int {
	if len(f.Managers()) == len(f.Nodes) {
		return tasksEach
	}
	return 2 * tasksEach
}

// running counts the tasks that run as wanted, besides those of one node, and those.
func (f *figures) running(ctx context.Context, at *dev.Node, node string) (elsewhere, there int, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	res, err := f.Client(at).TaskList(ctx, client.TaskListOptions{Filters: make(client.Filters).Add("desired-state", "running")})
	for _, t := range res.Items {
		if t.Status.State == swarm.TaskStateRunning && t.DesiredState == swarm.TaskStateRunning {
			if t.NodeID == node {
				there++
			} else {
				elsewhere++
			}
		}
	}
	return elsewhere, there, err
}

// leaderLost breaks the leader and writes at all other managers until one of them takes it.
func leaderLost(kind nemesis.Kind) func(context.Context, *figures) (time.Duration, error) {
	return func(ctx context.Context, f *figures) (time.Duration, error) {
		lead, err := f.Leader(ctx, 5*time.Second)
		if err != nil {
			return 0, err
		}
		begun := time.Now()
		undo, err := f.x.Break(ctx, lead, nemesis.Step{Kind: kind})
		if err != nil {
			return 0, err
		}
		took, err := f.firstWrite(ctx, lead, begun)
		return took, errors.Join(err, undo())
	}
}

// firstWrite returns the time from begun to the first write that a manager other than lost acknowledges.
func (f *figures) firstWrite(ctx context.Context, lost *dev.Node, begun time.Time) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, writeWait)
	defer cancel()
	f.n++
	var wg sync.WaitGroup
	var mu sync.Mutex
	var took time.Duration
	var made []string
	for _, m := range f.Managers() {
		if m == lost {
			continue
		}
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				name := fmt.Sprintf("w%d-%s-%d", f.n, m.Name, i)
				_, err := f.Client(m).ConfigCreate(ctx, client.ConfigCreateOptions{Spec: swarm.ConfigSpec{Annotations: swarm.Annotations{Name: name}, Data: []byte("x")}})
				mu.Lock()
				made = append(made, name)
				if err == nil && took == 0 {
					took = time.Since(begun)
					cancel()
				}
				mu.Unlock()
				nemesis.Sleep(ctx, figurePause)
			}
		})
	}
	wg.Wait()
	f.forget(made)
	if took == 0 {
		return 0, fmt.Errorf("no manager took a write within %v", writeWait)
	}
	return took, nil
}

// forget removes what was written, as far as it is there.
func (f *figures) forget(names []string) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	for _, m := range f.Managers()[:1] {
		for _, n := range names {
			_, _ = f.Client(m).ConfigRemove(ctx, n, client.ConfigRemoveOptions{})
		}
	}
}

func (f *figures) id(ctx context.Context, n *dev.Node) (string, error) {
	info, err := f.Client(n).Info(ctx, client.InfoOptions{})
	return info.Info.Swarm.NodeID, err
}

// elsewhere waits until all tasks run on other nodes.
func (f *figures) elsewhere(ctx context.Context, lost *dev.Node, id string, begun time.Time) (time.Duration, error) {
	list := slices.DeleteFunc(f.Managers(), func(m *dev.Node) bool { return m == lost })
	n := 0
	for i := 0; time.Since(begun) < 2*writeWait && ctx.Err() == nil; i++ {
		var err error
		if n, _, err = f.running(ctx, list[i%len(list)], id); err == nil && n == f.wanted() {
			return time.Since(begun), nil
		}
		nemesis.Sleep(ctx, figurePause)
	}
	return 0, fmt.Errorf("%d of %d tasks run elsewhere after %v", n, f.wanted(), 2*writeWait)
}

// workerLost kills a worker that has tasks, or cuts it off.
func workerLost(kill bool) func(context.Context, *figures) (time.Duration, error) {
	return func(ctx context.Context, f *figures) (time.Duration, error) {
		for _, n := range f.Nodes {
			if n.Role == "manager" {
				continue
			}
			id, err := f.id(ctx, n)
			if err != nil {
				return 0, err
			}
			if _, there, err := f.running(ctx, f.Managers()[0], id); err != nil || there == 0 {
				continue // it came back empty
			}
			return f.lose(ctx, n, id, kill)
		}
		return 0, errors.New("no worker has tasks")
	}
}

func (f *figures) lose(ctx context.Context, n *dev.Node, id string, kill bool) (time.Duration, error) {
	begun := time.Now()
	undo := func() error { return f.StartDaemon(ctx, n) }
	var err error
	if kill {
		err = f.Kill(n)
	} else {
		undo, err = f.x.Break(ctx, n, nemesis.Step{Kind: nemesis.Cut})
	}
	if err != nil {
		return 0, err
	}
	took, err := f.elsewhere(ctx, n, id, begun)
	if uerr := undo(); err != nil || uerr != nil {
		return 0, errors.Join(err, uerr)
	}
	back, err := f.readyAgain(ctx, id)
	f.back = append(f.back, back)
	return took, err
}

// readyAgain waits until a node is ready.
func (f *figures) readyAgain(ctx context.Context, id string) (time.Duration, error) {
	begun := time.Now()
	state := swarm.NodeState("")
	for time.Since(begun) < calmWait && ctx.Err() == nil {
		cctx, cancel := context.WithTimeout(ctx, time.Second)
		res, err := f.Client(f.Managers()[0]).NodeInspect(cctx, id, client.NodeInspectOptions{})
		cancel()
		if state = res.Node.Status.State; err == nil && state == swarm.NodeStateReady {
			return time.Since(begun), nil
		}
		nemesis.Sleep(ctx, figurePause)
	}
	return 0, fmt.Errorf("node %s is %q %v after it was back", id, state, calmWait)
}

// leaderNodeLost kills the leader with everything of its node; the tasks of managers are spread over three nodes.
func leaderNodeLost(ctx context.Context, f *figures) (time.Duration, error) {
	lead, err := f.Leader(ctx, 5*time.Second)
	if err != nil {
		return 0, err
	}
	id, err := f.id(ctx, lead)
	if err != nil {
		return 0, err
	}
	if _, there, err := f.running(ctx, lead, id); err == nil && there == 0 { // came back empty: give it some
		if err := f.spread(ctx); err != nil {
			return 0, err
		}
	}
	return f.lose(ctx, lead, id, true)
}

// spread replaces the managers' tasks, so that each node has its share again.
func (f *figures) spread(ctx context.Context) error {
	api := f.Client(f.Managers()[0])
	in, err := api.ServiceInspect(ctx, onManagers, client.ServiceInspectOptions{})
	if err != nil {
		return err
	}
	spec := in.Service.Spec
	spec.TaskTemplate.ForceUpdate++
	spec.UpdateConfig = &swarm.UpdateConfig{Parallelism: 0, Monitor: 100 * time.Millisecond, FailureAction: swarm.UpdateFailureActionContinue, Order: swarm.UpdateOrderStopFirst}
	if _, err := api.ServiceUpdate(ctx, in.Service.ID, client.ServiceUpdateOptions{Version: in.Service.Version, Spec: spec}); err != nil {
		return err
	}
	nemesis.Sleep(ctx, time.Second)
	return f.calm(ctx)
}

// healed cuts a worker (or follower) off until it is down, heals the link and waits until the node is ready.
func healed(ctx context.Context, f *figures) (time.Duration, error) {
	n := f.Nodes[len(f.Nodes)-1]
	id, err := f.id(ctx, n)
	if err != nil {
		return 0, err
	}
	undo, err := f.x.Break(ctx, n, nemesis.Step{Kind: nemesis.Cut})
	if err != nil {
		return 0, err
	}
	for begun := time.Now(); ; nemesis.Sleep(ctx, 10*figurePause) {
		cctx, cancel := context.WithTimeout(ctx, time.Second)
		res, err := f.Client(f.Managers()[0]).NodeInspect(cctx, id, client.NodeInspectOptions{})
		cancel()
		if err == nil && res.Node.Status.State == swarm.NodeStateDown {
			break
		}
		if time.Since(begun) > writeWait || ctx.Err() != nil {
			return 0, errors.Join(fmt.Errorf("%s is not down %v after it was cut off (%v)", n.Name, writeWait, err), undo())
		}
	}
	nemesis.Sleep(ctx, time.Duration(f.n%7)*300*time.Millisecond)
	f.n++
	if err := undo(); err != nil {
		return 0, err
	}
	return f.readyAgain(ctx, id)
}

// busy tells how busy the machine was since it was made.
type busy struct{ total, idle uint64 }

func newBusy() *busy {
	t, i := processors()
	return &busy{t, i}
}

func processors() (total, idle uint64) {
	b, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(b), "\n")
	for i, f := range strings.Fields(line)[1:] {
		var v uint64
		_, _ = fmt.Sscan(f, &v)
		if i < 8 { // guest time is in user time already
			total += v
		}
		if i == 3 || i == 4 {
			idle += v
		}
	}
	return total, idle
}

// String is the share of busy processors since, and the load average.
func (b *busy) String() string {
	t, i := processors()
	load, _ := os.ReadFile("/proc/loadavg")
	one, _, _ := strings.Cut(string(load), " ")
	return fmt.Sprintf("machine %d%% busy, load %s", 100-100*(i-b.idle)/max(1, t-b.total), one)
}
