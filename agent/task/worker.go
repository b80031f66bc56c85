package task

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"skein/manager/api"
)

// worker carries out one task. Its fields besides the intent belong to its goroutine.
type worker struct {
	cfg      Config
	id       string
	log      *slog.Logger
	networks map[string]*api.NetworkRecord
	intent
	ctl Controller
}

// errLost ends a task that ran before the daemon or the machine was restarted.
var errLost = errors.New("task: its container is gone from this node")

// stage is a step of a task's life; it returns the next one, nil at the end.
type stage func(*worker, context.Context) stage

func newWorker(cfg Config, a *api.Assignment, networks map[string]*api.NetworkRecord, known *api.TaskReport) *worker {
	w := &worker{cfg: cfg, id: a.TaskId, networks: networks, log: cfg.Log.With("task", a.TaskId, "service", a.ServiceName)}
	w.intent.init(a, known)
	return w
}

// run lives from assignment to removal, or until the daemon ends.
func (w *worker) run(ctx context.Context) {
	defer w.disarm()
	if !w.state().Terminal() {
		for next := stage((*worker).accept); next != nil && ctx.Err() == nil; {
			next = next(w, ctx)
		}
	}
	if !w.await(ctx, w.removable) {
		return
	}
	if !w.retry(ctx, "remove container", w.removeContainer) {
		return
	}
	w.await(ctx, w.unassigned)
}

// accept finds out what a former daemon left of this task.
func (w *worker) accept(ctx context.Context) stage {
	w.report(api.TaskAccepted, "accepted", nil)
	var found State
	err := w.attempt(ctx, func(ctx context.Context) error {
		var err error
		if w.ctl == nil {
			if w.ctl, err = w.cfg.Executor.Controller(w.assignment(), w.networks, w.cfg.Dependency); err != nil {
				w.ctl = nil
				return err
			}
		}
		found, err = w.ctl.State(ctx)
		return err
	})
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil && w.ctl != nil && w.stopDue():
		return (*worker).stop
	case err != nil && w.stopDue():
		w.report(api.TaskShutdown, "shutdown", nil)
		return nil
	case err != nil:
		return w.fail(err)
	case found.Ended:
		return w.ended(found.Exit)
	case found.Running && w.state() >= api.TaskRunning:
		w.report(api.TaskRunning, "started", nil)
		return (*worker).observe
	case found.Running:
		return (*worker).serve
	case w.state() >= api.TaskRunning: // a task is never started twice: it is replaced
		return w.fail(errLost)
	case w.stopDue() && !found.Created:
		w.report(api.TaskShutdown, "shutdown before it was started", nil)
		return nil
	}
	return (*worker).prepare
}

func (w *worker) prepare(ctx context.Context) stage {
	w.report(api.TaskPreparing, "preparing", nil)
	err := w.attempt(ctx, w.ctl.Prepare)
	switch {
	case ctx.Err() != nil:
		return nil
	case w.stopDue():
		return (*worker).stop
	case err != nil:
		return w.fail(fmt.Errorf("prepare task: %w", err))
	}
	return (*worker).hold
}

// hold waits with the prepared container until the managers want it to run.
func (w *worker) hold(ctx context.Context) stage {
	w.report(api.TaskReady, "prepared", nil)
	if err := w.step(ctx, w.mayStart); ctx.Err() != nil {
		return nil
	} else if err != nil || w.stopDue() {
		return (*worker).stop
	}
	return (*worker).start
}

func (w *worker) start(ctx context.Context) stage {
	w.report(api.TaskStarting, "starting", nil)
	err := w.step(ctx, w.ctl.Start)
	switch {
	case ctx.Err() != nil:
		return nil
	case w.stopDue():
		return (*worker).stop
	case err != nil:
		return w.fail(fmt.Errorf("start task: %w", err))
	}
	return (*worker).serve
}

