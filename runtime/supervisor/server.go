package supervisor

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/cgroup"
	"skein/runtime/sandbox"
	"skein/runtime/zygote"
)

// Config is where a supervisor lives. Several on one machine share nothing.
type Config struct {
	// StateDir keeps records, journal and pipes; only the owner can enter it.
	StateDir string
	// SocketPath is the unix socket of the daemon.
	SocketPath string
	// Cgroup is the parent of the containers' groups, an absolute path like /skein/c1/n1.
	Cgroup string
	// Logger receives what no caller can be told; default: standard error.
	Logger *slog.Logger
	// AdoptOrphans makes the process that calls Ensure the parent of containers whose supervisor died, until Close: their ends are then
	// seen at once and with their exit code, whatever the system's first process does. It waits for every child of the process, so
	// nothing else in it may wait for children.
	AdoptOrphans bool
}

func (c *Config) validate() error {
	for _, p := range []struct{ name, value string }{{"state directory", c.StateDir}, {"socket path", c.SocketPath}, {"cgroup", c.Cgroup}} {
		if !filepath.IsAbs(p.value) {
			return fmt.Errorf("supervisor %s %q: want an absolute path: %w", p.name, p.value, errdefs.ErrInvalidArgument)
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	return nil
}

const (
	// arenas bounds containers that are being created or wait for their start.
	arenas = 256
	// maxConns bounds what clients can hold open: attaches, event streams, calls.
	maxConns = 1024
	// maxContainers bounds the records of one node.
	maxContainers = 4096
	// maxFilters bounds the cache of compiled seccomp filters.
	maxFilters = 64
	// requestLimit bounds the wait for a client's request.
	requestLimit = 10 * time.Second
)

// readyEnv names the descriptor on which Ensure waits for the socket.
const readyEnv = "SKEIN_SUPERVISOR_READY_FD"

type server struct {
	cfg     Config
	log     *slog.Logger
	host    sandbox.Host
	cgroups *cgroup.Host
	pool    *zygote.Pool
	zygote  *zygote.Zygote
	journal *journal
	buffers *sync.Pool
	boot    string
	store   fdStore
	orphans *orphans
	work    sync.WaitGroup // process watchers

	mu         sync.Mutex
	containers map[string]*container
	filters    map[[32]byte]sandbox.Filter
	stopping   bool

	stop context.CancelFunc
}

// Serve runs the supervisor in this process until a client shuts it down. Call it first thing in a process of its own: it forks its
// zygote at once, becomes the reaper of orphans, and makes the process not dumpable.
func Serve(cfg Config) error {
	if err := cfg.validate(); err != nil {
		return err
	}
	pool, err := zygote.NewPool(arenas)
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	z, err := zygote.Fork(pool)
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	s := &server{cfg: cfg, log: cfg.Logger, pool: pool, zygote: z, buffers: newPool(), boot: bootID(),
		containers: map[string]*container{}, filters: map[[32]byte]sandbox.Filter{}, store: fdStore{m: map[string]int{}}, orphans: newOrphans()}
	if err := s.run(); err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	return nil
}

func (s *server) run() error {
	for _, p := range []struct {
		what string
		op   int
		arg  uintptr
	}{{"become reaper", unix.PR_SET_CHILD_SUBREAPER, 1}, {"become not dumpable", unix.PR_SET_DUMPABLE, 0}} {
		if err := unix.Prctl(p.op, p.arg, 0, 0, 0); err != nil {
			return fmt.Errorf("%s: %w", p.what, err)
		}
	}
	if err := os.MkdirAll(s.containersDir(), 0o700); err != nil {
		return err
	}
	if err := os.Chmod(s.cfg.StateDir, 0o700); err != nil {
		return err
	}
	lock, err := s.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if s.host, err = sandbox.Probe(); err != nil {
		return err
	}
	if s.cgroups, err = cgroup.Probe(); err != nil {
		return err
	}
	if _, err := s.cgroups.Open(s.cfg.Cgroup, "probe"); err != nil {
		return err
	}
	var events []runtime.Event
	if s.journal, events, err = openJournal(filepath.Join(s.cfg.StateDir, "journal"), s.log); err != nil {
		return err
	}
	defer s.journal.close()
	s.adopt(events)
	l, err := s.listen()
	if err != nil {
		return err
	}
	notifyReady()
	return s.accept(l)
}

// lock keeps a second supervisor off the state directory.
func (s *server) lock() (*os.File, error) {
	path := filepath.Join(s.cfg.StateDir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) && !s.answered() {
		err = awaitLock(f) // its holder is dying
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: another supervisor uses this state directory: %w", path, err)
	}
	return f, nil
}

// answered says whether a supervisor serves the socket already.
func (s *server) answered() bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	c, err := dial(ctx, s.cfg.SocketPath)
	if err == nil {
		_ = c.Close()
	}
	return err == nil
}

// awaitLock waits for the lock, at most requestLimit; then the process gives up and ends, and with it the wait.
func awaitLock(f *os.File) error {
	got := make(chan error, 1)
	go func() {
		for {
			err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
			if !errors.Is(err, unix.EINTR) {
				got <- err
				return
			}
		}
	}()
	t := time.NewTimer(requestLimit)
	defer t.Stop()
	select {
	case err := <-got:
		return err
	case <-t.C:
		return errors.New("it neither answers nor ends")
	}
}

func (s *server) listen() (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(s.cfg.SocketPath), 0o755); err != nil {
		return nil, err
	}
	if err := os.Remove(s.cfg.SocketPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177) // the socket is never accessible to others, not even before chmod
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.cfg.SocketPath, Net: "unix"})
	unix.Umask(old)
	return l, err
}

