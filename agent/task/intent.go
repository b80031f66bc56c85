package task

import (
	"context"
	"sync"
	"time"

	"skein/manager/api"
)

// intent is what the managers want of a task and what was last said of it: shared between the manager, which changes it, and the
// worker's goroutine, which waits on it.
type intent struct {
	mu       sync.Mutex
	a        *api.Assignment
	again    *api.Assignment // assigned once more while it was being removed
	removed  bool            // not in the set any more
	last     *api.TaskReport // latest report
	at       api.TaskState   // observed state: only grows
	wantedAt time.Time       // since when stopping is wanted
	clearAt  time.Time       // since when it is known to be out of rotation
	session  bool
	lostAt   time.Time
	wake     chan struct{}
	cancel   context.CancelFunc // of the step that runs
	timer    *time.Timer        // next moment at which stopping may become due
}

func (i *intent) init(a *api.Assignment, known *api.TaskReport) {
	i.a, i.at, i.wake = a, api.TaskState(a.State), make(chan struct{}, 1)
	if known != nil {
		i.last, i.at = known, max(i.at, api.TaskState(known.State))
	}
	i.noteLocked()
}

// update takes a newer assignment.
func (i *intent) update(a *api.Assignment) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.removed {
		i.again = a
		return
	}
	i.a = a
	i.noteLocked()
	i.pokeLocked()
}

// remove takes the task out of the set for good.
func (i *intent) remove() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.again = nil
	if i.removed {
		return
	}
	i.removed = true
	i.noteLocked()
	i.pokeLocked()
}

func (i *intent) setSession(connected bool, lostAt time.Time) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.session, i.lostAt = connected, lostAt
	i.pokeLocked()
}

// noteLocked records since when stopping is wanted and since when the task is out of rotation.
func (i *intent) noteLocked() {
	now := time.Now()
	if i.stopWantedLocked() && i.wantedAt.IsZero() {
		i.wantedAt = now
	}
	if (i.removed || i.a.Drained) && i.stopWantedLocked() && i.clearAt.IsZero() {
		i.clearAt = now
	}
}

// pokeLocked wakes the worker, or ends its step when stopping is due.
func (i *intent) pokeLocked() {
	select {
	case i.wake <- struct{}{}:
	default:
	}
	i.armLocked()
}

// armLocked ends the running step if stopping is due, or sees to it that it is ended when it becomes due.
func (i *intent) armLocked() {
	if i.timer != nil {
		i.timer.Stop()
		i.timer = nil
	}
	if i.cancel == nil || !i.stopWantedLocked() {
		return
	}
	left := i.dueAtLocked().Sub(time.Now())
	if left <= 0 {
		i.cancel()
		return
	}
	i.timer = time.AfterFunc(left, func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.armLocked()
	})
}

func (i *intent) disarm() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.timer != nil {
		i.timer.Stop()
	}
}

func (i *intent) stopWantedLocked() bool {
	return i.removed || api.TaskState(i.a.Desired) >= api.TaskShutdown
}

// inRotationLocked reports whether the task may have had clients.
func (i *intent) inRotationLocked() bool {
	return i.at == api.TaskRunning && (len(i.a.Attachments) > 0 || len(i.a.Ports) > 0)
}

func (i *intent) inRotation() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.inRotationLocked()
}

// outOfRotation reports whether the managers said that every live node sends the task no new clients.
func (i *intent) outOfRotation() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.removed || i.a.Drained
}

// drainTime is how long the clients that the task still has are waited for, and whether that means all of them, because somebody named the time.
func (i *intent) drainTime() (limit time.Duration, all bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case !i.inRotationLocked() || i.a.DrainTimeout < 0:
		return 0, false
	case i.a.DrainTimeout > 0:
		return time.Duration(i.a.DrainTimeout), true
	}
	return drainTime, false
}

// dueAtLocked is the instant from which the container may be stopped, as soon as its clients are done; stopping must be wanted.
func (i *intent) dueAtLocked() time.Time {
	if !i.inRotationLocked() {
		return i.wantedAt
	}
	if !i.clearAt.IsZero() {
		return i.clearAt.Add(drainMargin)
	}
	bound := i.wantedAt.Add(drainBound)
	if !i.session {
		alone := i.wantedAt
		if i.lostAt.After(alone) {
			alone = i.lostAt
		}
		if alone = alone.Add(aloneBound); alone.Before(bound) {
			return alone
		}
	}
	return bound
}

func (i *intent) stopWanted() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.stopWantedLocked()
}

// stopDue reports whether the container has to be stopped now.
func (i *intent) stopDue() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.stopWantedLocked() && !time.Now().Before(i.dueAtLocked())
}

// step runs f with a context that also ends when stopping is due.
func (i *intent) step(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	i.mu.Lock()
	i.cancel = cancel
	i.armLocked()
	i.mu.Unlock()
	defer func() {
		i.mu.Lock()
		i.cancel = nil
		i.armLocked()
		i.mu.Unlock()
	}()
	if err := ctx.Err(); err != nil {
		return err
	}
	return f(ctx)
}

// mayStart waits until the managers want the task to run and its start delay is over.
func (i *intent) mayStart(ctx context.Context) error {
	for {
		i.mu.Lock()
		wanted, after := api.TaskState(i.a.Desired) >= api.TaskRunning, i.a.StartAfter
		i.mu.Unlock()
		left := time.Duration(0)
		if after > 0 {
			left = time.Until(time.Unix(0, after))
		}
		if wanted && left <= 0 {
			return nil
		}
		var tick <-chan time.Time
		if wanted {
			t := time.NewTimer(left)
			defer t.Stop()
			tick = t.C
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-i.wake:
		case <-tick:
		}
	}
}

// await waits until cond holds; false when ctx ended first.
func (i *intent) await(ctx context.Context, cond func() bool) bool {
	for !cond() {
		select {
		case <-ctx.Done():
			return false
		case <-i.wake:
		}
	}
	return ctx.Err() == nil
}

// removable reports whether the task's container is wanted no more, not even ended.
func (i *intent) removable() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.removed || api.TaskState(i.a.Desired) >= api.TaskRemove
}

func (i *intent) unassigned() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.removed
}

func (i *intent) reassigned() *api.Assignment {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.again
}

func (i *intent) assignment() *api.Assignment {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.a
}

func (i *intent) state() api.TaskState {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.at
}

func (i *intent) latest() *api.TaskReport {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.last
}

// remember keeps a report as the latest; false when it says nothing new.
func (i *intent) remember(r *api.TaskReport) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	l := i.last
	if api.TaskState(r.State) < i.at {
		return false
	}
	if l != nil && l.State == r.State && l.Message == r.Message && l.Err == r.Err && l.ContainerId == r.ContainerId && l.Pid == r.Pid {
		return false
	}
	i.last, i.at = r, api.TaskState(r.State)
	return true
}
