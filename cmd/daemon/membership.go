package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/agent/engine"
	"skein/agent/identity"
	"skein/manager/api"
	"skein/manager/keyring"
	"skein/overlay"
)

const (
	textNotManager = "This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to connect this node to swarm and try again."
	textWorker     = "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. Please run this command on a manager node or promote the current node to a manager."
	textAlready    = "This node is already part of a swarm. Use \"docker swarm leave\" to leave this swarm and join another one."
	textLocked     = "Swarm is encrypted and needs to be unlocked before it can be used. Please use \"docker swarm unlock\" to unlock it."
	textNotPart    = "This node is not part of a swarm"
)

// membership is this node's place in a cluster: none, worker or manager (dockerapi.Swarm). One operation at a time.
type membership struct {
	cfg     Config
	eng     *engine.Engine
	network *overlay.Driver
	log     *slog.Logger

	op     sync.Mutex       // serialises init, join, leave, unlock, changes of the role
	closed bool             // under op: the daemon ends
	keys   *keyring.Keyring // under op: of a manager's data; nil on others

	mu   sync.RWMutex
	node *clusterNode // nil: not in a cluster. While the role changes it is the former one, ended.
	err  error        // why a node that should be in a cluster is not
	note string       // why a node that was in a cluster is not any more
	lock bool         // this manager's data is locked: err says so

	wg sync.WaitGroup // of those that follow a node's role
}

func newMembership(cfg Config, eng *engine.Engine, network *overlay.Driver, log *slog.Logger) *membership {
	return &membership{cfg: cfg, eng: eng, network: network, log: log}
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
	var err error
	m.keys = nil
	if keyring.Exists(m.clusterDir()) {
		if m.keys, err = keyring.Open(m.clusterDir()); errors.Is(err, keyring.ErrLocked) {
			m.log.Warn("this manager is locked: unlock it with \"docker swarm unlock\"")
			m.set(nil, api.Errorf(errdefs.ErrUnavailable, "%s", textLocked), "")
			m.mu.Lock()
			m.lock = true
			m.mu.Unlock()
			return nil
		}
	}
	if err == nil {
		err = m.takeUp()
	}
	if err != nil {
		// The node's own containers go on, and the API tells why the cluster does not.
		m.log.Error("cannot take part in the cluster", "err", err)
		m.set(nil, err, "")
	}
	return nil
}

// takeUp starts the node's part from what is on disk.
func (m *membership) takeUp() error {
	s, err := m.loadSettings()
	var id *identity.Identity
	if err == nil {
		if id, err = identity.Load(m.identityDir(), m.vault()); err != nil && !errdefs.IsFailedPrecondition(err) { // which says what to do
			err = fmt.Errorf("%w: restore the file, or leave with \"docker swarm leave --force\" and join again", err)
		}
	}
	if err == nil {
		err = m.start(id, s, nil)
	}
	return err
}

// vault is what encrypts the node's key.
func (m *membership) vault() identity.Vault {
	if m.keys == nil {
		return nil
	}
	return m.keys
}

// useKeys gives a manager its data keys and encrypts the node's key with them; a worker has none. A crash on the way leaves what the
// next start understands: the keys are made before anything is encrypted with them, and removed after nothing is.
func (m *membership) useKeys(id *identity.Identity) (err error) {
	if id.Role() == api.RoleManager {
		if m.keys == nil {
			if m.keys, err = keyring.Create(m.clusterDir()); err != nil {
				return err
			}
		}
		return id.Protect(m.keys)
	}
	if err := id.Protect(nil); err != nil {
		return err
	}
	// The log holds the cluster's keys, which are no business of a worker.
	if err := os.RemoveAll(filepath.Join(m.clusterDir(), "raft")); err != nil {
		return fmt.Errorf("remove the raft log of a former manager: %w", err)
	}
	m.keys = nil
	if err := os.Remove(keyring.Path(m.clusterDir())); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the data keys of a former manager: %w", err)
	}
	return nil
}

// SwarmUnlock lets a locked manager take part again.
func (m *membership) SwarmUnlock(_ context.Context, key string) error {
	m.op.Lock()
	defer m.op.Unlock()
	if !m.locked() {
		if !identity.Exists(m.identityDir()) {
			return api.Errorf(errdefs.ErrUnavailable, "%s", textNotManager)
		}
		return api.Errorf(errdefs.ErrConflict, "swarm is not locked")
	}
	keys, err := keyring.Unlock(m.clusterDir(), key)
	if err != nil {
		return err
	}
	m.keys = keys
	m.set(nil, nil, "")
	if err := m.takeUp(); err != nil {
		m.log.Error("cannot take part in the cluster", "err", err)
		m.set(nil, err, "")
		return err
	}
	m.log.Info("this manager is unlocked")
	return nil
}

