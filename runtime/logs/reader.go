package logs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
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

// maxRotated bounds the search for rotated files.
const maxRotated = 1000

// maxGap is how many numbers in a row may be without a file: a crash leaves one, a rotation while files are opened another.
const maxGap = 2

// maxTries bounds opening the files anew because they were rotated meanwhile.
const maxTries = 100

// Read calls each for every line chosen, oldest first, until it fails. Following ends without error when ctx is done.
func Read(ctx context.Context, path string, o Options, each func(Line) error) error {
	r := &reader{path: path, opts: o, each: each}
	defer func() {
		if r.cur != nil {
			r.cur.close()
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
	cur  *source // the newest file that was read, positioned after what was read
}

// history reads what is there: rotated files, then the current one, which stays open.
func (r *reader) history(ctx context.Context) error {
	files, err := r.open()
	if err != nil {
		return err
	}
	if len(files) == 0 && !r.opts.Follow {
		return fmt.Errorf("read log %s: %w", r.path, os.ErrNotExist)
	}
	defer func() {
		for _, f := range files {
			if f != r.cur {
				f.close()
			}
		}
	}()
	if len(files) > 0 {
		r.cur = files[0]
	}
	from := len(files)
	if n := r.opts.Tail; n > 0 {
		for i := 0; i < len(files) && n > 0; i++ {
			if n, err = files[i].seekTail(n); err != nil {
				return fmt.Errorf("read log: %w", err)
			}
			from = i + 1
		}
	}
	for i := from - 1; i >= 0; i-- {
		if err := r.drain(ctx, files[i]); err != nil {
			return err
		}
	}
	return nil
}

// open opens all files, newest first: a rotation meanwhile makes a file appear twice rather than not at all. When it appears out of
// order, newer ones came in between.
func (r *reader) open() ([]*source, error) {
	for range maxTries {
		files, again, err := r.openOnce()
		if err == nil && !again {
			return files, nil
		}
		for _, f := range files {
			f.close()
		}
		if err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("read log %s: it is rotated faster than it can be opened", r.path)
}

func (r *reader) openOnce() (files []*source, again bool, err error) {
	for i, gap := 0, 0; i < maxRotated && gap <= maxGap; i++ {
		f, err := openSource(r.path, i)
		if err != nil {
			return files, false, err
		}
		if f == nil {
			gap++
			continue
		}
		gap = 0
		known := slices.IndexFunc(files, f.same)
		if known >= 0 {
			f.close()
			if known != len(files)-1 {
				return files, true, nil
			}
			continue
		}
		files = append(files, f)
	}
	return files, false, nil
}

// drain gives all complete lines that a file has now.
func (r *reader) drain(ctx context.Context, s *source) error {
	return s.each(func(l Line) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !r.opts.Since.IsZero() && l.Time.Before(r.opts.Since) {
			return nil
		}
		if !r.opts.Until.IsZero() && l.Time.After(r.opts.Until) {
			return errEnough
		}
		return r.each(l)
	})
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
		if r.cur != nil {
			if err := r.drain(ctx, r.cur); err != nil {
				return err
			}
		}
		next, err := r.next()
		if err != nil || next == nil {
			return err
		}
		if r.cur != nil {
			// Lines written between the drain and the rotation.
			if err := r.drain(ctx, r.cur); err != nil {
				next.close()
				return err
			}
			r.cur.close()
		}
		r.cur = next
	}
}

// next is the file that follows the one being read, nil when that is still the newest. Several rotations may lie in between.
func (r *reader) next() (*source, error) {
	var newer *source
	for i, gap := 0, 0; i < maxRotated && gap <= maxGap; i++ {
		f, err := openSource(r.path, i)
		if err != nil {
			if newer != nil {
				newer.close()
			}
			return nil, err
		}
		if f == nil {
			gap++
			continue
		}
		gap = 0
		if r.cur != nil && r.cur.same(f) {
			f.close()
			return newer, nil
		}
		if newer != nil {
			newer.close()
		}
		newer = f
	}
	return newer, nil // the one being read is gone: the oldest kept is next
}
