package supervisor

import (
	"errors"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/logs"
)

const (
	// queuedChunks bounds what waits for a slow client; then the container waits, at most stallLimit, before the client is dropped.
	queuedChunks = 16
	stallLimit   = 30 * time.Second
)

// chunk is output on its way to a client.
type chunk struct {
	kind byte
	data []byte
}

// subscriber is one attached client.
type subscriber struct {
	stdout, stderr bool
	chunks         chan chunk
	late           []chunk       // while the reading is interrupted: what comes after chunks
	gone           chan struct{} // closed by the client's side
	cut            func()        // ends the client's connection
}

// stream is one descriptor that output is read from.
type stream struct {
	f     *os.File
	kind  byte
	log   *logs.Stream // nil: none is kept
	ended bool
}

// streamName is the name of a kind of output in logs.
func streamName(kind byte) string {
	if kind == frameStderr {
		return "stderr"
	}
	return "stdout"
}

// output carries a process's output to its log and to attached clients. Reading starts at once, or, when held, with the first client
// or release: so nothing of a short command is lost before its caller has attached.
type output struct {
	pool *sync.Pool
	halt *halt // interrupts the reading, everything read being passed on

	mu      sync.Mutex
	subs    map[*subscriber]bool
	ended   bool
	stopped bool
	start   chan struct{} // closed when reading may begin
	begun   bool
	hurry   chan struct{} // closed when clients are not waited for any more
	done    chan struct{} // closed when all streams ended
	streams []*stream
}

func (s *server) newOutput(held bool) *output {
	o := &output{pool: s.buffers, halt: s.pumps, subs: map[*subscriber]bool{}, start: make(chan struct{}), hurry: make(chan struct{}), done: make(chan struct{})}
	if !held {
		o.release()
	}
	return o
}

func (o *output) release() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.begun {
		o.begun = true
		close(o.start)
	}
}

// begunReading says whether output is being read already.
func (o *output) begunReading() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.begun
}

// add gives it a descriptor to read from, which it owns; nil is passed over. rest is the beginning of a line read earlier.
func (o *output) add(f *os.File, kind byte, log *logs.Writer, rest []byte) {
	if f == nil {
		return
	}
	s := &stream{f: f, kind: kind}
	if log != nil {
		s.log = log.Stream(streamName(kind), rest)
	}
	o.streams = append(o.streams, s)
}

// pump starts reading what was added.
func (o *output) pump() {
	if len(o.streams) == 0 {
		o.finish()
	}
	for _, s := range o.streams {
		o.halt.join()
		go func() {
			defer o.halt.leave()
			o.copy(s)
			s.f.Close()
			o.mu.Lock()
			s.ended = true
			last := !slices.ContainsFunc(o.streams, func(s *stream) bool { return !s.ended })
			o.mu.Unlock()
			if last {
				o.finish()
			}
		}()
	}
}

func (o *output) finish() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		return
	}
	o.ended = true
	for s := range o.subs {
		close(s.chunks)
	}
	o.subs = nil
	close(o.done)
}

// stop ends reading, for output that nobody can write to any more or that shall not be waited for.
func (o *output) stop() {
	o.release()
	o.mu.Lock()
	o.stopped = true
	o.mu.Unlock()
	o.wake()
}

// wake makes those notice a stop or an interruption that wait for output.
func (o *output) wake() {
	for _, s := range o.streams {
		_ = s.f.SetReadDeadline(time.Unix(1, 0))
	}
}

func (o *output) isStopped() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.stopped
}

func (o *output) copy(s *stream) {
	if s.log != nil {
		defer s.log.Close()
	}
	for waiting := true; waiting; {
		select {
		case <-o.start:
			waiting = false
		case <-o.halt.asked():
			o.halt.park()
		}
	}
	rc, err := s.f.SyscallConn()
	if err != nil {
		return
	}
	for {
		b, n, err := o.read(rc)
		if n > 0 {
			if s.log != nil {
				_, _ = s.log.Write((*b)[:n])
			}
			o.broadcast(s.kind, (*b)[:n])
		}
		o.pool.Put(b)
		if errors.Is(err, os.ErrDeadlineExceeded) && !o.isStopped() {
			o.halt.park()
			if _ = s.f.SetReadDeadline(time.Time{}); !o.isStopped() {
				continue
			}
		}
		if err != nil || n == 0 {
			return // end of file; a terminal ends with EIO
		}
	}
}

