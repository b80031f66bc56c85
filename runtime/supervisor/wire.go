package supervisor

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// A connection carries one request, {kind, length, payload} frames both ways. Descriptors travel with the frame's first byte.
const (
	frameRequest  = 'q'
	frameResponse = 'r'
	frameEvent    = 'e'
	frameKept     = 'k'
	frameStdin    = 'i'
	frameStdinEnd = 'c'
	frameStdout   = 'o'
	frameStderr   = 'x'
)

const (
	maxFrame   = 4 << 20
	maxChunk   = 32 << 10
	fdsPerMsg  = 64
	headerSize = 5
)

// request is one call.
type request struct {
	Op         string                `json:"op"`
	ID         string                `json:"id,omitempty"`
	ExecID     string                `json:"exec,omitempty"`
	Config     *runtime.Config       `json:"config,omitempty"`
	Process    *runtime.Process      `json:"process,omitempty"`
	Resources  *specs.LinuxResources `json:"resources,omitempty"`
	Signal     int                   `json:"signal,omitempty"`
	Rows       uint16                `json:"rows,omitempty"`
	Cols       uint16                `json:"cols,omitempty"`
	After      uint64                `json:"after,omitempty"`
	Name       string                `json:"name,omitempty"`
	Force      bool                  `json:"force,omitempty"`
	Stdin      bool                  `json:"stdin,omitempty"`
	Stdout     bool                  `json:"stdout,omitempty"`
	Stderr     bool                  `json:"stderr,omitempty"`
	CloseStdin bool                  `json:"closeStdin,omitempty"`
}

// response answers a request; Kind and Error are set on failure.
type response struct {
	Kind     string          `json:"kind,omitempty"`
	Error    string          `json:"error,omitempty"`
	PID      int             `json:"pid,omitempty"`
	States   []runtime.State `json:"states,omitempty"`
	Names    []string        `json:"names,omitempty"`
	More     bool            `json:"more,omitempty"`
	StateDir string          `json:"stateDir,omitempty"`
	Build    string          `json:"build,omitempty"`
	Routines int             `json:"routines,omitempty"`
}

// kinds are the error kinds that cross the socket.
func kinds() map[string]error {
	return map[string]error{
		"not found": errdefs.ErrNotFound, "already exists": errdefs.ErrAlreadyExists, "failed precondition": errdefs.ErrFailedPrecondition,
		"invalid argument": errdefs.ErrInvalidArgument, "unavailable": errdefs.ErrUnavailable, "not implemented": errdefs.ErrNotImplemented,
		"permission denied": errdefs.ErrPermissionDenied, "resource exhausted": errdefs.ErrResourceExhausted,
	}
}

// kindError is an error of a kind of errdefs that does not repeat the kind in its text.
type kindError struct {
	text string
	kind error
}

func (e *kindError) Error() string { return e.text }
func (e *kindError) Unwrap() error { return e.kind }

func toResponse(err error) response {
	r := response{Kind: "unknown", Error: err.Error()}
	for name, k := range kinds() {
		if errors.Is(err, k) {
			r.Kind = name
		}
	}
	return r
}

func (r *response) err() error {
	if r.Kind == "" {
		return nil
	}
	if k, ok := kinds()[r.Kind]; ok {
		return &kindError{r.Error, k}
	}
	return errors.New(r.Error)
}

// wire is a framed connection. One goroutine reads; writes are serialized.
type wire struct {
	conn *net.UnixConn
	in   []byte // of the frame being read; kept when reading is interrupted
	got  bool   // in is a whole frame that was given
	fds  []int  // received with the frame being read
	oob  []byte
	wmu  sync.Mutex
}

func newWire(c *net.UnixConn) *wire { return &wire{conn: c} }

// read returns the next frame, valid until the next read, and the descriptors that came with it, which the caller owns. Interrupted by a
// deadline it keeps what it has, and can be called again.
func (w *wire) read() (kind byte, payload []byte, fds []int, err error) {
	defer func() {
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			closeFDs(w.fds)
			w.fds = nil
		}
	}()
	if w.got {
		w.in, w.got = w.in[:0], false
	}
	if err := w.fill(headerSize); err != nil {
		return 0, nil, nil, err
	}
	n := binary.BigEndian.Uint32(w.in[1:])
	if n > maxFrame {
		return 0, nil, nil, fmt.Errorf("frame of %d bytes, at most %d", n, maxFrame)
	}
	if err := w.fill(headerSize + int(n)); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, nil, err
	}
	fds, w.fds, w.got = w.fds, nil, true
	return w.in[0], w.in[headerSize:], fds, nil
}

// fill reads until n bytes of the frame are there, and no further.
func (w *wire) fill(n int) error {
	if w.oob == nil {
		w.oob = make([]byte, unix.CmsgSpace(4*fdsPerMsg))
	}
	w.in = slices.Grow(w.in, max(0, n-len(w.in)))
	for len(w.in) < n {
		got, oobn, _, _, err := w.conn.ReadMsgUnix(w.in[len(w.in):n], w.oob)
		if oobn > 0 {
			w.take(w.oob[:oobn])
		}
		if err != nil {
			return err
		}
		if got == 0 {
			return io.EOF
		}
		w.in = w.in[:len(w.in)+got]
	}
	return nil
}

func (w *wire) take(oob []byte) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	for _, m := range msgs {
		if fds, err := unix.ParseUnixRights(&m); err == nil {
			w.fds = append(w.fds, fds...)
		}
	}
	for len(w.fds) > fdsPerMsg {
		unix.Close(w.fds[len(w.fds)-1])
		w.fds = w.fds[:len(w.fds)-1]
	}
}

func (w *wire) close() { w.conn.Close() }

func (w *wire) write(kind byte, payload []byte, fds ...int) error {
	w.wmu.Lock()
	defer w.wmu.Unlock()
	b := frame(kind, payload)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
		n, _, err := w.conn.WriteMsgUnix(b, oob, nil)
		if err != nil {
			return err
		}
		if b = b[n:]; len(b) == 0 {
			return nil
		}
	}
	_, err := w.conn.Write(b)
	return err
}

func (w *wire) writeJSON(kind byte, v any, fds ...int) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxFrame {
		return fmt.Errorf("message of %d bytes, at most %d: %w", len(b), maxFrame, errdefs.ErrInvalidArgument)
	}
	return w.write(kind, b, fds...)
}
