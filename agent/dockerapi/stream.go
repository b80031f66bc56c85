package dockerapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types"
	"github.com/moby/moby/api/types/jsonstream"
	"google.golang.org/grpc"

	"skein/manager/api"
)

func writeJSON(w http.ResponseWriter, code int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	return encodeJSON(w, v)
}

func encodeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// lister asks the managers for a page of a list.
type lister func(context.Context, *api.ListRequest) (*api.Objects, error)

// lists adapts a method of the control client.
func lists(f func(context.Context, *api.ListRequest, ...grpc.CallOption) (*api.Objects, error)) lister {
	return func(ctx context.Context, r *api.ListRequest) (*api.Objects, error) { return f(ctx, r) }
}

// writeList answers with a JSON array of objects that are JSON already, page by page, so that no list is too long. An error before the first
// page is an answer; one behind it cuts the answer short.
func writeList(ctx context.Context, w http.ResponseWriter, req *api.ListRequest, list lister) error {
	bw, n := bufio.NewWriterSize(w, 32<<10), 0
	err := api.EachPage(ctx, req, list, func(objects [][]byte) error {
		if !began(w) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusOK)
			bw.WriteByte('[')
		}
		for _, o := range objects {
			if n++; n > 1 {
				bw.WriteByte(',')
			}
			if _, err := bw.Write(o); err != nil {
				return err // the client is gone
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	bw.WriteString("]\n")
	return bw.Flush() // bufio keeps the first error
}

func writeRaw(w http.ResponseWriter, object []byte) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	_, err := w.Write(object)
	return err
}

// streamType is the content type of container output.
func streamType(r *http.Request, tty bool) string {
	if tty || apiMinor(r) < 42 {
		return types.MediaTypeRawStream
	}
	return types.MediaTypeMultiplexedStream
}

// frameWriter writes docker's multiplexed frames; writers of one connection share mu.
type frameWriter struct {
	mu  *sync.Mutex
	w   io.Writer
	typ stdcopy.StdType
}

// maxFrame bounds one frame's payload, so that neither side has to hold much.
const maxFrame = 1 << 20

func (f frameWriter) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	done := 0
	for done < len(p) {
		n := min(len(p)-done, maxFrame)
		head := [8]byte{byte(f.typ)}
		binary.BigEndian.PutUint32(head[4:], uint32(n))
		bufs := net.Buffers{head[:], p[done : done+n]}
		if _, err := bufs.WriteTo(f.w); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// hijacked is a connection taken over from HTTP.
type hijacked struct {
	conn  net.Conn
	in    io.Reader     // what the server had read ahead, then the connection
	ended chan struct{} // closed when in has ended
}

// input tells when the input has ended.
type input struct {
	io.Reader
	end func()
}

func (i input) Read(p []byte) (int, error) {
	n, err := i.Reader.Read(p)
	if err != nil {
		i.end()
	}
	return n, err
}

// hijack takes the connection over and tells the client to go on.
func hijack(w http.ResponseWriter, r *http.Request, contentType string) (*hijacked, error) {
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, err
	}
	if rw, ok := w.(*response); ok {
		rw.began = true
	}
	head := "HTTP/1.1 200 OK\r\nContent-Type: " + contentType + "\r\n\r\n"
	if r.Header.Get("Upgrade") != "" {
		head = "HTTP/1.1 101 UPGRADED\r\nContent-Type: " + contentType + "\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
	}
	if _, err := io.WriteString(conn, head); err != nil {
		conn.Close()
		return nil, err
	}
	// What the server has read ahead first, then the connection itself: net/http's reader cancels the request at the end of the input,
	// and a client that has nothing more to say still listens.
	ahead, err := buf.Peek(buf.Reader.Buffered())
	if err != nil {
		conn.Close()
		return nil, err
	}
	h := &hijacked{conn: conn, ended: make(chan struct{})}
	h.in = input{io.MultiReader(bytes.NewReader(bytes.Clone(ahead)), conn), sync.OnceFunc(func() { close(h.ended) })}
	return h, nil
}

// closeWait bounds how long a client may take to close its end.
const closeWait = 10 * time.Second

// close ends the output, then waits for the client's end and drops what it still says: closing over unread input would reset the
// connection, and the client might not get our last words.
func (c *hijacked) close() {
	if cw, ok := c.conn.(interface{ CloseWrite() error }); ok && cw.CloseWrite() == nil {
		_ = c.conn.SetReadDeadline(time.Now().Add(closeWait))
		_, _ = io.Copy(io.Discard, c.conn)
	}
	_ = c.conn.Close()
}

// streams are the writers and the reader for a backend.
func streams(in io.Reader, out io.Writer, tty, stdin, stdout, stderr bool) Streams {
	var s Streams
	var outW, errW io.Writer = out, out
	if !tty {
		mu := new(sync.Mutex)
		outW, errW = frameWriter{mu, out, stdcopy.Stdout}, frameWriter{mu, out, stdcopy.Stderr}
	}
	if stdin {
		s.Stdin = in
	}
	if stdout {
		s.Stdout = outW
	}
	if stderr {
		s.Stderr = errW
	}
	return s
}

// progress writes JSON messages one by one, each flushed. The answer begins with the first, so that an error before it has its own status.
type progress struct {
	mu    sync.Mutex
	w     http.ResponseWriter
	hold  bool // keep the first message back until the second: a pull that fails before has docker's status, not an answer that began well
	first []jsonstream.Message
	began bool
	err   error
}

func (p *progress) emit(m jsonstream.Message) {
	p.mu.Lock()
	if p.hold {
		p.hold, p.first = false, []jsonstream.Message{m}
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	p.write(m)
}

func (p *progress) write(v any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.first {
		p.send(m)
	}
	p.first = nil
	p.send(v)
}

func (p *progress) send(v any) {
	if p.err != nil {
		return
	}
	if !p.began {
		p.began = true
		p.w.Header().Set("Content-Type", "application/json")
		p.w.WriteHeader(http.StatusOK)
	}
	b, err := json.Marshal(v)
	if err == nil {
		_, err = p.w.Write(append(b, '\r', '\n'))
	}
	if err == nil {
		err = http.NewResponseController(p.w).Flush()
	}
	p.err = err
}

// finish ends the stream: an error after the first message is a message itself, in docker's old and new form.
func (p *progress) finish(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		for _, m := range p.first {
			p.send(m)
		}
		if !p.began {
			p.w.Header().Set("Content-Type", "application/json")
			p.w.WriteHeader(http.StatusOK)
		}
		return nil
	}
	if !p.began {
		return err
	}
	_, text := statusOf(err)
	p.send(struct {
		Detail *jsonstream.Error `json:"errorDetail"`
		Error  string            `json:"error"`
	}{&jsonstream.Error{Message: text}, text})
	return nil
}

// flusher writes to a client and flushes soon after, without a flush per line where lines come fast. close waits for its goroutine.
type flusher struct {
	mu    sync.Mutex
	w     *bufio.Writer
	rc    *http.ResponseController
	dirty chan struct{}
	done  chan struct{}
	err   error
}

func newFlusher(w http.ResponseWriter) *flusher {
	f := &flusher{w: bufio.NewWriterSize(w, 32<<10), rc: http.NewResponseController(w), dirty: make(chan struct{}, 1), done: make(chan struct{})}
	go f.run()
	return f
}

func (f *flusher) run() {
	defer close(f.done)
	for range f.dirty {
		f.mu.Lock()
		f.flush()
		f.mu.Unlock()
	}
}

func (f *flusher) flush() {
	if f.err == nil {
		f.err = errors.Join(f.w.Flush(), f.rc.Flush())
	}
}

func (f *flusher) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return 0, f.err
	}
	n, err := f.w.Write(p)
	select {
	case f.dirty <- struct{}{}:
	default:
	}
	return n, err
}

// close flushes the rest; no Write may follow.
func (f *flusher) close() {
	close(f.dirty)
	<-f.done
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flush()
}
