// Package control serves users: it checks what they wish, writes it as specs into the store, and shows the store's objects as Docker's.
//
// A wish that cannot be carried out is refused here, whole, with the object, the cause and the fix in the error; what is not built yet is
// refused by name and never silently dropped. Updates carry the version they were based on. Reads and writes run on the leader; a read
// sees everything that was acknowledged before it began. It writes specs and nothing else: what follows from them is the controllers'
// business. Who uses it: package manager registers it; any manager's API socket calls it through package forward.
package control

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/ca"
	"skein/manager/dispatcher"
	"skein/manager/store"
)

// writeTimeout bounds how long a write waits for a majority of the managers.
const writeTimeout = 20 * time.Second

// Store is what control needs of the store.
type Store interface {
	View(func(store.ReadTx))
	Update(context.Context, func(store.WriteTx) error) (uint64, error)
}

// Managers is what control must know of the group of managers.
type Managers interface {
	// Linearize returns when reads of the local store see everything that was acknowledged before the call.
	Linearize(ctx context.Context) error
	// ManagerStatus tells of a node whether it is a member of the Raft group, whether it leads, and whether it is reachable.
	ManagerStatus(nodeID string) (member, leader, reachable bool)
	// RemoveManager takes a node out of the Raft group.
	RemoveManager(ctx context.Context, nodeID string) error
}

// Observer is what the dispatcher of the current term knows beyond the log.
type Observer interface {
	// SoftState is the newest report about a task, nil if the log has it already.
	SoftState(taskID string) *api.TaskReport
	// NetStatus tells which node applied which version of which table.
	NetStatus(ctx context.Context) (*api.NetStatusReply, error)
	// NetCheck has nodes compare their kernels with the record, and mend them.
	NetCheck(ctx context.Context, req *api.NetCheckRequest) (*api.NetCheckReply, error)
	// Facts tells what nodes see of their surroundings: with fresh, as it is now.
	Facts(ctx context.Context, fresh bool) ([]dispatcher.NodeFacts, error)
}

// Authority is what control needs of the certificate authority.
type Authority interface {
	PlanConfig(ctx context.Context, c *store.Cluster, want swarm.CAConfig) (*ca.Plan, error)
}

// Config of a Server. Store and Managers are required.
type Config struct {
	Store    Store
	Managers Managers
	// Observer returns the current dispatcher, nil if there is none. May be nil.
	Observer func() Observer
	// Authority works out what a change of the cluster's certificate authority means; nil: one that shows no certificate to external ones.
	Authority Authority
	// Checks refuse specs that later parts cannot carry out: modes, placement.
	Checks []func(*swarm.ServiceSpec) error
	Now    func() time.Time
	Logger *slog.Logger
}

// Server implements api.ControlServer.
type Server struct {
	api.UnimplementedControlServer
	cfg   Config
	log   *slog.Logger
	roles sync.Mutex // held while a node's record, and with it its role, is changed
}

// New returns the service.
func New(cfg Config) *Server {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Authority == nil {
		cfg.Authority = ca.NewServer(cfg.Store, cfg.Logger, cfg.Now)
	}
	return &Server{cfg: cfg, log: cfg.Logger.With("component", "control")}
}

// read runs f on a view that has everything acknowledged so far.
func (s *Server) read(ctx context.Context, f func(store.ReadTx) error) error {
	if err := s.cfg.Managers.Linearize(ctx); err != nil {
		return err
	}
	var err error
	s.cfg.Store.View(func(tx store.ReadTx) { err = f(tx) })
	return err
}

// write proposes what f adds. It sees everything acknowledged so far, too: "not found" must be true.
func (s *Server) write(ctx context.Context, f func(store.WriteTx) error) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if err := s.cfg.Managers.Linearize(ctx); err != nil {
		return api.NotDone(err)
	}
	_, err := s.cfg.Store.Update(ctx, f)
	return err
}

func (s *Server) observer() Observer {
	if s.cfg.Observer == nil {
		return nil
	}
	return s.cfg.Observer()
}

func expect(kind, id string, version uint64) *api.Change {
	return &api.Change{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: kind, Id: id, Version: version}}}
}

// checkVersion refuses an update that was based on another version than the current one; docker's clients know the text.
func checkVersion(what string, got, want uint64) error {
	if got != want {
		return api.Errorf(errdefs.ErrConflict, "update out of sequence: %s has version %d by now, the update was made for %d: inspect it and update again", what, want, got)
	}
	return nil
}

func invalid(format string, args ...any) error {
	return api.Errorf(errdefs.ErrInvalidArgument, format, args...)
}