// notifyReady tells the process that waits for the socket, if there is one.
func notifyReady() {
	var fd int
	if _, err := fmt.Sscanf(os.Getenv(readyEnv), "%d", &fd); err != nil || fd < 3 {
		return
	}
	f := os.NewFile(uintptr(fd), "ready")
	_, _ = f.Write([]byte{1})
	f.Close()
}

func (s *server) accept(l *net.UnixListener) error {
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var conns sync.WaitGroup
	conns.Go(func() { s.orphans.run(ctx, s.zygote.PID) })
	slots := make(chan struct{}, maxConns)
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED) {
				s.log.Error("cannot accept a client", "error", err)
				time.Sleep(100 * time.Millisecond) // nothing tells when descriptors are free again
				continue
			}
			return fmt.Errorf("accept on %s: %w", s.cfg.SocketPath, err)
		}
		w := newWire(conn)
		select {
		case slots <- struct{}{}:
		default:
			_ = w.writeJSON(frameResponse, toResponse(fmt.Errorf("%d clients are connected: %w", maxConns, errdefs.ErrUnavailable)))
			w.close()
			continue
		}
		conns.Go(func() {
			defer func() { <-slots }()
			s.serve(ctx, w)
		})
	}
	conns.Wait()
	s.work.Wait()
	s.zygote.Close()
	return nil
}

// serve answers one request.
func (s *server) serve(ctx context.Context, w *wire) {
	defer w.close()
	if err := checkPeer(w.conn); err != nil {
		_ = w.writeJSON(frameResponse, toResponse(err))
		return
	}
	_ = w.conn.SetReadDeadline(time.Now().Add(requestLimit))
	kind, b, fds, err := w.read(nil)
	_ = w.conn.SetReadDeadline(time.Time{})
	if err != nil {
		return
	}
	var r request
	if err := json.Unmarshal(b, &r); err != nil || kind != frameRequest {
		closeFDs(fds)
		_ = w.writeJSON(frameResponse, toResponse(fmt.Errorf("malformed request: %w", errdefs.ErrInvalidArgument)))
		return
	}
	if r.Op != "storefd" {
		closeFDs(fds)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if r.Op != "attach" { // the peer says nothing more: reading ends when it leaves
		left := make(chan struct{})
		go func() {
			defer close(left)
			_, _, extra, _ := w.read(nil)
			closeFDs(extra)
			cancel()
		}()
		defer func() {
			w.close()
			<-left
		}()
	}
	resp, done, err := s.dispatch(ctx, w, &r, fds)
	if done {
		return
	}
	if err != nil {
		resp = toResponse(err)
	}
	if err := w.writeJSON(frameResponse, resp); err != nil && ctx.Err() == nil {
		s.log.Debug("client left before its answer", "op", r.Op, "error", err)
	}
}

// checkPeer lets in nobody but the user this process runs as.
func checkPeer(c *net.UnixConn) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	cerr := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(cerr, err); err != nil {
		return err
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d may not use this supervisor: %w", cred.Uid, errdefs.ErrPermissionDenied)
	}
	return nil
}