// read waits without holding a buffer.
func (o *output) read(rc interface {
	Read(func(uintptr) bool) error
}) (b *[]byte, n int, err error) {
	werr := rc.Read(func(fd uintptr) bool {
		b = o.pool.Get().(*[]byte)
		for {
			n, err = unix.Read(int(fd), *b)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		if errors.Is(err, unix.EAGAIN) {
			o.pool.Put(b)
			b = nil
			return false
		}
		return true
	})
	if b == nil {
		b = o.pool.Get().(*[]byte)
	}
	if werr != nil {
		err = werr
	}
	return b, max(n, 0), err
}

func (o *output) broadcast(kind byte, b []byte) {
	o.mu.Lock()
	subs := make([]*subscriber, 0, len(o.subs))
	for s := range o.subs {
		if kind == frameStdout && s.stdout || kind == frameStderr && s.stderr {
			subs = append(subs, s)
		}
	}
	o.mu.Unlock()
	if len(subs) == 0 {
		return
	}
	c := chunk{kind, append([]byte(nil), b...)}
	for i, s := range subs {
		for !o.send(s, c) {
			o.setLate(subs[i:], c, true)
			o.halt.park()
			o.setLate(subs[i:], c, false)
		}
	}
}

// send gives a client a chunk, or drops the client; false: neither, the reading shall be interrupted.
func (o *output) send(s *subscriber, c chunk) bool {
	select {
	case s.chunks <- c:
		return true
	case <-s.gone:
		return true
	default:
	}
	t := time.NewTimer(stallLimit)
	defer t.Stop()
	select {
	case s.chunks <- c:
	case <-s.gone:
	case <-o.halt.asked():
		return false
	case <-o.hurry:
		o.drop(s)
	case <-t.C:
		o.drop(s)
	}
	return true
}

// setLate notes, while the reading is interrupted, which clients a chunk is still to be given to.
func (o *output) setLate(subs []*subscriber, c chunk, late bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range subs {
		if late {
			s.late = append(s.late, c)
		} else {
			s.late = slices.DeleteFunc(s.late, func(x chunk) bool { return x.kind == c.kind })
		}
	}
}

// drop ends a client that takes nothing.
func (o *output) drop(s *subscriber) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.subs[s] {
		delete(o.subs, s)
		s.cut()
	}
}

// subscribe adds a client; its channel is closed at the end of the output.
func (o *output) subscribe(stdout, stderr bool, cut func()) *subscriber {
	s := &subscriber{stdout: stdout, stderr: stderr, cut: cut, chunks: make(chan chunk, queuedChunks), gone: make(chan struct{})}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		close(s.chunks)
	} else {
		o.subs[s] = true
	}
	return s
}

func (o *output) unsubscribe(s *subscriber) {
	close(s.gone)
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.subs, s)
}

// logConfig is the log that a container's configuration asks for.
func logConfig(cfg *runtime.Config) logs.Config {
	return logs.Config{Path: cfg.LogPath, Format: cfg.LogFormat, MaxSize: cfg.LogMaxSize, MaxFiles: cfg.LogMaxFiles,
		Compress: cfg.LogCompress, NonBlocking: cfg.LogNonBlocking, MaxBuffer: cfg.LogBufferSize}
}

// openLog opens it, if there is one.
func (c *container) openLog() error {
	if c.cfg.LogPath == "" {
		return nil
	}
	w, err := logs.Open(logConfig(&c.cfg))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log = w
	return err
}

func newPool() *sync.Pool {
	return &sync.Pool{New: func() any { b := make([]byte, maxChunk); return &b }}
}
