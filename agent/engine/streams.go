package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/opencontainers/runtime-spec/specs-go"

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
	err = e.cfg.Supervisor.Attach(ctx, r.ID, "", st)
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

// execTable remembers additional processes; they are gone with the daemon's memory once their container is.
type execTable struct {
	mu sync.Mutex
	m  map[string]*execEntry
}

type execEntry struct {
	id, container string
	req           container.ExecCreateRequest
	pid           int
	started       bool
	running       bool
	exit          int
	done          chan struct{}
}

// maxExecs bounds what a client that never starts its execs can make us remember, per node.
const maxExecs = 10000

func newExecTable() *execTable { return &execTable{m: map[string]*execEntry{}} }

func (t *execTable) get(id string) (*execEntry, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	x, ok := t.m[id]
	if !ok {
		return nil, notFound("No such exec instance: %s", id)
	}
	return x, nil
}

func (t *execTable) ended(_, id string, exit runtime.Exit) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x, ok := t.m[id]; ok && x.running {
		x.running, x.exit, x.pid = false, exit.Code, 0
		close(x.done)
	}
}

func (t *execTable) forget(containerID string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, x := range t.m {
		if x.container == containerID {
			delete(t.m, id)
		}
	}
}

func (t *execTable) ids(containerID string) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []string
	for id, x := range t.m {
		if x.container == containerID && x.running {
			out = append(out, id)
		}
	}
	return out
}

// ExecCreate prepares an additional process.
func (e *Engine) ExecCreate(ctx context.Context, ref string, req container.ExecCreateRequest) (string, error) {
	c, err := e.find(ref)
	if err != nil {
		return "", err
	}
	if len(req.Cmd) == 0 {
		return "", invalid("No exec command specified")
	}
	r := c.snapshot()
	if r.State.Status == container.StatePaused {
		return "", conflict("container %s is paused, unpause the container before exec", r.ID)
	}
	if !r.State.active() {
		return "", conflict("container %s is not running", r.ID)
	}
	x := &execEntry{id: newContainerID(), container: r.ID, req: req, done: make(chan struct{})}
	e.execs.mu.Lock()
	defer e.execs.mu.Unlock()
	if len(e.execs.m) >= maxExecs {
		for id, old := range e.execs.m {
			if old.started && !old.running {
				delete(e.execs.m, id)
			}
		}
		if len(e.execs.m) >= maxExecs {
			return "", errf(cerrdefs.ErrResourceExhausted, "too many exec instances (%d) on this node: start or drop some", maxExecs)
		}
	}
	e.execs.m[x.id] = x
	return x.id, nil
}

// ExecStart runs it; with streams it returns when the process ended and its output is drained.
func (e *Engine) ExecStart(ctx context.Context, id string, req container.ExecStartRequest, s dockerapi.Streams) error {
	x, err := e.execs.get(id)
	if err != nil {
		return err
	}
	c, err := e.find(x.container)
	if err != nil {
		return err
	}
	r := c.snapshot()
	p, err := e.execProcess(ctx, r, x)
	if err != nil {
		return err
	}
	e.execs.mu.Lock()
	if x.started {
		e.execs.mu.Unlock()
		return conflict("exec command %s has already run", id)
	}
	x.started, x.running = true, true
	e.execs.mu.Unlock()
	pid, err := e.cfg.Supervisor.Exec(ctx, r.ID, p)
	if err != nil {
		e.execs.ended(r.ID, id, runtime.Exit{Code: execCode(err)})
		return fmt.Errorf("OCI runtime exec failed: exec failed: %w", err)
	}
	e.execs.mu.Lock()
	if x.running {
		x.pid = pid
	}
	e.execs.mu.Unlock()
	e.emit(r, events.Action("exec_start: "+strings.Join(x.req.Cmd, " ")), map[string]string{"execID": id})
	if req.Detach {
		return nil
	}
	st := runtime.Streams{Stdout: s.Stdout, Stderr: s.Stderr, CloseStdin: true}
	if x.req.AttachStdin {
		st.Stdin = s.Stdin
	}
	if err := e.cfg.Supervisor.Attach(ctx, r.ID, id, st); err != nil && !cerrdefs.IsNotFound(err) {
		return err
	}
	select {
	case <-x.done:
	case <-ctx.Done():
	}
	return nil
}