// dispatch runs one request; done means that everything was answered already.
func (s *server) dispatch(ctx context.Context, w *wire, r *request, fds []int) (resp response, done bool, err error) {
	switch r.Op {
	case "hello":
		return response{StateDir: s.cfg.StateDir, PID: os.Getpid()}, false, nil
	case "create":
		return resp, false, s.create(r.Config)
	case "list":
		return response{States: s.list()}, false, nil
	case "events":
		return resp, true, s.events(ctx, w, r.After)
	case "storefd":
		return resp, false, s.store.put(r.Name, fds)
	case "loadfds":
		if err := s.store.send(w, r.Name); err != nil {
			return resp, false, err
		}
		return resp, true, nil
	case "releasefd":
		return resp, false, s.store.release(r.Name)
	case "shutdown":
		return resp, false, s.shutdown(r.Force)
	}
	c, err := s.get(r.ID)
	if err != nil {
		return resp, false, err
	}
	switch r.Op {
	case "start":
		resp.PID, err = c.start(ctx)
	case "signal":
		err = c.signal(r.ExecID, r.Signal)
	case "pause":
		err = c.pause(ctx)
	case "resume":
		err = c.resume()
	case "update":
		err = c.update(r.Resources)
	case "delete":
		err = c.delete()
	case "state":
		resp.States = []runtime.State{c.state()}
	case "exec":
		resp.PID, err = c.exec(r.Process)
	case "resize":
		err = c.resize(r)
	case "attach":
		if err = c.attach(w, r); err == nil {
			return resp, true, nil
		}
	default:
		err = fmt.Errorf("operation %q: %w", r.Op, errdefs.ErrNotImplemented)
	}
	return resp, false, err
}

func (s *server) containersDir() string { return filepath.Join(s.cfg.StateDir, "containers") }

func validID(id string) bool {
	return len(id) <= 128 && regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`).MatchString(id)
}

func (s *server) add(c *container) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopping:
		return c.errf(errdefs.ErrUnavailable, "create: the supervisor is shutting down")
	case s.containers[c.id] != nil:
		return c.errf(errdefs.ErrAlreadyExists, "create")
	case len(s.containers) >= maxContainers:
		return c.errf(errdefs.ErrResourceExhausted, "create: %d containers exist: remove some", len(s.containers))
	}
	s.containers[c.id] = c
	return nil
}

func (s *server) forget(c *container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, c.id)
}

func (s *server) get(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

func (s *server) list() []runtime.State {
	s.mu.Lock()
	all := make([]*container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	s.mu.Unlock()
	out := make([]runtime.State, 0, len(all))
	for _, c := range all {
		if st := c.state(); st.Status != "" { // not being created
			out = append(out, st)
		}
	}
	slices.SortFunc(out, func(a, b runtime.State) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// events streams the journal until the client leaves.
func (s *server) events(ctx context.Context, w *wire, after uint64) error {
	if err := s.journal.passed(after); err != nil {
		s.log.Error("cannot shorten the journal", "error", err)
	}
	if err := w.writeJSON(frameResponse, response{}); err != nil {
		return nil
	}
	err := s.journal.follow(ctx, after, func(ev runtime.Event) error { return w.writeJSON(frameEvent, ev) })
	if err != nil && ctx.Err() == nil {
		s.log.Debug("event stream ended", "error", err)
	}
	return nil
}

// filter compiles a seccomp profile, once for equal ones.
func (s *server) filter(p *specs.LinuxSeccomp) (sandbox.Filter, error) {
	if p == nil {
		return sandbox.Filter{}, nil
	}
	b, err := json.Marshal(p)
	if err != nil {
		return sandbox.Filter{}, err
	}
	key := sha256.Sum256(b)
	s.mu.Lock()
	f, ok := s.filters[key]
	s.mu.Unlock()
	if ok {
		return f, nil
	}
	if f, err = sandbox.CompileSeccomp(p); err != nil {
		return f, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.filters) >= maxFilters {
		clear(s.filters)
	}
	s.filters[key] = f
	return f, nil
}
