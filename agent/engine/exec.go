package engine

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/agent/dockerapi"
	"skein/runtime"
)

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

// ended marks the end of a process; false when it had ended before.
func (t *execTable) ended(id string, exit runtime.Exit) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	x, ok := t.m[id]
	if !ok || !x.running {
		return false
	}
	x.running, x.exit, x.pid = false, exit.Code, 0
	close(x.done)
	return true
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
	if r.State.Status == container.StateRestarting {
		return "", conflict("Container %s is restarting, wait until the container is running", r.ID)
	}
	if !r.State.active() {
		return "", conflict("container %s is not running", r.ID)
	}
	if _, err := parseKeys(req.DetachKeys); err != nil {
		return "", err
	}
	x := &execEntry{id: newContainerID(), container: r.ID, req: req, done: make(chan struct{})}
	if err := e.execs.add(x); err != nil {
		return "", err
	}
	e.emitExec(r, events.ActionExecCreate, x, true, nil)
	return x.id, nil
}

func (t *execTable) add(x *execEntry) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.m) >= maxExecs {
		for id, old := range t.m {
			if old.started && !old.running {
				delete(t.m, id)
			}
		}
		if len(t.m) >= maxExecs {
			return errf(cerrdefs.ErrResourceExhausted, "too many exec instances (%d) on this node: start or drop some", maxExecs)
		}
	}
	t.m[x.id] = x
	return nil
}

// emitExec publishes an event of an additional process; docker puts the command into the names of some.
func (e *Engine) emitExec(r record, action events.Action, x *execEntry, named bool, extra map[string]string) {
	if named {
		action += events.Action(": " + strings.Join(x.req.Cmd, " "))
	}
	attrs := map[string]string{"execID": x.id}
	for k, v := range extra {
		attrs[k] = v
	}
	e.emit(r, action, attrs)
}

// execEnded takes the journal's word of the end of an additional process.
func (e *Engine) execEnded(ev runtime.Event) {
	if !e.execs.ended(ev.ExecID, ev.Exit) {
		return
	}
	x, err := e.execs.get(ev.ExecID)
	if c := e.byID(ev.ContainerID); c != nil && err == nil {
		e.emitExec(c.snapshot(), events.ActionExecDie, x, false, map[string]string{"exitCode": strconv.Itoa(ev.Exit.Code)})
	}
}

// ExecStart runs it; with streams it returns when the process ended and its output is drained, or the client has detached.
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
	e.execs.mu.Lock()
	if x.started {
		e.execs.mu.Unlock()
		return conflict("exec command %s has already run", id)
	}
	x.started, x.running = true, true
	e.execs.mu.Unlock()
	if err := e.execRun(ctx, r, x, req); err != nil {
		e.execs.ended(id, runtime.Exit{Code: execCode(err)})
		return err
	}
	e.emitExec(r, events.ActionExecStart, x, true, nil)
	if req.Detach {
		return nil
	}
	st := runtime.Streams{Stdout: s.Stdout, Stderr: s.Stderr, CloseStdin: true}
	if x.req.AttachStdin {
		st.Stdin = s.Stdin
	}
	detached, err := e.attachDetachable(ctx, r.ID, id, x.req.Tty, x.req.DetachKeys, st)
	if detached {
		e.emitExec(r, events.ActionExecDetach, x, false, nil)
		return nil
	}
	if err != nil && !cerrdefs.IsNotFound(err) {
		return err
	}
	select {
	case <-x.done:
	case <-ctx.Done():
	}
	return nil
}

// execRun executes the process.
func (e *Engine) execRun(ctx context.Context, r record, x *execEntry, req container.ExecStartRequest) error {
	p, err := e.execProcess(ctx, r, x)
	if err != nil {
		return err
	}
	p.Detach = req.Detach
	p.ConsoleSize = box(x.req.ConsoleSize)
	if req.ConsoleSize != nil {
		p.ConsoleSize = box(req.ConsoleSize)
	}
	pid, err := e.cfg.Supervisor.Exec(ctx, r.ID, p)
	if err != nil {
		return processError{"OCI runtime exec failed: exec failed: unable to start container process: " + reason(err, r.ID, x.id), err}
	}
	e.execs.mu.Lock()
	defer e.execs.mu.Unlock()
	if x.running {
		x.pid = pid
	}
	return nil
}

// box is a terminal's size in docker's order, nil without one.
func box(size *[2]uint) *specs.Box {
	if size == nil || size[0] == 0 || size[1] == 0 {
		return nil
	}
	return &specs.Box{Height: size[0], Width: size[1]}
}

// processError is a process that could not be made, in docker's words.
type processError struct {
	text string
	err  error
}

func (p processError) Error() string { return p.text }
func (p processError) Unwrap() error { return p.err }

// reason is what the supervisor says without the names that docker does not repeat.
func reason(err error, containerID, execID string) string {
	text := strings.TrimPrefix(err.Error(), "container "+containerID+": ")
	for _, p := range []string{"start: ", "exec " + execID + ": ", "set-up: "} {
		text = strings.TrimPrefix(text, p)
	}
	return strings.TrimSuffix(text, ": "+cerrdefs.ErrInvalidArgument.Error())
}

// execCode is docker's exit code of a process that could not be executed.
func execCode(err error) int {
	if p := (processError{}); !errors.As(err, &p) {
		return 126
	}
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
