// Command linear checks that the cluster's API is linearizable while managers are killed, stopped, cut off and deprived of their disks.
//
//	go run ./test/linear -seed 7 -minutes 10 -managers 3
//	go run ./test/linear -seed 7 -minutes 10 -managers 5 -plan    # prints the faults of that run and ends
//
// It needs root (and mkfs.ext4 for -disk). Clients create, read, list, update with a version, and remove services without replicas, configs and
// networks by name, and set labels of nodes, at all managers' sockets at random; right after every fourth acknowledged write every manager
// is read. Meanwhile test/nemesis carries out the plan of the seed, a service with tasks is scaled, and every task list is checked. What a
// client asked and got becomes a history; a write that ended with an error other than a refusal may have happened at any later time.
// At the end everything is healed, every manager leads once and is read: what it answers goes into the history, too, and all must answer
// the same. The history is partitioned by object and checked with porcupine. Then every task that is called running must be a
// live process on its node, and the reverse.
//
// The exit code is 1 when a promise was broken; history and porcupine's picture of the objects concerned are kept in -out then.
// Files: objects.go (what is written), clients.go (who writes), history.go (the model), tasks.go (invariants of tasks), finish.go.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"skein/test/nemesis"
)

// options of a run.
type options struct {
	name     string
	binary   string
	managers int
	disk     int
	length   time.Duration
	seed     uint64
	faults   string
	clients  int
	rate     int
	out      string
	keep     bool
}

func main() {
	var o options
	var minutes float64
	var plan bool
	flag.StringVar(&o.name, "name", "lin", "name of the development cluster")
	flag.StringVar(&o.binary, "binary", "", "the skein executable (default: build it)")
	flag.IntVar(&o.managers, "managers", 3, "number of managers")
	flag.IntVar(&o.disk, "disk", 256, "MiB of each manager's own disk; 0: none, and no faults of disks")
	flag.Float64Var(&minutes, "minutes", 10, "length of the run")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()%100000), "seed of the faults and of what the clients do")
	flag.StringVar(&o.faults, "faults", "", "faults to choose from, separated by commas (default: all)")
	flag.IntVar(&o.clients, "clients", 20, "number of clients")
	flag.IntVar(&o.rate, "rate", 300, "requests a second of all clients together, at most")
	flag.StringVar(&o.out, "out", "", "directory for the history of a run that failed (default: a new one)")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster up when a promise was broken")
	flag.BoolVar(&plan, "plan", false, "print the faults of the seed and end")
	flag.Parse()
	o.length = time.Duration(minutes * float64(time.Minute))
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	broken, err := start(ctx, o, plan)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "linear:", err)
		os.Exit(2)
	}
	if broken > 0 {
		os.Exit(1)
	}
}

func start(ctx context.Context, o options, planOnly bool) (int, error) {
	among, err := nemesis.Kinds(o.faults)
	if err != nil {
		return 0, err
	}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil && o.disk > 0 && !planOnly {
		return 0, errors.New("-disk needs mkfs.ext4 (Debian: apt-get install e2fsprogs); -disk 0 does without disks")
	}
	plan := nemesis.Plan(o.seed, o.length, o.disk > 0, among...)
	fmt.Printf("seed %d: %d faults\n", o.seed, len(plan))
	for _, s := range plan {
		fmt.Println(" ", s)
	}
	if planOnly {
		return 0, nil
	}
	return run(ctx, o, plan)
}

// run does one run and returns how many promises were broken.
func run(ctx context.Context, o options, plan []nemesis.Step) (broken int, err error) {
	rig, err := nemesis.NewRig(ctx, nemesis.Options{Name: o.name, Managers: o.managers, DiskMiB: o.disk, Binary: o.binary})
	if err != nil {
		return 0, err
	}
	w := newWorld(rig, o)
	defer func() {
		if o.keep && w.brokenPromises() > 0 {
			rig.Say("cluster %s is left up", o.name)
		} else if cerr := rig.Close(); cerr != nil {
			w.violate("%v", cerr)
		}
		broken = w.brokenPromises()
		rig.Say("%d promises broken (seed %d)", broken, o.seed)
	}()
	if err := w.deploy(ctx); err != nil {
		return 0, err
	}
	load, stop := context.WithCancel(ctx)
	done := w.startClients(load)
	nerr := nemesis.New(rig).Run(ctx, plan)
	stop()
	<-done
	if nerr != nil {
		w.violate("a fault could not be made or undone: %v", nerr)
	}
	w.finish(ctx)
	w.judge(o)
	return 0, nil
}
