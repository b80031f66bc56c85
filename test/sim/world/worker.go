package world

import (
	"strings"
	"time"

	"skein/manager/api"
)

// As in package agent/task.
const (
	drainMargin = 150 * time.Millisecond
	drainBound  = 15 * time.Second
	aloneBound  = 10 * time.Second
)

type stage uint8

const (
	preparing stage = iota
	holding
	starting
	serving
	observing
	stopping
	over
)

// task is an agent's worker. What it does takes as long as its luck says.
type task struct {
	n       *node
	a       *assignment
	again   *assignment
	dropped bool
	stage   stage
	at      api.TaskState
	last    *api.TaskReport
	until   time.Duration // end of the stage's work; zero: nothing is under way
	wanted  time.Duration // since when stopping is wanted; negative: it is not
	clear   time.Duration // since when it is known to be out of rotation
	luck    luck
	armed   time.Duration
}

// luck is what will happen to a task.
type luck struct {
	prepare, start, ready, life, stop time.Duration
	prepareFails, startFails, hangs   bool
	rejected                          bool
	code                              int
}

const never = 1 << 60

func newTask(n *node, a *assignment) *task {
	t := &task{n: n, a: a, at: a.state, wanted: -1, clear: -1}
	t.luck = n.w.luck(a)
	t.want()
	return t
}

// luck draws what will happen.
func (w *World) luck(a *assignment) luck {
	l := luck{prepare: w.between(0, 500*time.Millisecond), start: w.between(5*time.Millisecond, 300*time.Millisecond),
		ready: w.between(0, 300*time.Millisecond), life: never, stop: w.between(0, time.Second)}
	if a.job {
		l.life = w.between(100*time.Millisecond, 4*time.Second)
	}
	if w.calm {
		return l
	}
	bad := strings.HasPrefix(a.image, "bad")
	switch x := w.r.Float64(); {
	case bad && x < 0.7:
		l.life, l.code = w.between(0, 3*time.Second), 1
	case bad && x < 0.8:
		l.startFails = true
	case x < 0.04:
		l.prepareFails, l.rejected = true, w.r.IntN(2) == 0
	case x < 0.06:
		l.startFails = true
	case x < 0.08:
		l.hangs = true
	case x < 0.16:
		l.life, l.code = w.between(0, 20*time.Second), w.r.IntN(2)
	case x < 0.20:
		l.prepare = w.between(0, 20*time.Second)
	case x < 0.25:
		l.stop = w.between(0, 20*time.Second)
	}
	return l
}

func (t *task) stopWanted() bool { return t.dropped || t.a.desired >= api.TaskShutdown }

// want notes since when stopping is wanted and since when the task is out of rotation.
func (t *task) want() {
	now := t.n.w.now
	if !t.stopWanted() {
		return
	}
	if t.wanted < 0 {
		t.wanted = now
	}
	if t.clear < 0 && (t.dropped || t.a.drained) {
		t.clear = now
	}
}

// dueAt is the instant at which the container is stopped.
func (t *task) dueAt() time.Duration {
	if t.at != api.TaskRunning || !t.a.mesh {
		return t.wanted
	}
	if t.clear >= 0 {
		return t.clear + drainMargin
	}
	if t.n.session == nil {
		return t.wanted + aloneBound
	}
	return t.wanted + drainBound
}

func (t *task) stopDue() bool {
	if !t.stopWanted() {
		return false
	}
	if at := t.dueAt(); at > t.n.w.now {
		t.wakeAt(at)
		return false
	}
	return true
}

func (t *task) removable() bool { return t.dropped || t.a.desired >= api.TaskRemove }

// drop takes the task out of the set.
func (t *task) drop() {
	t.again = nil
	if t.dropped {
		return
	}
	t.dropped = true
	t.want()
	t.poke()
}

// resume is what a new daemon does with a task that its journal names.
func (t *task) resume() {
	t.until, t.armed = 0, 0
	if t.last != nil && api.TaskState(t.last.State) < api.TaskRunning {
		t.last = nil // not written down
	}
	t.at = t.a.state
	if t.last != nil {
		t.at = max(t.at, api.TaskState(t.last.State))
	}
	t.accept()
}

// accept finds out what a former daemon left of the task.
func (t *task) accept() {
	c := t.n.holds[t.a.id]
	switch {
	case t.at.Terminal():
		t.stage = over
	case c != nil && c.ended:
		t.exited(c)
	case c != nil && c.running && t.at >= api.TaskRunning:
		t.stage, t.until = observing, t.n.w.now+t.luck.life
	case c != nil && c.running:
		t.stage, t.until = serving, t.n.w.now+t.luck.ready
	case t.at >= api.TaskRunning:
		t.say(api.TaskFailed, "failed", "task: its container is gone from this node")
		t.stage = over
	case t.stopWanted() && c == nil:
		t.say(api.TaskShutdown, "shutdown before it was started", "")
		t.stage = over
	default:
		t.say(api.TaskPreparing, "preparing", "")
		t.stage, t.until = preparing, t.n.w.now+t.luck.prepare
		if t.luck.hangs {
			t.until = t.n.w.now + never
		}
	}
	t.poke()
}

