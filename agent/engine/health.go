package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"skein/runtime"
)

const (
	defaultProbe        = 30 * time.Second // interval and timeout, docker's defaults
	defaultProbeRetries = 3
	probeLogEntries     = 5
	probeOutputBytes    = 4096
)

// health is the probes of one run of a container.
type health struct {
	stop   context.CancelFunc
	mu     sync.Mutex
	report container.Health
}

// healthConfig is the container's check, or nil: none, disabled, or empty.
func healthConfig(r record) *container.HealthConfig {
	h := r.Config.Healthcheck
	if h == nil || len(h.Test) < 2 || h.Test[0] == "NONE" {
		return nil
	}
	return h
}

// startHealth begins probing the current run.
func (e *Engine) startHealth(c *entry) {
	r := c.snapshot()
	cfg := healthConfig(r)
	if cfg == nil {
		return
	}
	ctx, stop := context.WithCancel(e.background)
	h := &health{stop: stop, report: container.Health{Status: container.Starting}}
	c.mu.Lock()
	if c.health != nil {
		c.health.stop()
	}
	c.health = h
	c.mu.Unlock()
	e.work.Go(func() error {
		e.probeLoop(ctx, c, h, r, cfg)
		return nil
	})
}

func (e *Engine) stopHealth(c *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.health != nil {
		c.health.stop()
	}
}

func (c *entry) healthReport() *container.Health {
	c.mu.Lock()
	h := c.health
	c.mu.Unlock()
	if h == nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	rep := h.report
	rep.Log = append([]*container.HealthcheckResult(nil), rep.Log...)
	return &rep
}

func (e *Engine) probeLoop(ctx context.Context, c *entry, h *health, r record, cfg *container.HealthConfig) {
	or := func(d, def time.Duration) time.Duration {
		if d == 0 {
			return def
		}
		return d
	}
	interval, timeout := or(cfg.Interval, defaultProbe), or(cfg.Timeout, defaultProbe)
	retries := cfg.Retries
	if retries == 0 {
		retries = defaultProbeRetries
	}
	begun := time.Now()
	for {
		wait := interval
		if inStart := time.Since(begun) < cfg.StartPeriod; inStart && h.status() == container.Starting {
			wait = min(wait, or(cfg.StartInterval, 5*time.Second))
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		if c.snapshot().State.Status == container.StatePaused {
			continue // a frozen container cannot answer, and is not to blame
		}
		res := e.probe(ctx, r, cfg, timeout)
		if ctx.Err() != nil {
			return
		}
		if h.record(res, retries, time.Since(begun) < cfg.StartPeriod) {
			status := h.status()
			e.emit(r, events.Action("health_status: "+string(status)), nil)
			_ = e.update(c, func(*record) {}) // wakes who waits for health
		}
	}
}

func (h *health) status() container.HealthStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.report.Status
}

// record takes a probe's result and reports whether the status changed.
func (h *health) record(res *container.HealthcheckResult, retries int, inStart bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	old := h.report.Status
	h.report.Log = append(h.report.Log, res)
	if len(h.report.Log) > probeLogEntries {
		h.report.Log = h.report.Log[1:]
	}
	if res.ExitCode == 0 {
		h.report.FailingStreak, h.report.Status = 0, container.Healthy
	} else if !inStart || old != container.Starting {
		h.report.FailingStreak++
		if h.report.FailingStreak >= retries {
			h.report.Status = container.Unhealthy
		}
	}
	return h.report.Status != old
}

// probe runs the check once in the container.
func (e *Engine) probe(ctx context.Context, r record, cfg *container.HealthConfig, timeout time.Duration) *container.HealthcheckResult {
	cmd := cfg.Test[1:]
	if cfg.Test[0] == "CMD-SHELL" {
		shell := r.Config.Shell
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		cmd = append(append([]string{}, shell...), cfg.Test[1])
	}
	res := &container.HealthcheckResult{Start: time.Now()}
	defer func() { res.End = time.Now() }()
	x := &execEntry{id: newContainerID(), container: r.ID, done: make(chan struct{}), started: true, running: true,
		req: container.ExecCreateRequest{Cmd: cmd}}
	e.execs.mu.Lock()
	e.execs.m[x.id] = x
	e.execs.mu.Unlock()
	defer func() {
		e.execs.mu.Lock()
		delete(e.execs.m, x.id)
		e.execs.mu.Unlock()
	}()
	e.emitExec(r, events.ActionExecCreate, x, true, nil)
	p, err := e.execProcess(ctx, r, x)
	if err == nil {
		_, err = e.cfg.Supervisor.Exec(ctx, r.ID, p)
	}
	if err != nil {
		res.ExitCode, res.Output = -1, "OCI runtime exec failed: exec failed: unable to start container process: "+reason(err, r.ID, x.id)
		return res
	}
	e.emitExec(r, events.ActionExecStart, x, true, nil)
	limit, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	out := &cappedBuffer{}
	_ = e.cfg.Supervisor.Attach(limit, r.ID, x.id, runtime.Streams{Stdout: out, Stderr: out}) // its end is what counts
	select {
	case <-x.done:
		res.ExitCode, res.Output = x.exit, out.String()
	case <-limit.Done():
		_ = e.cfg.Supervisor.SignalExec(ctx, r.ID, x.id, 9)
		res.ExitCode = -1
		if errors.Is(limit.Err(), context.DeadlineExceeded) {
			res.Output = fmt.Sprintf("Health check exceeded timeout (%v)", timeout)
		}
	}
	return res
}

// cappedBuffer keeps the first bytes and swallows the rest.
type cappedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (c *cappedBuffer) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if room := probeOutputBytes - c.b.Len(); room > 0 {
		c.b.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (c *cappedBuffer) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}
