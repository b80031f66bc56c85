package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/agent/engine"
	"skein/agent/identity"
	"skein/manager/api"
	"skein/overlay"
)

const (
	textNotManager = "This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to connect this node to swarm and try again."
	textWorker     = "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. Please run this command on a manager node or promote the current node to a manager."
	textAlready    = "This node is already part of a swarm. Use \"docker swarm leave\" to leave this swarm and join another one."
	textNotPart    = "This node is not part of a swarm"
)

// membership is this node's place in a cluster: none, worker or manager (dockerapi.Swarm). One operation at a time.
type membership struct {
	cfg     Config
	eng     *engine.Engine
	network *overlay.Driver
	log     *slog.Logger

	op sync.Mutex // serialises init, join, leave

	mu   sync.RWMutex
	node *clusterNode // nil: not in a cluster
	err  error        // why a node that should be in a cluster is not
}

func newMembership(cfg Config, eng *engine.Engine, network *overlay.Driver, log *slog.Logger) *membership {
	return &membership{cfg: cfg, eng: eng, network: network, log: log}
}

// settings is what rests on disk of how this node takes part.
type settings struct {
	Listen   string   // host:port
	RPCAddr  string   // host:port as others reach it
	Underlay string   // address of VXLAN packets
	Seeds    []string // managers to begin with
}

func (m *membership) clusterDir() string    { return filepath.Join(m.cfg.StateDir, "cluster") }
func (m *membership) settingsFile() string  { return filepath.Join(m.clusterDir(), "node.json") }
func (m *membership) identityDir() string   { return m.clusterDir() }
func (m *membership) current() *clusterNode { m.mu.RLock(); defer m.mu.RUnlock(); return m.node }

// resume takes the node back to where it was before the daemon ended.
func (m *membership) resume(ctx context.Context) error {
	m.op.Lock()
	defer m.op.Unlock()
	if !identity.Exists(m.identityDir()) {
		return nil
	}
	s, err := m.loadSettings()
	if err != nil {
		return err
	}
	id, err := identity.Load(m.identityDir())
	if err == nil {
		err = m.start(id, s, nil)
	}
	if err != nil {
		// The node's own containers go on, and the API tells why the cluster does not.
		m.log.Error("cannot take part in the cluster", "err", err)
		m.mu.Lock()
		m.err = err
		m.mu.Unlock()
	}
	return nil
}

// start runs this node's part in the cluster until stop. found, when set, makes a new cluster of it.
func (m *membership) start(id *identity.Identity, s settings, found *founding) error {
	n, err := startNode(m, id, s, found)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.node, m.err = n, nil
	m.mu.Unlock()
	return nil
}

// stop ends the node's part; nothing is left or removed.
func (m *membership) stop() {
	m.op.Lock()
	defer m.op.Unlock()
	m.mu.Lock()
	n := m.node
	m.node = nil
	m.mu.Unlock()
	if n != nil {
		n.stop()
	}
}

// SwarmInfo is the Swarm part of docker info.
func (m *membership) SwarmInfo(ctx context.Context) swarm.Info {
	m.mu.RLock()
	n, broken := m.node, m.err
	m.mu.RUnlock()
	if n == nil {
		if broken != nil {
			return swarm.Info{LocalNodeState: swarm.LocalNodeStateError, Error: broken.Error()}
		}
		return swarm.Info{LocalNodeState: swarm.LocalNodeStateInactive}
	}
	return n.info(ctx)
}

// SwarmInit makes a new cluster with this node as its only manager.
func (m *membership) SwarmInit(ctx context.Context, req swarm.InitRequest) (string, error) {
	m.op.Lock()
	defer m.op.Unlock()
	if identity.Exists(m.identityDir()) {
		return "", api.Errorf(errdefs.ErrUnavailable, "%s", textAlready)
	}
	switch {
	case req.ForceNewCluster:
		return "", api.Errorf(errdefs.ErrNotImplemented, "--force-new-cluster is not supported by this version of skein")
	case req.AutoLockManagers || req.Spec.EncryptionConfig.AutoLockManagers:
		return "", api.Errorf(errdefs.ErrNotImplemented, "--autolock is not supported by this version of skein")
	}
	s, err := m.settingsFor(req.ListenAddr, req.AdvertiseAddr, req.DataPathAddr)
	if err != nil {
		return "", err
	}
	f, err := newFounding(m, s, req)
	if err != nil {
		return "", err
	}
	if err := m.saveSettings(s); err != nil {
		return "", err
	}
	if err := m.start(f.id, s, f); err != nil {
		return "", errors.Join(fmt.Errorf("initialise the cluster: %w", err), m.forget())
	}
	return f.id.NodeID(), nil
}

// SwarmJoin makes this node a member of an existing cluster; the token decides on its role.
func (m *membership) SwarmJoin(ctx context.Context, req swarm.JoinRequest) error {
	m.op.Lock()
	defer m.op.Unlock()
	if identity.Exists(m.identityDir()) {
		return api.Errorf(errdefs.ErrUnavailable, "%s", textAlready)
	}
	if len(req.RemoteAddrs) == 0 {
		return api.Errorf(errdefs.ErrInvalidArgument, "at least one RemoteAddr is required to join: name a manager's address")
	}
	s, err := m.settingsFor(req.ListenAddr, req.AdvertiseAddr, req.DataPathAddr)
	if err != nil {
		return err
	}
	for _, r := range req.RemoteAddrs {
		s.Seeds = append(s.Seeds, withPort(r))
	}
	id, err := m.obtainIdentity(ctx, s, req)
	if err != nil {
		return err
	}
	if err := m.saveSettings(s); err != nil {
		return err
	}
	if err := m.start(id, s, nil); err != nil {
		return errors.Join(fmt.Errorf("join the cluster: %w", err), m.forget())
	}
	if err := m.current().joined(ctx); err != nil {
		n := m.current()
		m.mu.Lock()
		m.node = nil
		m.mu.Unlock()
		n.stop()
		return errors.Join(err, m.forget())
	}
	return nil
}

