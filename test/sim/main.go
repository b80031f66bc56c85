// Command sim plays seeded histories of the whole control plane: go run ./test/sim --seeds 10000 --from 1. A seed that fails is printed with
// the command that plays it again and the end of its history.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"skein/test/sim/world"
)

func main() {
	seeds := flag.Uint64("seeds", 100, "how many histories")
	from := flag.Uint64("from", 1, "the first seed")
	busy := flag.Duration("busy", 60*time.Second, "virtual time for which users and faults go on")
	workers := flag.Int("workers", runtime.NumCPU(), "histories at the same time")
	trace := flag.Bool("trace", false, "tell the whole history of a failure, not only its end")
	keep := flag.Int("failures", 3, "stop after so many failures")
	flag.Parse()
	if !play(*from, *seeds, *busy, *workers, *keep, *trace) {
		os.Exit(1)
	}
}

func play(from, seeds uint64, busy time.Duration, workers, keep int, trace bool) bool {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) // then it tells how far it got
	defer stop()
	began := time.Now()
	var next, entries, events, tasks, terms, done atomic.Uint64
	var mu sync.Mutex
	failures := 0
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for {
				i := next.Add(1) - 1
				mu.Lock()
				over := i >= seeds || failures >= keep || ctx.Err() != nil
				mu.Unlock()
				if over {
					return
				}
				r := world.Run(world.Config{Seed: from + i, Busy: busy, Trace: trace})
				done.Add(1)
				entries.Add(uint64(r.Entries))
				events.Add(uint64(r.Events))
				tasks.Add(uint64(r.Tasks))
				terms.Add(uint64(r.Terms))
				if r.Err != nil {
					mu.Lock()
					failures++
					fmt.Printf("%s\nseed %d: %v\nagain: go run ./test/sim --seeds 1 --from %d --busy %v --trace\n", r.Trace, r.Seed, r.Err, r.Seed, busy)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	cpu := time.Duration(u.Utime.Nano() + u.Stime.Nano())
	fmt.Printf("%d histories from seed %d: %d failed; %d entries, %d events, %d tasks, %d terms; %v, %v of CPU\n",
		done.Load(), from, failures, entries.Load(), events.Load(), tasks.Load(), terms.Load(), time.Since(began).Round(time.Millisecond), cpu.Round(time.Millisecond))
	return failures == 0
}
