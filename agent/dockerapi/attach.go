package dockerapi

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"skein/manager/api"
)

func (h *handlers) execRoutes() []route {
	return []route{
		{"POST /containers/{id}/exec", h.execCreate},
		{"POST /exec/{id}/start", h.execStart},
		{"GET /exec/{id}/json", h.execInspect},
		{"POST /exec/{id}/resize", h.execResize},
	}
}

// attachGrace is how long a client waits for a backend that does not call Attached.
const attachGrace = 50 * time.Millisecond

// containerAttach joins a client to a container's streams. The client is told to go on when the streams are joined, not before: it may
// start the container at once, and the first words must not be lost.
func (h *handlers) containerAttach(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	c, err := h.Containers.ContainerInspect(r.Context(), ref, false)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	tty := c.Config != nil && c.Config.Tty
	o := AttachOptions{
		Stdin: boolQuery(q, "stdin"), Stdout: boolQuery(q, "stdout"), Stderr: boolQuery(q, "stderr"),
		Logs: boolQuery(q, "logs"), Stream: boolQuery(q, "stream"), DetachKeys: q.Get("detachKeys"),
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	lc := &lazyConn{ready: make(chan struct{}), open: func() (*hijacked, error) {
		conn, err := hijack(w, r, streamType(r, tty))
		if err != nil {
			cancel() // the client is gone already: nobody else would tell the backend
			return nil, err
		}
		go watchHangup(ctx, conn, o.Stdin, cancel)
		return conn, nil
	}}
	o.Attached = func() { _, _ = lc.get() }
	grace := time.AfterFunc(attachGrace, o.Attached)
	err = h.Containers.ContainerAttach(ctx, c.ID, o, streams(lc, lc, tty, o.Stdin, o.Stdout, o.Stderr))
	grace.Stop()
	if err != nil && lc.refuse(err) {
		return err
	}
	conn, openErr := lc.get()
	if openErr != nil {
		return openErr
	}
	defer conn.close()
	if err != nil && !errors.Is(err, context.Canceled) {
		h.Logger.Debug("attach ended", "container", c.ID, "err", err)
	}
	return nil
}

// lazyConn takes the connection over when the container's streams are joined or first written to. Readers wait for that.
type lazyConn struct {
	once  sync.Once
	open  func() (*hijacked, error)
	ready chan struct{} // closed once conn and err are set
	conn  *hijacked
	err   error
}

func (l *lazyConn) get() (*hijacked, error) {
	l.once.Do(func() {
		defer close(l.ready)
		l.conn, l.err = l.open()
	})
	return l.conn, l.err
}

// refuse makes a connection that was not taken over stay so. It reports whether it was in time.
func (l *lazyConn) refuse(err error) (inTime bool) {
	l.once.Do(func() {
		defer close(l.ready)
		l.err, inTime = err, true
	})
	return inTime
}

func (l *lazyConn) Read(p []byte) (int, error) {
	<-l.ready
	if l.err != nil {
		return 0, l.err
	}
	return l.conn.in.Read(p)
}

func (l *lazyConn) Write(p []byte) (int, error) {
	c, err := l.get()
	if err != nil {
		return 0, err
	}
	return c.conn.Write(p)
}

func (h *handlers) execCreate(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	var req container.ExecCreateRequest
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	if len(req.Cmd) == 0 {
		return invalid("No exec command specified")
	}
	id, err := h.Containers.ExecCreate(r.Context(), ref, req)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, container.ExecCreateResponse{ID: id})
}

func (h *handlers) execStart(w http.ResponseWriter, r *http.Request) error {
	id, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	var req container.ExecStartRequest
	if err := readOptionalJSON(w, r, &req); err != nil {
		return err
	}
	ex, err := h.Containers.ExecInspect(r.Context(), id)
	if err != nil {
		return err
	}
	c, err := h.Containers.ContainerInspect(r.Context(), ex.ContainerID, false)
	switch {
	case err != nil:
		return err
	case ex.Running:
		return api.Errorf(errdefs.ErrConflict, "Error: Exec command %s is already running", id)
	case ex.ExitCode != nil:
		return api.Errorf(errdefs.ErrConflict, "Error: Exec command %s has already run", id)
	case c.State != nil && !c.State.Running:
		return api.Errorf(errdefs.ErrConflict, "container %s is not running", c.ID)
	case c.State != nil && c.State.Paused:
		return api.Errorf(errdefs.ErrConflict, "Container %s is paused, unpause the container before exec", c.ID)
	}
	if req.Detach {
		if err := h.Containers.ExecStart(r.Context(), id, req, Streams{}); err != nil {
			return err
		}
		w.WriteHeader(http.StatusOK)
		return nil
	}
	conn, err := hijack(w, r, streamType(r, req.Tty))
	if err != nil {
		return err
	}
	defer conn.close()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	go watchHangup(ctx, conn, ex.OpenStdin, cancel)
	s := streams(conn.in, conn.conn, req.Tty, ex.OpenStdin, ex.OpenStdout, ex.OpenStderr)
	if err := h.Containers.ExecStart(ctx, id, req, s); err != nil {
		// The exit code is in the exec's record; docker puts the text into the stream.
		_, text := statusOf(err)
		_, _ = io.WriteString(streams(nil, conn.conn, req.Tty, false, true, true).Stdout, text+"\r\n")
		h.Logger.Debug("exec ended", "exec", id, "err", err)
	}
	return nil
}

func (h *handlers) execInspect(w http.ResponseWriter, r *http.Request) error {
	id, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	ex, err := h.Containers.ExecInspect(r.Context(), id)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, ex)
}

func (h *handlers) execResize(w http.ResponseWriter, r *http.Request) error {
	id, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	rows, cols, err := sizeQuery(r)
	if err != nil {
		return err
	}
	return h.Containers.ExecResize(r.Context(), id, rows, cols)
}
