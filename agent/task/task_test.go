package task_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"skein/agent/task"
	"skein/agent/tasktest"
	"skein/manager/api"
)

// node is one daemon's life over a fake machine; the log has what was reported, with virtual times.
type node struct {
	t      *testing.T
	exec   *tasktest.Executor
	m      *task.Manager
	began  time.Time
	mu     sync.Mutex
	log    []string
	last   map[string]*api.TaskReport
	cancel context.CancelFunc
	done   chan struct{}
}

func newNode(t *testing.T, script func(*api.Assignment) tasktest.Script) *node {
	n := &node{t: t, exec: tasktest.NewExecutor(), began: time.Now(), last: map[string]*api.TaskReport{}}
	n.exec.Script = script
	n.boot()
	return n
}

func (n *node) boot() {
	n.m = task.New(task.Config{Executor: n.exec, Report: n.report})
	ctx, cancel := context.WithCancel(n.t.Context())
	n.cancel, n.done = cancel, make(chan struct{})
	go func() { defer close(n.done); _ = n.m.Run(ctx) }()
}

func (n *node) halt() { n.cancel(); <-n.done }

func (n *node) report(r *api.TaskReport) {
	n.mu.Lock()
	defer n.mu.Unlock()
	line := fmt.Sprintf("+%v %s %s %q", time.Since(n.began).Round(10*time.Millisecond), r.TaskId, api.TaskState(r.State), r.Message)
	if r.Err != "" {
		line += " err=" + fmt.Sprintf("%q", r.Err)
	}
	n.log = append(n.log, line)
	n.last[r.TaskId] = r
}

// take returns what was reported since the last take.
func (n *node) take() string {
	synctest.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	s := strings.Join(n.log, "\n")
	n.log = nil
	return s
}

func (n *node) want(lines ...string) {
	n.t.Helper()
	if got, want := n.take(), strings.Join(lines, "\n"); got != want {
		n.t.Fatalf("reports:\n%s\nwant:\n%s", got, want)
	}
}

func assign(id string, desired api.TaskState, change ...func(*api.Assignment)) *api.Assignment {
	a := &api.Assignment{TaskId: id, ServiceName: "web", Desired: uint32(desired), State: uint32(api.TaskAssigned), NodeId: "n1"}
	for _, c := range change {
		c(a)
	}
	return a
}

func meshed(a *api.Assignment)  { a.Ports = []*api.PortConfig{{Target: 80, Published: 80}} }
func drained(a *api.Assignment) { a.Drained = true }

func bubble(t *testing.T, f func(t *testing.T)) { synctest.Test(t, f) }

func TestLifeOfATask(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, func(*api.Assignment) tasktest.Script {
			return tasktest.Script{PrepareTime: time.Second, ReadyTime: 2 * time.Second, Note: "no port listens"}
		})
		defer n.halt()
		n.m.Connected(true)
		n.m.Set(task.Set{Assignments: []*api.Assignment{assign("t1", api.TaskReady)}})
		time.Sleep(5 * time.Second)
		n.want(`+0s t1 accepted "accepted"`, `+0s t1 preparing "preparing"`, `+1s t1 ready "prepared"`)
		after := time.Now().Add(3 * time.Second).UnixNano()
		n.m.Update([]*api.Assignment{assign("t1", api.TaskRunning, meshed, func(a *api.Assignment) { a.StartAfter = after })}, nil, nil)
		time.Sleep(10 * time.Second)
		n.want(`+8s t1 starting "starting"`, `+10s t1 running "started: no port listens" err="no port listens"`)
		n.m.Update([]*api.Assignment{assign("t1", api.TaskShutdown, meshed)}, nil, nil)
		time.Sleep(5 * time.Second)
		n.want("") // not drained yet
		n.m.Update([]*api.Assignment{assign("t1", api.TaskShutdown, meshed, drained)}, nil, nil)
		time.Sleep(time.Second)
		n.want(`+20.15s t1 shutdown "shutdown"`)
		if ids, _ := n.exec.Tasks(t.Context()); len(ids) != 1 {
			t.Fatalf("containers after shutdown: %v, want the ended one kept", ids)
		}
		n.m.Update(nil, []string{"t1"}, nil)
		synctest.Wait()
		if ids, _ := n.exec.Tasks(t.Context()); len(ids) != 0 {
			t.Fatalf("containers after removal: %v", ids)
		}
		if r := n.m.Reports(); len(r) != 0 {
			t.Fatalf("reports after removal: %v", r)
		}
	})
}

