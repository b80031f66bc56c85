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
	"skein/runtime/rootfs"
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
	maxConns = 2048
	// maxSessions bounds attached clients, so that those that stay do not take all the room from calls.
	maxSessions = 1536
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
	nulls   *rootfs.Nulls
	groups  *cgroup.Pool
	pool    *zygote.Pool
	zygote  *zygote.Zygote
	journal *journal
	buffers *sync.Pool
	userMu  sync.Mutex
	users   map[string]*os.File // user namespaces by their maps, for mounts
	boot    string
	store   fdStore
	orphans *orphans
	work    sync.WaitGroup // process watchers

	flow
	conns    sync.WaitGroup
	slots    chan struct{} // bounds clients
	locked   *os.File
	listener *net.UnixListener
	build    string // names this program
	keeper   keeper

	mu         sync.Mutex
	attached   map[*session]bool
	containers map[string]*container
	filters    map[[32]byte]sandbox.Filter
	stopping   bool

	stop context.CancelFunc
}

// flow is what goes on in a supervisor and stops for an upgrade.
type flow struct {
	gate     *gate // what must not be cut in half
	door     *halt // the taking in of clients
	pumps    *halt // the reading of output
	sessions *halt // attached clients
	upgrades sync.Mutex
}

// serve runs the supervisor in this process until a client shuts it down; given is what an earlier program of this process or a client
// left, or nil.
// It comes first in a process of its own: it forks its zygote at once, becomes the reaper of orphans, and makes the process not dumpable.
func serve(cfg Config, given *os.File) error {
	if err := cfg.validate(); err != nil {
		return err
	}
	for _, p := range []struct {
		what string
		op   int
		arg  uintptr
	}{{"become not dumpable", unix.PR_SET_DUMPABLE, 0}, {"become reaper", unix.PR_SET_CHILD_SUBREAPER, 1}} {
		if err := unix.Prctl(p.op, p.arg, 0, 0, 0); err != nil {
			return fmt.Errorf("supervisor: %s: %w", p.what, err)
		}
	}
	pool, err := zygote.NewPool(arenas)
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	z, err := zygote.Fork(pool)
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	s := newServer(cfg)
	s.pool, s.zygote = pool, z
	st, err := readState(given)
	if err == nil {
		s.build, err = ownBuild()
	}
	if err == nil {
		err = s.run(st)
	}
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	return nil
}

func newServer(cfg Config) *server {
	return &server{cfg: cfg, log: cfg.Logger, buffers: newPool(), boot: bootID(), slots: make(chan struct{}, maxConns),
		flow:       flow{gate: newGate(), door: newHalt(), pumps: newHalt(), sessions: newHalt()},
		containers: map[string]*container{}, attached: map[*session]bool{}, filters: map[[32]byte]sandbox.Filter{},
		store: fdStore{m: map[string]int{}}, orphans: newOrphans()}
}

// run serves until shutdown; st is what an earlier program of this process left, or what a
// client kept of an earlier process, or nil.
func (s *server) run(st *state) error {
	if err := os.MkdirAll(s.containersDir(), 0o700); err != nil {
		return err
	}
	if err := os.Chmod(s.cfg.StateDir, 0o700); err != nil {
		return err
	}
	var err error
	if s.locked, err = s.lock(st); err != nil {
		return err
	}
	defer s.locked.Close()
	if s.host, err = sandbox.Probe(); err != nil {
		return err
	}
	if s.nulls, err = rootfs.NewNulls(); err != nil {
		return err
	}
	defer s.nulls.Close()
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
	if s.listener, err = s.listen(st); err != nil {
		return err
	}
	var ctx context.Context
	ctx, s.stop = context.WithCancel(context.Background())
	defer s.stop()
	s.adopt(events, st)
	if s.groups, err = s.cgroups.NewPool(s.cfg.Cgroup, sandbox.DefaultDeviceRules()); err != nil {
		return err
	}
	if st.sameProcess() {
		s.tookOver(st)
	} else {
		notifyReady()
	}
	return s.accept(ctx)
}

// lock keeps a second supervisor off the state directory.
func (s *server) lock(st *state) (*os.File, error) {
	path := filepath.Join(s.cfg.StateDir, "lock")
	if st.sameProcess() {
		return os.NewFile(uintptr(st.Lock), path), nil // locked all the time
	}
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

func (s *server) all() []*container {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	return all
}

func (s *server) list() []runtime.State {
	all := s.all()
	out := make([]runtime.State, 0, len(all))
	for _, c := range all {
		if st := c.state(); st.Status != "" { // not being created
			out = append(out, st)
		}
	}
	slices.SortFunc(out, func(a, b runtime.State) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// events streams the journal until the client leaves, or, over an upgrade, loses its connection and asks again.
func (s *server) events(ctx context.Context, w *wire, after uint64, free func()) error {
	if err := s.journal.passed(after); err != nil {
		s.log.Error("cannot shorten the journal", "error", err)
	}
	free()
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
