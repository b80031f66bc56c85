// Command truth breaks a development cluster and shows that every node's networks tell the truth again soon after, or that addresses are
// given once. See README.md.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// options of a run.
type options struct {
	name     string
	binary   string
	managers int
	workers  int
	hold     time.Duration // of each fault
	within   time.Duration // after healing
	rounds   int
	faults   string
	tasks    int // of the addresses' part
	kills    int
}

func main() {
	o := options{}
	flag.StringVar(&o.name, "name", "truth", "name of the development cluster")
	flag.StringVar(&o.binary, "binary", "", "the skein executable; empty: it is built")
	flag.IntVar(&o.managers, "managers", 3, "number of managers")
	flag.IntVar(&o.workers, "workers", 2, "number of workers")
	flag.DurationVar(&o.hold, "hold", 30*time.Second, "how long a partition or loss lasts")
	flag.DurationVar(&o.within, "within", 5*time.Second, "the promise: all agrees this long after healing")
	flag.IntVar(&o.rounds, "rounds", 1, "how often each fault")
	flag.StringVar(&o.faults, "faults", "", "faults, separated by commas; empty: all of "+names())
	flag.IntVar(&o.tasks, "tasks", 2000, "with `addresses`: tasks to make and kill")
	flag.IntVar(&o.kills, "kills", 30, "with addresses: leaders to kill meanwhile")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	part := run
	switch flag.Arg(0) {
	case "":
	case "addresses":
		part = runAddresses
	default:
		fmt.Fprintf(os.Stderr, "truth: there is no part %q: addresses, or none for the faults\n", flag.Arg(0))
		os.Exit(2)
	}
	broken, err := part(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "truth:", err)
		os.Exit(2)
	}
	if broken > 0 {
		os.Exit(1)
	}
}
