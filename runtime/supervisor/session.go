package supervisor

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"time"

	"github.com/containerd/errdefs"
)

// session is one attached client. It can be interrupted at any byte and goes on with what it has on its way, in this program or the
// next.
type session struct {
	srv *server
	p   *process
	w   *wire
	req *request
	sub *subscriber
	// out is what the client has not got yet, stdin what the process has not taken yet; stdinEnd: the client's end of file comes after it.
	out, stdin []byte
	stdinEnd   bool
	final      bool // out ends with the last frame
}

// attach connects a client to a process until its output has ended or the client is gone; free says that the session has begun.
func (c *container) attach(w *wire, r *request, free func()) error {
	p, err := c.find(r.ExecID)
	if err != nil {
		return err
	}
	if r.Stdin && p.stdin == nil {
		return c.errf(errdefs.ErrFailedPrecondition, "attach: standard input is not open")
	}
	c.srv.mu.Lock()
	n := len(c.srv.attached)
	c.srv.mu.Unlock()
	if n >= maxSessions {
		return c.errf(errdefs.ErrResourceExhausted, "attach: %d clients are attached to this node's containers", n)
	}
	x := &session{srv: c.srv, p: p, w: w, req: r}
	x.sub = p.out.subscribe(r.Stdout, r.Stderr, w.close)
	if err := w.writeJSON(frameResponse, response{}); err != nil {
		p.out.unsubscribe(x.sub)
		return nil
	}
	p.out.release()
	x.begin()
	free()
	x.run()
	return nil
}

// begin makes the session known to who interrupts it.
func (x *session) begin() {
	x.srv.sessions.join()
	x.srv.mu.Lock()
	x.srv.attached[x] = true
	x.srv.mu.Unlock()
}

// run serves the session that has begun until it is over.
func (x *session) run() {
	defer x.srv.sessions.leave()
	defer func() {
		x.p.out.unsubscribe(x.sub)
		x.w.close()
		x.srv.mu.Lock()
		delete(x.srv.attached, x)
		x.srv.mu.Unlock()
	}()
	for x.turn() {
		x.srv.sessions.park()
		_ = x.w.conn.SetDeadline(time.Time{})
	}
}

// turn serves until the session is over, or, true, interrupted.
func (x *session) turn() bool {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	interrupted := make(chan bool, 1)
	go func() {
		defer cancel()
		interrupted <- x.input(ctx)
	}()
	over := x.output(ctx)
	cancel()
	if over {
		x.w.close() // ends the reading side
	} else {
		_ = x.w.conn.SetReadDeadline(time.Unix(1, 0))
	}
	return <-interrupted && !over
}

// output sends until the output has ended or the client is gone (true), or ctx is done.
func (x *session) output(ctx context.Context) (over bool) {
	for {
		for len(x.out) > 0 {
			n, err := x.w.conn.Write(x.out)
			x.out = x.out[n:]
			if err != nil {
				return !errors.Is(err, os.ErrDeadlineExceeded)
			}
		}
		if x.final {
			return true
		}
		x.out = nil
		select {
		case ch, ok := <-x.sub.chunks:
			if x.final = !ok; x.final {
				x.out = frame(frameResponse, []byte("{}"))
			} else {
				x.out = frame(ch.kind, ch.data)
			}
		case <-ctx.Done():
			return false
		}
	}
}

// frame is a frame as it crosses the socket.
func frame(kind byte, payload []byte) []byte {
	b := make([]byte, headerSize, headerSize+len(payload))
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:], uint32(len(payload)))
	return append(b, payload...)
}

// input passes what the client sends to the process until the client is gone, or, true, it is interrupted.
func (x *session) input(ctx context.Context) bool {
	asked := x.srv.sessions.asked()
	for {
		if !x.feed(ctx, asked) {
			select {
			case <-asked:
				return true
			default:
				return false
			}
		}
		kind, b, fds, err := x.w.read()
		closeFDs(fds)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return true
		}
		if err != nil {
			return false
		}
		switch {
		case kind == frameStdinEnd:
			x.stdinEnd = x.req.CloseStdin && x.req.Stdin && x.p.console == nil
		case kind == frameStdin && x.req.Stdin:
			x.stdin = b
		}
	}
}

// feedAgain is how often a write that waits for the process looks whether the client is still there.
const feedAgain = 100 * time.Millisecond

// feed writes what the client sent to a pipe or terminal whose reader may be slow. False: the client is gone or the session asked to
// stop. A process that does not read any more swallows its input.
func (x *session) feed(ctx context.Context, asked <-chan struct{}) bool {
	for len(x.stdin) > 0 {
		select {
		case <-ctx.Done():
			return false
		case <-asked:
			return false
		default:
		}
		_ = x.p.stdin.SetWriteDeadline(time.Now().Add(feedAgain))
		n, err := x.p.stdin.Write(x.stdin)
		x.stdin = x.stdin[n:]
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			x.stdin = nil
		}
	}
	if x.stdinEnd {
		x.p.stdin.Close()
		x.srv.keeper.dropStdin(x.req.ID, x.p)
		x.stdinEnd = false
	}
	return true
}

// sessionState is a session as data. It is taken while nothing of it runs.
type sessionState struct {
	Conn     int
	Request  json.RawMessage
	In       []byte `json:",omitempty"` // of a frame that has not come completely
	Out      []byte `json:",omitempty"`
	Stdin    []byte `json:",omitempty"`
	StdinEnd bool   `json:",omitempty"`
}

func (x *session) save() (sessionState, error) {
	req, err := json.Marshal(x.req)
	if err != nil {
		return sessionState{}, err
	}
	for queued := true; queued; {
		select {
		case ch, ok := <-x.sub.chunks:
			if queued = ok; ok {
				x.out = append(x.out, frame(ch.kind, ch.data)...)
			}
		default:
			queued = false
		}
	}
	st := sessionState{Request: req, In: x.w.in, Out: append([]byte(nil), x.out...), Stdin: x.stdin, StdinEnd: x.stdinEnd}
	if x.w.got {
		st.In = nil
	}
	for _, ch := range x.sub.late {
		st.Out = append(st.Out, frame(ch.kind, ch.data)...)
	}
	st.Conn, err = number(x.w.conn)
	return st, err
}

// resumeSession continues a saved session; it is started by run.
func (s *server) resumeSession(p *process, st sessionState) (*session, error) {
	x := &session{srv: s, p: p, req: &request{}, out: st.Out, stdin: st.Stdin, stdinEnd: st.StdinEnd}
	if err := json.Unmarshal(st.Request, x.req); err != nil {
		return nil, err
	}
	conn, err := unixConn(st.Conn)
	if err != nil {
		return nil, err
	}
	x.w = newWire(conn)
	x.w.in = st.In
	if x.req.Stdin && p.stdin == nil {
		x.req.Stdin = false
	}
	x.sub = p.out.subscribe(x.req.Stdout, x.req.Stderr, x.w.close)
	x.begin()
	return x, nil
}
