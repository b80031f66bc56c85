package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/runtime"
)

// readyLimit bounds the start of a supervisor, adoption of its containers included.
const readyLimit = 30 * time.Second

// Ensure connects to the supervisor at cfg.SocketPath and starts one, `exe supervisor --state-dir … --socket … --cgroup …`, when none
// answers; one that runs another build is upgraded to exe in place, and goes on as it is when it cannot be. It runs in a session of its own and survives this process; its messages go to supervisor.log in the state directory. The
// client starts it again when it is found dead.
func Ensure(ctx context.Context, exe string, cfg Config) (runtime.Supervisor, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.AdoptOrphans {
		// Before there is a supervisor: its children become ours if it dies.
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return nil, fmt.Errorf("become the parent of orphans: %w", err)
		}
	}
	var once sync.Mutex
	c, err := dial(ctx, cfg.SocketPath)
	if errdefs.IsUnavailable(err) {
		if err = launch(ctx, exe, cfg, nil); err == nil {
			c, err = dial(ctx, cfg.SocketPath)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := c.matchBuild(ctx, exe); err != nil {
		cfg.Logger.Warn("the supervisor goes on with another build than this one", "socket", cfg.SocketPath, "error", err)
	}
	revived := make(chan struct{}, 1)
	c.revive = func(ctx context.Context) (err error) {
		once.Lock()
		defer once.Unlock()
		defer func() {
			if err == nil {
				select {
				case revived <- struct{}{}:
				default:
				}
			}
		}()
		err = c.hello(ctx)
		if err == nil {
			return nil // somebody else did it
		}
		cfg.Logger.Warn("the supervisor is gone: starting another, which adopts the containers", "socket", cfg.SocketPath, "error", err)
		c.settle()
		if err := launch(ctx, exe, cfg, c); err != nil {
			return err
		}
		return c.hello(ctx)
	}
	if cfg.AdoptOrphans {
		go adoptOrphans(c.done, cfg.SocketPath, revived)
	}
	c.keepAll(ctx)
	return c, nil
}

// keepAll begins to keep what shall outlive the supervisor, and returns when all there is now is kept, or ctx is done.
func (c *client) keepAll(ctx context.Context) {
	synced := make(chan struct{})
	go c.keep(sync.OnceFunc(func() { close(synced) })) // ends with the client
	select {
	case <-synced:
	case <-ctx.Done():
	}
}

// matchBuild upgrades a supervisor that runs another build.
func (c *client) matchBuild(ctx context.Context, exe string) error {
	f, err := os.Open(exe)
	if err != nil {
		return err
	}
	defer f.Close()
	build, err := buildOf(f)
	if err != nil || build == c.build {
		return err
	}
	return c.Upgrade(ctx, exe)
}

// adoptOrphans reaps all children until done: it is their end being waited for that lets others learn the exit code. Those that ended
// while no supervisor answers are kept for the next, which has taken hold of them all when it answers.
func adoptOrphans(done <-chan struct{}, socket string, revived <-chan struct{}) {
	o := newOrphans()
	o.always()
	defer o.never()
	for {
		select {
		case <-done:
			return
		case <-o.signal:
		case <-revived:
		}
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			o.reap(0)
		}
	}
}

// launch starts the process and waits until its socket is open. The new supervisor gets what from keeps, unless it does not understand it.
func launch(ctx context.Context, exe string, cfg Config, from *client) error {
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	logPath := filepath.Join(cfg.StateDir, "supervisor.log")
	out, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	defer out.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	defer r.Close()
	err = fork(exe, cfg, out, w, from)
	w.Close()
	if err != nil {
		return fmt.Errorf("start supervisor %s: %w", exe, err)
	}
	deadline := time.Now().Add(readyLimit)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	_ = r.SetReadDeadline(deadline)
	defer context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })()
	var b [1]byte
	if _, err := r.Read(b[:]); err != nil {
		// It may have lost against another one that was started at the same time.
		if c, derr := dial(ctx, cfg.SocketPath); derr == nil {
			return c.Close()
		}
		if from != nil && errors.Is(err, io.EOF) {
			cfg.Logger.Error("a supervisor did not start with what was kept of its containers: trying without", "see", logPath)
			return launch(ctx, exe, cfg, nil)
		}
		return fmt.Errorf("start supervisor: it did not open %s: see %s: %w", cfg.SocketPath, logPath, errdefs.ErrUnavailable)
	}
	return nil
}

// The first descriptors of a new supervisor behind the standard ones.
const (
	readyFD = 3 + iota
	keptFD
	firstKeptFD
)

// fork starts the process with the standard descriptors, the one to tell on that the socket is open, and what was kept.
func fork(exe string, cfg Config, out, ready *os.File, from *client) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	files := []uintptr{null.Fd(), out.Fd(), out.Fd(), ready.Fd()}
	args := append([]string{exe}, cfg.args()...)
	if from != nil {
		st, fds := from.give(firstKeptFD)
		defer closeFDs(fds)
		kept, _, err := st.seal()
		if err != nil {
			return err
		}
		defer kept.Close()
		files = append(files, kept.Fd())
		for _, fd := range fds {
			files = append(files, uintptr(fd))
		}
		args = append(args, "--take-over", strconv.Itoa(keptFD))
	}
	pid, err := syscall.ForkExec(exe, args, &syscall.ProcAttr{Dir: "/", Env: append(os.Environ(), fmt.Sprintf("%s=%d", readyEnv, readyFD)), Files: files,
		Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		return err
	}
	// Reaps the supervisor if it ends before this process does; nobody waits for this.
	go reap(pid)
	return nil
}
