// Package tasktest has a fake Executor and a fake Network: containers and kernels of a node that exist only in memory, outlive the daemon
// that made them, and behave as a script says. Used by tests and by simulations of whole clusters.
package tasktest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"skein/agent/task"
	"skein/manager/api"
)

// Script is how a task's container behaves.
type Script struct {
	PrepareErrs  []error // one per call, then success
	PrepareTime  time.Duration
	StartErr     error
	ReadyTime    time.Duration
	ReadyErr     error
	Note         string
	RunTime      time.Duration // 0: until it is stopped
	Exit         task.Exit     // after RunTime
	ClientsTime  time.Duration // how long clients stay after the task left rotation
	ShutdownTime time.Duration
	ShutdownErrs []error
}

// Executor is a fake node. The zero value is not usable; call NewExecutor.
type Executor struct {
	// Script returns the behaviour of a task; nil: everything succeeds at once and runs until it is stopped.
	Script func(a *api.Assignment) Script

	mu         sync.Mutex
	containers map[string]*Container
	events     []string
	began      time.Time
}

// Container is a fake container.
type Container struct {
	TaskID  string
	Starts  int
	running bool
	ended   bool
	sick    string // why its health check gave it up
	change  chan struct{}
	exit    task.Exit
	gone    chan struct{} // closed at the end of the process
	pid     int
}

// NewExecutor returns an empty node.
func NewExecutor() *Executor {
	return &Executor{containers: map[string]*Container{}, began: time.Now()}
}

// Describe returns a small machine.
func (e *Executor) Describe(context.Context) ([]byte, error) {
	return []byte(`{"Hostname":"fake","Platform":{"Architecture":"x86_64","OS":"linux"},"Resources":{"NanoCPUs":4000000000,"MemoryBytes":8589934592}}`), nil
}

// Controller returns the controller of a task.
func (e *Executor) Controller(a *api.Assignment, _ map[string]*api.NetworkRecord, _ task.Dependency) (task.Controller, error) {
	var s Script
	if e.Script != nil {
		s = e.Script(a)
	}
	return &controller{e: e, id: a.TaskId, script: s}, nil
}

// Tasks lists the tasks that have a container.
func (e *Executor) Tasks(context.Context) ([]string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	ids := make([]string, 0, len(e.containers))
	for id := range e.containers {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}

// RemoveTask removes a task's container.
func (e *Executor) RemoveTask(_ context.Context, id string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.removeLocked(id)
	return nil
}

// Kill ends a container's process from outside.
func (e *Executor) Kill(id string, exit task.Exit) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.containers[id]
	if c == nil || !c.running {
		return fmt.Errorf("kill %s: it does not run", id)
	}
	e.endLocked(c, exit)
	return nil
}

// Sicken has a container's health check give it up.
func (e *Executor) Sicken(id, why string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.containers[id]
	if c == nil || !c.running || c.sick != "" {
		return fmt.Errorf("sicken %s: it does not run, or is sick", id)
	}
	c.sick = why
	close(c.change)
	return nil
}

// Add makes a container that nobody assigned.
func (e *Executor) Add(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.createLocked(id)
	c.running, c.Starts = true, 1
}

// Running lists the tasks whose container runs.
func (e *Executor) Running() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var ids []string
	for id, c := range e.containers {
		if c.running {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// Starts tells how often a task's process was started, over all daemons.
func (e *Executor) Starts(id string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c := e.containers[id]; c != nil {
		return c.Starts
	}
	return 0
}

// Events lists what happened: "+1.5s start t1".
func (e *Executor) Events() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.events)
}

func (e *Executor) noteLocked(what, id string) {
	if len(e.events) < 100_000 { // a simulation may run for long
		e.events = append(e.events, fmt.Sprintf("+%v %s %s", time.Since(e.began).Round(10*time.Millisecond), what, id))
	}
}

func (e *Executor) createLocked(id string) *Container {
	c := e.containers[id]
	if c == nil {
		c = &Container{TaskID: id, gone: make(chan struct{}), change: make(chan struct{}), pid: 1000 + len(e.containers)}
		e.containers[id] = c
		e.noteLocked("create", id)
	}
	return c
}

