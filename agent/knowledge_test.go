package agent

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/agent/task"
	"skein/manager/api"
)

func assignments(u *api.AssignmentUpdate) *api.ManagerMessage {
	return &api.ManagerMessage{Kind: &api.ManagerMessage_Assignments{Assignments: u}}
}

func tableUpdate(u *api.TableUpdate) *api.ManagerMessage {
	return &api.ManagerMessage{Kind: &api.ManagerMessage_Table{Table: u}}
}

func TestMergeFindsGaps(t *testing.T) {
	k := newKnowledge()
	steps := []struct {
		name string
		m    *api.ManagerMessage
		bad  bool
	}{
		{"increment before anything", assignments(&api.AssignmentUpdate{Sequence: 2}), true},
		{"full", assignments(&api.AssignmentUpdate{Sequence: 1, Full: true, Set: []*api.Assignment{{TaskId: "a", SpecJson: []byte("{}")}, {TaskId: "b"}}}), false},
		{"next", assignments(&api.AssignmentUpdate{Sequence: 2, Removed: []string{"b"}}), false},
		{"repeated", assignments(&api.AssignmentUpdate{Sequence: 2}), true},
		{"gap", assignments(&api.AssignmentUpdate{Sequence: 4}), true},
		{"change of an unknown table", tableUpdate(&api.TableUpdate{Table: "mesh", Version: 3}), true},
		{"full table", tableUpdate(&api.TableUpdate{Table: "mesh", Version: 3, Full: true, Nodes: []*api.NodeEndpoint{{Index: 1}}}), false},
		{"its change", tableUpdate(&api.TableUpdate{Table: "mesh", Version: 4, Nodes: []*api.NodeEndpoint{{Index: 2}}, RemovedNodes: []uint32{1}}), false},
		{"ended: without a spec", assignments(&api.AssignmentUpdate{Sequence: 3, Set: []*api.Assignment{{TaskId: "a", Desired: 640, State: 576}}}), false},
	}
	for _, s := range steps {
		if err := k.merge(s.m); (err != nil) != s.bad {
			t.Errorf("%s: error %v, want one: %v", s.name, err, s.bad)
		}
	}
	if a := k.assignments["a"]; string(a.GetSpecJson()) != "{}" || a.Desired != 640 || len(k.assignments) != 1 {
		t.Errorf("assignments: %v", k.assignments)
	}
	if m := k.tabs["mesh"]; m.Version != 4 || len(m.Nodes) != 1 || m.Nodes[2] == nil {
		t.Errorf("mesh: %+v", m.Table)
	}
}

func TestTablesHandedOutDoNotChange(t *testing.T) {
	k := newKnowledge()
	merge := func(m *api.ManagerMessage) {
		t.Helper()
		if err := k.merge(m); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := k.tables(); ok {
		t.Error("tables before a manager said who this node is")
	}
	merge(&api.ManagerMessage{Kind: &api.ManagerMessage_Welcome{Welcome: &api.Welcome{NodeIndex: 7}}})
	merge(tableUpdate(&api.TableUpdate{Table: "mesh", Version: 1, Full: true, Endpoints: []*api.TaskEndpoint{{TaskId: "a"}}}))
	before, _ := k.tables()
	merge(tableUpdate(&api.TableUpdate{Table: "mesh", Version: 2, RemovedEndpoints: []string{"a"}}))
	after, _ := k.tables()
	if len(before.Mesh.Endpoints) != 1 || before.Mesh.Version != 1 || len(after.Mesh.Endpoints) != 0 || after.NodeIndex != 7 {
		t.Errorf("before %+v, after %+v", before.Mesh, after.Mesh)
	}
}

// Secrets stay in memory for as long as a task needs them, and never reach the disk.
func TestDependenciesStayInMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.journal")
	a := &Agent{cfg: Config{Log: slog.New(slog.DiscardHandler)}, known: newKnowledge()}
	a.tasks = task.New(task.Config{Report: func(*api.TaskReport) {}, Log: a.cfg.Log})
	var err error
	if a.file, err = openJournal(path, a.replay); err != nil {
		t.Fatal(err)
	}
	say := func(m *api.ManagerMessage) {
		t.Helper()
		if err := a.receive(m); err != nil {
			t.Fatal(err)
		}
	}
	secret := func(id string) {
		say(&api.ManagerMessage{Kind: &api.ManagerMessage_Dependencies{Dependencies: &api.DependencyUpdate{Set: []*api.DependencyRecord{{Id: id, Kind: "secret", Data: []byte("hunter2")}}}}})
	}
	secret("s1")
	secret("s2")
	say(assignments(&api.AssignmentUpdate{Sequence: 1, Full: true, Set: []*api.Assignment{{TaskId: "a", Dependencies: []string{"s1", "s2"}}, {TaskId: "b", Dependencies: []string{"s1"}}}}))
	if a.dependency("s1") == nil || a.dependency("s2") == nil {
		t.Error("a secret that is needed was forgotten")
	}
	say(assignments(&api.AssignmentUpdate{Sequence: 2, Removed: []string{"a"}}))
	if a.dependency("s1") == nil || a.dependency("s2") != nil {
		t.Errorf("after the removal of a: s1 %v, s2 %v", a.dependency("s1"), a.dependency("s2"))
	}
	if err := a.file.rewrite(a.everything()); err != nil {
		t.Fatal(err)
	}
	secret("s1")
	a.file.close()
	if b, err := os.ReadFile(path); err != nil || bytes.Contains(b, []byte("hunter2")) || len(b) == 0 {
		t.Errorf("the journal of %d bytes holds the secret: %v", len(b), err)
	}
}

