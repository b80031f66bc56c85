package engine

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"skein/agent/dockerapi"
	"skein/manager/api"
	"skein/runtime"
)

func exited(r record) bool { return r.State.Status == container.StateExited && r.State.Clean }

func TestStartStop(t *testing.T) {
	b := newBench(t)
	id := b.run("one", container.HostConfig{})
	if err := b.e.ContainerStart(t.Context(), id); !errors.Is(err, dockerapi.ErrNotModified) {
		t.Errorf("second start: %v, want not modified", err)
	}
	if err := b.e.ContainerRemove(t.Context(), id, false, false); !cerrdefs.IsConflict(err) {
		t.Errorf("rm of a running container: %v, want conflict", err)
	}
	if err := b.e.ContainerStop(t.Context(), id, dockerapi.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if r := b.record(id); !exited(r) || r.State.ExitCode != 143 || r.Sandbox.ID != "" {
		t.Errorf("after stop: %+v", r.State)
	}
	if err := b.e.ContainerStop(t.Context(), id, dockerapi.StopOptions{}); !errors.Is(err, dockerapi.ErrNotModified) {
		t.Errorf("second stop: %v, want not modified", err)
	}
	if err := b.e.ContainerKill(t.Context(), id, ""); !cerrdefs.IsConflict(err) {
		t.Errorf("kill of a stopped container: %v, want conflict", err)
	}
	if err := b.e.ContainerRemove(t.Context(), id, false, false); err != nil {
		t.Fatal(err)
	}
	if _, err := b.e.ContainerInspect(t.Context(), id, false); !cerrdefs.IsNotFound(err) {
		t.Errorf("inspect after rm: %v", err)
	}
	if len(b.images.snapshots)+len(b.net.boxes)+len(b.sup.states)+b.e.nets.inUse() != 0 {
		t.Error("something of the container is left")
	}
}

func (n *localNetworks) inUse() int {
	sum := 0
	for _, m := range n.used {
		sum += len(m)
	}
	return sum
}

func TestStopKillsWhatIgnoresIt(t *testing.T) {
	b := newBench(t)
	b.sup.ignore = true
	id := b.run("deaf", container.HostConfig{})
	secs := 0
	if err := b.e.ContainerStop(t.Context(), id, dockerapi.StopOptions{Timeout: &secs}); err != nil {
		t.Fatal(err)
	}
	if r := b.record(id); r.State.ExitCode != 137 {
		t.Errorf("exit code %d, want 137", r.State.ExitCode)
	}
}

// A removal by force must not wait behind a stop that waits for ever.
func TestForcedRemoveOvertakesStop(t *testing.T) {
	b := newBench(t)
	b.sup.ignore = true
	id := b.run("deaf", container.HostConfig{})
	forever := -1
	stopped := make(chan error, 1)
	go func() { stopped <- b.e.ContainerStop(t.Context(), id, dockerapi.StopOptions{Timeout: &forever}) }()
	b.until(id, "being stopped", func(r record) bool { return r.State.StoppedByUser })
	if err := b.e.ContainerRemove(t.Context(), id, true, false); err != nil {
		t.Fatal(err)
	}
	<-stopped
}

// The client that asked for a stop may go; the stop goes on.
func TestStopOutlivesItsClient(t *testing.T) {
	b := newBench(t)
	id := b.run("one", container.HostConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.e.ContainerStop(ctx, id, dockerapi.StopOptions{}); err != nil {
		t.Error(err)
	}
}

func TestPausedContainersCanBeEnded(t *testing.T) {
	for name, end := range map[string]func(*Engine, string) error{
		"stop": func(e *Engine, id string) error {
			return e.ContainerStop(context.Background(), id, dockerapi.StopOptions{})
		},
		"kill": func(e *Engine, id string) error { return e.ContainerKill(context.Background(), id, "KILL") },
		"rm":   func(e *Engine, id string) error { return e.ContainerRemove(context.Background(), id, true, false) },
	} {
		b := newBench(t)
		id := b.run("icy", container.HostConfig{})
		if err := b.e.ContainerPause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if err := b.e.ContainerStart(t.Context(), id); !cerrdefs.IsConflict(err) {
			t.Errorf("start of a paused container: %v", err)
		}
		if err := end(b.e, id); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFailedStart(t *testing.T) {
	b := newBench(t)
	for _, c := range []struct {
		name string
		fail func(err error)
		code int
	}{
		{"execve", func(err error) { b.sup.set("start", err) }, 127},
		{"create", func(err error) { b.sup.set("create", err) }, 128},
		{"network", func(err error) { b.net.err = err }, 128},
		{"image", func(err error) { b.images.err = err }, 128},
	} {
		c.fail(errors.New("no such thing"))
		id := b.create(c.name, container.HostConfig{})
		if err := b.e.ContainerStart(t.Context(), id); err == nil {
			t.Errorf("%s: start succeeded", c.name)
		}
		r := b.record(id)
		if r.State.Status != container.StateCreated || r.State.ExitCode != c.code || r.State.Error == "" || !r.State.Clean {
			t.Errorf("%s: %+v, want created with %d and a reason, clean", c.name, r.State, c.code)
		}
		if n := b.e.nets.inUse(); n != 0 || len(b.sup.states)+len(b.net.boxes) != 0 {
			t.Errorf("%s: left over: %d addresses, %v, %v", c.name, n, b.sup.states, b.net.boxes)
		}
		c.fail(nil)
		if err := b.e.ContainerStart(t.Context(), id); err != nil {
			t.Errorf("%s: start afterwards: %v", c.name, err)
		}
		if err := b.e.ContainerRemove(t.Context(), id, true, false); err != nil {
			t.Error(err)
		}
	}
}

// docker run --rm waits for the removal; after a failed start the wait ends without an error of its own.
func TestWaitRemovedAfterFailedStart(t *testing.T) {
	b := newBench(t)
	b.sup.set("start", errors.New("no such file"))
	id := b.create("gone", container.HostConfig{AutoRemove: true})
	ch, err := b.e.ContainerWait(t.Context(), id, container.WaitConditionRemoved)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.e.ContainerStart(t.Context(), id); err == nil {
		t.Fatal("start succeeded")
	}
	if w := <-ch; w.StatusCode != 127 || w.Error != nil {
		t.Errorf("wait: %+v, want 127 without an error", w)
	}
}

func TestWaitConditions(t *testing.T) {
	b := newBench(t)
	id := b.create("one", container.HostConfig{})
	now, _ := b.e.ContainerWait(t.Context(), id, container.WaitConditionNotRunning)
	<-now // created is not running
	next, _ := b.e.ContainerWait(t.Context(), id, container.WaitConditionNextExit)
	if err := b.e.ContainerStart(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	b.sup.exit(id, runtime.Exit{Code: 3})
	if w := <-next; w.StatusCode != 3 {
		t.Errorf("next exit: %+v", w)
	}
}

// A process can be gone before Start answers; its end is told once.
func TestExitDuringStart(t *testing.T) {
	b := newBench(t)
	b.sup.started = func(id string) { b.sup.exit(id, runtime.Exit{Code: 5}) }
	id := b.run("quick", container.HostConfig{})
	b.until(id, "exited", exited)
	c, _ := b.e.find(id)
	if r, exits, _, _ := c.watch(); exits != 1 || r.State.ExitCode != 5 || r.State.RestartCount != 0 {
		t.Errorf("%d ends, %+v", exits, r.State)
	}
}

// However late Start answers, the end of the process is of this run.
func TestExitLongBeforeStartAnswers(t *testing.T) {
	b := newBench(t)
	b.sup.started = func(id string) {
		b.sup.exit(id, runtime.Exit{Code: 5})
		time.Sleep(1100 * time.Millisecond) // longer than any slack between clocks
	}
	id := b.run("quick", container.HostConfig{})
	b.until(id, "exited", exited)
}

func TestRestartPolicies(t *testing.T) {
	b := newBench(t)
	b.sup.started = func(id string) { b.sup.exit(id, runtime.Exit{Code: 1}) }
	id := b.run("again", container.HostConfig{RestartPolicy: container.RestartPolicy{Name: "on-failure", MaximumRetryCount: 2}})
	b.until(id, "given up", func(r record) bool { return exited(r) && r.State.RestartCount == 2 })

	b.sup.mu.Lock()
	b.sup.started = nil
	b.sup.mu.Unlock()
	id = b.run("always", container.HostConfig{RestartPolicy: container.RestartPolicy{Name: "always"}})
	b.sup.exit(id, runtime.Exit{})
	b.until(id, "restarting", func(r record) bool { return r.State.Status == container.StateRestarting })
	if err := b.e.ContainerRemove(t.Context(), id, false, false); !cerrdefs.IsConflict(err) {
		t.Errorf("rm while restarting: %v, want conflict", err)
	}
	b.until(id, "running again", func(r record) bool { return r.State.active() && r.State.RestartCount == 1 })
	b.sup.exit(id, runtime.Exit{})
	b.until(id, "restarting", func(r record) bool { return r.State.Status == container.StateRestarting })
	if in, err := b.e.ContainerInspect(t.Context(), id, false); err != nil || !in.State.Running || !in.State.Restarting {
		t.Errorf("inspect while restarting: %+v %v", in.State, err)
	}
	if _, err := b.e.ExecCreate(t.Context(), id, container.ExecCreateRequest{Cmd: []string{"true"}}); !cerrdefs.IsConflict(err) || !strings.Contains(err.Error(), "is restarting") {
		t.Errorf("exec while restarting: %v", err)
	}
	if err := b.e.ContainerKill(t.Context(), id, ""); err != nil {
		t.Errorf("kill while restarting: %v", err)
	}
	b.until(id, "killed before its restart", exited)
	if err := b.e.ContainerStart(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := b.e.ContainerStop(t.Context(), id, dockerapi.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until(id, "stopped", exited)
	b.restart() // "always" is always, once the daemon starts anew
	b.until(id, "running after a restart of the daemon", func(r record) bool { return r.State.active() })
}

// The daemon may die in every state of a container.
func TestAdopt(t *testing.T) {
	for _, c := range []struct {
		name string
		down func(b *bench, id string) // while no daemon runs
		hc   container.HostConfig
		want func(record) bool
	}{
		{"still running", func(*bench, string) {}, container.HostConfig{}, func(r record) bool { return r.State.Status == container.StateRunning && r.State.Pid == 4242 }},
		{"ended", func(b *bench, id string) { b.sup.exit(id, runtime.Exit{Code: 9}) }, container.HostConfig{}, func(r record) bool { return exited(r) && r.State.ExitCode == 9 }},
		{"supervisor lost", func(b *bench, id string) { delete(b.sup.states, id) }, container.HostConfig{}, func(r record) bool { return exited(r) && r.State.ExitCode == 255 }},
		{"ended, restart", func(b *bench, id string) { b.sup.exit(id, runtime.Exit{Code: 9}) }, container.HostConfig{RestartPolicy: container.RestartPolicy{Name: "unless-stopped"}},
			func(r record) bool { return r.State.active() && r.State.RestartCount == 1 }},
		{"paused", func(b *bench, id string) { _ = b.sup.Pause(context.Background(), id) }, container.HostConfig{}, func(r record) bool { return r.State.Status == container.StatePaused }},
	} {
		b := newBench(t)
		id := b.run("one", c.hc)
		addr := b.record(id).Sandbox.Bridges[0].Addr4
		b.stop()
		c.down(b, id)
		b.up()
		b.until(id, c.name, c.want)
		if r := b.record(id); r.State.active() && r.State.RestartCount == 0 {
			other := b.record(b.run("two", container.HostConfig{}))
			if other.Sandbox.Bridges[0].Addr4 == addr {
				t.Errorf("%s: the address of an adopted container was given away", c.name)
			}
		}
	}
}

// A daemon that died while it started a container has not recorded the run, which may be over when the next one looks.
func TestAdoptRunThatNobodyRecorded(t *testing.T) {
	for _, c := range []struct {
		name string
		exit *runtime.Exit
		want func(record) bool
	}{
		{"running", nil, func(r record) bool { return r.State.Status == container.StateRunning && !r.State.StartedAt.IsZero() }},
		{"ended", &runtime.Exit{Code: 9, OOMKilled: true}, func(r record) bool {
			return exited(r) && r.State.ExitCode == 9 && r.State.OOMKilled && !r.State.StartedAt.IsZero()
		}},
		{"not executed", &runtime.Exit{Code: 127, Err: "no such file"}, func(r record) bool {
			return r.State.Status == container.StateCreated && r.State.Clean && r.State.ExitCode == 127 && r.State.Error != ""
		}},
	} {
		b := newBench(t)
		id := b.create("one", container.HostConfig{})
		b.stop()
		if err := b.sup.Create(t.Context(), runtime.Config{ID: id}); err != nil {
			t.Fatal(err)
		}
		if _, err := b.sup.Start(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if c.exit != nil {
			b.sup.exit(id, *c.exit)
		}
		b.up()
		b.until(id, c.name, c.want)
	}
}

// A run that the record knows is not recorded again: its container may have been left over only because the daemon died before it cleaned up.
func TestAdoptRunThatWasRecorded(t *testing.T) {
	b := newBench(t)
	id := b.run("one", container.HostConfig{})
	b.sup.set("delete", cerrdefs.ErrUnavailable)
	b.sup.exit(id, runtime.Exit{Code: 9})
	b.until(id, "ended", func(r record) bool { return r.State.ExitCode == 9 })
	was := b.record(id)
	b.stop()
	b.sup.set("delete", nil)
	b.up()
	b.until(id, "clean", exited)
	if r := b.record(id); !r.State.StartedAt.Equal(was.State.StartedAt) || r.State.ExitCode != 9 {
		t.Errorf("state %+v, was %+v", r.State, was.State)
	}
}

func TestAdoptRemovesOrphans(t *testing.T) {
	b := newBench(t)
	b.stop()
	b.sup.states["stray"] = runtime.State{ID: "stray", Status: runtime.Stopped}
	b.images.snapshots["stray"] = true
	b.net.boxes["stray"] = b.net.boxes[""]
	b.up()
	if len(b.sup.states)+len(b.images.snapshots)+len(b.net.boxes) != 0 {
		t.Errorf("left: %v %v %v", b.sup.states, b.images.snapshots, b.net.boxes)
	}
}

// A daemon may die after it recorded that a run is cleaned up and before the last of its network is gone.
func TestAdoptRemovesWhatStillDeparted(t *testing.T) {
	b := newBench(t)
	id := b.run("one", container.HostConfig{})
	kept := b.run("two", container.HostConfig{})
	b.sup.exit(id, runtime.Exit{})
	b.until(id, "exited", exited)
	b.stop()
	b.net.boxes[id] = b.net.boxes[kept]
	b.up()
	if _, left := b.net.boxes[id]; left {
		t.Error("the network of a container that does not run was left")
	}
	if _, there := b.net.boxes[kept]; !there {
		t.Error("the network of a running container was removed")
	}
}

// What cannot be cleaned up at once is cleaned up when it can be: the supervisor may be gone for a moment.
func TestCleanUpIsRepeated(t *testing.T) {
	b := newBench(t)
	plain, rm := b.run("plain", container.HostConfig{}), b.run("rm", container.HostConfig{AutoRemove: true})
	b.sup.set("delete", cerrdefs.ErrUnavailable)
	b.sup.exit(plain, runtime.Exit{Code: 9})
	b.sup.exit(rm, runtime.Exit{Code: 9})
	b.until(rm, "ended", func(r record) bool { return !r.State.active() })
	entry, err := b.e.find(rm)
	if err != nil {
		t.Fatal(err)
	}
	b.sup.set("delete", nil)
	b.until(plain, "clean", exited)
	for {
		_, _, removed, changed := entry.watch()
		if removed {
			return
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Second):
			t.Fatal("a container that was to go is still there")
		}
	}
}

// A replayed end of an earlier run does not end the present one.
func TestReplayedExit(t *testing.T) {
	b := newBench(t)
	id := b.run("one", container.HostConfig{})
	old := runtime.Exit{Code: 1, At: time.Now().Add(-10 * time.Millisecond).Add(-time.Since(b.record(id).State.StartedAt))}
	b.sup.mu.Lock()
	b.sup.record(runtime.Event{ContainerID: id, Exit: old})
	b.sup.mu.Unlock()
	other := b.run("two", container.HostConfig{})
	b.sup.exit(other, runtime.Exit{})
	b.until(other, "exited", exited) // the journal is in order: the old record was taken
	if r := b.record(id); !r.State.active() {
		t.Errorf("a replayed end ended the run: %+v", r.State)
	}
}

func TestRename(t *testing.T) {
	b := newBench(t)
	id := b.create("old", container.HostConfig{})
	b.create("taken", container.HostConfig{})
	if err := b.e.ContainerRename(t.Context(), id, "taken"); !cerrdefs.IsConflict(err) {
		t.Errorf("rename to a taken name: %v", err)
	}
	if err := b.e.ContainerRename(t.Context(), id, "new"); err != nil {
		t.Fatal(err)
	}
	b.create("old", container.HostConfig{})
	b.restart()
	if r := b.record("new"); r.ID != id {
		t.Errorf("new is %s", r.ID)
	}
}

// Operations that waited behind a removal find nothing, and make nothing.
func TestOperationsAfterRemoval(t *testing.T) {
	b := newBench(t)
	id := b.create("one", container.HostConfig{})
	c, _ := b.e.find(id)
	c.op.Lock()
	done := make(chan error, 1)
	go func() { done <- b.e.ContainerStart(t.Context(), id) }()
	if err := b.e.remove(t.Context(), c, removal{}); err != nil {
		t.Fatal(err)
	}
	c.op.Unlock()
	if err := <-done; !cerrdefs.IsNotFound(err) {
		t.Errorf("start after rm: %v, want not found", err)
	}
	if len(b.images.snapshots) != 0 {
		t.Error("a removed container was prepared")
	}
}

func publish(port string) container.HostConfig {
	return container.HostConfig{PortBindings: network.PortMap{network.MustParsePort("80/tcp"): {{HostPort: port}}}}
}

func TestPublishedPorts(t *testing.T) {
	b := newBench(t)
	one := b.run("one", publish("8080"))
	two := b.create("two", publish("8080"))
	if err := b.e.ContainerStart(t.Context(), two); !cerrdefs.IsConflict(err) {
		t.Errorf("same port: %v, want conflict", err)
	}
	b.restart()
	if err := b.e.ContainerStart(t.Context(), two); !cerrdefs.IsConflict(err) {
		t.Errorf("same port after a restart of the daemon: %v, want conflict", err)
	}
	if err := b.e.ContainerRemove(t.Context(), one, true, false); err != nil {
		t.Fatal(err)
	}
	if err := b.e.ContainerStart(t.Context(), two); err != nil {
		t.Errorf("port released: %v", err)
	}
	b.net.inUse[portKey{"tcp", 9090}] = true
	if err := b.e.ContainerStart(t.Context(), b.create("three", publish("9090"))); !cerrdefs.IsConflict(err) {
		t.Errorf("port of the host: %v, want conflict", err)
	}
	if p := b.record(b.run("four", publish("9090-9092"))).Sandbox.Bridges[0].Ports[0].Published; p != 9091 {
		t.Errorf("range gave %d, want 9091", p)
	}
}

// Two containers that start at once never get one port.
func TestPortsAreGivenOnce(t *testing.T) {
	b := newBench(t)
	var wg sync.WaitGroup
	ids := make([]string, 8)
	for i := range ids {
		ids[i] = b.create("c"+string(rune('0'+i)), publish("0"))
		wg.Go(func() {
			if err := b.e.ContainerStart(t.Context(), ids[i]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	seen := map[uint16]bool{}
	for _, id := range ids {
		p := b.record(id).Sandbox.Bridges[0].Ports[0].Published
		if seen[p] {
			t.Errorf("port %d was given twice", p)
		}
		seen[p] = true
	}
}

func TestSharedNetworks(t *testing.T) {
	b := newBench(t)
	one := b.run("one", container.HostConfig{})
	two := b.run("two", container.HostConfig{NetworkMode: "container:one"})
	if got, want := b.record(two).Config.Hostname, b.record(one).Config.Hostname; got != want {
		t.Errorf("hostname %s, want the other's %s", got, want)
	}
	cfg := b.sup.configs[two]
	for _, m := range cfg.Spec.Mounts {
		if m.Destination == "/etc/hosts" && m.Source != b.e.containerDir(one)+"/hosts" {
			t.Errorf("hosts is %s, want the other's", m.Source)
		}
	}
	host := b.run("host", container.HostConfig{NetworkMode: "host"})
	if got := b.record(host).Config.Hostname; got != "node1" {
		t.Errorf("hostname on the node's network: %s", got)
	}
	if err := b.e.ContainerStop(t.Context(), one, dockerapi.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := b.e.ContainerRestart(t.Context(), two, dockerapi.StopOptions{}); !cerrdefs.IsConflict(err) {
		t.Errorf("join of a stopped container: %v, want conflict", err)
	}
}

func TestAddresses(t *testing.T) {
	b := newBench(t)
	l := &localNetwork{ID: "n", Name: "n", Driver: "bridge", Pools: []pool{{Subnet: netip.MustParsePrefix("10.9.9.0/29"), Gateway: netip.MustParseAddr("10.9.9.1")}}}
	b.e.nets.byID["n"] = l
	for i, want := range []string{"10.9.9.2", "10.9.9.3", "10.9.9.4", "10.9.9.5", "10.9.9.6"} {
		got, err := b.e.nets.take(l, string(rune('a'+i)), netip.Addr{}, netip.Addr{})
		if err != nil || got.addr4.Addr().String() != want {
			t.Errorf("address %d: %v %v, want %s", i, got, err, want)
		}
	}
	if _, err := b.e.nets.take(l, "z", netip.Addr{}, netip.Addr{}); !cerrdefs.IsConflict(err) {
		t.Errorf("full network: %v", err)
	}
	b.e.nets.give("n", "c")
	if got, err := b.e.nets.take(l, "z", netip.Addr{}, netip.Addr{}); err != nil || got.addr4.Addr().String() != "10.9.9.4" {
		t.Errorf("released address: %v %v", got, err)
	}
	for _, bad := range []string{"10.9.9.0", "10.9.9.7", "10.9.9.1", "10.9.9.2", "10.1.1.1"} {
		if _, err := b.e.nets.take(l, "y", netip.MustParseAddr(bad), netip.Addr{}); err == nil {
			t.Errorf("%s was given", bad)
		}
	}
	if err := b.e.nets.drop("n", b.e.containerName); !errors.Is(err, errDenied) {
		t.Errorf("drop of a used network: %v", err)
	}
}

// A probe's result reaches the record; a frozen container is not probed.
func TestHealth(t *testing.T) {
	b := newBench(t)
	b.sup.set("exec-exit", errors.New("1"))
	out, err := b.e.ContainerCreate(t.Context(), "sick", container.CreateRequest{Config: &container.Config{Image: "busybox",
		Healthcheck: &container.HealthConfig{Test: []string{"CMD", "false"}, Interval: 5 * time.Millisecond, Retries: 2}}}, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.e.ContainerStart(t.Context(), out.ID); err != nil {
		t.Fatal(err)
	}
	c, _ := b.e.find(out.ID)
	status := func(want container.HealthStatus) {
		t.Helper()
		b.until(out.ID, string(want), func(record) bool { h := c.healthReport(); return h != nil && h.Status == want })
	}
	status(container.Unhealthy)
	b.sup.set("exec-exit", nil)
	status(container.Healthy)
}

// A task's container is recorded with its addresses in one step: a crash in between would leave one that cannot start.
func TestTaskController(t *testing.T) {
	b := newBench(t)
	a := &api.Assignment{TaskId: "t1", ServiceName: "web", Slot: 1, SpecJson: []byte(`{"ContainerSpec":{"Image":"busybox"}}`),
		Attachments: []*api.Attachment{{NetworkId: "ov", Addr4: "10.0.0.5/20"}}}
	nets := map[string]*api.NetworkRecord{"ov": {Id: "ov", Name: "ov"}}
	ctl, err := b.e.Controller(a, nets, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := ctl.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.restart()
	if ctl, err = b.e.Controller(a, nets, nil); err != nil {
		t.Fatal(err)
	}
	if s, err := ctl.State(t.Context()); err != nil || !s.Created || s.Running {
		t.Errorf("state %+v %v", s, err)
	}
	if err := ctl.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	id := ctl.Info().ContainerID
	if box := b.net.boxes[id]; len(box.Legs) != 1 || box.Legs[0].NetworkID != "ov" {
		t.Errorf("sandbox %+v", box)
	}
	b.sup.exit(id, runtime.Exit{Code: 4})
	if x, err := ctl.Wait(t.Context()); err != nil || x.Code != 4 {
		t.Errorf("wait: %+v %v", x, err)
	}
	if err := ctl.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, _ := ctl.State(t.Context()); s.Created {
		t.Error("the task's container is left")
	}
}

// An attach that comes while the container starts is joined to it.
func TestAttachBeforeStart(t *testing.T) {
	b := newBench(t)
	id := b.create("one", container.HostConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	registered, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- b.e.ContainerAttach(ctx, id, dockerapi.AttachOptions{Stream: true, Stdout: true, Attached: func() { close(registered) }}, dockerapi.Streams{})
	}()
	<-registered
	if err := b.e.ContainerStart(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestUnchangedRecord: a record is written when it changed, and only then.
func TestUnchangedRecord(t *testing.T) {
	b := newBench(t)
	c, err := b.e.find(b.run("one", container.HostConfig{}))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(b.e.containerDir(c.rec.ID), "container.json")
	inode := func() os.FileInfo {
		st, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	was := inode()
	if err := b.e.update(c, func(*record) {}); err != nil || !os.SameFile(was, inode()) {
		t.Errorf("an unchanged record was written: %v", err)
	}
	if err := b.e.update(c, func(r *record) { r.State.RestartCount++ }); err != nil || os.SameFile(was, inode()) {
		t.Errorf("a changed record was not written: %v", err)
	}
	// What a failed write left out is written next time, changed again or not.
	if err := os.Rename(filepath.Dir(file), filepath.Dir(file)+".away"); err != nil {
		t.Fatal(err)
	}
	if err := b.e.update(c, func(r *record) { r.State.RestartCount++ }); err == nil {
		t.Error("writing without a directory succeeded")
	}
	if err := os.Rename(filepath.Dir(file)+".away", filepath.Dir(file)); err != nil {
		t.Fatal(err)
	}
	was = inode()
	if err := b.e.update(c, func(*record) {}); err != nil || os.SameFile(was, inode()) {
		t.Errorf("a change whose write had failed was never written: %v", err)
	}
}

// lostAnswer is a supervisor that starts a container and cannot say so any more; mute: nor can the next one.
type lostAnswer struct {
	*fakeSupervisor
	exit *runtime.Exit // of the run, before anybody asks
	mute bool
}

func (s lostAnswer) Start(ctx context.Context, id string) (int, error) {
	if _, err := s.fakeSupervisor.Start(ctx, id); err != nil {
		return 0, err
	}
	if s.exit != nil {
		s.fakeSupervisor.exit(id, *s.exit)
	}
	return 0, cerrdefs.ErrUnavailable
}

func (s lostAnswer) State(ctx context.Context, id string) (runtime.State, error) {
	if s.mute {
		return runtime.State{}, cerrdefs.ErrUnavailable
	}
	return s.fakeSupervisor.State(ctx, id)
}

// A start whose answer was lost has taken place if the next supervisor says so.
func TestStartWithoutAnswer(t *testing.T) {
	b := newBench(t)
	b.e.cfg.Supervisor = lostAnswer{fakeSupervisor: b.sup}
	if r := b.record(b.run("running", container.HostConfig{})); r.State.Pid != 4242 || r.State.Status != container.StateRunning {
		t.Errorf("state %+v, want running", r.State)
	}
	b.e.cfg.Supervisor = lostAnswer{fakeSupervisor: b.sup, exit: &runtime.Exit{Code: 9}}
	b.until(b.run("ended", container.HostConfig{}), "exited", func(r record) bool { return exited(r) && r.State.ExitCode == 9 })
}

// A run whose start nobody can tell of is nobody's: it is ended, and its container can be removed.
func TestStartWithoutAnyAnswer(t *testing.T) {
	b := newBench(t)
	b.e.cfg.Supervisor = lostAnswer{fakeSupervisor: b.sup, mute: true}
	id := b.create("lost", container.HostConfig{})
	if err := b.e.ContainerStart(t.Context(), id); err == nil {
		t.Fatal("the start succeeded")
	}
	if err := b.e.ContainerRemove(t.Context(), id, true, false); err != nil {
		t.Fatalf("remove: %v", err)
	}
	if states, err := b.sup.List(t.Context()); err != nil || len(states) != 0 {
		t.Errorf("the supervisor still has %v, %v", states, err)
	}
}

// A start that has reached the supervisor is finished, whoever stops waiting for it.
func TestStartOutlivesItsClient(t *testing.T) {
	b := newBench(t)
	id := b.create("gone", container.HostConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	b.e.cfg.Supervisor = cancelling{b.sup, cancel}
	if err := b.e.ContainerStart(ctx, id); err != nil {
		t.Errorf("start: %v", err)
	}
	if in, err := b.e.ContainerInspect(t.Context(), id, false); err != nil || !in.State.Running {
		t.Errorf("state %+v, %v; want running", in.State, err)
	}
}

// cancelling loses its client while it starts a container.
type cancelling struct {
	*fakeSupervisor
	cancel context.CancelFunc
}

func (s cancelling) Start(ctx context.Context, id string) (int, error) {
	s.cancel()
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	return s.fakeSupervisor.Start(ctx, id)
}
