package orchestrator

import (
	"context"
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
)

// BenchmarkCluster creates services on 1,000 nodes until every task is placed, then lets one task after the other die and be replaced,
// through the store and all controllers, without Raft.
func BenchmarkCluster(b *testing.B) {
	for _, shape := range [][2]int{{100, 100}, {10, 1000}, {1, 10_000}, {1, 100_000}, {1000, 1000}} {
		services, replicas := shape[0], uint64(shape[1])
		b.Run(fmt.Sprintf("create/%dx%d", services, replicas), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				sc := benchCluster(b, services, replicas)
				b.StartTimer()
				sc.settle()
			}
			b.ReportMetric(float64(services)*float64(replicas)*float64(b.N)/b.Elapsed().Seconds(), "tasks/s")
		})
		b.Run(fmt.Sprintf("replace/%dx%d", services, replicas), func(b *testing.B) {
			sc := benchCluster(b, services, replicas)
			sc.settle()
			i := 0
			for b.Loop() {
				i++
				sc.report(sc.benchTask(uint64(i)%replicas), api.TaskFailed, "")
				sc.settle()
			}
		})
	}
}

// BenchmarkOrchestrator is the orchestrator's own share of the CPU: its steps while services come up until all tasks run, and what it takes
// to decide what becomes of one that failed.
func BenchmarkOrchestrator(b *testing.B) {
	for _, shape := range [][2]int{{100, 1000}, {1, 100_000}, {1000, 1000}} {
		services, replicas := shape[0], uint64(shape[1])
		b.Run(fmt.Sprintf("%dx%d", services, replicas), func(b *testing.B) {
			for b.Loop() {
				sc := benchCluster(b, services, replicas)
				m := sc.measure()
				sc.settle()
				for _, t := range sc.tasks() {
					sc.report(t, api.TaskRunning, "")
					if t.Slot%1000 == 0 {
						sc.settle()
					}
				}
				sc.settle()
				b.ReportMetric(float64(m.cpu.Nanoseconds())/float64(services)/float64(replicas), "cpu-ns/task")
				m.steps = nil
				for i := range uint64(2000) {
					sc.report(sc.benchTask(1+i*7%replicas), api.TaskFailed, "")
					sc.settle()
				}
				slices.Sort(m.steps)
				b.ReportMetric(float64(m.steps[len(m.steps)/2].Nanoseconds()), "p50-ns/decision")
				b.ReportMetric(float64(m.steps[len(m.steps)*99/100].Nanoseconds()), "p99-ns/decision")
			}
		})
	}
}

func benchCluster(b *testing.B, services int, replicas uint64) *script {
	sc := &script{world: newWorld(b), specs: map[string]*swarm.ServiceSpec{}, nodes: map[string]*api.NodeRecord{}}
	for i := range 1000 {
		sc.node(fmt.Sprint("n", i), []string{"ready", "mem=640G"})
	}
	sc.settle()
	for i := range services {
		sc.service(fmt.Sprint("s", i), []string{fmt.Sprint("replicas=", replicas), "mem=64M", "delay=0s"})
	}
	return sc
}

func (sc *script) benchTask(slot uint64) (t *store.Task) {
	sc.view(func(tx store.ReadTx) {
		ts := tx.TasksBySlot("s0", max(1, slot), "")
		t = ts[len(ts)-1]
	})
	return t
}

// measured is a controller whose steps are timed.
type measured struct {
	loop.Controller
	cpu   time.Duration
	steps []time.Duration // those that decided something
}

func (m *measured) Step(view store.ReadTx, dirty loop.Keys, now time.Time) (loop.Changes, time.Time) {
	before := processCPU()
	changes, wake := m.Controller.Step(view, dirty, now)
	spent := processCPU() - before
	m.cpu += spent
	if len(changes) > 0 {
		m.steps = append(m.steps, spent)
	}
	return changes, wake
}

// measure replaces the orchestrator by one whose steps are timed.
func (sc *script) measure() *measured {
	m := &measured{Controller: New()}
	d := &driven{Driver: loop.NewDriver(sc.store, m), watcher: sc.store.Watch(m.Kinds()...)}
	sc.loops[0].watcher.Close()
	sc.loops[0] = d
	if _, err := d.Round(context.Background(), sc.now.Add(-time.Hour)); err != nil {
		sc.t.Fatal(err)
	}
	return m
}

// processCPU is user and system time of the process; one goroutine works at a time.
func processCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