// wakeAt has the task looked at again.
func (t *task) wakeAt(at time.Duration) {
	w := t.n.w
	if at >= never || (t.armed > w.now && t.armed <= at) {
		return
	}
	t.armed = at
	boot := t.n.boot
	w.after(at-w.now, func() {
		if t.n.boot == boot && t.n.tasks[t.a.id] == t {
			t.poke()
		}
	})
}

// reached tells whether the stage's work is done.
func (t *task) reached() bool {
	if t.until <= t.n.w.now {
		return true
	}
	t.wakeAt(t.until)
	return false
}

// poke brings the task on as far as it goes now.
func (t *task) poke() {
	if !t.n.daemon {
		return
	}
	for t.step() {
	}
}

func (t *task) step() bool {
	w, n := t.n.w, t.n
	switch t.stage {
	case preparing:
		if t.stopDue() {
			return t.stop()
		}
		if w.calm && t.luck.hangs {
			t.luck.hangs, t.until = false, w.now
		}
		if !t.reached() {
			return false
		}
		if t.luck.prepareFails {
			state := api.TaskFailed
			if t.luck.rejected {
				state = api.TaskRejected
			}
			return t.end(state, "failed", "no such image")
		}
		n.holds[t.a.id] = &container{service: t.a.service}
		t.say(api.TaskReady, "prepared", "")
		if w.cfg.Hooks.EarlyRunning {
			t.say(api.TaskRunning, "started", "")
		}
		t.stage = holding
	case holding:
		switch after := time.Unix(0, t.a.startAfter); {
		case t.stopDue():
			return t.stop()
		case t.a.desired < api.TaskRunning:
			return false
		case t.a.startAfter > 0 && n.clock().Before(after):
			t.wakeAt(w.now + after.Sub(n.clock()))
			return false
		}
		t.say(api.TaskStarting, "starting", "")
		t.stage, t.until = starting, w.now+t.luck.start
	case starting:
		switch {
		case t.stopDue():
			return t.stop()
		case !t.reached():
			return false
		case t.luck.startFails:
			return t.end(api.TaskFailed, "failed", "start task: no such file")
		}
		c := n.holds[t.a.id]
		if c == nil {
			return t.end(api.TaskFailed, "failed", "its container is gone")
		}
		c.running, c.since = true, w.now
		w.started(n, t.a.id)
		t.stage, t.until = serving, w.now+t.luck.ready
	case serving:
		switch {
		case t.stopDue():
			return t.stop()
		case !t.reached():
			return false
		}
		t.say(api.TaskRunning, "started", "")
		t.stage, t.until = observing, w.now+t.luck.life
	case observing:
		c := n.holds[t.a.id]
		if c == nil || c.ended {
			t.exited(c)
			return true
		}
		if t.stopDue() {
			return t.stop()
		}
		if !t.reached() {
			return false
		}
		c.running, c.ended, c.code = false, true, t.luck.code
		t.exited(c)
	case stopping:
		if !t.reached() {
			return false
		}
		if c := n.holds[t.a.id]; c != nil && !w.cfg.Hooks.NoStop {
			c.running, c.ended = false, true
		}
		if t.removable() && !w.cfg.Hooks.NoStop {
			delete(n.holds, t.a.id)
		}
		return t.end(api.TaskShutdown, "shutdown", "")
	case over:
		if t.removable() && !w.cfg.Hooks.KeepContainers {
			delete(n.holds, t.a.id)
		}
		if t.dropped {
			delete(n.tasks, t.a.id)
			if a := t.again; a != nil {
				n.take(a)
			}
			n.forgetDeps()
		}
		return false
	}
	return true
}

func (t *task) stop() bool {
	t.stage, t.until = stopping, t.n.w.now+t.luck.stop
	return true
}

func (t *task) end(state api.TaskState, message, err string) bool {
	t.say(state, message, err)
	t.stage = over
	return true
}

// exited reports a process that ended by itself.
func (t *task) exited(c *container) {
	switch {
	case t.stopWanted():
		t.say(api.TaskShutdown, "shutdown", "")
	case c == nil:
		t.say(api.TaskFailed, "failed", "task: its container is gone from this node")
	case c.code == 0:
		t.say(api.TaskComplete, "finished", "")
	default:
		t.say(api.TaskFailed, "failed", "task: non-zero exit")
	}
	t.stage = over
}

// say reports a state, unless a later one was.
func (t *task) say(state api.TaskState, message, err string) {
	if state < t.at || (t.last != nil && api.TaskState(t.last.State) == state) {
		return
	}
	t.at = state
	t.last = &api.TaskReport{TaskId: t.a.id, State: uint32(state), Time: t.n.clock().UnixNano(), Message: message, Err: err, NodeId: t.n.name}
	t.n.report(t.last)
}