func TestEnds(t *testing.T) {
	down := errors.New(`pull "web": registry does not answer`)
	tests := []struct {
		name   string
		script tasktest.Script
		want   string // end of the last report
		starts int
	}{
		{"complete", tasktest.Script{RunTime: time.Second}, `complete "finished"`, 1},
		{"exit code", tasktest.Script{RunTime: time.Second, Exit: task.Exit{Code: 3}}, `failed "failed" err="task: non-zero exit (3)"`, 1},
		{"unknown", tasktest.Script{RunTime: time.Second, Exit: task.Exit{Code: -1}}, `failed "failed" err="task: exit status unknown"`, 1},
		{"out of memory", tasktest.Script{RunTime: time.Second, Exit: task.Exit{Code: 137, OOM: true}}, `err="task: non-zero exit (137): out of memory: its limit is too low for what it does"`, 1},
		{"fatal", tasktest.Script{PrepareErrs: []error{task.Fatal{Err: errors.New("no such image")}}}, `rejected "rejected" err="prepare task: no such image"`, 0},
		{"heals", tasktest.Script{PrepareErrs: []error{down, down, nil}}, `running "started"`, 1},
		{"never heals", tasktest.Script{PrepareErrs: slices.Repeat([]error{down}, 1000)}, `failed "failed" err="prepare task: gave up after 1m0s: pull \"web\": registry does not answer"`, 0},
		{"start", tasktest.Script{StartErr: errors.New("exec: no such file")}, `failed "failed" err="start task: exec: no such file"`, 0},
		{"unready", tasktest.Script{ReadyErr: errors.New("unhealthy")}, `failed "failed" err="wait until ready: unhealthy"`, 1},
		{"ends early", tasktest.Script{ReadyTime: 5 * time.Second, RunTime: time.Second, Exit: task.Exit{Code: 1}}, `failed "failed" err="task: non-zero exit (1)"`, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := newNode(t, func(*api.Assignment) tasktest.Script { return tt.script })
				defer n.halt()
				n.m.Set(task.Set{Assignments: []*api.Assignment{assign("t1", api.TaskRunning)}})
				time.Sleep(3 * time.Minute)
				if got := n.take(); !strings.HasSuffix(got, tt.want) {
					t.Fatalf("reports:\n%s\nwant end:\n%s", got, tt.want)
				}
				if got := n.exec.Starts("t1"); got != tt.starts {
					t.Fatalf("started %d times, want %d", got, tt.starts)
				}
				if tt.name == "unready" && len(n.exec.Running()) != 0 {
					t.Fatal("a task that failed still runs")
				}
			})
		})
	}
}

func TestErrorIsShownWhileRetrying(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, func(*api.Assignment) tasktest.Script {
			return tasktest.Script{PrepareErrs: slices.Repeat([]error{errors.New("registry down")}, 1000)}
		})
		defer n.halt()
		n.m.Set(task.Set{Assignments: []*api.Assignment{assign("t1", api.TaskRunning)}})
		time.Sleep(10 * time.Second)
		n.want(`+0s t1 accepted "accepted"`, `+0s t1 preparing "preparing"`, `+0s t1 preparing "retrying" err="registry down"`)
		n.m.Update([]*api.Assignment{assign("t1", api.TaskShutdown)}, nil, nil) // ends the retries at once
		n.want(`+10s t1 shutdown "shutdown"`)
	})
}

func TestStopping(t *testing.T) {
	tests := []struct {
		name   string
		act    func(n *node)
		stopAt string
	}{
		{"no endpoints", func(n *node) { n.m.Update([]*api.Assignment{assign("t1", api.TaskShutdown)}, nil, nil) }, "+10s"},
		{"managers silent", func(n *node) { n.m.Update([]*api.Assignment{assign("t1", api.TaskShutdown, meshed)}, nil, nil) }, "+25s"},
		{"managers lost", func(n *node) {
			n.m.Update([]*api.Assignment{assign("t1", api.TaskShutdown, meshed)}, nil, nil)
			time.Sleep(2 * time.Second)
			n.m.Connected(false)
		}, "+22s"},
		{"drained at once", func(n *node) {
			n.m.Update([]*api.Assignment{assign("t1", api.TaskShutdown, meshed, drained)}, nil, nil)
		}, "+10.15s"},
		{"removed", func(n *node) { n.m.Update(nil, []string{"t1"}, nil) }, "+10.15s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := newNode(t, nil)
				defer n.halt()
				n.m.Connected(true)
				n.m.Set(task.Set{Assignments: []*api.Assignment{assign("t1", api.TaskRunning, meshed)}})
				time.Sleep(10 * time.Second)
				n.take()
				tt.act(n)
				time.Sleep(time.Minute)
				if want := tt.stopAt + " stop t1"; !slices.Contains(n.exec.Events(), want) {
					t.Fatalf("events %v, want %q", n.exec.Events(), want)
				}
				if got := n.exec.Running(); len(got) != 0 {
					t.Fatalf("still running: %v", got)
				}
			})
		})
	}
}

