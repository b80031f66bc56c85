package supervisor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// quietLimit bounds the wait for requests and ends that are under way when an upgrade begins.
	quietLimit = 20 * time.Second
	// checkLimit bounds a new program's look at the state.
	checkLimit = 15 * time.Second
)

// Main is the supervisor's process: `skein supervisor` with args behind it. It must come before all else in the program.
func Main(args []string) error {
	var cfg Config
	f := flag.NewFlagSet("supervisor", flag.ContinueOnError)
	f.StringVar(&cfg.StateDir, "state-dir", "", "directory of records and journal")
	f.StringVar(&cfg.SocketPath, "socket", "", "socket of the daemon")
	f.StringVar(&cfg.Cgroup, "cgroup", "", "parent of the containers' cgroups")
	check := f.Int("check-state", -1, "only say whether the state in this descriptor is understood")
	given := f.Int("take-over", -1, "continue with the state in this descriptor, left by this process's earlier program or kept by a client")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *check >= 0 {
		_, b, err := parseState(os.NewFile(uintptr(*check), "state"))
		if err == nil {
			_, err = os.Stdout.WriteString(stateAnswer(b))
		}
		return err
	}
	return serve(cfg, file(*given, "state"))
}

// args are the command line that Main wants.
func (c *Config) args() []string {
	return []string{"supervisor", "--state-dir", c.StateDir, "--socket", c.SocketPath, "--cgroup", c.Cgroup}
}

// upgrade replaces this process's program by the one open in the descriptor. It returns only when that did not come about, and then
// everything goes on as before. Children, descriptors and attached clients stay; who connects meanwhile waits.
func (s *server) upgrade(w *wire, fds []int) error {
	defer closeFDs(fds)
	if len(fds) != 1 {
		return fmt.Errorf("upgrade: want the new program's descriptor: %w", errdefs.ErrInvalidArgument)
	}
	if !s.upgrades.TryLock() {
		return fmt.Errorf("upgrade: another is under way: %w", errdefs.ErrUnavailable)
	}
	defer s.upgrades.Unlock()
	client, err := number(w.conn)
	if err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	// Above the descriptors that a child is given.
	exe, err := unix.FcntlInt(uintptr(fds[0]), unix.F_DUPFD_CLOEXEC, 100)
	if err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	defer unix.Close(exe)
	// A look at an empty state first: most reasons to refuse need no interruption.
	probe, answer, err := (&state{}).seal()
	if err == nil {
		err = s.check(exe, probe, answer)
		probe.Close()
	}
	if err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	if err := s.interrupted(func() error { return s.become(exe, client) }); err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	return nil
}

// interrupted runs do while nothing moves: no request, no recording of an end, no reading of output, no client. The caller's own request
// is set aside.
func (s *server) interrupted(do func() error) error {
	deadline := time.Now().Add(quietLimit)
	defer s.door.resume()
	if !s.door.stop(deadline, func() { _ = s.listener.SetDeadline(time.Unix(1, 0)) }) {
		return fmt.Errorf("the supervisor still takes in clients: %w", errdefs.ErrUnavailable)
	}
	s.gate.leave()
	defer s.gate.enter()
	if !s.gate.shut(deadline) {
		return fmt.Errorf("requests or ends have been under way for %v: %w", quietLimit, errdefs.ErrUnavailable)
	}
	defer s.gate.open()
	defer s.pumps.resume()
	if !s.pumps.stop(deadline, s.wakePumps) {
		return fmt.Errorf("output or a log has been blocked for %v: %w", quietLimit, errdefs.ErrUnavailable)
	}
	defer s.sessions.resume()
	if !s.sessions.stop(deadline, s.wakeSessions) {
		return fmt.Errorf("attached clients have been busy for %v: %w", quietLimit, errdefs.ErrUnavailable)
	}
	if err := s.flushLogs(deadline); err != nil {
		return err
	}
	return do()
}

func (s *server) wakePumps() {
	for _, c := range s.all() {
		c.mu.Lock()
		if c.init != nil {
			c.init.out.wake()
		}
		for _, p := range c.execs {
			p.out.wake()
		}
		c.mu.Unlock()
	}
}

func (s *server) wakeSessions() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for x := range s.attached {
		_ = x.w.conn.SetDeadline(time.Unix(1, 0))
	}
}

func (s *server) flushLogs(deadline time.Time) error {
	for _, c := range s.all() {
		c.mu.Lock()
		log := c.log
		c.mu.Unlock()
		if log != nil && !log.Flush(deadline) {
			return c.errf(errdefs.ErrUnavailable, "its log has not been written within %v", quietLimit)
		}
	}
	return nil
}

// become checks the new program with the whole state and executes it.
func (s *server) become(exe, client int) error {
	st, err := s.save(client)
	if err != nil {
		return err
	}
	f, answer, err := st.seal()
	if err != nil {
		return err
	}
	defer f.Close()
	if err := s.check(exe, f, answer); err != nil {
		return err
	}
	n := fileNumber(f)
	if err := st.keepOpen(true); err != nil {
		return errors.Join(err, st.keepOpen(false))
	}
	_, err = unix.FcntlInt(uintptr(n), unix.F_SETFD, 0)
	if err == nil {
		args := append(append([]string{os.Args[0]}, s.cfg.args()...), "--take-over", strconv.Itoa(n))
		err = syscall.Exec("/proc/self/fd/"+strconv.Itoa(exe), args, environment())
	}
	return errors.Join(fmt.Errorf("execute the new program: %w", err), st.keepOpen(false))
}

// environment is this process's without what was meant for its first program.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, readyEnv+"=") })
}

// check lets a program say whether it understands a state.
func (s *server) check(exe int, st *os.File, answer string) error {
	ctx, cancel := context.WithTimeout(context.Background(), checkLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/fd/"+strconv.Itoa(exe), append(s.cfg.args(), "--check-state", "3")...)
	var out, errs bounded
	cmd.Stdout, cmd.Stderr, cmd.Env, cmd.Dir = &out, &errs, environment(), "/"
	cmd.ExtraFiles = []*os.File{st}
	cmd.WaitDelay = time.Second
	err := s.orphans.start(cmd)
	if err == nil {
		err = cmd.Wait()
		s.orphans.remove(cmd.Process.Pid)
	}
	if err == nil && out.String() != answer {
		err = errors.New("it does not know the state's format")
	}
	if err != nil {
		return fmt.Errorf("the new program cannot take over: %w: %s: %w", err, strings.TrimSpace(errs.String()), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// bounded keeps the beginning of what a program says.
type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if room := 4096 - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

// buildOf names a program: two builds that differ have different names.
func buildOf(f *os.File) (string, error) {
	if e, err := elf.NewFile(f); err == nil {
		if sec := e.Section(".note.go.buildid"); sec != nil {
			if b, err := sec.Data(); err == nil && len(b) > 16 {
				n := int(binary.LittleEndian.Uint32(b[4:]))
				if at := 12 + 4; n > 0 && at+n <= len(b) {
					return string(b[at : at+n]), nil
				}
			}
		}
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<40)); err != nil {
		return "", fmt.Errorf("read %s: %w", f.Name(), err)
	}
	return fmt.Sprintf("sha256:%x", h.Sum(nil)), nil
}

// ownBuild names the program of this process.
func ownBuild() (string, error) {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return "", err
	}
	defer f.Close()
	return buildOf(f)
}
