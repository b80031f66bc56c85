package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// client calls a supervisor, one connection a call, so that it needs no repair when the supervisor was replaced.
type client struct {
	socket string
	revive func(context.Context) error // starts the supervisor again, nil for Dial
	mu     sync.Mutex
	kept   *keeping
	build  string        // of the supervisor's program
	closed bool          // or shut down: the supervisor is not started again
	done   chan struct{} // closed with it
}

// Dial connects to a running supervisor; an error of kind unavailable says that none answers.
func Dial(ctx context.Context, socketPath string) (runtime.Supervisor, error) {
	return dial(ctx, socketPath)
}

func dial(ctx context.Context, socketPath string) (*client, error) {
	c := &client{socket: socketPath, kept: newKeeping(), done: make(chan struct{})}
	if err := c.hello(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// hello checks that a supervisor answers.
func (c *client) hello(ctx context.Context) error {
	resp, err := c.once(ctx, &request{Op: "hello"})
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.build = resp.Build
	return nil
}

// Close lets go of everything; containers and supervisor are not touched.
func (c *client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finish()
	return nil
}

// finish ends event streams and keeps the supervisor from being started again. It is called with mu held.
func (c *client) finish() {
	if !c.closed {
		c.closed = true
		close(c.done)
	}
}

// again starts the supervisor again after an error that says it is gone; false: this client may or can not.
func (c *client) again(ctx context.Context, cause error) (bool, error) {
	c.mu.Lock()
	closed := c.closed
	c.mu.Unlock()
	if c.revive == nil || closed || !errdefs.IsUnavailable(cause) || ctx.Err() != nil {
		return false, cause
	}
	if err := c.revive(ctx); err != nil {
		return false, fmt.Errorf("%w: start it again: %w", cause, err)
	}
	return true, nil
}

// open connects and sends a request; the connection closes when ctx ends or stop is called.
func (c *client) open(ctx context.Context, r *request, fds ...int) (w *wire, stop func(), err error) {
	w, stop, err = c.openOnce(ctx, r, fds...)
	if err != nil {
		var ok bool
		if ok, err = c.again(ctx, err); ok {
			return c.openOnce(ctx, r, fds...)
		}
	}
	return w, stop, err
}

func (c *client) openOnce(ctx context.Context, r *request, fds ...int) (*wire, func(), error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return nil, nil, fmt.Errorf("supervisor at %s does not answer: %w: %w", c.socket, err, errdefs.ErrUnavailable)
	}
	w := newWire(conn.(*net.UnixConn))
	unhook := context.AfterFunc(ctx, w.close)
	stop := func() {
		unhook()
		w.close()
	}
	if err := w.writeJSON(frameRequest, r, fds...); err != nil {
		stop()
		return nil, nil, fmt.Errorf("supervisor at %s: send %s: %w", c.socket, r.Op, c.gone(ctx, err))
	}
	return w, stop, nil
}

// gone gives a broken connection its kind.
func (c *client) gone(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, errdefs.ErrInvalidArgument) {
		return err
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
}

// readResponse takes one answer and the descriptors with it.
func (c *client) readResponse(ctx context.Context, w *wire, op string) (response, []int, error) {
	var resp response
	kind, b, fds, err := w.read()
	if err == nil && kind != frameResponse {
		err = fmt.Errorf("frame %q", kind)
	}
	if err == nil {
		err = json.Unmarshal(b, &resp)
	}
	if err != nil {
		closeFDs(fds)
		return resp, nil, fmt.Errorf("supervisor at %s: %s: %w", c.socket, op, c.gone(ctx, err))
	}
	if err := resp.err(); err != nil {
		closeFDs(fds)
		return resp, nil, err
	}
	return resp, fds, nil
}

func (c *client) call(ctx context.Context, r *request, fds ...int) (response, error) {
	w, stop, err := c.open(ctx, r, fds...)
	if err != nil {
		return response{}, err
	}
	defer stop()
	resp, err := c.answer(ctx, w, r.Op)
	if err == nil || r.Op != "state" && r.Op != "list" {
		return resp, err
	}
	// The supervisor died over a question, which can be asked again.
	ok, err := c.again(ctx, err)
	if !ok {
		return resp, err
	}
	return c.once(ctx, r)
}

// once is call without starting the supervisor again.
func (c *client) once(ctx context.Context, r *request) (response, error) {
	w, stop, err := c.openOnce(ctx, r)
	if err != nil {
		return response{}, err
	}
	defer stop()
	return c.answer(ctx, w, r.Op)
}

func (c *client) answer(ctx context.Context, w *wire, op string) (response, error) {
	resp, got, err := c.readResponse(ctx, w, op)
	closeFDs(got)
	return resp, err
}

func (c *client) Create(ctx context.Context, cfg runtime.Config) error {
	_, err := c.call(ctx, &request{Op: "create", Config: &cfg})
	return err
}

func (c *client) Start(ctx context.Context, id string) (int, error) {
	resp, err := c.call(ctx, &request{Op: "start", ID: id})
	return resp.PID, err
}

func (c *client) Signal(ctx context.Context, id string, sig int) error {
	_, err := c.call(ctx, &request{Op: "signal", ID: id, Signal: sig})
	return err
}

func (c *client) Pause(ctx context.Context, id string) error {
	_, err := c.call(ctx, &request{Op: "pause", ID: id})
	return err
}

func (c *client) Resume(ctx context.Context, id string) error {
	_, err := c.call(ctx, &request{Op: "resume", ID: id})
	return err
}

func (c *client) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	_, err := c.call(ctx, &request{Op: "update", ID: id, Resources: r})
	return err
}

