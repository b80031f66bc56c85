package logs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// Line is one record.
type Line struct {
	Stream string
	Time   time.Time
	// Text ends with a line feed unless the line was longer than a record or its end was not written.
	Text []byte
}

// Options choose the lines. The zero value reads everything once.
type Options struct {
	// Since and Until bound the time of lines, inclusive; zero means no bound.
	Since, Until time.Time
	// Tail is how many of the last lines to give; 0 or less: all.
	Tail int
	// Follow waits for more until ctx is done or Until has passed.
	Follow bool
	// Watcher tells about changes when following. Required with Follow.
	Watcher *Watcher
	// Done, when following, ends it once everything that was written by then is read: close it when the container has ended.
	Done <-chan struct{}
}

// maxRecord bounds one line of a file: 16 KiB of text, every byte escaped.
const maxRecord = 8*maxLine + 256

// maxRotated bounds the search for rotated files.
const maxRotated = 1000

// Read calls each for every line chosen, oldest first, until it fails. Following ends without error when ctx is done.
func Read(ctx context.Context, path string, o Options, each func(Line) error) error {
	r := &reader{path: path, opts: o, each: each}
	defer func() {
		if r.f != nil {
			r.f.Close()
		}
	}()
	if o.Follow {
		if o.Watcher == nil {
			return errors.New("follow log: no watcher given")
		}
		r.wake = o.Watcher.add(path)
		defer o.Watcher.remove(path, r.wake)
	}
	err := r.history(ctx)
	if err == nil && o.Follow {
		err = r.follow(ctx)
	}
	if errors.Is(err, errEnough) || o.Follow && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

var errEnough = errors.New("enough")

type reader struct {
	path string
	opts Options
	each func(Line) error
	wake chan struct{}
	f    *os.File // the current file, positioned after what was read
	br   *bufio.Reader
	torn []byte // a line not complete yet
}

// history reads what is there: rotated files, then the current one, which stays open.
func (r *reader) history(ctx context.Context) error {
	var opened []*os.File
	defer func() {
		for _, f := range opened {
			if f != r.f {
				f.Close()
			}
		}
	}()
	// From new to old: a rotation in between makes a file appear twice rather than not at all.
	for i := 0; i < maxRotated; i++ {
		p := r.path
		if i > 0 {
			p = numbered(r.path, i)
		}
		f, err := os.Open(p)
		if errors.Is(err, os.ErrNotExist) && (i > 0 || r.opts.Follow) {
			if i > 0 {
				break
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		if len(opened) > 0 && same(opened[len(opened)-1], f) {
			f.Close()
			continue
		}
		opened = append(opened, f)
	}
	files := opened
	if len(files) > 0 {
		r.f = files[0]
	}
	if r.opts.Tail > 0 {
		n, err := seekTail(files, r.opts.Tail)
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		files = files[:n]
	}
	for i := len(files) - 1; i >= 0; i-- {
		r.br, r.torn = bufio.NewReaderSize(files[i], 32<<10), nil
		if err := r.drain(ctx); err != nil {
			return err
		}
	}
	return nil
}

func same(a, b *os.File) bool {
	x, err1 := a.Stat()
	y, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// seekTail positions the files, newest first, so that n lines follow in all, and returns how many files are needed.
func seekTail(files []*os.File, n int) (int, error) {
	for i, f := range files {
		end, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return 0, err
		}
		pos, left, err := backwards(f, end, n)
		if err != nil {
			return 0, err
		}
		if _, err := f.Seek(pos, io.SeekStart); err != nil {
			return 0, err
		}
		if n = left; n == 0 {
			return i + 1, nil
		}
	}
	return len(files), nil
}

// backwards finds where the last n lines before end begin; left counts those that are missing.
func backwards(f *os.File, end int64, n int) (pos int64, left int, err error) {
	buf := make([]byte, 32<<10)
	for hi := end; hi > 0; {
		lo := max(0, hi-int64(len(buf)))
		b := buf[:hi-lo]
		if _, err := f.ReadAt(b, lo); err != nil && !errors.Is(err, io.EOF) {
			return 0, 0, err
		}
		for i := len(b) - 1; i >= 0; i-- {
			if b[i] == '\n' && lo+int64(i) != end-1 {
				if n--; n == 0 {
					return lo + int64(i) + 1, 0, nil
				}
			}
		}
		hi = lo
	}
	if end > 0 {
		n--
	}
	return 0, max(n, 0), nil
}

// drain gives all complete lines that the current file has now.
func (r *reader) drain(ctx context.Context) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, err := r.br.ReadSlice('\n')
		if len(r.torn)+len(b) > maxRecord {
			r.torn, b = nil, nil // not a log line: skip
		}
		if err == nil {
			line := b
			if len(r.torn) > 0 {
				line = append(r.torn, b...)
				r.torn = nil
			}
			if err := r.line(line); err != nil {
				return err
			}
			continue
		}
		r.torn = append(r.torn, b...)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("read log: %w", err)
		}
	}
}

func (r *reader) line(b []byte) error {
	var rec struct {
		Log    string    `json:"log"`
		Stream string    `json:"stream"`
		Time   time.Time `json:"time"`
	}
	if json.Unmarshal(bytes.TrimSpace(b), &rec) != nil {
		return nil // torn by a crash
	}
	if !r.opts.Since.IsZero() && rec.Time.Before(r.opts.Since) {
		return nil
	}
	if !r.opts.Until.IsZero() && rec.Time.After(r.opts.Until) {
		return errEnough
	}
	return r.each(Line{Stream: rec.Stream, Time: rec.Time, Text: []byte(rec.Log)})
}

// follow waits for changes and gives new lines, over rotations.
func (r *reader) follow(ctx context.Context) error {
	var until <-chan time.Time
	if !r.opts.Until.IsZero() {
		t := time.NewTimer(time.Until(r.opts.Until))
		defer t.Stop()
		until = t.C
	}
	done := r.opts.Done
	for last := false; ; {
		if err := r.more(ctx); err != nil || last {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-until:
			return nil
		case <-done:
			last = true
		case <-r.wake:
		}
	}
}

// more reads what is new; when the file was rotated it finishes the old one and goes on with the next.
func (r *reader) more(ctx context.Context) error {
	for {
		if r.f != nil {
			if err := r.drain(ctx); err != nil {
				return err
			}
		}
		next, err := r.next()
		if err != nil || next == nil {
			return err
		}
		if r.f != nil {
			// Lines written between the drain and the rotation.
			if err := r.drain(ctx); err != nil {
				next.Close()
				return err
			}
			r.f.Close()
		}
		r.f, r.br, r.torn = next, bufio.NewReaderSize(next, 32<<10), nil
	}
}

// next is the file that follows the one being read, nil when that is still the newest. Several rotations may lie in between.
func (r *reader) next() (*os.File, error) {
	var newer *os.File
	for i := 0; i < maxRotated; i++ {
		p := r.path
		if i > 0 {
			p = numbered(r.path, i)
		}
		f, err := os.Open(p)
		if errors.Is(err, os.ErrNotExist) {
			if i == 0 {
				continue
			}
			return newer, nil // the one being read is gone: the oldest kept is next
		}
		if err != nil {
			return newer, fmt.Errorf("read log: %w", err)
		}
		if r.f != nil && same(r.f, f) {
			f.Close()
			return newer, nil
		}
		if newer != nil {
			newer.Close()
		}
		newer = f
		if r.f == nil {
			continue
		}
	}
	return newer, nil
}
