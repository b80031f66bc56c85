package engine

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"skein/agent/dockerapi"
	"skein/runtime"
	"skein/runtime/logs"
)

// ContainerLogs emits the container's log lines.
func (e *Engine) ContainerLogs(ctx context.Context, ref string, o dockerapi.LogOptions, emit func(dockerapi.LogLine) error) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	return e.readLogs(ctx, c, o, emit)
}

func (e *Engine) readLogs(ctx context.Context, c *entry, o dockerapi.LogOptions, emit func(dockerapi.LogLine) error) error {
	r := c.snapshot()
	path, details := e.logPath(r), logDetails(r)
	if path == "" {
		return errNoLog
	}
	if o.Tail == 0 {
		if !o.Follow {
			return nil
		}
		o.Since = time.Now()
	}
	opts := logs.Options{Since: o.Since, Until: o.Until, Tail: int(o.Tail)}
	if o.Follow {
		follow, stop := context.WithCancel(ctx)
		defer stop()
		ended := make(chan struct{})
		go func() { // ends with follow
			defer close(ended)
			e.awaitEnd(follow, c, -1)
		}()
		opts.Follow, opts.Watcher, opts.Done = true, e.logWatcher, ended
	}
	err := logs.Read(ctx, path, opts, func(l logs.Line) error {
		stderr := l.Stream == "stderr"
		if stderr && !o.Stderr || !stderr && !o.Stdout {
			return nil
		}
		return emit(dockerapi.LogLine{Time: l.Time, Stderr: stderr, Line: l.Text, Details: details})
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // never started
	}
	return err
}

// ContainerAttach connects to the container's streams.
func (e *Engine) ContainerAttach(ctx context.Context, ref string, o dockerapi.AttachOptions, s dockerapi.Streams) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	r := c.snapshot()
	if r.State.Status == container.StatePaused {
		return conflict("container %s is paused, unpause the container before attach", r.ID)
	}
	if _, err := parseKeys(o.DetachKeys); err != nil {
		return err
	}
	if o.Logs {
		err := e.readLogs(ctx, c, dockerapi.LogOptions{Stdout: o.Stdout, Stderr: o.Stderr, Tail: -1}, func(l dockerapi.LogLine) error {
			w := s.Stdout
			if l.Stderr {
				w = s.Stderr
			}
			_, err := w.Write(l.Line)
			return err
		})
		if err != nil {
			return err
		}
	}
	if !o.Stream {
		return nil
	}
	st := runtime.Streams{CloseStdin: r.Config.StdinOnce}
	if o.Stdin && r.Config.OpenStdin {
		st.Stdin = s.Stdin
	}
	if o.Stdout {
		st.Stdout = s.Stdout
	}
	if o.Stderr {
		st.Stderr = s.Stderr
	}
	registered := func() {
		if o.Attached != nil {
			o.Attached()
		}
	}
	running := r.State.active()
	if running {
		st.Attached = registered
	} else { // docker run attaches before it starts
		var ok bool
		if ok, err = e.awaitCreated(ctx, c, &st, registered); !ok {
			return err
		}
	}
	e.emit(r, events.ActionAttach, nil)
	detached, err := e.attachDetachable(ctx, r.ID, "", r.Config.Tty, o.DetachKeys, st)
	if detached {
		e.emit(r, events.ActionDetach, nil)
	}
	if !running {
		st.Attached() // also when it failed: start must not wait for it
	}
	if cerrdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// awaitCreated waits until the next run's process exists but has not executed yet; start goes on once st.Attached was called. registered
// is called as soon as the next start will wait.
func (e *Engine) awaitCreated(ctx context.Context, c *entry, st *runtime.Streams, registered func()) (bool, error) {
	a := &attacher{created: make(chan struct{}), attached: make(chan struct{})}
	st.Attached = sync.OnceFunc(func() { close(a.attached) })
	c.mu.Lock()
	removed := c.removed
	c.attachers = append(c.attachers, a)
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		c.attachers = slices.DeleteFunc(c.attachers, func(o *attacher) bool { return o == a })
		c.mu.Unlock()
	}()
	if removed {
		return false, errGone
	}
	before := c.attempts()
	registered()
	for {
		r, _, removed, changed := c.watch()
		if removed || c.attempts() > before { // the start failed
			st.Attached()
			return false, nil
		}
		if r.State.active() { // it was started between the caller's look and ours
			st.Attached()
			return true, nil
		}
		select {
		case <-a.created:
			return true, nil
		case <-changed:
		case <-ctx.Done():
			st.Attached()
			return false, ctx.Err()
		}
	}
}

// attacher waits for a container to be created, and start waits for it to be attached.
type attacher struct {
	created, attached chan struct{}
}

// attachWait bounds how long a start waits for a client that asked to attach first.
const attachWait = 5 * time.Second

// letAttach wakes the attachers of a created process and waits until they are connected.
func (e *Engine) letAttach(ctx context.Context, c *entry) {
	c.mu.Lock()
	list := c.attachers
	c.attachers = nil
	c.mu.Unlock()
	limit := time.NewTimer(attachWait)
	defer limit.Stop()
	for _, a := range list {
		close(a.created)
	}
	for _, a := range list {
		select {
		case <-a.attached:
		case <-limit.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// ContainerResize sets the terminal's size.
func (e *Engine) ContainerResize(ctx context.Context, ref string, rows, cols uint16) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	r := c.snapshot()
	if !r.State.active() {
		return conflict("container %s is not running", r.ID)
	}
	return e.cfg.Supervisor.Resize(ctx, r.ID, "", rows, cols)
}
