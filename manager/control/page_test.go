package control_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// inPages asks for a list of pages of so many bytes, calling between after each.
func inPages(f *fixture, bytes uint32, list func(context.Context, *api.ListRequest) (*api.Objects, error), filters map[string]*api.StringList, between func()) (ids []string, pages int) {
	f.t.Helper()
	req := &api.ListRequest{Filters: filters, PageBytes: bytes}
	for {
		o, err := list(f.t.Context(), req)
		f.ok(err)
		pages++
		for _, raw := range o.Json {
			var v struct{ ID string }
			f.ok(json.Unmarshal(raw, &v))
			ids = append(ids, v.ID)
		}
		if o.Next == "" {
			return ids, pages
		}
		req.After = o.Next
		between()
	}
}

// Pages together are the whole list, in the same order, whatever their size; what comes and goes meanwhile takes nothing else away.
func TestPages(t *testing.T) {
	f := setup(t)
	var services []string
	for i := range 5 {
		services = append(services, f.create(fmt.Sprintf(`{"Name":"s%d","TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"Replicated":{"Replicas":20}}}`, i)))
	}
	global := f.create(`{"Name":"g","TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"Global":{}}}`)
	for _, id := range services {
		c := &api.TaskCreate{ServiceId: id, Revision: 1}
		for slot := range uint64(20) {
			for gen := range uint32(2) {
				c.Items = append(c.Items, &api.TaskCreate_Item{Slot: slot + 1, Desired: uint32(api.TaskRunning), Generation: gen + 1})
			}
		}
		f.put(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: c}})
	}
	f.put(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: &api.TaskCreate{ServiceId: global, Revision: 1, Items: []*api.TaskCreate_Item{
		{NodeId: f.node[0], Desired: uint32(api.TaskRunning), Generation: 1}, {NodeId: f.node[1], Desired: uint32(api.TaskRunning), Generation: 1}}}}})
	nothing := func() {}
	for name, tc := range map[string]struct {
		list    func(context.Context, *api.ListRequest) (*api.Objects, error)
		filters map[string]*api.StringList
		want    int
	}{
		"tasks": {f.srv.ListTasks, nil, 202}, "of a service": {f.srv.ListTasks, filter("service", "s3"), 40}, "of a global service": {f.srv.ListTasks, filter("service", global), 2},
		"of two services": {f.srv.ListTasks, filter("service", services[0], "service", services[2]), 80}, "of a node": {f.srv.ListTasks, filter("node", f.node[1]), 1},
		"services": {f.srv.ListServices, nil, 6}, "nodes": {f.srv.ListNodes, nil, 2}, "networks": {f.srv.ListNetworks, nil, 1}, "none": {f.srv.ListTasks, filter("name", "nope"), 0},
	} {
		whole, n := inPages(f, 0, tc.list, tc.filters, nothing)
		if len(whole) != tc.want || n != 1 {
			t.Errorf("%s: %d in %d answers, want %d in one", name, len(whole), n, tc.want)
		}
		for _, size := range []uint32{1, 3000, 1 << 20} {
			got, n := inPages(f, size, tc.list, tc.filters, nothing)
			if !slices.Equal(got, whole) {
				t.Errorf("%s in pages of %d bytes: %d in %d pages, want the %d of the whole list", name, size, len(got), n, len(whole))
			}
			if want := max(tc.want, 1); size == 1 && n != want {
				t.Errorf("%s: %d pages of one, want %d", name, n, want)
			}
		}
	}
	if _, err := f.srv.ListTasks(t.Context(), &api.ListRequest{After: "x", PageBytes: 1}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a place that is none: %v", err)
	}

	// A service with the tasks that were listed last is removed between two pages, another comes.
	whole, _ := inPages(f, 0, f.srv.ListTasks, nil, nothing)
	slices.Sort(services)
	removed, once := services[2], false
	got, _ := inPages(f, 3000, f.srv.ListTasks, nil, func() {
		if once {
			return
		}
		once = true
		_, err := f.srv.RemoveService(t.Context(), &api.RemoveRequest{Ref: removed})
		f.ok(err)
	})
	slices.Sort(got)
	if len(slices.Compact(got)) != len(got) {
		t.Error("a task is listed twice")
	}
	var rest []string
	f.st.View(func(tx store.ReadTx) {
		for _, id := range whole {
			if task := tx.Task(id); task != nil && task.ServiceID != removed {
				rest = append(rest, id)
			}
		}
	})
	for _, id := range rest {
		if _, found := slices.BinarySearch(got, id); !found {
			t.Errorf("task %s was there all the time and is not listed", id)
		}
	}
}

// The counts of a service come with it, so that nobody has to list a million tasks for them.
func TestServiceStatusInPages(t *testing.T) {
	f := setup(t)
	id := f.create(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"Replicated":{"Replicas":7}}}`)
	o, err := f.srv.ListServices(t.Context(), &api.ListRequest{Status: true, PageBytes: 10})
	if s := list[swarm.Service](f, o, err); len(s) != 1 || s[0].ID != id || s[0].ServiceStatus == nil || s[0].ServiceStatus.DesiredTasks != 7 {
		t.Errorf("services are %+v, want one with its status", s)
	}
}

// BenchmarkLists: a million tasks of a thousand services, services with their counts and all tasks, page by page.
func BenchmarkLists(b *testing.B) {
	f := setup(b)
	for i := range 1000 {
		id := f.create(fmt.Sprintf(`{"Name":"s%d","TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"Replicated":{"Replicas":1000}}}`, i))
		c := &api.TaskCreate{ServiceId: id, Revision: 1}
		for slot := range uint64(1000) {
			c.Items = append(c.Items, &api.TaskCreate_Item{Slot: slot + 1, Desired: uint32(api.TaskRunning), Generation: 1})
		}
		f.put(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: c}})
	}
	run := func(list func(context.Context, *api.ListRequest) (*api.Objects, error), status bool, want int) func(*testing.B) {
		return func(b *testing.B) {
			for b.Loop() {
				n := 0
				err := api.EachPage(b.Context(), &api.ListRequest{Status: status}, list, func(o [][]byte) error { n += len(o); return nil })
				if err != nil || n != want {
					b.Fatalf("%d objects, %v; want %d", n, err, want)
				}
			}
		}
	}
	b.Run("services", run(f.srv.ListServices, true, 1000))
	b.Run("tasks", run(f.srv.ListTasks, false, 1_000_000))
}
