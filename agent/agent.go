package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"skein/agent/task"
	"skein/manager/api"
)

// Config of an Agent.
type Config struct {
	// Who this node is, as managers and other nodes see it.
	NodeID       string
	Hostname     string
	UnderlayAddr string // address VXLAN packets go to
	RPCAddr      string // host:port of the node-to-node listener
	// StateDir holds agent.journal: what managers said last, for a restart without them.
	StateDir string
	// Seeds are addresses of managers to begin with; later the managers' own list is used first.
	Seeds []string
	// Dial makes a connection of this session's own, which the agent closes. It should not wait for the connection to stand.
	Dial     func(ctx context.Context, addr string) (*grpc.ClientConn, error)
	Executor task.Executor
	Network  Network
	// OnManagers and OnNode, where set, are told the managers and this node's record (role, availability) whenever they may have
	// changed. They must not block.
	OnManagers func([]*api.ManagerPeer)
	OnNode     func(*api.NodeRecord)
	// OnCredentials, where set, is told whom to trust and what to encrypt gossip with, at the begin of each session and when it changes. It
	// must not block.
	OnCredentials func(*api.Credentials)
	// TLS, where set, is what this node says of its certificate; call TLSChanged when it is another.
	TLS func() *api.NodeTLS
	// Addrs, where set, lists the node's addresses that a client on it may have. It is asked every now and then.
	Addrs func() []string
	// Crypt, where set, is what this node encrypts networks with; call CryptChanged when it is another.
	Crypt func() *api.NodeCrypt
	// Facts, where set, looks at what the managers are to know of this node's surroundings.
	Facts func(ctx context.Context) (*api.NodeFacts, error)
	// OnRefused, where set, is told each time a manager says that this node is not part of the cluster. It must not block.
	OnRefused func(error)
	Log       *slog.Logger
}

func (c *Config) validate() error {
	switch {
	case c.NodeID == "":
		return errors.New("agent: no node id")
	case c.StateDir == "":
		return errors.New("agent: no state directory")
	case c.Dial == nil || c.Executor == nil || c.Network == nil:
		return errors.New("agent: Dial, Executor and Network are needed")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Agent is this node's side of the session with the managers.
type Agent struct {
	cfg     Config
	tasks   *task.Manager
	outbox  *outbox
	tables  *applier
	file    *journal
	tls     chan struct{} // capacity 1: Config.TLS says something else now
	crypt   chan struct{} // capacity 1: Config.Crypt says something else now
	going   func()        // closes leaving, once
	addrs   []string      // what the managers were told of Config.Addrs, at addrsAt; the session's own
	addrsAt time.Time
	ask     chan struct{} // capacity 1: managers want to know the facts
	asked   atomic.Uint64 // the newest such request
	left    chan struct{} // closed when no session comes any more

	leaving chan struct{} // closed by Leave

	mu      sync.Mutex
	known   *knowledge
	status  Status
	term    uint64    // highest of a leader that we had a session with
	termAt  time.Time // when that was heard last
	goodbye bool      // was said: no session follows

	spread time.Duration // over which managers without a leader want all attempts to spread, as they said last; connect's alone
}

// Status tells how the session stands.
type Status struct {
	Connected bool
	Leader    string // address of the manager of the session, or of the last one
	SessionID string
	Since     time.Time // of being connected, or not
	Err       string    // why it is not connected
	Applied   map[string]uint64
	Failed    map[string]string // tables that could not be applied, with the reason
}

// New loads what managers said before the last end of the daemon. It starts nothing.
func New(cfg Config) (*Agent, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, outbox: newOutbox(), known: newKnowledge(), tls: make(chan struct{}, 1), crypt: make(chan struct{}, 1), ask: make(chan struct{}, 1), left: make(chan struct{}), leaving: make(chan struct{})}
	a.going = sync.OnceFunc(func() { close(a.leaving) })
	a.tables = newApplier(cfg.Network, a.currentTables, cfg.Log)
	a.tasks = task.New(task.Config{Executor: gatedExecutor{cfg.Executor, a.tables}, Report: a.report, Dependency: a.dependency, Log: cfg.Log})
	file, err := openJournal(filepath.Join(cfg.StateDir, "agent.journal"), a.replay)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	a.file = file
	return a, nil
}

// Run applies what is known, runs the tasks, and keeps a session with the leader until ctx ends. Containers outlive it.
func (a *Agent) Run(ctx context.Context) error {
	defer a.file.close()
	a.mu.Lock()
	a.status.Since = time.Now()
	assignments, networks := a.known.assigned()
	reports := maps.Clone(a.known.reports)
	managers := a.known.managers
	a.mu.Unlock()
	if len(assignments) > 0 {
		a.tasks.Set(task.Set{Assignments: assignments, Networks: networks, Known: reports})
	}
	if len(managers) > 0 && a.cfg.OnManagers != nil {
		a.cfg.OnManagers(managers)
	}
	a.tables.poke() // the data plane first: it must work without managers
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.tables.run(ctx) })
	g.Go(func() error { return a.tasks.Run(ctx) })
	g.Go(func() error { return a.connect(ctx) })
	return g.Wait()
}

