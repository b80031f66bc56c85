package consensus

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/manager/api"
)

// reserve keeps room on the log's disk. While less than its size is free, writes of users are refused; what raft itself must write
// (elections, entries of another leader) still fits. Should even that room be used up by others, a preallocated file of the same size
// is given back. It comes back when there is room again.
type reserve struct {
	dir  string
	path string
	size int64
	free func() (int64, error)
	log  *slog.Logger

	mu      sync.Mutex
	held    bool
	refused bool
}

func newReserve(cfg Config, log *slog.Logger) *reserve {
	r := &reserve{dir: cfg.Dir, path: filepath.Join(cfg.Dir, "reserve"), size: cfg.Reserve, free: cfg.FreeSpace, log: log}
	if r.size > 0 {
		r.mu.Lock()
		defer r.mu.Unlock()
		if err := r.allocate(); err != nil {
			log.Warn("no reserve could be allocated for the raft log", "path", r.path, "bytes", r.size, "error", err)
		}
	}
	return r
}

func (r *reserve) allocate() error {
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, r.size)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = nil // then free space is all there is
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(r.path)
		return err
	}
	r.held = true
	return nil
}

// release gives the file's room back; false when there was none.
func (r *reserve) release() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.held {
		return false
	}
	r.held = false
	r.log.Error("disk full: the reserve of the raft log is in use now", "path", r.path)
	return os.Remove(r.path) == nil
}

// check refuses a user's write while the disk is too full.
func (r *reserve) check() error {
	if r.size <= 0 {
		return nil
	}
	free, err := r.free()
	if err != nil {
		return fmt.Errorf("look for free space of the raft log on %s: %w", r.dir, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	need := r.size
	if !r.held {
		need *= 2 // for the file
	}
	if free < need {
		if !r.refused {
			r.log.Error("disk nearly full: writes are refused", "path", r.dir, "free_bytes", free, "reserve_bytes", need)
		}
		r.refused = true
		return api.Errorf(errdefs.ErrResourceExhausted, "raft log on %s: %d MiB free, below the reserve of %d MiB: free space; reads go on",
			r.dir, free>>20, need>>20)
	}
	if !r.held {
		if err := r.allocate(); err != nil {
			r.log.Warn("no reserve could be allocated for the raft log", "path", r.path, "error", err)
		}
	}
	if r.refused {
		r.log.Info("the disk has room again: writes are accepted", "path", r.dir, "free_bytes", free)
	}
	r.refused = false
	return nil
}

func freeSpace(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}
