package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/consensus"
	"skein/manager/store"
)

// Sizes of the cluster that the store is measured with.
const (
	storeNodes    = 5000
	storeServices = 1000
	storeBatch    = 500 // tasks of a transaction, as controllers write them
)

// direct applies entries at once, on one store, and keeps nothing.
type direct struct {
	store *store.Store
	index uint64
	bytes int
	now   int64
}

func (d *direct) Propose(_ context.Context, txns []*api.Txn) (uint64, []error, error) {
	d.now += int64(time.Millisecond)
	entry, err := d.store.EncodeEntry(d.now, txns)
	if err != nil {
		return 0, nil, err
	}
	d.index++
	d.bytes += len(entry)
	return d.index, d.store.Apply(d.index, entry), nil
}

// filler puts tasks into a store, the way controllers and agents do.
type filler struct {
	store    *store.Store
	r        *rand.Rand
	services []string
	nodes    []string
	tasks    int // of each service
	network  bool
}

func newFiller(s *store.Store, tasks int, network bool) *filler {
	f := &filler{store: s, r: rand.New(rand.NewPCG(1, 2)), tasks: tasks / storeServices, network: network}
	for range storeServices {
		f.services = append(f.services, f.id())
	}
	for range storeNodes {
		f.nodes = append(f.nodes, f.id())
	}
	return f
}

func (f *filler) id() string { return api.NewID() }

func (f *filler) do(ctx context.Context, txns ...*api.Txn) error {
	_, results, err := f.store.Batch(ctx, txns)
	return errors.Join(append(results, err)...)
}

func change(c ...*api.Change) *api.Txn { return &api.Txn{Changes: c} }

// world makes cluster, nodes, network and services.
func (f *filler) world(ctx context.Context) error {
	c := &api.ClusterRecord{Id: "c1", OverlayPool: "10.0.0.0/9", MeshPool: "10.128.0.0/9", OverlayBits: 20, UlaPrefix: "fd12:3456:789a::/48", FeatureLevel: api.FeatureLevel}
	txns := []*api.Txn{change(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})}
	for i, id := range f.nodes {
		n := &api.NodeRecord{Id: id, Hostname: fmt.Sprint("node", i), Role: api.RoleWorker, Availability: "active"}
		txns = append(txns, change(&api.Change{Kind: &api.Change_PutNode{PutNode: n}}))
	}
	net := &api.NetworkRecord{Id: f.id(), Name: "net", Subnet4: "10.0.0.0/11"}
	txns = append(txns, change(&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: net}}))
	for i, id := range f.services {
		spec := swarm.ServiceSpec{Annotations: swarm.Annotations{Name: fmt.Sprint("service", i)}}
		spec.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Image: "app:1"}
		if f.network {
			spec.TaskTemplate.Networks = []swarm.NetworkAttachmentConfig{{Target: net.Id}}
		} else {
			spec.TaskTemplate.Networks = []swarm.NetworkAttachmentConfig{{Target: store.NetworkNone}}
		}
		b, err := json.Marshal(spec)
		if err != nil {
			return err
		}
		txns = append(txns, change(&api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: id, SpecJson: b}}}))
	}
	return f.do(ctx, txns...)
}

// place creates and places the tasks from slot lo to hi of a service.
func (f *filler) place(service string, lo, hi int) (create, place *api.Txn) {
	c := &api.TaskCreate{ServiceId: service, Revision: 1}
	p := &api.TaskPlacement{}
	first := f.r.IntN(len(f.nodes))
	for slot := lo; slot <= hi; slot++ {
		c.Items = append(c.Items, &api.TaskCreate_Item{Slot: uint64(slot), Generation: 1})
		p.TaskIds = append(p.TaskIds, api.TaskID(service, uint64(slot), "", 1))
		p.NodeIds = append(p.NodeIds, f.nodes[(first+slot*7)%len(f.nodes)])
		p.Refused = append(p.Refused, "")
	}
	return change(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: c}}), change(&api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: p}})
}

