package orchestrator

import (
	"fmt"
	"testing"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// BenchmarkCluster creates services on 1,000 nodes until every task is placed, then lets one task after the other die and be replaced,
// through the store and all controllers, without Raft.
func BenchmarkCluster(b *testing.B) {
	for _, shape := range [][2]int{{100, 100}, {10, 1000}, {1, 10_000}} {
		services, replicas := shape[0], uint64(shape[1])
		build := func(b *testing.B) *script {
			sc := &script{world: newWorld(b), specs: map[string]*swarm.ServiceSpec{}, nodes: map[string]*api.NodeRecord{}}
			for i := range 1000 {
				sc.node(fmt.Sprint("n", i), []string{"ready", "mem=64G"})
			}
			sc.settle()
			for i := range services {
				sc.service(fmt.Sprint("s", i), []string{fmt.Sprint("replicas=", replicas), "mem=64M", "delay=0s"})
			}
			return sc
		}
		b.Run(fmt.Sprintf("create/%dx%d", services, replicas), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				sc := build(b)
				b.StartTimer()
				sc.settle()
			}
			b.ReportMetric(float64(services)*float64(replicas)*float64(b.N)/b.Elapsed().Seconds(), "tasks/s")
		})
		b.Run(fmt.Sprintf("replace/%dx%d", services, replicas), func(b *testing.B) {
			sc := build(b)
			sc.settle()
			i := 0
			for b.Loop() {
				i++
				var t *store.Task
				sc.view(func(tx store.ReadTx) {
					ts := tx.TasksBySlot("s0", 1+uint64(i)%replicas, "")
					t = ts[len(ts)-1]
				})
				sc.report(t, api.TaskFailed, "")
				sc.settle()
			}
		})
	}
}