// Leave tells the managers that this node leaves the cluster, so that it is down for them at once. It returns when they ended the session;
// there is none any more after that. Without a session it waits for one until ctx ends.
func (a *Agent) Leave(ctx context.Context) error {
	a.going()
	select {
	case <-a.left:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("say goodbye to the managers: %w", context.Cause(ctx))
	}
}

// Status returns how the session and the tables stand.
func (a *Agent) Status() Status {
	a.mu.Lock()
	s := a.status
	a.mu.Unlock()
	s.Applied, s.Failed = a.tables.state()
	return s
}

// dependency is a secret or config that the managers sent for a task here; nil before they did.
func (a *Agent) dependency(id string) *api.DependencyRecord {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.known.dependencies[id]
}

// Managers returns the managers as last heard.
func (a *Agent) Managers() []*api.ManagerPeer {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.known.managers
}

// Reports returns what is known of each task that is assigned to this node.
func (a *Agent) Reports() []*api.TaskReport { return a.tasks.Reports() }

// report takes a task's report: to the managers at once, to the journal where a restart must not forget it.
func (a *Agent) report(r *api.TaskReport) {
	if api.TaskState(r.State) >= api.TaskRunning {
		a.file.write(func() ([]frame, bool) {
			a.mu.Lock()
			defer a.mu.Unlock()
			if a.known.assignments[r.TaskId] == nil {
				return nil, false
			}
			a.known.reports[r.TaskId] = r
			return []frame{{kind: frameReports, msg: &api.StatusBatch{Reports: []*api.TaskReport{r}}}}, true
		}, a.everything, a.cfg.Log)
	}
	a.outbox.add(r)
}

// receive takes one message of the managers: merged, written down, then acted upon.
func (a *Agent) receive(m *api.ManagerMessage) error {
	var err error
	a.file.write(func() ([]frame, bool) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if err = a.known.merge(m); err != nil {
			return nil, false
		}
		return []frame{{kind: frameManager, msg: m}}, m.GetHeartbeat() == nil && m.GetDependencies() == nil && m.GetCredentials() == nil && m.GetFacts() == nil
	}, a.everything, a.cfg.Log)
	if err != nil {
		return err
	}
	switch k := m.Kind.(type) {
	case *api.ManagerMessage_Welcome:
		if a.cfg.OnNode != nil && k.Welcome.Node != nil {
			a.cfg.OnNode(k.Welcome.Node)
		}
		a.tables.poke()
	case *api.ManagerMessage_Assignments:
		a.assign(k.Assignments)
	case *api.ManagerMessage_Table:
		a.tables.poke()
	case *api.ManagerMessage_Managers:
		if a.cfg.OnManagers != nil {
			a.cfg.OnManagers(k.Managers.Managers)
		}
	case *api.ManagerMessage_Facts:
		a.askFacts(k.Facts.Sequence)
	case *api.ManagerMessage_Credentials:
		if a.cfg.OnCredentials != nil {
			a.cfg.OnCredentials(k.Credentials)
		}
	}
	return nil
}

// TLSChanged has the managers told what Config.TLS says now.
func (a *Agent) TLSChanged() {
	select {
	case a.tls <- struct{}{}:
	default: // it will be asked once, after both
	}
}

// CryptChanged has the managers told what Config.Crypt says now.
func (a *Agent) CryptChanged() {
	select {
	case a.crypt <- struct{}{}:
	default: // it will be asked once, after both
	}
}

func (a *Agent) nodeCrypt() *api.NodeCrypt {
	if a.cfg.Crypt == nil {
		return nil
	}
	return a.cfg.Crypt()
}

func (a *Agent) nodeTLS() *api.NodeTLS {
	if a.cfg.TLS == nil {
		return nil
	}
	return a.cfg.TLS()
}

func (a *Agent) assign(u *api.AssignmentUpdate) {
	if u.More {
		return // the rest of a full set is on its way
	}
	a.mu.Lock()
	set := a.known.merged
	_, networks := a.known.assigned()
	a.mu.Unlock()
	if u.Full {
		a.tasks.Set(task.Set{Assignments: set, Networks: networks, Confirmed: true})
		return
	}
	a.tasks.Update(set, u.Removed, u.Networks)
}

// replay merges a frame of the journal while it is loaded. A frame that does not fit is skipped: managers will say it again.
func (a *Agent) replay(f frame) {
	switch m := f.msg.(type) {
	case *api.ManagerMessage:
		if err := a.known.merge(m); err != nil {
			a.cfg.Log.Warn("skip a message in the agent's journal", "err", err)
		}
	case *api.StatusBatch:
		for _, r := range m.Reports {
			a.known.reports[r.TaskId] = r
		}
	}
}

// everything is the whole knowledge as frames, for a journal that has grown.
func (a *Agent) everything() []frame {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.known.frames()
}

func (a *Agent) currentTables() (Tables, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.known.tables()
}
