package main

import (
	"math"
	"os"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/moby/moby/api/types/swarm"

	"skein/test/nemesis"
)

// TestSmoke is a short run: a kill, a stop and two cuts, then every manager leads once.
func TestSmoke(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: real clusters are left out")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces, mounts and cgroups")
	}
	plan := []nemesis.Step{
		{At: 500 * time.Millisecond, Kind: nemesis.Kill, Leader: true},
		{At: 3 * time.Second, Kind: nemesis.Stop, Leader: true, For: 3 * nemesis.Lease},
		{At: 5 * time.Second, Kind: nemesis.Cut, Pick: 1, For: time.Second},
		{At: 6 * time.Second, Kind: nemesis.CutIn, Leader: true, For: time.Second},
	}
	broken, err := run(t.Context(), options{name: "lis", managers: 3, seed: 1, clients: 10, rate: 150, out: t.TempDir()}, plan)
	if err != nil {
		t.Fatal(err)
	}
	if broken > 0 {
		t.Errorf("%d promises broken: see the output", broken)
	}
}

// event is one request of a written history, from and to in any unit.
type event struct {
	op, value, prior, result, read string
	from, to                       int64
}

func TestModel(t *testing.T) {
	const forever = math.MaxInt64
	for _, c := range []struct {
		name  string
		legal bool
		ops   []event
	}{
		{"create, read", true, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opRead, "", "", resOK, "a", 3, 4}}},
		{"lost write", false, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opRead, "", "", resOK, "", 3, 4}}},
		{"stale read", false, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opUpdate, "b", "a", resOK, "", 3, 4}, {opRead, "", "", resOK, "a", 5, 6}}},
		{"read beside the update", true, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opUpdate, "b", "a", resOK, "", 3, 6}, {opRead, "", "", resOK, "a", 4, 5}}},
		{"there and back", false, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opUpdate, "b", "a", resOK, "", 3, 9}, {opRead, "", "", resOK, "b", 4, 5}, {opRead, "", "", resOK, "a", 6, 7}}},
		{"unknown create seen late", true, []event{{opCreate, "a", "", resUnknown, "", 1, forever}, {opRead, "", "", resOK, "", 3, 4}, {opRead, "", "", resOK, "a", 5, 6}}},
		{"unknown create seen and gone", false, []event{{opCreate, "a", "", resUnknown, "", 1, forever}, {opRead, "", "", resOK, "a", 3, 4}, {opRead, "", "", resOK, "", 5, 6}}},
		{"invented", false, []event{{opRead, "", "", resOK, "a", 1, 2}}},
		{"two updates from one version", false, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opUpdate, "b", "a", resOK, "", 3, 6}, {opUpdate, "c", "a", resOK, "", 3, 6}}},
		{"created twice", false, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opCreate, "b", "", resOK, "", 3, 4}}},
		{"exists before anybody made it", false, []event{{opCreate, "a", "", resExists, "", 1, 2}}},
		{"refused for no reason", false, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opUpdate, "b", "a", resStale, "", 3, 4}}},
		{"removed and made again", true, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opRemove, "", "", resOK, "", 3, 4}, {opUpdate, "c", "a", resMissing, "", 3, 8}, {opCreate, "b", "", resOK, "", 5, 6}}},
		{"not removed", false, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opRemove, "", "", resOK, "", 3, 4}, {opRead, "", "", resOK, "a", 5, 6}}},
		{"missing though it is there", false, []event{{opCreate, "a", "", resOK, "", 1, 2}, {opRemove, "", "", resMissing, "", 3, 4}}},
	} {
		var ops []porcupine.Operation
		for i, e := range c.ops {
			ops = append(ops, porcupine.Operation{ClientId: i, Input: input{Object: "config/x", Op: e.op, Value: e.value, Prior: e.prior},
				Output: output{e.result, e.read}, Call: e.from, Return: e.to})
		}
		if got := porcupine.CheckOperations(model(), ops); got != c.legal {
			t.Errorf("%s: linearizable %v, want %v", c.name, got, c.legal)
		}
	}
}

func TestTaskView(t *testing.T) {
	task := func(id, node string, slot int, desired, state swarm.TaskState) swarm.Task {
		return swarm.Task{ID: id, NodeID: node, Slot: slot, DesiredState: desired, Status: swarm.TaskStatus{State: state}}
	}
	run, stop := swarm.TaskStateRunning, swarm.TaskStateShutdown
	for _, c := range []struct {
		name        string
		first, then []swarm.Task
		bad         int
	}{
		{"runs and ends", []swarm.Task{task("a", "n", 1, run, run)}, []swarm.Task{task("a", "n", 1, stop, stop)}, 0},
		{"is replaced", []swarm.Task{task("a", "n", 1, run, run)}, []swarm.Task{task("a", "n", 1, stop, run), task("b", "m", 1, run, swarm.TaskStateAssigned)}, 0},
		{"runs again", []swarm.Task{task("a", "n", 1, stop, stop)}, []swarm.Task{task("a", "n", 1, stop, run)}, 1},
		{"moves", []swarm.Task{task("a", "n", 1, run, run)}, []swarm.Task{task("a", "m", 1, run, run)}, 1},
		{"twice in a slot", nil, []swarm.Task{task("a", "n", 1, run, run), task("b", "m", 1, run, run)}, 1},
		{"id twice", nil, []swarm.Task{task("a", "n", 1, stop, run), task("a", "n", 1, stop, run)}, 1},
		{"is wanted again", []swarm.Task{task("a", "n", 1, stop, run)}, []swarm.Task{task("a", "n", 1, run, run)}, 1},
	} {
		v := newTaskView()
		if bad := v.look(c.first); len(bad) > 0 {
			t.Errorf("%s: first %v", c.name, bad)
		}
		if bad := v.look(c.then); len(bad) != c.bad {
			t.Errorf("%s: %v, want %d complaints", c.name, bad, c.bad)
		}
	}
}