// serve waits until the container can be given traffic.
func (w *worker) serve(ctx context.Context) stage {
	w.report(api.TaskStarting, "starting", nil)
	var note string
	err := w.step(ctx, func(ctx context.Context) (err error) {
		note, err = w.ctl.Ready(ctx)
		return err
	})
	switch {
	case ctx.Err() != nil:
		return nil
	case w.stopDue():
		return (*worker).stop
	case err != nil:
		return w.unready(ctx, err)
	}
	if note != "" { // clients show the error of a task that runs, too, and no message
		w.report(api.TaskRunning, "started: "+note, errors.New(note))
	} else {
		w.report(api.TaskRunning, "started", nil)
	}
	return (*worker).observe
}

// unready ends a task that never could serve: its own exit tells more than the failed wait, if it had one.
func (w *worker) unready(ctx context.Context, cause error) stage {
	if st, err := w.ctl.State(ctx); err == nil && st.Ended {
		return w.ended(st.Exit)
	}
	if !w.retry(ctx, "stop container that did not become ready", w.ctl.Shutdown) {
		return nil
	}
	return w.fail(fmt.Errorf("wait until ready: %w", cause))
}

// observe waits for the container's end, or for the moment to stop it.
func (w *worker) observe(ctx context.Context) stage {
	for tries := 0; ; tries++ {
		var exit Exit
		err := w.step(ctx, func(ctx context.Context) (err error) {
			exit, err = w.ctl.Wait(ctx)
			return err
		})
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil && exit.Sick:
			return w.sick(exit.Err)
		case err == nil:
			return w.ended(exit)
		case w.stopDue():
			return (*worker).drain
		}
		// The container's state is not known: that is no reason to end it.
		w.log.Warn("wait for container", "err", err)
		w.report(api.TaskRunning, "started; its state cannot be observed", err)
		_ = w.step(ctx, func(ctx context.Context) error { return pause(ctx, backoff(tries)) }) // its end is looked at above
	}
}

// drain lets the clients end that the task still has: no new ones are sent to it any more.
func (w *worker) drain(ctx context.Context) stage {
	limit, all := w.drainTime()
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := w.ctl.Quiet(bounded, all); err != nil && bounded.Err() == nil {
		w.log.Warn("whether the task still has clients is not known: it is stopped", "err", err)
	}
	if ctx.Err() != nil {
		return nil
	}
	return (*worker).stop
}

// sick ends a container that runs but was given up: as soon as no new clients are sent to it, without a wait for those that it has.
func (w *worker) sick(cause string) stage {
	return func(w *worker, ctx context.Context) stage {
		if w.inRotation() {
			w.report(api.TaskRunning, api.MessageLeaving, errors.New(cause))
			bounded, cancel := context.WithTimeout(ctx, sickBound)
			if w.await(bounded, w.outOfRotation) {
				_ = pause(bounded, drainMargin) // its end is looked at below
			}
			cancel()
		}
		if !w.retry(ctx, "stop unhealthy container", w.ctl.Shutdown) {
			return nil
		}
		exit := Exit{Code: 1}
		if st, err := w.ctl.State(ctx); err == nil && st.Ended && st.Exit.Code != 0 {
			exit = st.Exit
		}
		exit.Err = cause
		return w.ended(exit)
	}
}

// stop ends the container, whatever was done of it.
func (w *worker) stop(ctx context.Context) stage {
	var last Exit
	ok := w.retry(ctx, "stop container", func(ctx context.Context) error {
		if err := w.ctl.Shutdown(ctx); err != nil {
			return err
		}
		if st, err := w.ctl.State(ctx); err == nil && st.Ended {
			last = st.Exit
		}
		return nil
	})
	if !ok {
		return nil
	}
	if w.removable() { // addresses are free once the report is logged: the namespace must be gone by then
		if err := w.ctl.Remove(ctx); err != nil {
			w.log.Warn("remove container", "err", err)
		}
	}
	w.reportExit(api.TaskShutdown, "shutdown", nil, last)
	return nil
}

// ended reports a process that ended by itself, or was found ended.
func (w *worker) ended(exit Exit) stage {
	switch {
	case w.stopWanted():
		w.reportExit(api.TaskShutdown, "shutdown", nil, exit)
	case exit.Code == 0 && exit.Err == "":
		w.reportExit(api.TaskComplete, "finished", nil, exit)
	default:
		w.reportExit(api.TaskFailed, "failed", exitError(exit), exit)
	}
	return nil
}

