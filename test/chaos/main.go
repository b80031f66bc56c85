// Command chaos breaks a real development cluster on purpose, again and again, while clients use it, and checks after each fault that
// the cluster is whole again and kept its promises.
//
//	go run ./test/chaos -name cha -minutes 5 -seed 7
//	go run ./test/chaos -name cha -faults kill-leader,pause-leader -rounds 10
//	go run ./test/chaos -list
//	go run ./test/chaos measure -n 200 -parts leader-kill
//	go run ./test/chaos measure -parts load -minutes 10
//
// It needs root. A run is: start managers and workers (cmd/dev), a registry and four services; then rounds of one random fault each,
// with a random change of a service in the middle, and the checks of check.go; at the end the cluster is taken down and the machine is
// searched for leftovers. -seed repeats the choice of faults, not the timing. The exit code is 1 when a promise was broken; -keep leaves
// the cluster up then. Everything is printed with the time since the start.
//
// Files: world.go (cluster, services, what was acknowledged), load.go (clients of published ports), faults.go (what is broken), calm.go
// (changes without a fault: no request may fail), check.go (what must hold), leaks.go (what a node holds of kernel objects), measure.go
// (figures: how long failures last), burden.go (what must not happen on a busy machine).
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
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
	minutes  float64
	rounds   int
	seed     uint64
	faults   string
	keep     bool
	verbose  bool
	stop     bool // at the first broken promise
}

func main() {
	if len(os.Args) > 1 && (os.Args[1] == "measure" || os.Args[1] == "burn") {
		verbs()
		return
	}
	var o options
	var list bool
	flag.StringVar(&o.name, "name", "cha", "name of the development cluster")
	flag.StringVar(&o.binary, "binary", "", "the skein executable (default: build it)")
	flag.IntVar(&o.managers, "managers", 3, "number of managers")
	flag.IntVar(&o.workers, "workers", 2, "number of workers")
	flag.Float64Var(&o.minutes, "minutes", 5, "start no further round after this time")
	flag.IntVar(&o.rounds, "rounds", 0, "end after this many rounds; 0: only -minutes counts")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()%100000), "seed of the choice of faults")
	flag.StringVar(&o.faults, "faults", "", "faults to choose from, separated by commas (default: all)")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster up when a promise was broken")
	flag.BoolVar(&o.stop, "stop", false, "end at the first broken promise")
	flag.BoolVar(&o.verbose, "v", false, "tell of every request that failed")
	flag.BoolVar(&list, "list", false, "list the faults and end")
	flag.Parse()
	if list {
		for _, f := range faults {
			fmt.Printf("%-20s %s\n", f.name, f.about)
		}
		return
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	broken, err := run(ctx, o)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(2)
	}
	if broken > 0 {
		os.Exit(1)
	}
}

// verbs are what the program does besides breaking a cluster at random.
func verbs() {
	if os.Args[1] == "burn" {
		percent := 0
		if len(os.Args) != 3 || func() error { _, err := fmt.Sscan(os.Args[2], &percent); return err }() != nil || percent < 1 || percent > 99 {
			fmt.Fprintln(os.Stderr, "chaos burn PERCENT: want 1 to 99")
			os.Exit(2)
		}
		burn(percent)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	missed, err := measure(ctx, os.Args[2:])
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(2)
	}
	if missed > 0 {
		os.Exit(1)
	}
}

// run does one run and returns how many promises were broken.
func run(ctx context.Context, o options) (broken int, err error) {
	chosen, err := choose(o.faults)
	if err != nil {
		return 0, err
	}
	w, err := newWorld(ctx, o)
	if err != nil {
		return 0, err
	}
	defer func() {
		if o.keep && w.broken > 0 {
			w.say("cluster %s is left up", o.name)
		} else {
			w.down()
		}
		w.summary()
		broken = w.broken
	}()
	w.rounds(ctx, o, chosen)
	return w.broken, nil
}

// rounds injects faults until time or number is over.
func (w *world) rounds(ctx context.Context, o options, chosen []fault) {
	end := time.Now().Add(time.Duration(o.minutes * float64(time.Minute)))
	w.check(ctx, "start", false)
	var bag []fault // every fault once before any comes again
	for n := 1; ctx.Err() == nil && time.Now().Before(end) && (o.rounds == 0 || n <= o.rounds); n++ {
		if len(bag) == 0 {
			bag = append(bag, chosen...)
			w.rand.Shuffle(len(bag), func(i, j int) { bag[i], bag[j] = bag[j], bag[i] })
		}
		f := bag[0]
		bag = bag[1:]
		w.round(ctx, n, f)
		if o.stop && w.broken > 0 {
			return
		}
	}
}

func (w *world) round(ctx context.Context, n int, f fault) {
	w.say("round %d: %s", n, f.name)
	w.fault = f.name
	load := w.startLoad()
	begun := time.Now()
	err := f.inject(ctx, w)
	rep := load.stop()
	w.say("  %s took %v; %d requests, %d failed, longest gap %v%s", f.name, time.Since(begun).Round(10*time.Millisecond), rep.sent, rep.failed,
		rep.gap.Round(10*time.Millisecond), rep.reason())
	if err != nil {
		w.violate("%s: %v", f.name, err)
	}
	if f.calm && rep.failed > 0 {
		w.violate("%s: %d of %d requests failed though nothing was broken: %s", f.name, rep.failed, rep.sent, rep.reason())
	}
	w.check(ctx, f.name, f.restarts)
}

func choose(names string) ([]fault, error) {
	if names == "" {
		return faults, nil
	}
	var out []fault
	for _, name := range strings.Split(names, ",") {
		found := false
		for _, f := range faults {
			if ok, _ := filepath.Match(name, f.name); ok {
				out, found = append(out, f), true
			}
		}
		if !found {
			return nil, fmt.Errorf("there is no fault %q: see -list", name)
		}
	}
	return out, nil
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0x5ce1)) }
