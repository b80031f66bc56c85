// Command endure proves by endurance what tests of a few seconds can only suggest: that a node keeps its promises when its processes are
// killed hundreds of times, when memory runs out a thousand times, with a thousand containers at once, and over ten thousand of them one
// after the other. It needs root, starts a development node of its own (cmd/dev) and takes it down at the end.
//
//	go run ./test/endure -name endu                          # everything in full length, about an hour
//	go run ./test/endure -name endu -only kill-daemon -n 20 -seed 7
//	go run ./test/endure -list
//
// Each run prints its figures; a promise that was broken is printed when it is noticed, with the time since the start, and again below
// the table at the end, and the exit code is 1. -seed repeats what clients do and when processes are killed, not the machine's timing.
// -n overrides a run's length. The short versions of all runs are this package's tests.
//
// Files: world.go (the node and its processes), audit.go (comparing everything that knows of containers), holdings.go (what a node holds of the
// kernel), ledger.go (what a client believes of its container), client.go (what clients do), kill.go, oom.go, many.go, cycles.go (the
// runs), direct.go (a supervisor without an engine), inside (the program in the containers).
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options of the program.
type options struct {
	name    string
	binary  string
	only    string
	n       int
	seed    uint64
	clients int
	keep    bool
	verbose bool
}

// run is one proof.
type run struct {
	name  string
	about string
	n     int // its full length
	do    func(*world, context.Context, int) error
}

func runs() []run {
	return []run{
		{"kill-daemon", "kill -9 of the daemon at random points of create, start, exec, stop, restart, remove", 200, (*world).killDaemon},
		{"kill-supervisor", "kill -9 of the supervisor at such points", 100, (*world).killSupervisor},
		{"kill-both", "kill -9 of daemon and supervisor at once", 50, (*world).killBoth},
		{"oom", "starts of containers whose first pages exceed their memory limit", 1000, (*world).oom},
		{"many", "containers at once, through the API", 1000, (*world).many},
		{"many-bridge", "containers with a bridge network at once, through the API", 200, (*world).manyBridge},
		{"many-direct", "containers at once, through the supervisor", 1000, (*world).manyDirect},
		{"cycles", "create, start, end, delete through the API, with a bridge network", 2000, (*world).cycles},
		{"cycles-direct", "create, start, end, delete through the supervisor", 10000, (*world).cyclesDirect},
	}
}

func main() {
	var o options
	var list bool
	flag.StringVar(&o.name, "name", "endu", "name of the development cluster")
	flag.StringVar(&o.binary, "binary", "", "the skein executable (default: build it)")
	flag.StringVar(&o.only, "only", "", "runs, separated by commas (default: all)")
	flag.IntVar(&o.n, "n", 0, "length of each run (default: its own)")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()%100000), "seed of all random choices")
	flag.IntVar(&o.clients, "clients", 4, "clients of the kill runs")
	flag.BoolVar(&o.keep, "keep", false, "leave the node up when a promise was broken")
	flag.BoolVar(&o.verbose, "v", false, "tell of each kill")
	flag.BoolVar(&list, "list", false, "list the runs and end")
	flag.Parse()
	if list {
		for _, r := range runs() {
			fmt.Printf("%-16s %6d %s\n", r.name, r.n, r.about)
		}
		return
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	broken, err := endure(ctx, o)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "endure:", err)
		os.Exit(2)
	}
	if broken > 0 {
		os.Exit(1)
	}
}

// endure does the chosen runs and returns how many promises were broken.
func endure(ctx context.Context, o options) (broken int, err error) {
	chosen, err := choose(o.only)
	if err != nil {
		return 0, err
	}
	w, err := newWorld(ctx, o)
	if err != nil {
		return 0, err
	}
	ctx, w.giveUp = context.WithCancel(ctx)
	defer w.giveUp()
	var table []string
	for _, r := range chosen {
		n := r.n
		if o.n > 0 {
			n = o.n
		}
		table = append(table, w.verdict(ctx, r, n))
		if ctx.Err() != nil {
			break
		}
	}
	if o.keep && len(w.broken) > 0 {
		w.say("node %s is left up", w.node.StateDir)
	} else {
		w.down()
	}
	fmt.Printf("\nseed %d\n%s\n", o.seed, strings.Join(table, "\n"))
	fmt.Printf("%d promises broken\n", len(w.broken))
	for _, b := range w.broken {
		fmt.Println("  -", b)
	}
	return len(w.broken), ctx.Err()
}

// verdict does one run and returns its line of the table.
func (w *world) verdict(ctx context.Context, r run, n int) string {
	w.say("%s, %d: %s", r.name, n, r.about)
	w.run, w.figures = r.name, nil
	before, begun := len(w.broken), time.Now()
	if err := r.do(w, ctx, n); err != nil {
		w.breaks("%v", err)
	}
	verdict := "kept"
	if bad := len(w.broken) - before; bad > 0 {
		verdict = fmt.Sprintf("%d BROKEN", bad)
	}
	return fmt.Sprintf("%-16s %6d %-10s %7.1f s  %s", r.name, n, verdict, time.Since(begun).Seconds(), strings.Join(w.figures, "; "))
}

func choose(names string) ([]run, error) {
	if names == "" {
		return runs(), nil
	}
	var out []run
	for _, name := range strings.Split(names, ",") {
		i := slices.IndexFunc(runs(), func(r run) bool { return r.name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no run %q: see -list", name)
		}
		out = append(out, runs()[i])
	}
	return out, nil
}
