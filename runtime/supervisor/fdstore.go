package supervisor

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxStored bounds the descriptors kept for the daemon; the process may have 20,000 in all.
const maxStored = 4096

// fdStore keeps descriptors for the daemon while it restarts.
type fdStore struct {
	mu sync.Mutex
	m  map[string]int
}

// put takes the descriptor over, replacing one of the same name.
func (s *fdStore) put(name string, fds []int) error {
	if len(fds) != 1 || name == "" || len(name) > 256 {
		closeFDs(fds)
		return fmt.Errorf("store descriptor %q: want a name of at most 256 bytes and one descriptor: %w", name, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, ok := s.m[name]
	if !ok && len(s.m) >= maxStored {
		closeFDs(fds)
		return fmt.Errorf("store descriptor %q: %d are kept already: %w", name, maxStored, errdefs.ErrResourceExhausted)
	}
	if ok {
		unix.Close(old)
	}
	s.m[name] = fds[0]
	return nil
}

func (s *fdStore) release(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, ok := s.m[name]
	if !ok {
		return fmt.Errorf("stored descriptor %q: %w", name, errdefs.ErrNotFound)
	}
	delete(s.m, name)
	unix.Close(fd)
	return nil
}

// send answers with duplicates of all whose name has the prefix, in as many frames as their number needs.
func (s *fdStore) send(w *wire, prefix string) error {
	s.mu.Lock()
	var names []string
	for n := range s.m {
		if strings.HasPrefix(n, prefix) {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	fds := make([]int, 0, len(names))
	for i, n := range names {
		fd, err := unix.FcntlInt(uintptr(s.m[n]), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			s.mu.Unlock()
			closeFDs(fds)
			return fmt.Errorf("duplicate stored descriptor %q: %w", names[i], err)
		}
		fds = append(fds, fd)
	}
	s.mu.Unlock()
	defer closeFDs(fds)
	for {
		n := min(len(names), fdsPerMsg)
		if err := w.writeJSON(frameResponse, response{Names: names[:n], More: len(names) > n}, fds[:n]...); err != nil {
			return err
		}
		if len(names) == n {
			return nil
		}
		names, fds = names[n:], fds[n:]
	}
}
