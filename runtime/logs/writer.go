// Package logs writes and reads container logs, rotated to path.1, path.2, … by size, optionally compressed to path.N.gz.
//
// There are two formats: json-file, one line {"log":…,"stream":…,"time":…} per line of output, and local, binary records of 18 bytes more
// than the text. Readers tell them apart by the first byte. A line longer than 16 KiB is written in parts, all but the last without a
// line feed, as readers of the formats expect. A crash can leave a torn last line; a writer that continues the file ends it or cuts it
// off, and readers skip it. A crash in the middle of a rotation leaves at most one number without a file, which readers pass over and
// the next rotation fills. The writer never blocks the container for a full disk: lines that cannot be written are counted and dropped.
// Written by runtime/supervisor, read by the daemon straight from the files.
package logs

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// maxLine bounds one record's text.
const maxLine = 16 << 10

// The formats of log files.
const (
	JSON  = "json-file"
	Local = "local"
)

// DefaultBuffer is how much waits for the disk in non-blocking mode.
const DefaultBuffer = 1 << 20

// Config is how a log is kept.
type Config struct {
	Path string
	// Format is JSON or Local; empty means JSON.
	Format string
	// MaxSize is the size in bytes at which a file is rotated; 0 never.
	MaxSize int64
	// MaxFiles counts the current file and is at least 1.
	MaxFiles int
	// Compress makes rotated files gzip files.
	Compress bool
	// NonBlocking lets the container go on while the disk is slow: up to MaxBuffer bytes (0: DefaultBuffer) wait, more is dropped.
	NonBlocking bool
	MaxBuffer   int64
}

// Check refuses what Open would refuse, before anything is made.
func (c Config) Check() error {
	if _, err := formatOf(c.Format); err != nil {
		return err
	}
	if c.MaxSize < 0 || c.MaxFiles < 0 || c.MaxBuffer < 0 {
		return fmt.Errorf("log limits: size %d, files %d, buffer %d: want none below zero: %w", c.MaxSize, c.MaxFiles, c.MaxBuffer, errdefs.ErrInvalidArgument)
	}
	return nil
}

// format is one way to lay out records.
type format interface {
	appendRecord(out, text []byte, stream string, t time.Time) []byte
	// next reads one record and tells its length; ok is false for what is to be skipped.
	next(*bufio.Reader) (l Line, n int, ok bool, err error)
	// tail finds where the last n records before end begin, and how many are missing.
	tail(r io.ReaderAt, end int64, n int) (pos int64, left int, err error)
	// repair mends the end of a file that is to be continued and returns its size.
	repair(*os.File, int64) (int64, error)
}

func formatOf(name string) (format, error) {
	switch name {
	case "", JSON:
		return jsonFormat{}, nil
	case Local:
		return localFormat{}, nil
	}
	return nil, fmt.Errorf("log format %q: want %s or %s: %w", name, JSON, Local, errdefs.ErrInvalidArgument)
}

// Writer appends to one container's log.
type Writer struct {
	format format
	now    func() time.Time

	mu      sync.Mutex
	sink    *sink // used with mu held, or by the queue alone
	queue   *queue
	buf     []byte
	dropped uint64
	lastErr error
	closed  bool
}

// Open continues or makes the log file.
func Open(cfg Config) (*Writer, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	f, err := formatOf(cfg.Format)
	if err != nil {
		return nil, err
	}
	w := &Writer{format: f, now: time.Now, sink: newSink(cfg, f)}
	if err := w.sink.open(); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	w.sink.resume()
	if cfg.NonBlocking {
		limit := cfg.MaxBuffer
		if limit == 0 {
			limit = DefaultBuffer
		}
		w.queue = newQueue(limit)
		go w.drain()
	}
	return w, nil
}

// Close writes what waits and closes the file; a rotated file is compressed completely first.
func (w *Writer) Close() error {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return nil
	}
	w.closed = true
	q := w.queue
	w.mu.Unlock()
	if q != nil {
		close(q.end)
		<-q.done
	}
	return w.sink.close()
}

// Flush waits until nothing waits for the disk; false: something did until the deadline. A file that is being compressed is left to
// whoever opens the log next.
func (w *Writer) Flush(deadline time.Time) bool {
	t := time.NewTimer(time.Until(deadline))
	defer t.Stop()
	for {
		w.mu.Lock()
		if w.queue == nil || w.queue.size == 0 || w.closed {
			w.mu.Unlock()
			return true
		}
		empty := make(chan struct{})
		w.queue.empty = append(w.queue.empty, empty)
		w.mu.Unlock()
		select {
		case <-empty:
		case <-t.C:
			return false
		}
	}
}