func (m *membership) locked() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.lock
}

// set changes what the node is.
func (m *membership) set(n *clusterNode, err error, note string) {
	m.mu.Lock()
	m.node, m.err, m.note, m.lock = n, err, note, false
	m.mu.Unlock()
}

// start runs this node's part in the cluster until stop. found, when set, makes a new cluster of it.
func (m *membership) start(id *identity.Identity, s settings, found *founding) error {
	if m.closed {
		return api.Errorf(errdefs.ErrUnavailable, "the daemon is ending")
	}
	if err := m.useKeys(id); err != nil {
		return err
	}
	n, err := startNode(m, id, s, found)
	if err != nil {
		return err
	}
	m.set(n, nil, "")
	m.wg.Go(func() { m.follow(n) })
	return nil
}

// stop ends the node's part; nothing is left or removed. A leader hands over first, so that the others need no election.
func (m *membership) stop() {
	m.end()
	m.wg.Wait()
}

func (m *membership) end() {
	m.op.Lock()
	defer m.op.Unlock()
	m.closed = true
	n := m.current()
	m.set(nil, nil, "")
	if n == nil {
		return
	}
	if n.manager != nil {
		n.manager.HandOver(context.Background())
	}
	n.stop()
}

// SwarmInfo is the Swarm part of docker info.
func (m *membership) SwarmInfo(ctx context.Context) swarm.Info {
	m.mu.RLock()
	n, broken, note, locked := m.node, m.err, m.note, m.lock
	m.mu.RUnlock()
	if n == nil {
		if locked {
			return swarm.Info{LocalNodeState: swarm.LocalNodeStateLocked, Error: broken.Error()}
		}
		if broken != nil {
			return swarm.Info{LocalNodeState: swarm.LocalNodeStateError, Error: broken.Error()}
		}
		return swarm.Info{LocalNodeState: swarm.LocalNodeStateInactive, Error: note}
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
	if req.ForceNewCluster {
		return "", api.Errorf(errdefs.ErrNotImplemented, "--force-new-cluster is not supported by this version of skein")
	}
	if req.AutoLockManagers { // where clients of old put it
		req.Spec.EncryptionConfig.AutoLockManagers = true
	}
	s, err := m.settingsFor(req.ListenAddr, req.AdvertiseAddr, req.DataPathAddr)
	if err != nil {
		return "", err
	}
	f, err := newFounding(ctx, m, s, req)
	if err != nil {
		return "", err
	}
	if err := m.prepare(s); err != nil {
		return "", err
	}
	if err := f.install(m); err != nil {
		return "", errors.Join(err, m.forget())
	}
	if err := m.start(f.id, s, f); err != nil {
		return "", errors.Join(fmt.Errorf("initialise the cluster: %w", err), m.forget())
	}
	return f.id.NodeID(), nil
}

// prepare does what can fail before the identity, which makes the node a member, is asked for.
func (m *membership) prepare(s settings) error {
	l, err := net.Listen("tcp", s.Listen)
	if err != nil {
		return api.Errorf(errdefs.ErrInvalidArgument, "listen for other nodes: %v: name another address or port with --listen-addr", err)
	}
	if err := l.Close(); err != nil {
		return err
	}
	return m.saveSettings(s)
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
		addr, err := remoteAddress(r)
		if err != nil {
			return err
		}
		s.Seeds = append(s.Seeds, addr)
	}
	if err := m.prepare(s); err != nil {
		return err
	}
	id, err := m.obtainIdentity(ctx, s, req)
	if err != nil {
		return err
	}
	if err := m.start(id, s, nil); err != nil {
		return errors.Join(fmt.Errorf("join the cluster: %w", err), m.forget())
	}
	if err := m.current().joined(ctx); err != nil {
		n := m.current()
		m.set(nil, nil, "")
		n.leave(context.WithoutCancel(ctx)) // it may be in the group already
		n.stop()
		return errors.Join(fmt.Errorf("join the cluster: %w: nothing of it is left here, try again", err), m.forget())
	}
	return nil
}

// remoteWait bounds how long one of the given managers may take to answer.
const remoteWait = 8 * time.Second

