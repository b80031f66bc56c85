package supervisor

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/sandbox"
	"skein/runtime/zygote"
)

// openNamespace opens a namespace to join: by path, or another container's by the handle of its first process, which names nothing any
// more once that process ended.
func (c *container) openNamespace(n sandbox.NamespacePath) (int, error) {
	if !strings.HasPrefix(n.Path, runtime.ContainerPath) {
		fd, err := unix.Open(n.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, fmt.Errorf("open %s namespace %s: %w: %w", n.Type, n.Path, err, errdefs.ErrInvalidArgument)
		}
		return fd, nil
	}
	o, err := c.donor(n.Path)
	if err != nil {
		return -1, fmt.Errorf("join %s namespace: %w", n.Type, err)
	}
	o.mu.Lock()
	st, init := o.rec.State.Status, o.init
	o.mu.Unlock()
	id := o.id
	if o == c || init == nil || st != runtime.Running && st != runtime.Paused {
		return -1, fmt.Errorf("join %s namespace of container %s: it is not running: %w", n.Type, id, errdefs.ErrFailedPrecondition)
	}
	fd := -1
	err = control(init.fd, func(own int) error {
		var err error
		fd, err = unix.FcntlInt(uintptr(own), unix.F_DUPFD_CLOEXEC, 3)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("join %s namespace of container %s: %w", n.Type, id, err)
	}
	return fd, nil
}

// donor is the container that a path names.
func (c *container) donor(name string) (*container, error) {
	return c.srv.get(strings.TrimPrefix(name, runtime.ContainerPath))
}

// second waits until a first child made the container's process, and reaps the first.
func (c *container) second(start *pendingStart, slot zygote.Slot, deadline time.Time) (int, error) {
	first := start.child.PID
	ready := start.child.Ready(deadline)
	if ready != nil {
		_ = unix.Kill(first, unix.SIGKILL)
	}
	reap(first)
	c.srv.orphans.remove(first)
	pid := int(start.prog.Result(slot))
	if pid <= 0 {
		return 0, errors.Join(ready, errIfNil(ready))
	}
	// Processes of a pid namespace that is joined can see the second child: its number is believed only if it is a new child of ours.
	if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err != nil || !c.srv.orphans.claim(pid) {
		c.srv.orphans.always()
		return 0, fmt.Errorf("process %d is not the one that was started: the container tampered with it: %w", pid, errdefs.ErrFailedPrecondition)
	}
	if ready != nil {
		_ = unix.Kill(pid, unix.SIGKILL)
		reap(pid)
		c.srv.orphans.remove(pid)
	}
	return pid, ready
}
