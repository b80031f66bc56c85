package control_test

import (
	"strings"
	"testing"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// A job as docker's clients see it: defaults, iterations from 0 with every update, slots from 0, tasks that are wanted to complete.
func TestJobs(t *testing.T) {
	f := setup(t)
	const spec = `{"Name":"mig","TaskTemplate":{"ContainerSpec":{"Image":"i:1"}},"Mode":{"ReplicatedJob":{"MaxConcurrent":2,"TotalCompletions":3}}}`
	id := f.create(spec)
	f.create(`{"Name":"one","TaskTemplate":{"ContainerSpec":{"Image":"i:1"}},"Mode":{"ReplicatedJob":{}}}`)
	if j := f.service("one").Spec.Mode.ReplicatedJob; *j.MaxConcurrent != 1 || *j.TotalCompletions != 1 {
		t.Errorf("defaults: %d at once, %d in all", *j.MaxConcurrent, *j.TotalCompletions)
	}
	first := f.service("mig")
	if st := first.JobStatus; st == nil || st.JobIteration.Index != 0 || st.LastExecution.IsZero() {
		t.Fatalf("job status: %+v", st)
	}
	if _, err := f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: "mig", Version: first.Version.Index, SpecJson: []byte(spec)}); err != nil {
		t.Fatal(err)
	}
	if svc := f.service("mig"); svc.JobStatus.JobIteration.Index != 1 || svc.UpdateStatus != nil {
		t.Errorf("after the same spec again: %+v, update status %v", svc.JobStatus, svc.UpdateStatus)
	}
	f.put(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: &api.TaskCreate{ServiceId: id, Revision: 2, Items: []*api.TaskCreate_Item{
		{Slot: 1, Desired: uint32(api.TaskRunning), Generation: 1}, {Slot: 2, Desired: uint32(api.TaskRunning), Generation: 1}}}}})
	one, two := api.TaskID(id, 1, "", 1), api.TaskID(id, 2, "", 1)
	f.put(&api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: &api.TaskPlacement{TaskIds: []string{one, two}, NodeIds: []string{f.node[1], f.node[1]}}}})
	report := func(task string, state api.TaskState) {
		f.put(&api.Change{Kind: &api.Change_ReportTask{ReportTask: &api.TaskReport{TaskId: task, NodeId: f.node[1], State: uint32(state), Time: 7}}})
	}
	report(one, api.TaskComplete)
	report(two, api.TaskRunning)
	o, err := f.srv.ListServices(t.Context(), &api.ListRequest{Status: true, Filters: filter("mode", "replicated-job", "name", "mig")})
	if st := list[swarm.Service](f, o, err)[0].ServiceStatus; st.RunningTasks != 1 || st.DesiredTasks != 2 || st.CompletedTasks != 1 {
		t.Errorf("status %+v, want 1 of 2 running, 1 completed", st)
	}
	task, err := f.srv.GetTask(t.Context(), &api.GetRequest{Ref: one})
	if got := get[swarm.Task](f, task, err); got.Slot != 0 || got.DesiredState != "complete" || got.JobIteration == nil || got.JobIteration.Index != 1 {
		t.Errorf("task: slot %d, wanted %s, iteration %v", got.Slot, got.DesiredState, got.JobIteration)
	}
	for _, tc := range []struct{ spec, want string }{
		{`{"Name":"x","TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"GlobalJob":{}},"UpdateConfig":{"Parallelism":1}}`, "not supported for jobs"},
		{`{"Name":"x","TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"ReplicatedJob":{"MaxConcurrent":0}}}`, "Mode.ReplicatedJob.MaxConcurrent = 0: want 1 to"},
		{`{"Name":"x","TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"ReplicatedJob":{"TotalCompletions":9000000000}}}`, "more than the limit"},
	} {
		if _, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: []byte(tc.spec)}); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.spec, err, tc.want)
		}
	}
}
