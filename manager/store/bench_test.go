package store_test

import (
	"fmt"
	"testing"
	"time"

	"skein/manager/api"
	"skein/manager/store"
)

// BenchmarkPlace applies entries of 1,000 placements each, with one network and a gateway address per task.
func BenchmarkPlace(b *testing.B) {
	s := store.New(nil)
	index := uint64(0)
	apply := func(changes ...*api.Change) {
		entry, err := s.EncodeEntry(time.Unix(1_800_000_000, 0).UnixNano(), []*api.Txn{{Changes: changes}})
		if err != nil {
			b.Fatal(err)
		}
		index++
		for _, err := range s.Apply(index, entry) {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
	const nodes, per = 1000, 1000
	for i := range nodes {
		apply(putNode(fmt.Sprint("node", i), "host"))
	}
	apply(putNetwork(&api.NetworkRecord{Id: "net", Name: "net", Subnet4: "172.16.0.0/12"}), putService("s1", spec("app", on("net"))))
	slot := uint64(0)
	for b.Loop() {
		create := &api.TaskCreate{ServiceId: "s1", Revision: 1}
		place := &api.TaskPlacement{}
		for i := range per {
			slot++
			create.Items = append(create.Items, &api.TaskCreate_Item{Slot: slot, Generation: 1})
			place.TaskIds = append(place.TaskIds, api.TaskID("s1", slot, "", 1))
			place.NodeIds = append(place.NodeIds, fmt.Sprint("node", i))
		}
		apply(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: create}}, &api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: place}})
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/per, "ns/task")
}
