package supervisor

import (
	"errors"
	"os"
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
	gone           chan struct{} // closed by the client's side
	cut            func()        // ends the client's connection
}

// output carries a process's output to its log and to attached clients. Reading starts at once, or, when held, with the first client
// or release: so nothing of a short command is lost before its caller has attached.
type output struct {
	pool *sync.Pool

	mu    sync.Mutex
	subs  map[*subscriber]bool
	ended bool
	start chan struct{} // closed when reading may begin
	begun bool
	left  int
	done  chan struct{} // closed when all streams ended
	files []*os.File
}

func newOutput(pool *sync.Pool, held bool) *output {
	o := &output{pool: pool, subs: map[*subscriber]bool{}, start: make(chan struct{}), done: make(chan struct{})}
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

// pump starts reading the streams; nil files are skipped. It owns them.
func (o *output) pump(stdout, stderr *os.File, log *logs.Writer) {
	type stream struct {
		f    *os.File
		kind byte
		name string
	}
	var list []stream
	if stdout != nil {
		list = append(list, stream{stdout, frameStdout, "stdout"})
	}
	if stderr != nil {
		list = append(list, stream{stderr, frameStderr, "stderr"})
	}
	o.left = len(list)
	if o.left == 0 {
		o.finish()
	}
	for _, s := range list {
		o.files = append(o.files, s.f)
		go func() {
			o.copy(s.f, s.kind, s.name, log)
			s.f.Close()
			o.mu.Lock()
			o.left--
			last := o.left == 0
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
	for _, f := range o.files {
		_ = f.SetReadDeadline(time.Unix(1, 0))
	}
}

func (o *output) copy(f *os.File, kind byte, name string, log *logs.Writer) {
	var to *logs.Stream
	if log != nil {
		to = log.Stream(name, nil)
		defer to.Close()
	}
	<-o.start
	rc, err := f.SyscallConn()
	if err != nil {
		return
	}
	for {
		b, n, err := o.read(rc)
		if n > 0 {
			if to != nil {
				_, _ = to.Write((*b)[:n])
			}
			o.broadcast(kind, (*b)[:n])
		}
		o.pool.Put(b)
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
	for _, s := range subs {
		select {
		case s.chunks <- c:
			continue
		case <-s.gone:
			continue
		default:
		}
		t := time.NewTimer(stallLimit)
		select {
		case s.chunks <- c:
		case <-s.gone:
		case <-t.C:
			o.drop(s)
		}
		t.Stop()
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