// execCode is docker's exit code of a process that could not be executed.
func execCode(err error) int {
	for _, text := range []string{"executable file not found", "no such file or directory"} {
		if strings.Contains(err.Error(), text) {
			return 127
		}
	}
	return 126
}

func (e *Engine) execProcess(ctx context.Context, r record, x *execEntry) (runtime.Process, error) {
	cwd := x.req.WorkingDir
	if cwd == "" {
		cwd = r.Config.WorkingDir
	}
	if cwd == "" {
		cwd = "/"
	}
	var user specs.User
	home := "/"
	mounts, err := e.cfg.Images.Mounts(ctx, r.ID)
	if err != nil {
		return runtime.Process{}, err
	}
	name := x.req.User
	if name == "" {
		name = r.Config.User
	}
	if user, home, err = resolveUser(mounts, name, r.HostConfig.GroupAdd); err != nil {
		return runtime.Process{}, err
	}
	cfg := *r.Config
	cfg.Tty = x.req.Tty
	cfg.Env = mergeEnv(cfg.Env, x.req.Env)
	return runtime.Process{
		ID: x.id, Args: x.req.Cmd, Env: processEnv(&cfg, home), Cwd: cwd, User: user, Terminal: x.req.Tty, OpenStdin: x.req.AttachStdin, Privileged: x.req.Privileged,
	}, nil
}

// ExecInspect tells how it went.
func (e *Engine) ExecInspect(ctx context.Context, id string) (container.ExecInspectResponse, error) {
	x, err := e.execs.get(id)
	if err != nil {
		return container.ExecInspectResponse{}, err
	}
	e.execs.mu.Lock()
	defer e.execs.mu.Unlock()
	out := container.ExecInspectResponse{
		ID: x.id, Running: x.running, OpenStdin: x.req.AttachStdin, OpenStdout: x.req.AttachStdout, OpenStderr: x.req.AttachStderr,
		ContainerID: x.container, Pid: x.pid,
		ProcessConfig: &container.ExecProcessConfig{Tty: x.req.Tty, Entrypoint: x.req.Cmd[0], Arguments: x.req.Cmd[1:], User: x.req.User, Privileged: &x.req.Privileged},
	}
	if x.started && !x.running {
		code := x.exit
		out.ExitCode = &code
	}
	return out, nil
}

// ExecResize sets the terminal's size.
func (e *Engine) ExecResize(ctx context.Context, id string, rows, cols uint16) error {
	x, err := e.execs.get(id)
	if err != nil {
		return err
	}
	return e.cfg.Supervisor.Resize(ctx, x.container, id, rows, cols)
}

// ContainerTop lists the container's processes with the columns of ps -ef.
func (e *Engine) ContainerTop(ctx context.Context, ref string, args []string) (container.TopResponse, error) {
	c, err := e.find(ref)
	if err != nil {
		return container.TopResponse{}, err
	}
	r := c.snapshot()
	if !r.State.active() {
		return container.TopResponse{}, conflict("container %s is not running", r.ID)
	}
	if len(args) > 0 && strings.Join(args, " ") != "-ef" {
		return container.TopResponse{}, notBuilt("docker top with ps options %q is not supported by this version of skein: leave them out", strings.Join(args, " "))
	}
	return processTable(r.State.Pid)
}

// processTable walks the pid namespace of pid's descendants through /proc.
func processTable(root int) (container.TopResponse, error) {
	out := container.TopResponse{Titles: []string{"UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"}}
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", root))
	if err != nil {
		return out, conflict("the container's process %d is gone", root)
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return out, err
	}
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		if l, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err != nil || l != ns {
			continue
		}
		if row, ok := processRow(pid); ok {
			out.Processes = append(out.Processes, row)
		}
	}
	return out, nil
}
