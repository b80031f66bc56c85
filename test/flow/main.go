// Command flow changes services in every way an operator can while clients use them, and tells of each request that failed.
//
//	go run ./test/flow -ops 30 -seed 7
//	go run ./test/flow -only drain,kill-daemon -ops 6
//	go run ./test/flow -list
//	go run ./test/flow -pace 5
//
// It needs root. A run is: three managers and two workers (cmd/dev), a service of a well-behaved server and one of a server that ends at once
// when told to, clients of both through each node from outside, and of one by its VIP from inside: each kind of test/flow/load. Then so many
// operations of ops.go, every kind once before any comes again. The exit code is 1 when a request failed or an operation did not end.
//
// With -pace it only measures, without clients, how long rolling updates of ten tasks take, two at a time.
//
// A kept connection that its server closed between two requests, while the next was on its way, is counted apart ("idle"): HTTP's clients
// repeat such a request, and nothing below HTTP can prevent it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path"
	"strings"
	"syscall"
	"time"
)

// options of a run.
type options struct {
	name     string
	binary   string
	managers int
	workers  int
	replicas int
	ops      int
	seed     uint64
	only     string
	stream   time.Duration
	drain    time.Duration
	pause    time.Duration
	keep     bool
	verbose  bool
	pace     int
}

func main() {
	var o options
	var list bool
	flag.StringVar(&o.name, "name", "flow", "name of the development cluster")
	flag.StringVar(&o.binary, "binary", "", "the skein executable (default: build it)")
	flag.IntVar(&o.managers, "managers", 3, "number of managers")
	flag.IntVar(&o.workers, "workers", 2, "number of workers")
	flag.IntVar(&o.replicas, "replicas", 5, "replicas of the services")
	flag.IntVar(&o.ops, "ops", 30, "number of operations")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()%100000), "seed of the choice of operations")
	flag.StringVar(&o.only, "only", "", "operations to choose from, separated by commas (default: all)")
	flag.DurationVar(&o.stream, "stream", 10*time.Second, "how long a stream lasts")
	flag.DurationVar(&o.drain, "drain", 0, "the services' skein.drain.timeout; 0: the default")
	flag.DurationVar(&o.pause, "pause", 50*time.Millisecond, "between two requests of a client")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster up when something failed")
	flag.BoolVar(&o.verbose, "v", false, "tell of kept connections that ended between two requests, too")
	flag.IntVar(&o.pace, "pace", 0, "instead, measure rolling updates without clients so many times")
	flag.BoolVar(&list, "list", false, "list the operations and end")
	flag.Parse()
	if list {
		for _, op := range operations() {
			fmt.Printf("%-16s %s\n", op.name, op.about)
		}
		return
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	broken, err := run(ctx, o)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "flow:", err)
		os.Exit(2)
	}
	if broken > 0 {
		os.Exit(1)
	}
}

// run does one run and returns how much went wrong.
func run(ctx context.Context, o options) (broken int, err error) {
	chosen, err := choose(o.only)
	if err != nil {
		return 0, err
	}
	w, err := newWorld(ctx, o)
	if err != nil {
		return 0, err
	}
	defer func() {
		if o.keep && w.tally.broken() > 0 {
			w.say("cluster %s is left up", o.name)
		} else {
			w.down()
		}
		broken = w.tally.summary(w)
	}()
	if o.pace > 0 {
		return 0, w.measurePace(ctx)
	}
	load := w.startLoad()
	defer func() { w.tally.take("outside", load.Stop()) }()
	w.operate(ctx, chosen)
	return 0, nil
}

// operate carries the operations out, one after the other.
func (w *world) operate(ctx context.Context, chosen []operation) {
	var bag []operation // every kind once before any comes again
	for n := 1; n <= w.opts.ops && ctx.Err() == nil; n++ {
		if len(bag) == 0 {
			bag = append(bag, chosen...)
			w.rand.Shuffle(len(bag), func(i, j int) { bag[i], bag[j] = bag[j], bag[i] })
		}
		op := bag[0]
		bag = bag[1:]
		begun := time.Now()
		w.tally.begin(fmt.Sprintf("%d %s", n, op.name))
		err := op.do(ctx, w)
		if err == nil {
			err = w.settled(ctx)
		}
		w.say("%2d %-16s %6.1f s  failed %d, idle %d", n, op.name, time.Since(begun).Seconds(), w.tally.failures(), w.tally.idles())
		if err != nil && ctx.Err() == nil {
			w.tally.violate(w, "%d %s: %v", n, op.name, err)
		}
	}
	w.tally.begin("end")
	sleep(ctx, time.Second)
}

func choose(names string) ([]operation, error) {
	all := operations()
	if names == "" {
		return all, nil
	}
	var out []operation
	for _, name := range strings.Split(names, ",") {
		found := false
		for _, op := range all {
			if ok, _ := path.Match(name, op.name); ok {
				out, found = append(out, op), true
			}
		}
		if !found {
			return nil, fmt.Errorf("there is no operation %q: see -list", name)
		}
	}
	return out, nil
}
