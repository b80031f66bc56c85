// Package netbench measures the overlay network alone: no managers, no containers' processes. It needs root.
//
//	go run ./test/bench net                                     # all parts, about four minutes
//	go run ./test/bench net -only paths -rounds 40 -slice 100ms
//	go run ./test/bench net -only setup -containers 1200
//	go run ./test/bench net -only spread -nodes 50 -endpoints 5000
//
// Nodes, containers and a client in another subnet are network namespaces; their networks are made by the product's driver. Nodes and client are
// cabled directly: each hop of a packet is one pass of the kernel's softirq on the same CPU, and a question with its answer that takes more than
// about ten of them measures the scheduler. Everything runs on one kernel: figures include client, server and all nodes, so that
// only ratios of one run mean something. The paths of a metric take turns in short slices; printed are the best slice, the median, CPU
// time per operation, and the ratios that have bars. On a busy machine trust those of the least p50 and of CPU time.
//
//	paths   request/response, new connections, one stream, for each way from client to server (list: paths.go)
//	setup   a container's legs, addresses and DNS, one after the other up to -containers; with rests, from the warm pool
//	change  one endpoint of -endpoints leaves and comes back, as applied by the kernel
//	spread  the same from a task's exit until -nodes simulated nodes applied it, over real sessions
//	dns     questions answered in a container: names of the cluster, one and many at once
package netbench

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options of a run.
type options struct {
	only       string
	rounds     int
	metrics    string
	ways       string
	slice      time.Duration
	containers int
	nodes      int
	endpoints  int
	changes    int
	profile    string
}

// Main measures as the arguments say.
func Main(args []string) error {
	var o options
	fs := flag.NewFlagSet("net", flag.ContinueOnError)
	fs.StringVar(&o.only, "only", "", "parts to measure, separated by commas (default: all)")
	fs.IntVar(&o.rounds, "rounds", 15, "rounds over all paths")
	fs.StringVar(&o.metrics, "metrics", "rr,udp,conn,stream", "metrics of paths")
	fs.StringVar(&o.ways, "ways", "", "only ways with this in their name")
	fs.DurationVar(&o.slice, "slice", 200*time.Millisecond, "length of one slice of one path")
	fs.IntVar(&o.containers, "containers", 1200, "containers of setup")
	fs.IntVar(&o.nodes, "nodes", 50, "simulated nodes of spread")
	fs.IntVar(&o.endpoints, "endpoints", 5000, "endpoints of change and spread")
	fs.IntVar(&o.changes, "changes", 200, "changes of change and spread")
	fs.StringVar(&o.profile, "profile", "", "write a CPU profile of all parts to this file")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if o.profile != "" {
		f, err := os.Create(o.profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	return run(ctx, o)
}

type part struct {
	name string
	run  func(context.Context, *bench) error
}

var parts = []part{{"paths", paths}, {"setup", setup}, {"change", change}, {"spread", spread}, {"dns", queries}}

type bench struct {
	options
	dir string
	log *slog.Logger
}

func run(ctx context.Context, o options) error {
	want := strings.Split(o.only, ",")
	for _, w := range want {
		if w != "" && !slices.ContainsFunc(parts, func(p part) bool { return p.name == w }) {
			return fmt.Errorf("no part is called %q", w)
		}
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: makes network namespaces")
	}
	runtime.GOMAXPROCS(64) // threads that wait in the kernel keep their P: the scheduler is not what is measured
	for _, p := range parts {
		if o.only != "" && !slices.Contains(want, p.name) {
			continue
		}
		dir, err := os.MkdirTemp("", "skein-net")
		if err != nil {
			return err
		}
		b := &bench{options: o, dir: dir, log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))}
		fmt.Printf("\n%s (load %s)\n", p.name, loadAverage())
		err = errors.Join(p.run(ctx, b), os.RemoveAll(dir))
		fmt.Printf("  (load %s)\n", loadAverage())
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:2], " ")
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

// cpuTime is what this process and the kernel on its behalf have used.
func cpuTime() time.Duration {
	var r syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &r) // cannot fail for oneself
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func quantile[T int64 | float64 | time.Duration](sorted []T, q float64) T {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(float64(len(sorted))*q))]
}

// times prints the distribution of times.
func times(what string, all []time.Duration, cpu time.Duration) {
	s := slices.Sorted(slices.Values(all))
	fmt.Printf("  %-52s %5d  min %8s  p50 %8s  p90 %8s  p99 %8s  max %8s  mean %8s  CPU %8s\n", what, len(s), ms(quantile(s, 0)), ms(quantile(s, 0.5)),
		ms(quantile(s, 0.9)), ms(quantile(s, 0.99)), ms(quantile(s, 1)), ms(mean(s)), ms(cpu/time.Duration(max(1, len(s)))))
}

func mean(all []time.Duration) time.Duration {
	var sum time.Duration
	for _, d := range all {
		sum += d
	}
	return sum / time.Duration(max(1, len(all)))
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d)/1e6) }