// each calls f with every service's slots in parts, as many services at a time as there are workers.
func (f *filler) each(workers int, do func(service string, lo, hi int) error) error {
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		wg.Go(func() {
			for i := w; i < len(f.services) && errs[w] == nil; i += workers {
				for lo := 1; lo <= f.tasks; lo += storeBatch {
					errs[w] = errors.Join(errs[w], do(f.services[i], lo, min(lo+storeBatch-1, f.tasks)))
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// run creates, places and reports all tasks, one after the other.
func (f *filler) run(ctx context.Context, report bool) error {
	return f.each(1, func(service string, lo, hi int) error {
		create, place := f.place(service, lo, hi)
		if err := f.do(ctx, create); err != nil {
			return err
		}
		if err := f.do(ctx, place); err != nil || !report {
			return err
		}
		return f.do(ctx, f.reports(place.Changes[0].GetPlaceTasks(), time.Unix(1_800_000_000, 0))...)
	})
}

// reports says of placed tasks that they run.
func (f *filler) reports(p *api.TaskPlacement, at time.Time) []*api.Txn {
	var out []*api.Txn
	for i, id := range p.TaskIds {
		var container [32]byte
		for k := range 4 {
			for v, b := f.r.Uint64(), 8*k; b < 8*k+8; b++ {
				container[b], v = byte(v), v>>8
			}
		}
		r := &api.TaskReport{TaskId: id, NodeId: p.NodeIds[i], State: uint32(api.TaskRunning), Time: at.UnixNano() + f.r.Int64N(1e9),
			Message: "started", ContainerId: hex.EncodeToString(container[:]), Pid: 1 + f.r.Int32N(1<<22)}
		out = append(out, change(&api.Change{Kind: &api.Change_ReportTask{ReportTask: r}}))
	}
	return out
}

func liveHeap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// filled makes a store of running tasks, and tells what it took.
func (b *bench) filled(ctx context.Context, network bool) (*store.Store, error) {
	d := &direct{now: time.Unix(1_800_000_000, 0).UnixNano()}
	d.store = store.New(d)
	f := newFiller(d.store, b.opts.million, network)
	if err := f.world(ctx); err != nil {
		return nil, err
	}
	empty, logged, cpu := liveHeap(), d.bytes, cpuTime()
	if err := f.run(ctx, true); err != nil {
		return nil, err
	}
	cpu = cpuTime() - cpu
	n := f.tasks * storeServices
	what := "without networks"
	if network {
		what = "with an address and a gateway"
	}
	fmt.Printf("  %-46s %9d tasks  %7.1f B of heap each  %6.1f B of log each  CPU %6.2f us each, written, packed and applied\n", what, n,
		float64(liveHeap()-empty)/float64(n), float64(d.bytes-logged)/float64(n), float64(cpu.Microseconds())/float64(n))
	return d.store, nil
}

// taskMemory measures the store's memory per running task.
func (b *bench) taskMemory(ctx context.Context) error {
	for _, network := range []bool{false, true} {
		s, err := b.filled(ctx, network)
		if err != nil {
			return err
		}
		runtime.KeepAlive(s)
	}
	return nil
}

// taskSnapshot measures a snapshot, how long an entry has to wait meanwhile, and how long it takes to read it back.
func (b *bench) taskSnapshot(ctx context.Context) error {
	s, err := b.filled(ctx, true)
	if err != nil {
		return err
	}
	var id string
	s.View(func(tx store.ReadTx) { id = tx.Nodes()[0].Id })
	stop, done := make(chan struct{}), make(chan time.Duration)
	go func() { // entries meanwhile
		longest, n := time.Duration(0), 0
		for {
			select {
			case <-stop:
				done <- longest
				return
			default:
			}
			n++
			begun := time.Now()
			_, _, _ = s.Batch(ctx, []*api.Txn{change(&api.Change{Kind: &api.Change_NodeStatus{NodeStatus: &api.NodeStatus{NodeId: id, State: "ready", Message: fmt.Sprint(n)}}})})
			longest = max(longest, time.Since(begun))
			time.Sleep(time.Millisecond)
		}
	}()
	begun, cpu := time.Now(), cpuTime()
	write := s.Snapshot()
	view := time.Since(begun)
	var buf bytes.Buffer
	if err := write(&buf); err != nil {
		return err
	}
	wall, used := time.Since(begun), cpuTime()-cpu
	close(stop)
	fmt.Printf("  %-46s %7.1f MB  %6.2f s  CPU %6.2f s  taken in %v  longest entry meanwhile %v\n", "snapshot", float64(buf.Len())/1e6, wall.Seconds(),
		used.Seconds(), view.Round(time.Microsecond), (<-done).Round(time.Microsecond))
	begun, cpu = time.Now(), cpuTime()
	other := store.New(nil)
	if err := other.Restore(&buf); err != nil {
		return err
	}
	fmt.Printf("  %-46s %10s  %6.2f s  CPU %6.2f s\n", "restore", "", time.Since(begun).Seconds(), (cpuTime() - cpu).Seconds())
	return nil
}

// loopback is a Raft stream layer on a TCP port.
type loopback struct{ net.Listener }

func (loopback) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout("tcp", string(addr), timeout)
}

// managers starts a group of three in this process, each with its log on the disk, and returns the leader's store.
func managers(ctx context.Context, dir string) (leader *store.Store, stop func() error, err error) {
	var nodes []*consensus.Node
	stop = func() error {
		var errs []error
		for _, n := range nodes {
			errs = append(errs, n.Close())
		}
		return errors.Join(errs...)
	}
	for i := range 3 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, stop, err
		}
		s := store.New(nil)
		n, err := consensus.Open(consensus.Config{NodeID: fmt.Sprint("m", i), Dir: filepath.Join(dir, fmt.Sprint("m", i)), Stream: loopback{l}, Advertise: l.Addr().String(),
			// What else runs on this machine shall not cost the leadership: it is not what is measured.
			Timing: consensus.Timing{Heartbeat: 5 * time.Second, Election: 5 * time.Second, Lease: 5 * time.Second, Commit: 25 * time.Millisecond, RPC: 10 * time.Second},
			Store:  s, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), Fatal: func(code int, err error) { fmt.Fprintln(os.Stderr, "manager must end:", code, err) }})
		if err != nil {
			return nil, stop, err
		}
		nodes = append(nodes, n)
		if i > 0 {
			if err := nodes[0].AddVoter(ctx, fmt.Sprint("m", i), l.Addr().String()); err != nil {
				return nil, stop, err
			}
			continue
		}
		leader = s
		if err := n.Bootstrap(); err != nil {
			return nil, stop, err
		}
		for leads := false; !leads; {
			select {
			case leads = <-n.LeaderCh():
			case <-ctx.Done():
				return nil, stop, ctx.Err()
			}
		}
	}
	return leader, stop, nil
}

// commits measures how fast placements go through three managers, which share this machine's CPUs and disk.
func (b *bench) commits(ctx context.Context) (err error) {
	s, stop, err := managers(ctx, b.dir)
	defer func() { err = errors.Join(err, stop()) }()
	if err != nil {
		return err
	}
	f := newFiller(s, b.opts.million, true)
	if err := f.world(ctx); err != nil {
		return err
	}
	const workers = 8
	var mu sync.Mutex
	var creates, places []*api.Txn
	for _, service := range f.services { // made before: it is not what is measured
		for lo := 1; lo <= f.tasks; lo += storeBatch {
			c, p := f.place(service, lo, min(lo+storeBatch-1, f.tasks))
			creates, places = append(creates, c), append(places, p)
		}
	}
	phase := func(what string, count int, next func() []*api.Txn) error {
		begun, cpu := time.Now(), cpuTime()
		var wg sync.WaitGroup
		errs := make([]error, workers)
		for w := range workers {
			wg.Go(func() {
				for errs[w] == nil {
					mu.Lock()
					txns := next()
					mu.Unlock()
					if txns == nil {
						return
					}
					errs[w] = f.do(ctx, txns...)
				}
			})
		}
		wg.Wait()
		wall, used := time.Since(begun), cpuTime()-cpu
		fmt.Printf("  %-46s %9d tasks  %9.0f tasks/s  %9.0f tasks per CPU second, all three managers\n", what, count, float64(count)/wall.Seconds(), float64(count)/used.Seconds())
		return errors.Join(errs...)
	}
	n := f.tasks * storeServices
	one := func(list *[]*api.Txn) func() []*api.Txn {
		rest := *list
		return func() []*api.Txn {
			if len(rest) == 0 {
				return nil
			}
			t := rest[:1]
			rest = rest[1:]
			return t
		}
	}
	if err := phase("created", n, one(&creates)); err != nil {
		return err
	}
	if err := phase("placed", n, one(&places)); err != nil {
		return err
	}
	rest := places
	return phase("reported running", n, func() []*api.Txn {
		if len(rest) == 0 {
			return nil
		}
		p := rest[0]
		rest = rest[1:]
		return f.reports(p.Changes[0].GetPlaceTasks(), time.Unix(1_800_000_000, 0))
	})
}
