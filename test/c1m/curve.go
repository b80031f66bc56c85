package c1m

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime/metrics"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

const (
	createAtOnce = 16 // services, by as many clients
	sampleOf     = 50 // of so many services one is counted for the curve
	awayFor      = 5 * time.Second
	pollEvery    = 250 * time.Millisecond
	latePeriod   = 10 * time.Millisecond
)

// fill creates the services and returns when the API shows all tasks running.
func fill(ctx context.Context, c *cluster, f *fleet, o options) error {
	total := int64(o.services) * int64(o.replicas)
	began, cpu := time.Now(), cpuTime()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 2)
	go func() {
		if err := createAll(ctx, c, o); err != nil {
			failed <- err
		}
	}()
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		for f.running.Load() < total || !allShown(ctx, c, total) {
			if pause(ctx, pollEvery) != nil {
				return
			}
		}
	}()
	curve := newCurve(c, f, began, cpu)
	go curve.watch(ctx)
	fmt.Println("seconds   created    placed   running  started  sessions  CPU-s      RSS     heap     late")
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	killed := !o.kill
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failed:
			return err
		case err := <-c.fatal:
			return err
		case <-tick.C:
			curve.print(o)
			if !killed && f.running.Load() >= total/2 {
				killed = true
				fmt.Println("-- the leader is killed")
				go func() {
					if err := c.killLeader(ctx, awayFor); err != nil && ctx.Err() == nil {
						failed <- err
					}
				}()
			}
		case <-shown:
			if ctx.Err() != nil {
				return ctx.Err()
			}
			curve.print(o)
			wall, used := time.Since(began), cpuTime()-cpu
			fmt.Printf("%d tasks on %d nodes run after %v: %.0f/s; CPU %v, %.1f µs per task, %s; %d sessions were lost\n", total, o.agents, wall.Round(time.Millisecond),
				float64(total)/wall.Seconds(), used.Round(time.Millisecond), float64(used.Microseconds())/float64(total), usage(), f.losses.Load())
			return nil
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// createAll creates the services as users do: several at once, through any manager, and again when a manager went meanwhile.
func createAll(ctx context.Context, c *cluster, o options) error {
	next := make(chan int)
	done := make(chan error, createAtOnce)
	for w := range createAtOnce {
		go func() {
			var err error
			for i := range next {
				if err == nil {
					err = create(ctx, c, i+w, i, o.replicas)
				}
			}
			done <- err
		}()
	}
	for i := range o.services {
		next <- i
	}
	close(next)
	for range createAtOnce {
		if err := <-done; err != nil {
			return err
		}
	}
	return nil
}

func serviceName(i int) string { return fmt.Sprintf("svc%04d", i) }

func create(ctx context.Context, c *cluster, through, i, replicas int) error {
	spec := fmt.Appendf(nil, `{"Name":%q,"TaskTemplate":{"ContainerSpec":{"Image":"registry.example/app:1","Env":["A=1","B=2"]},"Resources":{"Reservations":{"NanoCPUs":%d,"MemoryBytes":%d}}},"Mode":{"Replicated":{"Replicas":%d}}}`,
		serviceName(i), taskCPU, taskMemory, replicas)
	for {
		members := c.members()
		_, err := members[through%len(members)].mgr.Control().CreateService(ctx, &api.CreateRequest{SpecJson: spec})
		if err == nil || strings.Contains(err.Error(), "already exists") {
			return nil
		}
		if ctx.Err() != nil || !retriable(err) {
			return fmt.Errorf("create %s: %w", serviceName(i), err)
		}
		through++
		if err := pause(ctx, pollEvery); err != nil {
			return err
		}
	}
}

// allShown asks the API of all managers in turn how many tasks run.
func allShown(ctx context.Context, c *cluster, total int64) bool {
	for _, m := range c.members() {
		o, err := m.mgr.Control().ListServices(ctx, &api.ListRequest{Status: true})
		if err != nil {
			continue
		}
		var running int64
		for _, b := range o.Json {
			var s swarm.Service
			if json.Unmarshal(b, &s) == nil && s.ServiceStatus != nil {
				running += int64(s.ServiceStatus.RunningTasks)
			}
		}
		return running == total
	}
	return false
}

// curve prints how far everything is.
type curve struct {
	c     *cluster
	f     *fleet
	began time.Time
	cpu   time.Duration
	late  atomic.Int64 // the greatest delay of a timer since the last line
}

func newCurve(c *cluster, f *fleet, began time.Time, cpu time.Duration) *curve {
	return &curve{c: c, f: f, began: began, cpu: cpu}
}

// watch measures how late this process's goroutines run, until ctx ends.
func (v *curve) watch(ctx context.Context) {
	for {
		at := time.Now().Add(latePeriod)
		if pause(ctx, latePeriod) != nil {
			return
		}
		if late := int64(time.Since(at)); late > v.late.Load() {
			v.late.Store(late)
		}
	}
}

// print counts in the first manager's store; with many services a share of them stands for all.
func (v *curve) print(o options) {
	every := 1
	if o.services >= 10*sampleOf {
		every = sampleOf
	}
	var created, placed, running int
	v.c.members()[0].mgr.Store().View(func(tx store.ReadTx) {
		for i := 0; i < o.services; i += every {
			svc := tx.ServiceByName(serviceName(i))
			if svc == nil {
				continue
			}
			for _, t := range tx.TasksByService(svc.Id) {
				created++
				if t.State >= api.TaskAssigned {
					placed++
				}
				if t.State == api.TaskRunning {
					running++
				}
			}
		}
	})
	rss, heap := memory()
	fmt.Printf("%7.1f %9d %9d %9d %8d %9d %6.1f %5d MiB %4d MiB %5d ms\n", time.Since(v.began).Seconds(), created*every, placed*every, running*every,
		v.f.running.Load(), v.f.sessions.Load(), (cpuTime() - v.cpu).Seconds(), rss>>20, heap>>20, v.late.Swap(0)/1e6)
}

// usage is the memory of this process, as text.
func usage() string {
	rss, heap := memory()
	return fmt.Sprintf("RSS %d MiB, heap %d MiB", rss>>20, heap>>20)
}

func memory() (rss, heap uint64) {
	var size, resident uint64
	if b, err := os.ReadFile("/proc/self/statm"); err == nil {
		_, _ = fmt.Sscan(string(b), &size, &resident)
	}
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(s)
	return resident * uint64(os.Getpagesize()), s[0].Value.Uint64()
}

func cpuTime() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