func TestClientsAreWaitedFor(t *testing.T) {
	limit := func(d time.Duration) func(*api.Assignment) {
		return func(a *api.Assignment) { a.DrainTimeout = int64(d) }
	}
	tests := []struct {
		name    string
		clients time.Duration
		change  func(*api.Assignment)
		act     func(n *node)
		stopAt  string
	}{
		{"a stream of ten seconds", 10 * time.Second, limit(0), nil, "+20.15s stop t1"},
		{"for ever", time.Hour, limit(0), nil, "+25.15s stop t1"},
		{"as the service says", time.Hour, limit(time.Minute), nil, "+1m10.15s stop t1"},
		{"not at all", time.Hour, limit(-1), nil, "+10.15s stop t1"},
		{"not published", time.Hour, func(a *api.Assignment) { a.Ports = nil }, nil, "+10s stop t1"},
		{"it ends meanwhile", time.Hour, limit(0), func(n *node) {
			if err := n.exec.Kill("t1", task.Exit{Code: 2}); err != nil {
				n.t.Error(err)
			}
		}, "+15s stop t1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := newNode(t, func(*api.Assignment) tasktest.Script { return tasktest.Script{ClientsTime: tt.clients} })
				defer n.halt()
				n.m.Connected(true)
				n.m.Set(task.Set{Assignments: []*api.Assignment{assign("t1", api.TaskRunning, meshed)}})
				time.Sleep(10 * time.Second)
				n.m.Update([]*api.Assignment{assign("t1", api.TaskShutdown, meshed, drained, tt.change)}, nil, nil)
				time.Sleep(5 * time.Second)
				if tt.act != nil {
					tt.act(n)
				}
				time.Sleep(2 * time.Minute)
				if !slices.Contains(n.exec.Events(), tt.stopAt) {
					t.Fatalf("events %v, want %q", n.exec.Events(), tt.stopAt)
				}
			})
		})
	}
}

func TestSick(t *testing.T) {
	for _, tt := range []struct {
		name   string
		ports  func(*api.Assignment)
		drain  bool
		stopAt string
	}{
		{"every node sends no clients any more", meshed, true, "+12.15s stop t1"},
		{"managers silent", meshed, false, "+15s stop t1"},
		{"no clients", func(*api.Assignment) {}, false, "+10s stop t1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := newNode(t, nil)
				defer n.halt()
				n.m.Connected(true)
				n.m.Set(task.Set{Assignments: []*api.Assignment{assign("t1", api.TaskRunning, tt.ports)}})
				time.Sleep(10 * time.Second)
				n.take()
				if err := n.exec.Sicken("t1", "unhealthy container: no"); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if leaving := n.last["t1"].Message == api.MessageLeaving; leaving != (tt.stopAt != "+10s stop t1") {
					t.Errorf("leaving: %v", leaving)
				}
				time.Sleep(2 * time.Second)
				if tt.drain {
					n.m.Update([]*api.Assignment{assign("t1", api.TaskRunning, tt.ports, drained)}, nil, nil)
				}
				time.Sleep(time.Minute)
				if !slices.Contains(n.exec.Events(), tt.stopAt) {
					t.Fatalf("events %v, want %q", n.exec.Events(), tt.stopAt)
				}
				if r := n.last["t1"]; api.TaskState(r.State) != api.TaskFailed || r.Err != "task: non-zero exit (143): unhealthy container: no" {
					t.Errorf("last report: %v", r)
				}
			})
		})
	}
}