// obtainIdentity asks the given managers in turn. A wrong token is not tried twice. What a failed attempt leaves is the node's key, so that
// a manager that had taken the node, but whose answer was lost, knows it again; nothing else.
func (m *membership) obtainIdentity(ctx context.Context, s settings, req swarm.JoinRequest) (*identity.Identity, error) {
	var errs []error
	for _, remote := range s.Seeds {
		id, err := m.askForIdentity(ctx, remote, s, req)
		if err == nil {
			return id, nil
		}
		errs = append(errs, err)
		lost := errdefs.IsUnavailable(err) || errdefs.IsDeadlineExceeded(err) || errors.Is(err, context.DeadlineExceeded)
		if !lost {
			return nil, errors.Join(append(errs, m.forget())...)
		}
		if ctx.Err() != nil {
			break
		}
	}
	_ = os.Remove(m.settingsFile())
	_ = os.Remove(m.clusterDir()) // unless the key is in it
	return nil, api.Errorf(errdefs.ErrUnavailable, "%v: no manager answered: compare the addresses, and see whether a firewall is between (TCP port %d)", errors.Join(errs...), defaultPort)
}

func (m *membership) askForIdentity(ctx context.Context, remote string, s settings, req swarm.JoinRequest) (*identity.Identity, error) {
	ctx, cancel := context.WithTimeout(ctx, remoteWait)
	defer cancel()
	id, err := identity.Join(ctx, remote, req.JoinToken, identity.JoinOptions{
		StateDir: m.identityDir(), Hostname: m.cfg.Hostname, RPCAddr: s.RPCAddr, UnderlayAddr: s.Underlay, Availability: string(req.Availability),
	})
	if errdefs.IsNotImplemented(err) {
		return nil, api.Errorf(errdefs.ErrUnavailable, "join the cluster: the node at %s is a worker: name a manager's address", remote)
	}
	return id, err
}

// SwarmLeave takes the node out of its cluster and removes what the cluster had here.
func (m *membership) SwarmLeave(ctx context.Context, force bool) error {
	m.op.Lock()
	defer m.op.Unlock()
	if !identity.Exists(m.identityDir()) {
		return api.Errorf(errdefs.ErrUnavailable, "%s", textNotPart)
	}
	n := m.current()
	if m.locked() && !force {
		return api.Errorf(errdefs.ErrUnavailable, "%s Or leave all the same with \"docker swarm leave --force\".", textLocked)
	}
	if n != nil && n.manager != nil && !force {
		return api.Errorf(errdefs.ErrFailedPrecondition, "You are attempting to leave the swarm on a node that is participating as a manager. Removing this node leaves the swarm with fewer managers; the only way to restore a swarm that has lost consensus is to reinitialize it. Use `--force` to suppress this message.")
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanWait) // half-way is no place to stop because the client went
	defer cancel()
	if n != nil {
		n.leave(ctx)
	}
	return m.clean(ctx, n, "")
}

// cleanWait bounds the removal of everything that the cluster had on this node.
const cleanWait = 2 * time.Minute

// clean ends the node's part and removes what the cluster had here, its identity last, so that what failed can be repeated.
func (m *membership) clean(ctx context.Context, n *clusterNode, note string) error {
	if n != nil {
		n.stop()
	}
	m.set(nil, errors.New("this node is leaving its cluster"), "")
	err := errors.Join(m.removeTasks(ctx), m.eng.LeaveNetworks(ctx))
	if err == nil {
		if err = m.network.Leave(ctx); err != nil {
			err = fmt.Errorf("remove the cluster's networks: %w", err)
		}
	}
	if err == nil {
		err = m.forget()
	}
	if err != nil {
		err = fmt.Errorf("leave the cluster: %w: try again with \"docker swarm leave --force\"", err)
		m.set(nil, err, "")
		return err
	}
	m.set(nil, nil, note)
	return nil
}

func (m *membership) removeTasks(ctx context.Context) error {
	ids, err := m.eng.Tasks(ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := m.eng.RemoveTask(ctx, id); err != nil {
			return fmt.Errorf("remove task %s: %w", id, err)
		}
	}
	return nil
}

// forget removes identity, cluster state and settings, the identity first: without it the rest means nothing.
func (m *membership) forget() error {
	if err := identity.Remove(m.identityDir()); err != nil {
		return err
	}
	m.keys = nil
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
	n, broken, locked := m.node, m.err, m.lock
	m.mu.RUnlock()
	switch {
	case n == nil && locked:
		return nil, broken
	case n == nil && broken != nil:
		return nil, api.Errorf(errdefs.ErrUnavailable, "this node cannot take part in its swarm: %v", broken)
	case n == nil:
		return nil, api.Errorf(errdefs.ErrUnavailable, "%s", textNotManager)
	case !n.manages():
		return nil, api.Errorf(errdefs.ErrUnavailable, "%s", textWorker)
	}
	return n, nil
}
