package manager

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/ca"
	"skein/manager/control"
	"skein/manager/keyring"
	"skein/manager/store"
)

// Defaults of a new cluster (DECISIONS 14).
const (
	DefaultOverlayPool = "10.0.0.0/9"
	DefaultMeshPool    = "10.192.0.0/10"
	DefaultOverlayBits = 20
	DefaultDataPort    = 4789
	gossipKeyBytes     = 32
	ingressName        = "ingress"
)

// Seed is what a cluster begins with: its root, and the first node's certificate. It is made before the node's port can be opened, since
// that needs the certificate.
type Seed struct {
	ClusterID, NodeID string
	// CertPEM is the first node's certificate, leaf, then root; GossipKey goes with it into the node's identity.
	CertPEM, GossipKey []byte

	root *ca.Root
}

// NewSeed makes a cluster of one manager out of its certificate request. conf may name another root than a fresh one.
func NewSeed(ctx context.Context, csrPEM []byte, conf swarm.CAConfig) (*Seed, error) {
	csr, err := ca.ParseRequest(csrPEM)
	if err != nil {
		return nil, fmt.Errorf("make a cluster: %w", err)
	}
	now := time.Now()
	s := &Seed{ClusterID: api.NewID(), GossipKey: make([]byte, gossipKeyBytes)}
	if _, err := rand.Read(s.GossipKey); err != nil {
		return nil, fmt.Errorf("make a cluster: %w", err)
	}
	s.NodeID = api.NodeIDFor(s.ClusterID, csr.RawSubjectPublicKeyInfo)
	id := api.NodeIdentity{NodeID: s.NodeID, Role: api.RoleManager, ClusterID: s.ClusterID}
	if s.root, s.CertPEM, err = ca.Found(ctx, conf, csr, id, now); err != nil {
		return nil, fmt.Errorf("make a cluster: %w", err)
	}
	return s, nil
}

// InitSpec describes a new cluster and its first node. Zero values stand for the defaults.
type InitSpec struct {
	Seed *Seed
	Spec swarm.Spec
	// OverlayPools are cut into networks of OverlayBits, one after the other; MeshPool into blocks of nodes. The caller has checked them
	// against its routes.
	OverlayPools []netip.Prefix
	MeshPool     netip.Prefix
	OverlayBits  uint32
	DataPort     uint32 // of VXLAN

	Hostname     string
	UnderlayAddr string
	Availability string
}

// CheckInit refuses a spec that InitCluster would refuse, before anything is made.
func CheckInit(s InitSpec) error {
	_, err := s.cluster()
	return err
}

// InitCluster makes this manager the first of a new cluster. Run must be under way, and the manager must be new.
func (m *Manager) InitCluster(ctx context.Context, s InitSpec) error {
	if err := m.initCluster(ctx, s); err != nil {
		return fmt.Errorf("make a cluster: %w", err)
	}
	m.log.Info("cluster made", "cluster", s.Seed.ClusterID)
	return nil
}

func (m *Manager) initCluster(ctx context.Context, s InitSpec) error {
	if s.Seed == nil || s.Seed.NodeID != m.cfg.NodeID || s.Seed.ClusterID != m.cfg.ClusterID {
		return api.Errorf(errdefs.ErrInvalidArgument, "the seed is not that of this node's certificate")
	}
	c, err := s.cluster()
	if err != nil {
		return err
	}
	select {
	case <-m.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	raft, err := m.node()
	if err != nil {
		return err
	}
	if err := raft.Bootstrap(); err != nil {
		return err
	}
	if err := m.awaitLeading(ctx); err != nil {
		return err
	}
	first := &api.NodeRecord{Id: m.cfg.NodeID, Hostname: s.Hostname, Role: api.RoleManager, Availability: s.Availability,
		UnderlayAddr: s.UnderlayAddr, RpcAddr: m.cfg.RPCAddr, FeatureLevel: api.FeatureLevel, Status: &api.NodeStatus{State: "unknown"}}
	if first.Availability == "" {
		first.Availability = "active"
	}
	ingress := &api.NetworkRecord{Id: api.NewID(), Name: ingressName, Driver: "overlay", Ingress: true}
	_, err = m.store.Update(ctx, func(tx store.WriteTx) error {
		tx.Add(&api.Change{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "cluster", Id: c.Id}}})
		tx.Add(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})
		tx.Add(&api.Change{Kind: &api.Change_PutNode{PutNode: first}})
		tx.Add(&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: ingress}})
		return nil
	})
	return err
}

func (m *Manager) awaitLeading(ctx context.Context) error {
	for {
		changed := m.Changed()
		if m.IsLeader() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// cluster is the cluster's record.
func (s *InitSpec) cluster() (*api.ClusterRecord, error) {
	spec, err := control.InitialClusterSpec(s.Spec)
	if err != nil {
		return nil, err
	}
	spec.CAConfig.SigningCACert, spec.CAConfig.SigningCAKey = "", "" // the seed has them
	c := &api.ClusterRecord{OverlayPool: DefaultOverlayPool, MeshPool: DefaultMeshPool, OverlayBits: DefaultOverlayBits, DataPort: DefaultDataPort, FeatureLevel: api.FeatureLevel}
	for i, p := range s.OverlayPools {
		if i == 0 {
			c.OverlayPool = p.String()
		}
		if len(s.OverlayPools) > 1 {
			c.OverlayPools = append(c.OverlayPools, p.String())
		}
	}
	if s.MeshPool.IsValid() {
		c.MeshPool = s.MeshPool.String()
	}
	if s.OverlayBits != 0 {
		c.OverlayBits = s.OverlayBits
	}
	if s.DataPort != 0 {
		c.DataPort = s.DataPort
	}
	if c.DataPort > 65535 {
		return nil, api.Errorf(errdefs.ErrInvalidArgument, "data path port %d: want 1 to 65535", c.DataPort)
	}
	if c.SpecJson, err = json.Marshal(spec); err != nil {
		return nil, err
	}
	if spec.EncryptionConfig.AutoLockManagers {
		c.UnlockKey = keyring.NewUnlockKey()
	}
	var ula [6]byte
	if _, err := rand.Read(ula[1:]); err != nil {
		return nil, err
	}
	ula[0] = 0xfd
	c.UlaPrefix = netip.PrefixFrom(netip.AddrFrom16([16]byte(append(ula[:], make([]byte, 10)...))), 48).String()
	if s.Seed == nil {
		return c, nil
	}
	c.Id, c.GossipKey, c.CaCertPem = s.Seed.ClusterID, s.Seed.GossipKey, s.Seed.root.CertPEM()
	c.ForceRotate = spec.CAConfig.ForceRotate
	if c.CaKeyPem, err = s.Seed.root.KeyPEM(); err != nil {
		return nil, err
	}
	c.WorkerToken, c.ManagerToken = s.Seed.root.NewToken(), s.Seed.root.NewToken()
	return c, nil
}
