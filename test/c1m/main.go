// Package c1m starts a million simulated containers on thousands of simulated agents and shows how long three real managers take.
//
//	go run ./test/bench c1m                                                   # 5,000 agents, 1,000 services of 1,000 replicas
//	go run ./test/bench c1m -agents 100 -services 10 -replicas 1000
//	go run ./test/bench c1m -kill-leader                                      # cut off and ended in the middle; started again later
//	go run ./test/bench c1m -agents 1000 -services 100 -cpuprofile /tmp/c1m   # for go tool pprof
//
// The managers are whole: Raft over mutual TLS on loopback TCP, bbolt with fsync, encrypted logs and snapshots. The agents speak the product's
// session protocol over gRPC, on connections within the process whose certificates are the ones the cluster's CA issued to them; only the
// handshake is left out. Their containers are entries of a map that take a while to prepare and to start. All of it shares one
// process, so that its CPU time is that of the whole cluster.
//
// It prints a line a second (tasks created, placed, running; CPU; memory), and when the API shows everything running, a checker of its own
// reads all tasks through the API and all containers from the agents: each slot exactly once, no container twice, no node
// over its capacity, the managers' stores equal.
//
// Files: main.go (flags, order of events), managers.go, link.go (connections), agent.go and fleet.go (simulated nodes), curve.go, check.go.
package c1m

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"syscall"
	"time"
)

// options of a run.
type options struct {
	agents, services, replicas int
	kill                       bool
	prepare                    time.Duration
	start                      time.Duration
	limit                      time.Duration
	gc                         int
	memory                     int64
	dir                        string
	cpu                        string
	mem                        string
	timing                     int
	verbose                    bool
}

// Main runs the program with its command line.
func Main(args []string) error {
	var o options
	fs := flag.NewFlagSet("c1m", flag.ContinueOnError)
	fs.IntVar(&o.agents, "agents", 5000, "simulated nodes")
	fs.IntVar(&o.services, "services", 1000, "services to create")
	fs.IntVar(&o.replicas, "replicas", 1000, "replicas of each")
	fs.BoolVar(&o.kill, "kill-leader", false, "cut the leader off and end it when half of the tasks run")
	fs.DurationVar(&o.prepare, "prepare", 100*time.Millisecond, "how long a container takes to be prepared")
	fs.DurationVar(&o.start, "start", 50*time.Millisecond, "how long it takes to start")
	fs.DurationVar(&o.limit, "limit", 30*time.Minute, "give up after this time")
	fs.IntVar(&o.gc, "gc", 400, "GOGC of the process")
	fs.Int64Var(&o.memory, "memory", 10240, "MiB beyond which the collector works harder")
	fs.StringVar(&o.dir, "dir", "", "directory of the managers' disks (default: a temporary one)")
	fs.StringVar(&o.cpu, "cpuprofile", "", "write CPU profiles to this path with .sessions (until all sessions stand) and .tasks (until all containers run)")
	fs.StringVar(&o.mem, "memprofile", "", "write a heap profile at the end")
	fs.IntVar(&o.timing, "raft-timing", 4, "the managers' election times as multiples of the defaults: here they share their processors with all nodes")
	fs.BoolVar(&o.verbose, "v", false, "show the managers' log")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if o.timing < 1 || o.agents < 1 || o.services < 1 || o.replicas < 1 {
		return errors.New("c1m: agents, services, replicas and raft-timing must be at least 1")
	}
	debug.SetGCPercent(o.gc)
	debug.SetMemoryLimit(o.memory << 20)
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	ctx, cancel = context.WithTimeout(ctx, o.limit)
	defer cancel()
	return run(ctx, o)
}

func run(ctx context.Context, o options) (err error) {
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "c1m-"); err != nil {
			return err
		}
		defer os.RemoveAll(o.dir)
	}
	log := slog.New(slog.DiscardHandler)
	if o.verbose {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	c, err := newCluster(ctx, o.dir, o.timing, log)
	if err != nil {
		return err
	}
	defer c.stop()
	f := newFleet(c, o)
	defer f.stop()
	began := time.Now()
	if err := f.join(ctx); err != nil {
		return err
	}
	fmt.Printf("%d nodes joined in %v\n", o.agents, time.Since(began).Round(time.Millisecond))
	stop, err := profile(o.cpu, ".sessions")
	if err != nil {
		return err
	}
	began = time.Now()
	used := cpuTime()
	f.run()
	err = f.awaitSessions(ctx)
	stop()
	if err != nil {
		return err
	}
	fmt.Printf("%d sessions stood after %v, CPU %v; %s\n", o.agents, time.Since(began).Round(time.Millisecond), (cpuTime() - used).Round(time.Millisecond), usage())
	stop, err = profile(o.cpu, ".tasks")
	if err != nil {
		return err
	}
	err = fill(ctx, c, f, o)
	stop()
	if err != nil {
		return err
	}
	if o.mem != "" {
		if err := heapProfile(o.mem); err != nil {
			return err
		}
	}
	return check(ctx, c, f, o)
}

func profile(path, part string) (stop func(), err error) {
	if path == "" {
		return func() {}, nil
	}
	out, err := os.Create(path + part)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(out); err != nil {
		return nil, err
	}
	return func() { pprof.StopCPUProfile(); _ = out.Close() }, nil
}

func heapProfile(path string) error {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	runtime.GC()
	return pprof.WriteHeapProfile(out)
}