// fail ends a task that could not be brought to run.
func (w *worker) fail(err error) stage {
	var fatal Fatal
	if errors.As(err, &fatal) && w.state() <= api.TaskPreparing {
		w.report(api.TaskRejected, "rejected", err)
		return nil
	}
	w.report(api.TaskFailed, "failed", err)
	return nil
}

// exitError is docker's text of a failed task, with the reason when one is known.
func exitError(exit Exit) error {
	switch {
	case exit.Code < 0 && exit.Err != "":
		return fmt.Errorf("task: exit status unknown: %s", exit.Err)
	case exit.Code < 0:
		return errors.New("task: exit status unknown")
	case exit.OOM:
		return fmt.Errorf("task: non-zero exit (%d): out of memory: its limit is too low for what it does", exit.Code)
	case exit.Err != "":
		return fmt.Errorf("task: non-zero exit (%d): %s", exit.Code, exit.Err)
	}
	return fmt.Errorf("task: non-zero exit (%d)", exit.Code)
}

// attempt repeats f until it succeeds, is fatal, stopping is due, or the bound is over; meanwhile the task's error tells why.
func (w *worker) attempt(ctx context.Context, f func(context.Context) error) error {
	deadline := time.Now().Add(prepareBound)
	for tries := 0; ; tries++ {
		err := w.step(ctx, f)
		var fatal Fatal
		if err == nil || errors.As(err, &fatal) || w.stopDue() || ctx.Err() != nil {
			return err
		}
		delay := backoff(tries)
		if time.Now().Add(delay).After(deadline) {
			return fmt.Errorf("gave up after %v: %w", prepareBound, err)
		}
		w.log.Warn("task is delayed", "err", err, "retry", delay)
		w.report(w.state(), "retrying", err)
		if err := w.step(ctx, func(ctx context.Context) error { return pause(ctx, delay) }); err != nil {
			return err
		}
	}
}

// retry repeats what must succeed in the end (stopping, removing) until the daemon ends.
func (w *worker) retry(ctx context.Context, what string, f func(context.Context) error) bool {
	for tries := 0; ; tries++ {
		err := f(ctx)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		w.log.Error(what, "err", err)
		if !w.state().Terminal() {
			w.report(w.state(), "retrying", fmt.Errorf("%s: %w", what, err))
		}
		if pause(ctx, backoff(tries)) != nil {
			return false
		}
	}
}

func (w *worker) removeContainer(ctx context.Context) error {
	if w.ctl != nil {
		return w.ctl.Remove(ctx)
	}
	return w.cfg.Executor.RemoveTask(ctx, w.id)
}

// report publishes a state, unless a later one was reached before (after a restart of the daemon).
func (w *worker) report(state api.TaskState, message string, err error) {
	w.publish(w.newReport(state, message, err))
}

func (w *worker) reportExit(state api.TaskState, message string, err error, exit Exit) {
	r := w.newReport(state, message, err)
	r.ExitCode = int32(exit.Code)
	if !exit.At.IsZero() {
		r.Time = exit.At.UnixNano()
	}
	w.publish(r)
}

func (w *worker) newReport(state api.TaskState, message string, err error) *api.TaskReport {
	r := &api.TaskReport{TaskId: w.id, State: uint32(state), Time: time.Now().UnixNano(), Message: message, NodeId: w.assignment().NodeId}
	if err != nil {
		r.Err = err.Error()
	}
	if w.ctl != nil {
		info := w.ctl.Info()
		r.ContainerId, r.Pid, r.Ports = info.ContainerID, int32(info.Pid), info.Ports
	}
	return r
}

func (w *worker) publish(r *api.TaskReport) {
	if w.remember(r) {
		w.cfg.Report(r)
	}
}

// backoff doubles from backoffMin to backoffMax, with a jitter of a quarter so that tasks of one service do not retry in step.
func backoff(tries int) time.Duration {
	d := min(backoffMin<<min(tries, 10), backoffMax)
	return d - time.Duration(rand.Int64N(int64(d/4)))
}

// pause waits on the clock or for the context.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