func (c *client) Delete(ctx context.Context, id string) error {
	r := &request{Op: "delete", ID: id}
	_, err := c.call(ctx, r)
	if ok, cause := c.again(ctx, err); ok { // it died over it: what is left is removed, and nothing left is right, too
		if _, err = c.once(ctx, r); errdefs.IsNotFound(err) {
			err = nil
		}
	} else {
		err = cause
	}
	return err
}

func (c *client) State(ctx context.Context, id string) (runtime.State, error) {
	resp, err := c.call(ctx, &request{Op: "state", ID: id})
	if err == nil && len(resp.States) != 1 {
		err = fmt.Errorf("container %s: state: empty answer", id)
	}
	if err != nil {
		return runtime.State{}, err
	}
	return resp.States[0], nil
}

func (c *client) List(ctx context.Context) ([]runtime.State, error) {
	resp, err := c.call(ctx, &request{Op: "list"})
	return resp.States, err
}

func (c *client) Resize(ctx context.Context, id, execID string, rows, cols uint16) error {
	_, err := c.call(ctx, &request{Op: "resize", ID: id, ExecID: execID, Rows: rows, Cols: cols})
	return err
}

func (c *client) Exec(ctx context.Context, id string, p runtime.Process) (int, error) {
	resp, err := c.call(ctx, &request{Op: "exec", ID: id, Process: &p})
	return resp.PID, err
}

func (c *client) SignalExec(ctx context.Context, id, execID string, sig int) error {
	if execID == "" {
		return fmt.Errorf("container %s: signal: no process named: %w", id, errdefs.ErrInvalidArgument)
	}
	_, err := c.call(ctx, &request{Op: "signal", ID: id, ExecID: execID, Signal: sig})
	return err
}

func (c *client) StoreFD(ctx context.Context, name string, fd int) error {
	_, err := c.call(ctx, &request{Op: "storefd", Name: name}, fd)
	return err
}

func (c *client) ReleaseFD(ctx context.Context, name string) error {
	_, err := c.call(ctx, &request{Op: "releasefd", Name: name})
	return err
}

func (c *client) LoadFDs(ctx context.Context, prefix string) (map[string]int, error) {
	w, stop, err := c.open(ctx, &request{Op: "loadfds", Name: prefix})
	if err != nil {
		return nil, err
	}
	defer stop()
	out := map[string]int{}
	for {
		resp, fds, err := c.readResponse(ctx, w, "loadfds")
		if err == nil && len(fds) != len(resp.Names) {
			closeFDs(fds)
			err = fmt.Errorf("load descriptors %q: %d came for %d names: too many open files here?", prefix, len(fds), len(resp.Names))
		}
		if err != nil {
			for _, fd := range out {
				unix.Close(fd)
			}
			return nil, err
		}
		for i, n := range resp.Names {
			out[n] = fds[i]
		}
		if !resp.More {
			return out, nil
		}
	}
}