// reload reads a journal as the next daemon would.
func reload(t *testing.T, path string) (*knowledge, *journal) {
	t.Helper()
	a := &Agent{cfg: Config{Log: slog.New(slog.DiscardHandler)}, known: newKnowledge()}
	j, err := openJournal(path, a.replay)
	if err != nil {
		t.Fatal(err)
	}
	return a.known, j
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "agent.journal")
	k, j := reload(t, path)
	log := slog.New(slog.DiscardHandler)
	say := func(m *api.ManagerMessage) {
		j.write(func() ([]frame, bool) {
			if err := k.merge(m); err != nil {
				t.Fatal(err)
			}
			return []frame{{kind: frameManager, msg: m}}, true
		}, k.frames, log)
	}
	say(&api.ManagerMessage{Kind: &api.ManagerMessage_Welcome{Welcome: &api.Welcome{NodeIndex: 7}}})
	say(assignments(&api.AssignmentUpdate{Sequence: 1, Full: true, Set: []*api.Assignment{{TaskId: "a"}}}))
	say(tableUpdate(&api.TableUpdate{Table: "mesh", Version: 1, Full: true}))
	for i := range 20000 { // far more than its bound
		say(tableUpdate(&api.TableUpdate{Table: "mesh", Version: uint64(i + 2), Endpoints: []*api.TaskEndpoint{{TaskId: "t", Addr4: fmt.Sprintf("10.0.%d.%d", i/256, i%256), Names: []string{"a name of some length that fills the journal"}}}}))
	}
	say(assignments(&api.AssignmentUpdate{Sequence: 2, Set: []*api.Assignment{{TaskId: "b", RegistryAuth: []byte("hunter2")}}, Templates: []*api.Template{{RegistryAuth: []byte("hunter2")}}}))
	if raw, err := os.ReadFile(path); err != nil || strings.Contains(string(raw), "hunter2") || string(k.assignments["b"].RegistryAuth) != "hunter2" {
		t.Errorf("the journal keeps credentials of a registry, or the memory does not: %v", err)
	}
	j.close()
	fi, err := os.Stat(path)
	if err != nil || fi.Size() > 2*minGrowthBytes {
		t.Fatalf("journal has %d bytes: %v", fi.Size(), err)
	}
	check := func(name string, want *knowledge) {
		t.Helper()
		got, j := reload(t, path)
		j.close()
		gt, _ := got.tables()
		wt, _ := want.tables()
		if len(got.assignments) != len(want.assignments) || gt.Mesh.Version != wt.Mesh.Version || !proto.Equal(gt.Mesh.Endpoints["t"], wt.Mesh.Endpoints["t"]) || gt.NodeIndex != 7 {
			t.Errorf("%s: got %d assignments, mesh %d; want %d, %d", name, len(got.assignments), gt.Mesh.Version, len(want.assignments), wt.Mesh.Version)
		}
	}
	check("reloaded", k)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	delete(k.assignments, "b") // the last frame is torn
	if err := os.WriteFile(path, whole[:len(whole)-3], 0o600); err != nil {
		t.Fatal(err)
	}
	check("torn", k)
	check("torn end cut off", k)
	if err := os.WriteFile(path, append(whole[:len(whole)-3], "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"...), 0o600); err != nil {
		t.Fatal(err)
	}
	check("damaged", k)
	if err := os.WriteFile(path, []byte("not a journal at all, but long enough"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, j := reload(t, path); len(got.assignments) != 0 || j.size != 0 {
		t.Errorf("a foreign file was read: %v", got.assignments)
	}
}

func TestJournalSurvivesAFullDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.journal")
	k, j := reload(t, path)
	say := func(m *api.ManagerMessage) {
		j.write(func() ([]frame, bool) { return []frame{{kind: frameManager, msg: m}}, k.merge(m) == nil }, k.frames, slog.New(slog.DiscardHandler))
	}
	say(assignments(&api.AssignmentUpdate{Sequence: 1, Full: true, Set: []*api.Assignment{{TaskId: "a"}}}))
	j.f.Close()                             // every write fails now
	if err := os.Remove(path); err != nil { // and so does making it anew
		t.Fatal(err)
	}
	dir := path + ".new"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	say(assignments(&api.AssignmentUpdate{Sequence: 2, Set: []*api.Assignment{{TaskId: "b"}}}))
	if !j.failed || len(k.assignments) != 2 {
		t.Fatalf("failed %v, %d assignments", j.failed, len(k.assignments))
	}
	if err := os.RemoveAll(dir); err != nil { // room again
		t.Fatal(err)
	}
	say(assignments(&api.AssignmentUpdate{Sequence: 3, Set: []*api.Assignment{{TaskId: "c"}}}))
	j.close()
	if got, j := reload(t, path); len(got.assignments) != 3 || j.failed {
		t.Errorf("after space returned: %v", got.assignments)
	}
}

func TestRetryDelay(t *testing.T) {
	for range 1000 {
		if d := retryDelay(0, 0); d < retryMin || d > retryEarlyCap {
			t.Fatalf("first retry after %v", d)
		}
		if d := retryDelay(1<<40, 0); d < retryMin || d > retryMax {
			t.Fatalf("late retry after %v", d)
		}
		if d := retryDelay(0, time.Hour); d < retryMin || d > spreadMax {
			t.Fatalf("retry in a herd after %v", d)
		}
	}
}
