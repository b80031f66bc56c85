package logs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Watcher tells followers that files changed, all through one inotify instance. It watches directories, so that a rotated file's
// successor is noticed.
type Watcher struct {
	f  *os.File
	fd int // of f; asking f for it would make it blocking
	mu sync.Mutex
	// by directory: the watch and its followers
	dirs map[string]*dirWatch
	byWD map[int32]*dirWatch
}

type dirWatch struct {
	path  string
	wd    int32
	wakes map[chan struct{}]string // follower → base name of its file
}

// NewWatcher makes a watcher; Run must run while it is used.
func NewWatcher() (*Watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch logs: inotify: %w", err)
	}
	return &Watcher{fd: fd, f: os.NewFile(uintptr(fd), "inotify"), dirs: map[string]*dirWatch{}, byWD: map[int32]*dirWatch{}}, nil
}

// Run delivers changes until ctx is done and then closes the watcher.
func (w *Watcher) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { w.f.Close() })
	defer stop()
	buf := make([]byte, 64<<10)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, os.ErrClosed) {
				return nil
			}
			return fmt.Errorf("watch logs: %w", err)
		}
		w.deliver(buf[:n])
	}
}

func (w *Watcher) deliver(b []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(b) >= unix.SizeofInotifyEvent {
		ev := (*unix.InotifyEvent)(unsafe.Pointer(&b[0]))
		end := unix.SizeofInotifyEvent + int(ev.Len)
		if end > len(b) {
			return
		}
		if ev.Mask&unix.IN_Q_OVERFLOW != 0 {
			for _, d := range w.dirs {
				d.wake("")
			}
		} else if d := w.byWD[ev.Wd]; d != nil {
			name := string(b[unix.SizeofInotifyEvent:end])
			for i := range name {
				if name[i] == 0 {
					name = name[:i]
					break
				}
			}
			d.wake(name)
		}
		b = b[end:]
	}
}

// wake tells the followers of a file, or all.
func (d *dirWatch) wake(name string) {
	for c, base := range d.wakes {
		if name == "" || name == base {
			select {
			case c <- struct{}{}:
			default:
			}
		}
	}
}

// add registers a follower. Without a watch (directory missing, limit reached) it is woken once and then only by Done or ctx.
func (w *Watcher) add(path string) chan struct{} {
	c := make(chan struct{}, 1)
	dir, base := filepath.Split(path)
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.dirs[dir]
	if d == nil {
		wd, err := unix.InotifyAddWatch(w.fd, dir, unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO)
		if err != nil {
			c <- struct{}{}
			return c
		}
		d = &dirWatch{path: dir, wd: int32(wd), wakes: map[chan struct{}]string{}}
		w.dirs[dir], w.byWD[d.wd] = d, d
	}
	d.wakes[c] = base
	return c
}

func (w *Watcher) remove(path string, c chan struct{}) {
	dir, _ := filepath.Split(path)
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.dirs[dir]
	if d == nil {
		return
	}
	if delete(d.wakes, c); len(d.wakes) == 0 {
		delete(w.dirs, dir)
		delete(w.byWD, d.wd)
		_, _ = unix.InotifyRmWatch(w.fd, uint32(d.wd))
	}
}