func (c *client) Shutdown(ctx context.Context, force bool) error {
	_, err := c.once(ctx, &request{Op: "shutdown", Force: force})
	if err == nil {
		c.mu.Lock()
		c.finish()
		c.mu.Unlock()
	}
	return err
}

// Upgrade makes the supervisor's process run another program, a file of this machine, in place: containers, their output and attached clients
// do not notice. On an error the supervisor goes on as it was.
func (c *client) Upgrade(ctx context.Context, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("upgrade the supervisor: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	fd, err := number(f)
	if err != nil {
		return fmt.Errorf("upgrade the supervisor: %w", err)
	}
	resp, err := c.call(ctx, &request{Op: "upgrade"}, fd)
	if err != nil {
		return fmt.Errorf("supervisor at %s: %w", c.socket, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.build = resp.Build
	return nil
}

// Waits between attempts to reach a supervisor again.
const (
	retryMin = 20 * time.Millisecond
	retryMax = time.Second
)

// Events follows the journal over restarts of the supervisor.
func (c *client) Events(ctx context.Context, after uint64) (<-chan runtime.Event, error) {
	w, stop, err := c.openEvents(ctx, after)
	if err != nil {
		return nil, err
	}
	out := make(chan runtime.Event)
	go func() {
		defer close(out)
		wait := retryMin
		for {
			if w != nil {
				before := after
				after = forward(ctx, w, after, out)
				stop()
				if after != before {
					wait = retryMin
				}
			}
			t := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				t.Stop()
				return
			case <-c.done:
				t.Stop()
				return
			case <-t.C:
			}
			wait = min(2*wait, retryMax)
			if w, stop, err = c.openEvents(ctx, after); err != nil {
				w = nil
			}
		}
	}()
	return out, nil
}

func (c *client) openEvents(ctx context.Context, after uint64) (*wire, func(), error) {
	w, stop, err := c.open(ctx, &request{Op: "events", After: after})
	if err != nil {
		return nil, nil, err
	}
	if _, _, err := c.readResponse(ctx, w, "events"); err != nil {
		stop()
		return nil, nil, err
	}
	return w, stop, nil
}

// forward passes events on until the stream breaks, and returns the number of the last.
func forward(ctx context.Context, w *wire, after uint64, out chan<- runtime.Event) uint64 {
	for {
		kind, b, fds, err := w.read()
		closeFDs(fds)
		if err != nil || kind != frameEvent {
			return after
		}
		var ev runtime.Event
		if json.Unmarshal(b, &ev) != nil {
			return after
		}
		select {
		case out <- ev:
			after = ev.Seq
		case <-ctx.Done():
			return after
		}
	}
}

// Attach copies both ways until the outputs ended, the connection broke, or ctx is done.
func (c *client) Attach(ctx context.Context, id, execID string, s runtime.Streams) error {
	r := &request{Op: "attach", ID: id, ExecID: execID, Stdin: s.Stdin != nil, Stdout: s.Stdout != nil, Stderr: s.Stderr != nil, CloseStdin: s.CloseStdin}
	w, stop, err := c.open(ctx, r)
	if err != nil {
		return err
	}
	defer stop()
	if _, _, err := c.readResponse(ctx, w, "attach"); err != nil {
		return err
	}
	if s.Attached != nil {
		s.Attached()
	}
	if s.Stdin != nil {
		// Ends with the reader or with the connection; a reader that blocks for ever is its owner's to close.
		go sendStdin(w, s.Stdin)
	}
	for {
		kind, b, fds, err := w.read()
		closeFDs(fds)
		if err != nil {
			return fmt.Errorf("container %s: attach: %w", id, c.gone(ctx, err))
		}
		switch kind {
		case frameStdout:
			_, err = s.Stdout.Write(b)
		case frameStderr:
			_, err = s.Stderr.Write(b)
		case frameResponse:
			return nil
		}
		if err != nil {
			return fmt.Errorf("container %s: attach: %w", id, err)
		}
	}
}

func sendStdin(w *wire, r io.Reader) {
	buf := make([]byte, maxChunk)
	for {
		n, err := r.Read(buf)
		if n > 0 && w.write(frameStdin, buf[:n]) != nil {
			return
		}
		if err != nil {
			_ = w.write(frameStdinEnd, nil)
			return
		}
	}
}