// obtainIdentity asks the given managers in turn. A wrong token is not tried twice.
func (m *membership) obtainIdentity(ctx context.Context, s settings, req swarm.JoinRequest) (*identity.Identity, error) {
	var errs []error
	for _, remote := range s.Seeds {
		id, err := identity.Join(ctx, remote, req.JoinToken, identity.JoinOptions{
			StateDir: m.identityDir(), Hostname: m.cfg.Hostname, RPCAddr: s.RPCAddr, UnderlayAddr: s.Underlay, Availability: string(req.Availability),
		})
		if err == nil {
			return id, nil
		}
		errs = append(errs, err)
		if !errdefs.IsUnavailable(err) && !errdefs.IsDeadlineExceeded(err) {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// SwarmLeave takes the node out of its cluster and removes what the cluster had here.
func (m *membership) SwarmLeave(ctx context.Context, force bool) error {
	m.op.Lock()
	defer m.op.Unlock()
	if !identity.Exists(m.identityDir()) {
		return api.Errorf(errdefs.ErrUnavailable, "%s", textNotPart)
	}
	n := m.current()
	if n != nil && n.manager != nil && !force {
		return api.Errorf(errdefs.ErrFailedPrecondition, "You are attempting to leave the swarm on a node that is participating as a manager. Removing this node leaves the swarm with fewer managers; the only way to restore a swarm that has lost consensus is to reinitialize it. Use `--force` to suppress this message.")
	}
	if n != nil {
		n.leave(ctx)
		m.mu.Lock()
		m.node = nil
		m.mu.Unlock()
		n.stop()
	}
	if err := m.removeTasks(ctx); err != nil {
		return err
	}
	if err := m.network.Teardown(ctx); err != nil {
		return fmt.Errorf("leave: remove the cluster's networks: %w", err)
	}
	m.mu.Lock()
	m.err = nil
	m.mu.Unlock()
	return m.forget()
}

func (m *membership) removeTasks(ctx context.Context) error {
	ids, err := m.eng.Tasks(ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := m.eng.RemoveTask(ctx, id); err != nil {
			return fmt.Errorf("leave: remove task %s: %w", id, err)
		}
	}
	return nil
}

// forget removes identity, cluster state and settings, the identity first: without it the rest means nothing.
func (m *membership) forget() error {
	if err := identity.Remove(m.identityDir()); err != nil {
		return err
	}
	return os.RemoveAll(m.clusterDir())
}

// Control is the client of the cluster's control service.
func (m *membership) Control(ctx context.Context) (api.ControlClient, error) {
	n, err := m.managerNode()
	if err != nil {
		return nil, err
	}
	return n.control, nil
}

// Agent is the client of a node's agent service.
func (m *membership) Agent(ctx context.Context, nodeID string) (api.AgentClient, error) {
	n, err := m.managerNode()
	if err != nil {
		return nil, err
	}
	return n.agentOf(nodeID)
}

func (m *membership) managerNode() (*clusterNode, error) {
	m.mu.RLock()
	n, broken := m.node, m.err
	m.mu.RUnlock()
	switch {
	case n == nil && broken != nil:
		return nil, api.Errorf(errdefs.ErrUnavailable, "this node cannot take part in its swarm: %v", broken)
	case n == nil:
		return nil, api.Errorf(errdefs.ErrUnavailable, "%s", textNotManager)
	case n.manager == nil:
		return nil, api.Errorf(errdefs.ErrUnavailable, "%s", textWorker)
	}
	return n, nil
}

// settingsFor chooses this node's addresses: the request's words, then the daemon's flags.
func (m *membership) settingsFor(listen, advertise, dataPath string) (settings, error) {
	l, err := listenAddress(listen, m.cfg.ListenAddr)
	if err != nil {
		return settings{}, err
	}
	if advertise == "" {
		advertise = m.cfg.AdvertiseAddr
	}
	a, err := chooseAddress(advertise)
	if err != nil {
		return settings{}, err
	}
	if dataPath == "" {
		dataPath = m.cfg.DataPathAddr
	}
	d := a
	if dataPath != "" {
		if d, err = chooseAddress(dataPath); err != nil {
			return settings{}, err
		}
	}
	s := settings{Listen: l, RPCAddr: advertised(a, l), Underlay: d.String()}
	if strings.Contains(advertise, ":") {
		if ap, err := netip.ParseAddrPort(advertise); err == nil {
			s.RPCAddr = ap.String()
		}
	}
	return s, nil
}

func (m *membership) loadSettings() (settings, error) {
	var s settings
	b, err := os.ReadFile(m.settingsFile())
	if errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("this node has a certificate but %s is missing: leave with `skein swarm leave --force` and join again", m.settingsFile())
	}
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		return s, fmt.Errorf("cluster settings %s: %w", m.settingsFile(), err)
	}
	return s, nil
}

func (m *membership) saveSettings(s settings) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.clusterDir(), 0o700); err != nil {
		return err
	}
	tmp := m.settingsFile() + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("cluster settings: %w", err)
	}
	return os.Rename(tmp, m.settingsFile())
}

func withPort(addr string) string {
	if _, err := netip.ParseAddrPort(addr); err == nil {
		return addr
	}
	if i := strings.LastIndex(addr, ":"); i > 0 && !strings.Contains(addr[i:], "]") && strings.Count(addr, ":") == 1 {
		return addr
	}
	return fmt.Sprintf("%s:%d", addr, defaultPort)
}
