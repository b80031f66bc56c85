// Package engine is this node's containers, images and single-host networks: the only composer of runtime and overlay.
//
// It keeps one record per container on disk, reconciles records with the supervisor's processes, the image store's snapshots and
// the kernel's sandboxes when it starts, and removes what has no record. It serves the Docker API's node part
// (agent/dockerapi), runs the cluster's tasks (agent/task.Executor) and applies the cluster's tables (agent.Network).
package engine

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/moby/moby/api/types/swarm"
	"golang.org/x/sync/errgroup"

	"skein/agent/volumes"
	"skein/overlay"
	"skein/overlay/crypt"
	"skein/runtime"
	"skein/runtime/image"
	"skein/runtime/logs"
)

// Network is what the engine needs of the overlay driver.
type Network interface {
	Set(ctx context.Context, c overlay.Config) (overlay.Applied, error)
	AddSandbox(ctx context.Context, s overlay.Sandbox) (nsPath string, err error)
	RemoveSandbox(ctx context.Context, id string) error
	Sandboxes() ([]string, error)
	SandboxPath(id string) string
	SetBridges(ctx context.Context, bridges []overlay.Bridge) error
	CryptKeys() ([]crypt.Key, error)
	CryptKeysChanged() <-chan struct{}
	Facts() (overlay.Facts, error)
	PortHolder(proto string, port uint16) (name string, pid int, inUse bool)
	PortFree(proto string, at netip.Addr, port uint16) error
	PortUnbound(proto string, at netip.Addr, port uint16) error
	SCTP() bool
	HostRoutes() ([]netip.Prefix, error)
}

// Config of an engine. All members are required but Labels and Generic.
type Config struct {
	StateDir   string // containers, networks; 0700
	RunDir     string // what must not be on a disk: secrets
	Hostname   string
	Version    string
	Images     image.Store
	Supervisor runtime.Supervisor
	Network    Network
	Insecure   []string                // registries that may be spoken to without TLS, for info
	Labels     []string                // engine labels, "k=v"
	Generic    []swarm.GenericResource // what this node offers beside CPU and memory
	UserNS     *IDMaps                 // when set, containers run in user namespaces unless they ask for the host's
	Logger     *slog.Logger
}

// Engine is a node's engine. Methods are safe for concurrent use.
type Engine struct {
	cfg        Config
	log        *slog.Logger
	id         string // engine id, kept in the state directory
	events     *bus
	execs      *execTable
	nets       *localNetworks
	ports      *portTable
	attach     *attachments
	volumes    *volumes.Store
	volumeUse  sync.Mutex // held from a volume's creation until its container is registered, and over removals
	memory     sync.Mutex // held while the memory for secrets is made
	logWatcher *logs.Watcher

	mu         sync.RWMutex
	containers map[string]*entry // by id
	names      map[string]string // name → id
	tasks      map[string]*entry // by the cluster task they carry out
	lastEvent  uint64

	background context.Context // ends with Run
	work       errgroup.Group  // follow-ups of exits; waited for by Run
	ready      chan struct{}   // closed when reconciliation is done
}

// New loads the records. It starts nothing and changes nothing; Run reconciles.
func New(cfg Config) (*Engine, error) {
	for _, d := range []string{cfg.StateDir, filepath.Join(cfg.StateDir, "containers")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("engine state directory: %w", err)
		}
	}
	e := &Engine{
		cfg: cfg, log: cfg.Logger, events: newBus(),
		containers: map[string]*entry{}, names: map[string]string{}, tasks: map[string]*entry{}, ready: make(chan struct{}),
	}
	e.execs, e.ports, e.attach = newExecTable(), newPortTable(), newAttachments()
	var err error
	if e.logWatcher, err = logs.NewWatcher(); err != nil {
		return nil, fmt.Errorf("watch log files: %w", err)
	}
	if e.id, err = loadID(filepath.Join(cfg.StateDir, "engine-id")); err != nil {
		return nil, err
	}
	if e.nets, err = loadLocalNetworks(cfg.StateDir, e.id, e.outsideRoutes); err != nil {
		return nil, err
	}
	if e.volumes, err = volumes.New(filepath.Join(cfg.StateDir, "volumes")); err != nil {
		return nil, err
	}
	if err := e.loadContainers(); err != nil {
		return nil, err
	}
	return e, nil
}

// Run reconciles with what the kernel holds, then follows the supervisor's journal until ctx is done.
func (e *Engine) Run(ctx context.Context) error {
	var cancel context.CancelFunc
	e.background, cancel = context.WithCancel(ctx)
	defer cancel()
	e.work.Go(func() error { return e.logWatcher.Run(e.background) })
	if err := e.reconcile(ctx); err != nil {
		return fmt.Errorf("reconcile containers: %w", err)
	}
	ch, err := e.cfg.Supervisor.Events(ctx, e.lastEvent)
	if err != nil {
		return fmt.Errorf("follow the supervisor's journal: %w", err)
	}
	close(e.ready)
	e.work.Go(func() error { return e.keepAttachments(e.background) })
	e.resume()
	for ev := range ch {
		e.handleExit(ev)
	}
	cancel()
	_ = e.work.Wait()
	if ctx.Err() == nil {
		return fmt.Errorf("the supervisor's journal ended: the supervisor is gone")
	}
	return nil
}

// Ready is closed once the records agree with the kernel; API and agent wait for it.
func (e *Engine) Ready() <-chan struct{} { return e.ready }

func (e *Engine) containerDir(id string) string {
	return filepath.Join(e.cfg.StateDir, "containers", id)
}
