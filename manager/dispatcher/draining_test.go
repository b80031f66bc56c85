package dispatcher_test

import (
	"encoding/json"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/dispatcher"
	"skein/manager/store"
)

// endpointIn waits until a table tells a state of an endpoint, and returns the table's version.
func endpointIn(p *peer, state, task string) uint64 {
	return until(p, state, func(m *api.ManagerMessage) (uint64, bool) {
		for _, e := range m.GetTable().GetEndpoints() {
			if e.TaskId == task && e.State == state {
				return m.GetTable().Version, true
			}
		}
		return 0, false
	})
}

// assignment waits for a task's assignment that f takes.
func assignment(p *peer, task string, f func(*api.Assignment) bool) *api.Assignment {
	return until(p, "assignment", func(m *api.ManagerMessage) (*api.Assignment, bool) {
		for _, a := range m.GetAssignments().GetSet() {
			if a.TaskId == task && f(a) {
				return a, true
			}
		}
		return nil, false
	})
}

// relabel gives a service other labels, which touches no task.
func (l *lab) relabel(service string, labels map[string]string) {
	l.t.Helper()
	var spec swarm.ServiceSpec
	l.store.View(func(tx store.ReadTx) { spec = *tx.Service(id(service)).Spec })
	spec.Labels = labels
	b, err := json.Marshal(spec)
	if err != nil {
		l.t.Fatal(err)
	}
	l.apply(&api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: id(service), Name: service, SpecJson: b}}})
}

func isDrained(a *api.Assignment) bool { return a.Drained }

// A node that is about to end a task which nobody told to end has it out of rotation first.
func TestLeavingTaskGetsNoClients(t *testing.T) {
	bubble(t, func(l *lab) {
		l.node("w1")
		tasks := l.tasks("web", "w1")
		p := l.dial("w1").hello(&api.Hello{})
		defer p.cancel()
		p.report(running(tasks[0]))
		endpointIn(p, "ready", tasks[0])
		sick := running(tasks[0])
		sick.Message, sick.Err = api.MessageLeaving, "unhealthy container"
		p.report(sick)
		version := endpointIn(p, "draining", tasks[0])
		p.ack(id("net"), version)
		if a := assignment(p, tasks[0], isDrained); api.TaskState(a.Desired) != api.TaskRunning {
			t.Errorf("the task is wanted no more: %v", a)
		}
		synctest.Wait()
		if got := l.task(tasks[0]); got.State != api.TaskRunning || got.Status.Err != "unhealthy container" {
			t.Errorf("the store has %s, status %v", got.State, got.Status)
		}
		p.report(running(tasks[0])) // its daemon was restarted, and the task is well
		endpointIn(p, "ready", tasks[0])
	})
}

// The service's label decides how long its clients are waited for, as it is when the task is to stop.
func TestDrainTimeoutOfTheService(t *testing.T) {
	for _, c := range []struct {
		label string
		want  int64
	}{{"", 0}, {"30s", int64(30 * time.Second)}, {"0s", -1}} {
		t.Run("label "+strings.TrimSpace(c.label), func(t *testing.T) {
			bubble(t, func(l *lab) {
				l.node("w1")
				tasks := l.tasks("web", "w1")
				p := l.dial("w1").hello(&api.Hello{})
				defer p.cancel()
				p.report(running(tasks[0]))
				endpointIn(p, "ready", tasks[0])
				labels := map[string]string{}
				if c.label != "" {
					labels[dispatcher.LabelDrainTimeout] = c.label
				}
				l.relabel("web", labels)
				l.apply(&api.Change{Kind: &api.Change_DesireTasks{DesireTasks: &api.TaskDesire{TaskIds: tasks, Desired: uint32(api.TaskShutdown)}}})
				a := assignment(p, tasks[0], func(a *api.Assignment) bool { return api.TaskState(a.Desired) == api.TaskShutdown })
				if a.DrainTimeout != c.want {
					t.Errorf("drain timeout %v, want %v", a.DrainTimeout, c.want)
				}
			})
		})
	}
}
