package task

import (
	"context"
	"log/slog"
	"maps"
	"sync"
	"time"

	"skein/manager/api"
)

// Bounds of a task's life. Variables of no test: virtual time makes the real values testable.
const (
	// drainMargin lets packets that chose the endpoint just before it left the last table arrive (notes: at least one round trip).
	drainMargin = 150 * time.Millisecond
	// drainBound ends the wait for a drain that managers do not confirm although they are there.
	drainBound = 15 * time.Second
	// aloneBound ends that wait when no manager is there to confirm anything.
	aloneBound = 10 * time.Second
	// drainTime is how long clients' connections are waited for when nobody says otherwise: a stream of ten seconds that began just before the
	// task left rotation ends in time.
	drainTime = 15 * time.Second
	// sickBound ends the wait of a container that its health check gave up: its clients are served badly meanwhile.
	sickBound = 5 * time.Second
	// prepareBound ends the retries of a preparation whose error might heal (a registry that is down).
	prepareBound = 60 * time.Second
	backoffMin   = 500 * time.Millisecond
	backoffMax   = 5 * time.Second
)

// Config of a Manager.
type Config struct {
	Executor Executor
	// Report is told each new report of a task. It must not block and must not call the manager. Reports are immutable.
	Report func(*api.TaskReport)
	// Dependency is handed to the executor; nil: there are none.
	Dependency Dependency
	Log        *slog.Logger
}

// Set is the whole of what this node must run.
type Set struct {
	Assignments []*api.Assignment
	Networks    []*api.NetworkRecord
	// Known are reports made before a restart of the daemon, so that a state never goes back.
	Known map[string]*api.TaskReport
	// Confirmed says that a manager sent this set in this process's life: containers of other tasks are orphans and are removed.
	Confirmed bool
}

// Manager runs all tasks of this node.
type Manager struct {
	cfg Config

	mu        sync.Mutex
	ctx       context.Context // of Run; nil before it, workers start with it
	workers   map[string]*worker
	networks  map[string]*api.NetworkRecord
	connected bool
	lostAt    time.Time // since when no manager confirms drains
	wg        sync.WaitGroup
	sweep     chan struct{}
}

// New returns a manager that does nothing before Run.
func New(cfg Config) *Manager {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Manager{cfg: cfg, workers: map[string]*worker{}, networks: map[string]*api.NetworkRecord{}, sweep: make(chan struct{}, 1)}
}

// Run drives the tasks until ctx ends. Containers keep running then: the next daemon adopts them.
func (m *Manager) Run(ctx context.Context) error {
	m.mu.Lock()
	m.ctx = ctx
	m.lostAt = time.Now()
	for _, w := range m.workers {
		m.startLocked(w)
	}
	m.mu.Unlock()
	for {
		select {
		case <-ctx.Done():
			m.mu.Lock()
			m.ctx = nil
			m.mu.Unlock()
			m.wg.Wait()
			return ctx.Err()
		case <-m.sweep:
			m.removeOrphans(ctx)
		}
	}
}

// Set replaces what this node must run.
func (m *Manager) Set(s Set) {
	m.mu.Lock()
	defer m.mu.Unlock()
	wanted := make(map[string]bool, len(s.Assignments))
	m.networks = map[string]*api.NetworkRecord{}
	m.learnLocked(s.Networks)
	for _, a := range s.Assignments {
		wanted[a.TaskId] = true
		m.assignLocked(a, s.Known[a.TaskId])
	}
	for id, w := range m.workers {
		if !wanted[id] {
			w.remove()
		}
	}
	if s.Confirmed {
		select {
		case m.sweep <- struct{}{}:
		default:
		}
	}
}

// Update changes what this node must run.
func (m *Manager) Update(set []*api.Assignment, removed []string, networks []*api.NetworkRecord) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.learnLocked(networks)
	for _, a := range set {
		m.assignLocked(a, nil)
	}
	for _, id := range removed {
		if w := m.workers[id]; w != nil {
			w.remove()
		}
	}
}

// Connected says whether a session with the managers stands; without one drains are waited for only shortly.
func (m *Manager) Connected(yes bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.connected == yes {
		return
	}
	m.connected = yes
	if !yes {
		m.lostAt = time.Now()
	}
	for _, w := range m.workers {
		w.setSession(m.connected, m.lostAt)
	}
}

// Reports returns the latest report of each task that has one.
func (m *Manager) Reports() []*api.TaskReport {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*api.TaskReport, 0, len(m.workers))
	for _, w := range m.workers {
		if r := w.latest(); r != nil {
			out = append(out, r)
		}
	}
	return out
}

func (m *Manager) learnLocked(networks []*api.NetworkRecord) {
	for _, n := range networks {
		m.networks[n.Id] = n
	}
}

func (m *Manager) assignLocked(a *api.Assignment, known *api.TaskReport) {
	if w := m.workers[a.TaskId]; w != nil {
		w.update(a)
		return
	}
	w := newWorker(m.cfg, a, maps.Clone(m.networks), known)
	m.workers[a.TaskId] = w
	w.setSession(m.connected, m.lostAt)
	if m.ctx != nil {
		m.startLocked(w)
	}
}

func (m *Manager) startLocked(w *worker) {
	ctx := m.ctx
	w.setSession(m.connected, m.lostAt)
	m.wg.Go(func() {
		w.run(ctx)
		m.finished(ctx, w)
	})
}

// finished forgets a worker whose container is removed. An assignment that came back meanwhile starts over.
func (m *Manager) finished(ctx context.Context, w *worker) {
	if ctx.Err() != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.workers, w.id)
	if a := w.reassigned(); a != nil {
		m.assignLocked(a, nil)
	}
}

// removeOrphans removes containers of tasks that are not assigned to this node.
func (m *Manager) removeOrphans(ctx context.Context) {
	ids, err := m.cfg.Executor.Tasks(ctx)
	if err != nil {
		m.cfg.Log.Error("list task containers", "err", err)
		return
	}
	for _, id := range ids {
		m.mu.Lock()
		_, wanted := m.workers[id]
		m.mu.Unlock()
		if wanted || ctx.Err() != nil {
			continue
		}
		m.cfg.Log.Info("remove container of a task that is not assigned here", "task", id)
		if err := m.cfg.Executor.RemoveTask(ctx, id); err != nil {
			m.cfg.Log.Error("remove orphan container; it is tried again with the next full assignment set", "task", id, "err", err)
		}
	}
}