func (e *Executor) endLocked(c *Container, exit task.Exit) {
	if exit.At.IsZero() {
		exit.At = time.Now()
	}
	c.running, c.ended, c.exit = false, true, exit
	close(c.gone)
	e.noteLocked(fmt.Sprintf("exit(%d)", exit.Code), c.TaskID)
}

func (e *Executor) removeLocked(id string) {
	c := e.containers[id]
	if c == nil {
		return
	}
	if c.running {
		e.endLocked(c, task.Exit{Code: 137})
	}
	delete(e.containers, id)
	e.noteLocked("remove", id)
}

type controller struct {
	e      *Executor
	id     string
	script Script
	info   task.Info
}

func (c *controller) container() *Container {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	return c.e.containers[c.id]
}

func (c *controller) State(context.Context) (task.State, error) {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	x := c.e.containers[c.id]
	if x == nil {
		return task.State{}, nil
	}
	c.info = task.Info{ContainerID: "c-" + c.id, Pid: x.pid}
	return task.State{Created: true, Running: x.running, Ended: x.ended, Exit: x.exit}, nil
}

func (c *controller) Prepare(ctx context.Context) error {
	if err := wait(ctx, c.script.PrepareTime); err != nil {
		return err
	}
	if len(c.script.PrepareErrs) > 0 {
		err := c.script.PrepareErrs[0]
		c.script.PrepareErrs = c.script.PrepareErrs[1:]
		if err != nil {
			return err
		}
	}
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	x := c.e.createLocked(c.id)
	c.info = task.Info{ContainerID: "c-" + c.id, Pid: x.pid}
	return nil
}

func (c *controller) Start(context.Context) error {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	x := c.e.containers[c.id]
	if x == nil {
		return errors.New("start: no container")
	}
	if c.script.StartErr != nil {
		return c.script.StartErr
	}
	if x.running || x.ended {
		return nil
	}
	x.running = true
	x.Starts++
	c.e.noteLocked("start", c.id)
	if c.script.RunTime > 0 {
		time.AfterFunc(c.script.RunTime, func() {
			c.e.mu.Lock()
			defer c.e.mu.Unlock()
			if x.running {
				c.e.endLocked(x, c.script.Exit)
			}
		})
	}
	return nil
}

func (c *controller) Ready(ctx context.Context) (string, error) {
	x := c.container()
	t := time.NewTimer(c.script.ReadyTime)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case <-x.gone:
		return "", errors.New("container ended before it was ready")
	case <-t.C:
		return c.script.Note, c.script.ReadyErr
	}
}

func (c *controller) Wait(ctx context.Context) (task.Exit, error) {
	x := c.container()
	if x == nil {
		return task.Exit{Code: -1, Err: "no container"}, nil
	}
	select {
	case <-ctx.Done():
		return task.Exit{}, ctx.Err()
	case <-x.change:
		return task.Exit{Sick: true, Err: x.sick}, nil
	case <-x.gone:
		c.e.mu.Lock()
		defer c.e.mu.Unlock()
		return x.exit, nil
	}
}

func (c *controller) Quiet(ctx context.Context, _ bool) error {
	x := c.container()
	if x == nil || c.script.ClientsTime == 0 {
		return nil
	}
	t := time.NewTimer(c.script.ClientsTime)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-x.gone:
	case <-t.C:
	}
	return nil
}

func (c *controller) Shutdown(ctx context.Context) error {
	c.e.mu.Lock()
	c.e.noteLocked("stop", c.id)
	c.e.mu.Unlock()
	if err := wait(ctx, c.script.ShutdownTime); err != nil {
		return err
	}
	if len(c.script.ShutdownErrs) > 0 {
		err := c.script.ShutdownErrs[0]
		c.script.ShutdownErrs = c.script.ShutdownErrs[1:]
		if err != nil {
			return err
		}
	}
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	if x := c.e.containers[c.id]; x != nil && x.running {
		c.e.endLocked(x, task.Exit{Code: 143})
	}
	return nil
}

func (c *controller) Remove(context.Context) error {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	c.e.removeLocked(c.id)
	return nil
}

func (c *controller) Info() task.Info { return c.info }

func wait(ctx context.Context, d time.Duration) error {
	if d == 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
