// Package logs writes and reads container logs in the json-file format: one line {"log":…,"stream":…,"time":…} per line of output,
// files rotated to path.1, path.2, … by size.
//
// A line longer than 16 KiB is written in parts, all but the last without a line feed in "log", as readers of the format expect. A
// crash can leave a torn last line; a writer that continues the file ends it, and readers skip it. The writer never blocks the
// container for a full disk: lines that cannot be written are counted and dropped. Written by runtime/supervisor, read by the daemon
// straight from the files.
package logs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"
)

// maxLine bounds one record's text.
const maxLine = 16 << 10

// Writer appends to one container's log.
type Writer struct {
	path     string
	maxSize  int64
	maxFiles int
	now      func() time.Time

	mu      sync.Mutex
	f       *os.File
	size    int64
	buf     []byte
	dropped uint64
	lastErr error
}

// Open continues or makes the log file. maxSize 0 never rotates; maxFiles counts the current file and is at least 1.
func Open(path string, maxSize int64, maxFiles int) (*Writer, error) {
	w := &Writer{path: path, maxSize: maxSize, maxFiles: max(maxFiles, 1), now: time.Now}
	if err := w.open(); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return w, nil
}

func (w *Writer) open() error {
	f, err := os.OpenFile(w.path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	w.f, w.size = f, st.Size()
	var last [1]byte
	if w.size > 0 {
		if _, err := f.ReadAt(last[:], w.size-1); err == nil && last[0] != '\n' {
			n, _ := f.WriteString("\n")
			w.size += int64(n)
		}
	}
	return nil
}

// Close closes the file.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return nil
	}
	err := w.f.Close()
	w.f = nil
	return err
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

// Stream returns the writer's stream of that name, stdout or stderr.
func (w *Writer) Stream(name string) *Stream { return &Stream{w: w, name: name} }

// Write takes a chunk of output; complete lines reach the file before it returns. It never fails.
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
		s.w.buf = appendRecord(s.w.buf, s.rest, s.name, now)
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
	s.w.buf = appendRecord(s.w.buf[:0], s.rest, s.name, s.w.now())
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
	if w.f == nil {
		w.dropped += lines
		return
	}
	if w.maxSize > 0 && w.size > 0 && w.size+int64(len(w.buf)) > w.maxSize {
		if err := w.rotate(); err != nil {
			w.lastErr = err // goes on in the old file
		}
	}
	n, err := w.f.Write(w.buf)
	w.size += int64(n)
	if err != nil {
		w.dropped += lines
		w.lastErr = err
	}
}

func (w *Writer) rotate() error {
	for i := w.maxFiles - 1; i > 0; i-- {
		from := w.path
		if i > 1 {
			from = numbered(w.path, i-1)
		}
		if err := os.Rename(from, numbered(w.path, i)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("rotate log: %w", err)
		}
	}
	if w.maxFiles == 1 {
		if err := os.Remove(w.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("rotate log: %w", err)
		}
	}
	old := w.f
	if err := w.open(); err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	return old.Close()
}

func numbered(path string, i int) string { return path + "." + strconv.Itoa(i) }

// appendRecord encodes one line. The text is escaped as encoding/json does without HTML escaping; invalid UTF-8 becomes U+FFFD.
func appendRecord(out, text []byte, stream string, t time.Time) []byte {
	out = append(out, `{"log":"`...)
	out = appendEscaped(out, text)
	out = append(out, `","stream":"`...)
	out = append(out, stream...)
	out = append(out, `","time":"`...)
	out = t.UTC().AppendFormat(out, time.RFC3339Nano)
	return append(out, "\"}\n"...)
}

func appendEscaped(out, b []byte) []byte {
	const hex = "0123456789abcdef"
	for i := 0; i < len(b); {
		c := b[i]
		switch {
		case c == '"' || c == '\\':
			out = append(out, '\\', c)
		case c >= 0x20 && c < utf8.RuneSelf:
			out = append(out, c)
		case c == '\n':
			out = append(out, '\\', 'n')
		case c == '\r':
			out = append(out, '\\', 'r')
		case c == '\t':
			out = append(out, '\\', 't')
		case c < 0x20:
			out = append(out, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		default:
			r, n := utf8.DecodeRune(b[i:])
			switch {
			case r == utf8.RuneError && n == 1:
				out = append(out, `\ufffd`...)
			case r == '\u2028' || r == '\u2029':
				out = append(out, `\u202`...)
				out = append(out, hex[r&15])
			default:
				out = append(out, b[i:i+n]...)
			}
			i += n
			continue
		}
		i++
	}
	return out
}