func TestDiesWhileDraining(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, nil)
		defer n.halt()
		n.m.Connected(true)
		n.m.Set(task.Set{Assignments: []*api.Assignment{assign("t1", api.TaskRunning, meshed)}})
		n.take()
		n.m.Update([]*api.Assignment{assign("t1", api.TaskShutdown, meshed)}, nil, nil)
		time.Sleep(time.Second)
		if err := n.exec.Kill("t1", task.Exit{Code: 2}); err != nil {
			t.Fatal(err)
		}
		n.want(`+1s t1 shutdown "shutdown"`)
	})
}

func TestAdoption(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, nil)
		ids := []string{"t1", "t2", "t3"}
		var set []*api.Assignment
		for _, id := range ids {
			set = append(set, assign(id, api.TaskRunning, meshed))
		}
		n.m.Set(task.Set{Assignments: set})
		n.take()
		n.halt() // the daemon dies
		known := map[string]*api.TaskReport{"t1": n.last["t1"]}
		if err := n.exec.Kill("t2", task.Exit{Code: 9}); err != nil {
			t.Fatal(err)
		}
		n.exec.Add("orphan")
		n.boot()
		defer func() { n.halt() }()
		n.m.Set(task.Set{Assignments: set, Known: known})
		time.Sleep(time.Second)
		if got := n.exec.Running(); !slices.Equal(got, []string{"orphan", "t1", "t3"}) {
			t.Fatalf("running after restart: %v", got)
		}
		for _, id := range ids {
			if got := n.exec.Starts(id); got != 1 {
				t.Errorf("%s started %d times", id, got)
			}
		}
		if got := n.last["t2"]; api.TaskState(got.State) != api.TaskFailed || got.ExitCode != 9 {
			t.Errorf("t2: %v", got)
		}
		n.m.Set(task.Set{Assignments: set, Confirmed: true}) // a manager speaks: the orphan goes
		synctest.Wait()
		if got := n.exec.Running(); !slices.Equal(got, []string{"t1", "t3"}) {
			t.Fatalf("running after a full set: %v", got)
		}
	})
}

func TestEndedTaskIsNotStartedAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, nil)
		defer n.halt()
		known := map[string]*api.TaskReport{"t1": {TaskId: "t1", State: uint32(api.TaskRejected), Err: "no such image"}}
		n.m.Set(task.Set{Assignments: []*api.Assignment{assign("t1", api.TaskRunning)}, Known: known})
		time.Sleep(time.Minute)
		n.want("")
		if got := n.m.Reports(); len(got) != 1 || got[0].Err != "no such image" {
			t.Fatalf("reports for the next session: %v", got)
		}
	})
}

func TestRunningTaskIsNotStartedTwice(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, nil) // a machine that lost its state directory
		defer n.halt()
		n.m.Set(task.Set{Confirmed: true, Assignments: []*api.Assignment{assign("t1", api.TaskRunning, func(a *api.Assignment) { a.State = uint32(api.TaskRunning) })}})
		n.want(`+0s t1 failed "failed" err="task: its container is gone from this node"`)
		if got := n.exec.Starts("t1"); got != 0 {
			t.Fatalf("started %d times", got)
		}
	})
}

func TestRemoveDesired(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newNode(t, func(*api.Assignment) tasktest.Script {
			return tasktest.Script{ShutdownTime: time.Second, ShutdownErrs: []error{errors.New("supervisor is restarting"), nil}}
		})
		defer n.halt()
		n.m.Set(task.Set{Assignments: []*api.Assignment{assign("t1", api.TaskRunning)}})
		n.take()
		n.m.Update([]*api.Assignment{assign("t1", api.TaskRemove)}, nil, nil)
		time.Sleep(5 * time.Second)
		if got := n.take(); !strings.Contains(got, `running "retrying" err="stop container: supervisor is restarting"`) || !strings.HasSuffix(got, `shutdown "shutdown"`) {
			t.Fatalf("reports: %s", got)
		}
		if ids, _ := n.exec.Tasks(t.Context()); len(ids) != 0 {
			t.Fatalf("containers: %v", ids)
		}
		n.m.Update(nil, []string{"t1"}, nil)
		// The same task once more, while it is being removed: it starts over.
		n.m.Set(task.Set{Assignments: []*api.Assignment{assign("t1", api.TaskRunning)}})
		synctest.Wait()
		if got := n.exec.Running(); !slices.Equal(got, []string{"t1"}) {
			t.Fatalf("running: %v", got)
		}
	})
}
