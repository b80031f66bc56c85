package oci

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/sandbox"
	"skein/runtime/zygote"
)

// maxHookOutput bounds what is kept of a hook's output for its error.
const maxHookOutput = 4096

// hookState is what hooks read from their standard input.
func (c *Container) hookState(status specs.ContainerState) []byte {
	s := specs.State{Version: specs.Version, ID: c.rec.ID, Status: status, Bundle: c.rec.Bundle, Annotations: c.rec.Notes}
	if status != specs.StateStopped {
		s.Pid = c.rec.PID
	}
	b, _ := json.Marshal(s) // plain strings and numbers
	return b
}

// tail keeps the last bytes written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - maxHookOutput; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

func hookContext(h specs.Hook) (context.Context, context.CancelFunc) {
	if h.Timeout != nil {
		return context.WithTimeout(context.Background(), time.Duration(*h.Timeout)*time.Second)
	}
	return context.WithCancel(context.Background())
}

// runHooks runs hooks one after the other in the runtime's namespaces, up to the first that fails. A hook that does not read its input
// is fine: writing to it fails with EPIPE, which is not an error.
func (c *Container) runHooks(kind string, list []specs.Hook, state []byte) error {
	for i, h := range list {
		if err := c.runHook(h, state); err != nil {
			return fmt.Errorf("%s hook %d, %s: %w", kind, i, h.Path, err)
		}
	}
	return nil
}

func (c *Container) runHook(h specs.Hook, state []byte) error {
	ctx, cancel := hookContext(h)
	defer cancel()
	args := h.Args
	if len(args) == 0 {
		args = []string{h.Path}
	}
	var out tail
	cmd := exec.CommandContext(ctx, h.Path)
	cmd.Args, cmd.Env, cmd.Dir = args, append([]string{}, h.Env...), c.rec.Bundle
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(state), &out, &out
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("it ran longer than %d s: %w", *h.Timeout, context.DeadlineExceeded)
	case errors.Is(err, exec.ErrWaitDelay):
		return nil // it left somebody behind who holds its output
	case err != nil:
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out.b)))
	}
	return nil
}

// runInside runs hooks in the container's namespaces, whose root is the host's before the pivot and the container's after it.
func (c *Container) runInside(kind string, s *specs.Spec, list []specs.Hook, state []byte) error {
	for i, h := range list {
		if err := c.runHookInside(s, h, state); err != nil {
			return fmt.Errorf("%s hook %d, %s: %w", kind, i, h.Path, err)
		}
	}
	return nil
}

func namespacesOf(s *specs.Spec) uint64 {
	var f uint64
	for _, n := range s.Linux.Namespaces {
		f |= sandbox.NamespaceFlag(n.Type)
	}
	return f
}

func (c *Container) runHookInside(s *specs.Spec, h specs.Hook, state []byte) error {
	pool, err := zygote.NewPool(1)
	if err != nil {
		return err
	}
	p, err := pool.Program()
	if err != nil {
		return err
	}
	args := h.Args
	if len(args) == 0 {
		args = []string{h.Path}
	}
	d := p.EnterDirect(4)
	defer d.Close()
	slot, execs := sandbox.CompileHook(p, namespacesOf(s), h.Path, args, h.Env)
	pidfd, err := unix.PidfdOpen(c.rec.PID, 0)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	in, err := stateFile(state)
	if err != nil {
		return err
	}
	defer in.Close()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	r, w, err := replyPipe()
	if err != nil {
		return err
	}
	err = d.Launch([]int{int(in.Fd()), int(null.Fd()), int(null.Fd()), pidfd}, r, w, 0, -1)
	unix.Close(w)
	if err != nil {
		return err
	}
	if reap(d.PID) != 0 {
		return setupError(p, zygote.ErrGone)
	}
	pid := int(p.Result(slot))
	code, err := awaitHook(pid, h)
	if _, ferr := execs.Failed(p); err == nil && code != 0 && ferr != nil {
		return ferr
	}
	if err == nil && code != 0 {
		err = fmt.Errorf("exit status %d", code)
	}
	return err
}

// stateFile is the state as something to read that needs no writer.
func stateFile(state []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "state")
	if _, err := f.Write(state); err != nil {
		f.Close()
		return nil, err
	}
	_, err = f.Seek(0, 0)
	return f, err
}

// awaitHook waits for a child at most as long as the hook may take.
func awaitHook(pid int, h specs.Hook) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	limit := -1
	if h.Timeout != nil {
		limit = *h.Timeout * 1000
	}
	if !awaitExit(fd, limit) {
		_ = unix.Kill(pid, unix.SIGKILL)
		reap(pid)
		return 0, fmt.Errorf("it ran longer than %d s: %w", *h.Timeout, context.DeadlineExceeded)
	}
	return reap(pid), nil
}

// awaitExit waits for the end of a process, at most ms milliseconds, -1 for ever.
func awaitExit(pidfd, ms int) bool {
	deadline := time.Now().Add(time.Duration(ms) * time.Millisecond)
	for {
		left := -1
		if ms >= 0 {
			left = int(max(0, time.Until(deadline).Milliseconds()))
		}
		p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, left)
		if n > 0 {
			return true
		}
		if err == nil && n == 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return false
		}
	}
}
