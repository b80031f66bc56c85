// Command bench measures a real cluster through its API and prints one table: wall times (min, median, p95) and CPU of everything in the
// nodes' cgroups: daemons, supervisors, containers.
//
//	go run ./test/bench -name spd
//	go run ./test/bench -name spd -only run,scale -rounds 100
//	go run ./test/bench -name spd -only scale -profile /tmp/scale   # perf record of all nodes while it runs
//
// It needs root and starts its own development cluster of three managers, which it takes down at the end. The figures of a single
// runtime step (create, start, exec, delete) are printed by `SKEIN_FIGURES=100 go test ./runtime/supervisor -run TestFigures -v`.
//
// Files: cluster.go (cluster, images, CPU and memory counters), container.go (one node), service.go (services), table.go.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// options of a run.
type options struct {
	name    string
	binary  string
	only    string
	rounds  int
	tasks   int
	keep    bool
	profile string
}

// step is one measurement.
type step struct {
	name string
	what string
	run  func(*bench, context.Context) error
}

func steps() []step {
	return []step{
		{"memory", "idle memory of daemons and supervisors", (*bench).idle},
		{"run", "run --rm IMAGE true, networks none and bridge", (*bench).runs},
		{"exec", "exec in a running container", (*bench).execs},
		{"density", "memory per idle container", (*bench).density},
		{"scale", "service scale 1→n until all run", (*bench).scale},
		{"update", "rolling update of 10 tasks, 2 at a time", (*bench).update},
		{"failover", "a killed node's tasks run elsewhere", (*bench).failover},
	}
}

func main() {
	var o options
	flag.StringVar(&o.name, "name", "bench", "name of the development cluster")
	flag.StringVar(&o.binary, "binary", "", "the skein executable (default: build it)")
	flag.StringVar(&o.only, "only", "", "measurements to make, separated by commas (default: all)")
	flag.IntVar(&o.rounds, "rounds", 40, "rounds of short measurements")
	flag.IntVar(&o.tasks, "tasks", 100, "tasks of the scale measurement")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster up")
	flag.StringVar(&o.profile, "profile", "", "record profiles with perf to this path, one file per measurement")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := measure(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, o options) (err error) {
	b, err := newBench(ctx, o)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := b.close(); err == nil {
			err = cerr
		}
	}()
	want := strings.Split(o.only, ",")
	for _, s := range steps() {
		if o.only != "" && !contains(want, s.name) {
			continue
		}
		fmt.Printf("\n%s: %s\n", s.name, s.what)
		stop, err := b.record(s.name)
		if err != nil {
			return err
		}
		err = s.run(b, ctx)
		stop()
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}
