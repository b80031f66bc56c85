package agent

import (
	"context"
	"fmt"
	"time"

	"skein/agent/task"
	"skein/manager/api"
)

// gateBound is how long a task may wait for its networks: a manager sends tables before the assignments that need them.
const gateBound = 15 * time.Second

// gatedExecutor lets a task start only when this node's network agrees with tables that have its endpoint: a container's legs need their
// network here, and its neighbours a route to it.
type gatedExecutor struct {
	task.Executor
	tables *applier
}

func (g gatedExecutor) Controller(a *api.Assignment, networks map[string]*api.NetworkRecord, dependency task.Dependency) (task.Controller, error) {
	c, err := g.Executor.Controller(a, networks, dependency)
	if err != nil {
		return nil, err
	}
	return &gatedController{Controller: c, tables: g.tables, a: a}, nil
}

type gatedController struct {
	task.Controller
	tables *applier
	a      *api.Assignment
}

// Start waits for the task's networks, then starts its container.
func (c *gatedController) Start(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, gateBound)
	defer cancel()
	if missing := c.tables.await(bounded, c.a); missing != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("its network is not ready on this node after %v: %w", gateBound, missing)
	}
	return c.Controller.Start(ctx)
}
