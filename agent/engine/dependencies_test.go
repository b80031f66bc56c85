package engine

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/swarm"

	"skein/agent/task"
	"skein/manager/api"
	"skein/runtime"
)

// A task's secrets and configs are files with the wished owner and mode, bound read-only, and gone when it ends.
func TestDependencies(t *testing.T) {
	b := newBench(t)
	cs := &swarm.ContainerSpec{Image: "busybox", Env: []string{"COLOUR=red"},
		Secrets: []*swarm.SecretReference{{SecretID: "s1", SecretName: "pw", File: &swarm.SecretReferenceFileTarget{Name: "pw", UID: "0", GID: "7", Mode: 0o400}}},
		Configs: []*swarm.ConfigReference{{ConfigID: "c1", ConfigName: "conf", File: &swarm.ConfigReferenceFileTarget{Name: "/etc/app/conf"}}},
	}
	spec, err := json.Marshal(swarm.TaskSpec{ContainerSpec: cs})
	if err != nil {
		t.Fatal(err)
	}
	sent := map[string]*api.DependencyRecord{}
	dependency := func(id string) *api.DependencyRecord { return sent[id] }
	a := &api.Assignment{TaskId: "t1", ServiceId: "s", ServiceName: "web", Slot: 2, NodeId: "n1", SpecJson: spec}
	ctl, err := b.e.Controller(a, nil, dependency)
	if err != nil {
		t.Fatal(err)
	}
	sent["s1"] = &api.DependencyRecord{Id: "s1", Kind: "secret", SpecJson: []byte(`{}`), Data: []byte("hunter2 {{not a template}}")}
	var fatal task.Fatal
	if err := ctl.Prepare(t.Context()); err == nil || !strings.Contains(err.Error(), "config conf: the managers have not sent it") || errors.As(err, &fatal) {
		t.Fatalf("before everything was sent: %v", err)
	}
	if left, _ := os.ReadDir(b.e.dependenciesDir()); len(left) != 0 {
		t.Errorf("a failed attempt left %v", left)
	}
	sent["c1"] = &api.DependencyRecord{Id: "c1", Kind: "config", SpecJson: []byte(`{"Templating":{"Name":"golang"}}`),
		Data: []byte(`{{env "COLOUR"}} {{.Task.Slot}} {{secret "pw"}}`)}
	if err := ctl.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := b.e.taskContainer("t1").snapshot()
	want := []struct {
		target, content string
		mode            os.FileMode
	}{{"/run/secrets/pw", "hunter2 {{not a template}}", 0o400}, {"/etc/app/conf", "red 2 hunter2 {{not a template}}", 0o444}}
	mounts := fileMounts(r)
	for i, w := range want {
		got, err := os.ReadFile(mounts[i].Source)
		fi, serr := os.Stat(mounts[i].Source)
		if err != nil || serr != nil || string(got) != w.content || mounts[i].Destination != w.target || fi.Mode() != w.mode || !strings.Contains(strings.Join(mounts[i].Options, " "), " ro ") {
			t.Errorf("file %d: %q, %v, mount %+v, %v %v", i, got, fi.Mode(), mounts[i], err, serr)
		}
	}
	// What another daemon left of tasks that are gone is removed.
	orphan := filepath.Join(b.e.dependenciesDir(), "gone")
	if err := os.Mkdir(orphan, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := b.e.removeOrphanFiles(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(orphan); err == nil {
		t.Error("an orphan is still there")
	}
	// They go when the task ends, though its container stays; also when the task ended while no daemon watched.
	if err := ctl.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.sup.exit(ctl.Info().ContainerID, runtime.Exit{Code: 1})
	if _, err := ctl.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(b.e.dependenciesDir()); err == nil {
		t.Error("the files of the last task that ended are still there")
	}
	if err := os.MkdirAll(filepath.Join(b.e.dependenciesDir(), "t1"), 0o700); err != nil {
		t.Fatal(err)
	}
	if s, err := ctl.State(t.Context()); err != nil || !s.Ended {
		t.Fatal(s, err)
	}
	if _, err := os.Stat(b.e.dependenciesDir()); err == nil {
		t.Error("the files of a task that is found ended are still there")
	}
	if err := ctl.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
}
