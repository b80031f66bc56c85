// Command bench measures and prints one table: wall times (min, median, p95) and CPU. It needs root.
//
//	go run ./test/bench -name spd
//	go run ./test/bench -name spd -only run,scale -rounds 100
//	go run ./test/bench -name spd -only scale -profile /tmp/scale   # perf record of all nodes while it runs
//	go run ./test/bench -only supervisor,oci,crowd -rounds 60 -crun /tmp/crun-new
//	go run ./test/bench c1m                                         # a million simulated containers: package test/c1m, flags of its own
//	go run ./test/bench net                                         # the overlay network: package test/netbench, flags of its own
//
// The steps supervisor, oci and crowd measure the runtime alone: containers like an engine makes them (all namespaces, default mounts, masks,
// devices, filter, limits) of a static program that ends at once. What is compared takes turns in one run, once warm, once after 100 ms
// of rest, which is when kernels' locks are cold. supervisor: each step of a container and of an additional process, by one client, with
// a supervisor of a few MiB and one of 1 GiB of heap. oci: the commands of skein-oci against crun and runc where they are installed, and
// against those that -crun and -runc name; on hybrid hosts all of them without the v2 side, which new crun refuses. crowd: a thousand at once.
//
// The steps task-memory, task-snapshot and commit measure the managers' store in this process: -million tasks of 1,000 services on 5,000 nodes,
// written by 500 as controllers write them and reported running with a container's id. Memory is the live heap after a collection; CPU is
// that of the whole process, which for commit holds all three managers, their logs on the disk of $TMPDIR.
//
// The others start a development cluster of three managers, taken down at the end, and measure it through its API; CPU is that of
// everything in the nodes' cgroups: daemons, supervisors, containers.
//
// Files: runtime.go (supervisor, crowd), oci.go (commands), cluster.go (cluster, images, CPU and memory counters), container.go (one node),
// service.go (services), store.go (the managers' store), table.go.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"skein/test/c1m"
	"skein/test/netbench"
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
	crowd   int
	crun    string
	runc    string
	million int
}

// step is one measurement.
type step struct {
	name  string
	what  string
	alone bool // needs no cluster
	run   func(*bench, context.Context) error
}

func steps() []step {
	return []step{
		{"supervisor", "one container after the other, with small and large heap; processes in a container", true, (*bench).supervisors},
		{"oci", "OCI commands", true, (*bench).oci},
		{"crowd", "containers at once", true, (*bench).crowd},
		{"task-memory", "the store's memory, log and CPU per running task", true, (*bench).taskMemory},
		{"task-snapshot", "a snapshot of all tasks: bytes, time, entries meanwhile; and back", true, (*bench).taskSnapshot},
		{"commit", "tasks through three managers: raft over loopback TCP, fsync on", true, (*bench).commits},
		{"memory", "idle memory of daemons and supervisors", false, (*bench).idle},
		{"run", "run --rm IMAGE true, networks none and bridge", false, (*bench).runs},
		{"exec", "exec in a running container", false, (*bench).execs},
		{"density", "memory per idle container", false, (*bench).density},
		{"scale", "service scale 1→n until all run", false, (*bench).scale},
		{"update", "rolling update of 10 tasks, 2 at a time", false, (*bench).update},
		{"failover", "a killed node's tasks run elsewhere", false, (*bench).failover},
	}
}

func main() {
	var err error
	switch { // what it starts itself as
	case len(os.Args) > 1 && os.Args[1] == "c1m":
		err = c1m.Main(os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == "net":
		err = netbench.Main(os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == "supervisor":
		err = supervise(os.Args[2:])
	case len(os.Args) == 5 && os.Args[1] == hiddenWord:
		err = hidden(context.Background(), os.Args[2], os.Args[3], os.Args[4])
	default:
		err = byFlags()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// byFlags reads the flags and measures.
func byFlags() error {
	var o options
	flag.StringVar(&o.name, "name", "bench", "name of the development cluster")
	flag.StringVar(&o.binary, "binary", "", "the skein executable (default: build it)")
	flag.StringVar(&o.only, "only", "", "measurements to make, separated by commas (default: all)")
	flag.IntVar(&o.rounds, "rounds", 40, "rounds of short measurements")
	flag.IntVar(&o.tasks, "tasks", 100, "tasks of the scale measurement")
	flag.IntVar(&o.crowd, "crowd", 1000, "containers of the crowd measurement")
	flag.StringVar(&o.crun, "crun", "", "further crun executables, separated by commas")
	flag.StringVar(&o.runc, "runc", "", "further runc executables, separated by commas")
	flag.IntVar(&o.million, "million", 1_000_000, "tasks of task-memory, task-snapshot and commit, a multiple of 1,000")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster up")
	flag.StringVar(&o.profile, "profile", "", "record profiles with perf to this path, one file per measurement")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	return measure(ctx, o)
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
		if !s.alone && b.Cluster == nil {
			if err := b.up(ctx); err != nil {
				return err
			}
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
