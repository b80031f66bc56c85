package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"skein/cmd/dev"
	"skein/test/nemesis"
)

const (
	liveObjects = 30              // at a time
	objectOps   = 60              // requests to an object before another takes its place
	maxUnknown  = 8               // writes of unknown outcome, which porcupine has to try everywhere
	opTime      = 3 * time.Second // a manager may be stopped for longer
	huntShare   = 4               // after one acknowledged write of so many every manager is read
	statusStep  = 10 * time.Second
)

var errTwice = errors.New("a name is used twice")

// object is what clients of the run share.
type object struct {
	kind    string
	name    string
	ops     atomic.Int32
	unknown atomic.Int32
}

func (o *object) full() string { return o.kind + "/" + o.name }

// world is a run.
type world struct {
	rig   *nemesis.Rig
	opts  options
	hist  *history
	kinds map[string]kind
	value atomic.Int64 // the last value given out

	mu      sync.Mutex
	live    []*object
	all     []*object
	made    int
	broken  []string
	outDir  string
	results map[string]int
	tasks   *taskView
}

func newWorld(r *nemesis.Rig, o options) *world {
	return &world{rig: r, opts: o, hist: &history{begun: time.Now()}, kinds: kinds(), results: map[string]int{}, tasks: newTaskView()}
}

func (w *world) violate(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	w.rig.Say("BROKEN: %s", msg)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.broken = append(w.broken, msg)
}

func (w *world) brokenPromises() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.broken)
}

// pick is a random object. One that was used enough is replaced; it is removed at the end of its life now and then.
func (w *world) pick(r *rand.Rand) *object {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := r.IntN(liveObjects + len(w.rig.Managers()))
	for len(w.live) <= i {
		w.live = append(w.live, nil)
	}
	o := w.live[i]
	if o == nil || (o.kind != "node" && (o.ops.Load() > objectOps || o.unknown.Load() > maxUnknown)) {
		sorts := []string{"service", "service", "config", "config", "network"}
		w.made++
		o = &object{kind: sorts[w.made%len(sorts)], name: fmt.Sprintf("x-%d", w.made)} // no name may be the beginning of an id
		w.live[i] = o
		w.all = append(w.all, o)
	}
	o.ops.Add(1)
	return o
}

// startClients runs them, what looks at tasks and what scales until ctx ends.
func (w *world) startClients(ctx context.Context) <-chan struct{} {
	var wg sync.WaitGroup
	for i := range w.opts.clients {
		wg.Go(func() { w.client(ctx, i) })
	}
	wg.Go(func() { w.watchTasks(ctx) })
	wg.Go(func() { w.scaleLoop(ctx) })
	wg.Go(func() {
		for ctx.Err() == nil {
			nemesis.Sleep(ctx, statusStep)
			w.mu.Lock()
			w.rig.Say("requests: %v", w.results)
			w.mu.Unlock()
		}
	})
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	return done
}

func (w *world) client(ctx context.Context, id int) {
	r := rand.New(rand.NewPCG(w.opts.seed, uint64(id)+1))
	mean := time.Duration(w.opts.clients) * time.Second / time.Duration(w.opts.rate)
	managers := w.rig.Managers()
	at := func() *dev.Node { return managers[r.IntN(len(managers))] }
	for ctx.Err() == nil {
		o := w.pick(r)
		k := w.kinds[o.kind]
		acked := false
		switch x := r.IntN(100); {
		case x < 30:
			w.read(ctx, id, at(), k, o)
		case x < 38:
			w.list(ctx, id, at(), k)
		case x < 58 && k.create != nil:
			acked = w.write(ctx, id, at(), o, input{Op: opCreate, Value: w.next()}, func(ctx context.Context, m *dev.Node, in input) error {
				return k.create(ctx, w.rig.Client(m), o.name, in.Value)
			})
		case x < 68 && k.remove != nil:
			acked = w.write(ctx, id, at(), o, input{Op: opRemove}, func(ctx context.Context, m *dev.Node, _ input) error {
				return k.remove(ctx, w.rig.Client(m), o.name)
			})
		case k.update != nil:
			f, ok := w.read(ctx, id, at(), k, o)
			if !ok || (f.value == "" && k.create != nil) {
				break
			}
			acked = w.write(ctx, id, at(), o, input{Op: opUpdate, Value: w.next(), Prior: f.value}, func(ctx context.Context, m *dev.Node, in input) error {
				return k.update(ctx, w.rig.Client(m), f, in.Value)
			})
		}
		if acked && r.IntN(huntShare) == 0 {
			w.hunt(ctx, id, k, o)
		}
		nemesis.Sleep(ctx, time.Duration(r.Int64N(int64(2*mean))))
	}
}

func (w *world) next() string { return fmt.Sprintf("v%d", w.value.Add(1)) }

func (w *world) count(op, result string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.results[op+" "+result]++
}

// read asks for one object.
func (w *world) read(ctx context.Context, id int, at *dev.Node, k kind, o *object) (found, bool) {
	ctx, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	call := w.hist.now()
	f, err := k.read(ctx, w.rig.Client(at), o.name)
	res := refusal(err)
	switch res {
	case resMissing:
		f = found{}
	case resOK:
	default:
		w.count(opRead, resUnknown)
		return f, false
	}
	w.count(opRead, res)
	w.hist.add(id, input{Object: o.full(), Op: opRead, At: at.Name}, output{resOK, f.value}, call, w.hist.now())
	return f, true
}

// list asks for all objects of a kind: an answer for each of those that live.
func (w *world) list(ctx context.Context, id int, at *dev.Node, k kind) {
	w.mu.Lock()
	objects := slices.Clone(w.live)
	w.mu.Unlock()
	w.listed(ctx, id, at, k, objects)
}

func (w *world) listed(ctx context.Context, id int, at *dev.Node, k kind, objects []*object) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	call := w.hist.now()
	all, err := k.list(ctx, w.rig.Client(at))
	back := w.hist.now()
	if errors.Is(err, errTwice) {
		w.violate("list of %ss at %s: %v", k.name, at.Name, err)
	}
	if err != nil {
		w.count("list", resUnknown)
		return nil, err
	}
	w.count("list", resOK)
	for _, o := range objects {
		if o != nil && o.kind == k.name {
			w.hist.add(id, input{Object: o.full(), Op: opRead, At: at.Name}, output{resOK, all[o.name]}, call, back)
		}
	}
	return all, nil
}

// write does one write and reports whether it was acknowledged.
func (w *world) write(ctx context.Context, id int, at *dev.Node, o *object, in input, do func(context.Context, *dev.Node, input) error) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), opTime)
	defer cancel()
	in.Object, in.At = o.full(), at.Name
	call := w.hist.now()
	err := do(ctx, at, in)
	res := refusal(err)
	if in.Op != opCreate && res == resExists {
		res = resUnknown // not a refusal that the model knows
	}
	w.hist.add(id, in, output{Result: res}, call, w.hist.now())
	if res == resUnknown {
		o.unknown.Add(1)
	}
	w.count(in.Op, res)
	return res == resOK
}

// hunt looks for stale reads: every manager is asked at once after a write was acknowledged.
func (w *world) hunt(ctx context.Context, id int, k kind, o *object) {
	var wg sync.WaitGroup
	for i, m := range w.rig.Managers() {
		wg.Go(func() { w.read(ctx, 1000+10*id+i, m, k, o) })
	}
	wg.Wait()
}