// Dropped is how many lines were lost, and the last reason.
func (w *Writer) Dropped() (uint64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dropped, w.lastErr
}

// Stream collects the output of one descriptor into lines. It is used by one goroutine.
type Stream struct {
	w    *Writer
	name string
	rest []byte
}

// Stream returns the writer's stream of that name, stdout or stderr; rest is the beginning of a line that an earlier writer had not
// ended.
func (w *Writer) Stream(name string, rest []byte) *Stream {
	return &Stream{w: w, name: name, rest: append([]byte(nil), rest[:min(len(rest), maxLine-1)]...)}
}

// Rest is the beginning of a line whose end has not come yet. Whoever keeps it does not Close the stream.
func (s *Stream) Rest() []byte { return s.rest }

// Write takes a chunk of output; complete lines reach the file, or the queue, before it returns. It never fails.
func (s *Stream) Write(b []byte) (int, error) {
	n := len(b)
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	now := s.w.now()
	s.w.buf = s.w.buf[:0]
	lines := uint64(0)
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		if i < 0 && len(s.rest)+len(b) < maxLine {
			s.rest = append(s.rest, b...)
			break
		}
		take := i + 1
		if i < 0 || len(s.rest)+take > maxLine {
			take = min(maxLine-len(s.rest), len(b))
		}
		s.rest = append(s.rest, b[:take]...)
		b = b[take:]
		s.w.buf = s.w.format.appendRecord(s.w.buf, s.rest, s.name, now)
		s.rest = s.rest[:0]
		lines++
	}
	s.w.flush(lines)
	if cap(s.rest) > 4096 && len(s.rest) == 0 {
		s.rest = nil
	}
	return n, nil
}

// Close writes the last line if it had no line feed.
func (s *Stream) Close() {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if len(s.rest) == 0 {
		return
	}
	s.w.buf = s.w.format.appendRecord(s.w.buf[:0], s.rest, s.name, s.w.now())
	s.rest = nil
	s.w.flush(1)
}

func (w *Writer) flush(lines uint64) {
	if lines == 0 {
		return
	}
	defer func() {
		if cap(w.buf) > 64<<10 {
			w.buf = nil
		}
	}()
	switch {
	case w.closed:
		w.dropped += lines
	case w.queue == nil:
		w.account(lines, w.sink.write(w.buf))
	case !w.queue.put(w.buf, lines):
		w.account(lines, fmt.Errorf("the disk is slow and the buffer of %d bytes full", w.queue.limit))
	}
}

// account counts lines that were lost.
func (w *Writer) account(lines uint64, err error) {
	if err != nil {
		w.dropped += lines
		w.lastErr = err
	}
}

// drain writes what the queue holds until it is ended.
func (w *Writer) drain() {
	q := w.queue
	defer close(q.done)
	for {
		ended := false
		select {
		case <-q.end:
			ended = true
		case <-q.wake:
		}
		for {
			w.mu.Lock()
			c, ok := q.take()
			w.mu.Unlock()
			if !ok {
				break
			}
			err := w.sink.write(c.data)
			w.mu.Lock()
			q.wrote(len(c.data))
			w.account(c.lines, err)
			w.mu.Unlock()
		}
		if ended {
			return
		}
	}
}

// queue is what waits for the disk. It is used with the writer's lock held.
type queue struct {
	limit  int64
	size   int64
	chunks []lines
	empty  []chan struct{} // closed when it is
	wake   chan struct{}
	end    chan struct{}
	done   chan struct{}
}

type lines struct {
	data  []byte
	lines uint64
}

func newQueue(limit int64) *queue {
	return &queue{limit: limit, wake: make(chan struct{}, 1), end: make(chan struct{}), done: make(chan struct{})}
}

// put takes a copy of whole records; false: there is no room. One that is larger than the whole queue finds room in an empty one.
func (q *queue) put(b []byte, n uint64) bool {
	if q.size > 0 && q.size+int64(len(b)) > q.limit {
		return false
	}
	q.size += int64(len(b))
	q.chunks = append(q.chunks, lines{append([]byte(nil), b...), n})
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return true
}

func (q *queue) take() (lines, bool) {
	if len(q.chunks) == 0 {
		q.chunks = nil
		return lines{}, false
	}
	c := q.chunks[0]
	q.chunks = q.chunks[1:]
	return c, true
}

func (q *queue) wrote(n int) {
	if q.size -= int64(n); q.size > 0 {
		return
	}
	for _, c := range q.empty {
		close(c)
	}
	q.empty = nil
}
