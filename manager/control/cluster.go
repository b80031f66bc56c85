package control

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"net/netip"
	"reflect"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/ca"
	"skein/manager/keyring"
	"skein/manager/store"
)

const (
	minCertLife = time.Hour
	maxHistory  = 1000
)

// DefaultClusterSpec is the spec of a cluster that was given none: docker's defaults.
func DefaultClusterSpec() swarm.Spec {
	s := swarm.Spec{
		Orchestration: swarm.OrchestrationConfig{TaskHistoryRetentionLimit: ptr(int64(5))},
		Raft:          swarm.RaftConfig{SnapshotInterval: 10000, KeepOldSnapshots: ptr(uint64(0)), LogEntriesForSlowFollowers: 500, ElectionTick: 10, HeartbeatTick: 1},
		Dispatcher:    swarm.DispatcherConfig{HeartbeatPeriod: 5 * time.Second},
		CAConfig:      swarm.CAConfig{NodeCertExpiry: 90 * 24 * time.Hour},
	}
	s.Name, s.Labels = "default", map[string]string{}
	return s
}

// InitialClusterSpec checks the spec of a new cluster and fills in what it leaves out.
func InitialClusterSpec(want swarm.Spec) (swarm.Spec, error) {
	spec := DefaultClusterSpec()
	fillCluster(&want, spec)
	if err := validateCluster(want, spec); err != nil {
		return spec, err
	}
	return want, nil
}

// fillCluster replaces what the client left out by what there is.
func fillCluster(want *swarm.Spec, have swarm.Spec) {
	if want.Name == "" {
		want.Name = have.Name
	}
	if want.Labels == nil {
		want.Labels = have.Labels
	}
	if want.Orchestration.TaskHistoryRetentionLimit == nil {
		want.Orchestration = have.Orchestration
	}
	fillRaft(&want.Raft, have.Raft)
	if want.Dispatcher.HeartbeatPeriod == 0 {
		want.Dispatcher = have.Dispatcher
	}
	if reflect.DeepEqual(want.CAConfig, swarm.CAConfig{}) {
		want.CAConfig = have.CAConfig
	}
	if want.CAConfig.NodeCertExpiry == 0 {
		want.CAConfig.NodeCertExpiry = have.CAConfig.NodeCertExpiry
	}
}

func fillRaft(want *swarm.RaftConfig, have swarm.RaftConfig) {
	if want.KeepOldSnapshots == nil {
		want.KeepOldSnapshots = have.KeepOldSnapshots
	}
	want.SnapshotInterval = cmp.Or(want.SnapshotInterval, have.SnapshotInterval)
	want.LogEntriesForSlowFollowers = cmp.Or(want.LogEntriesForSlowFollowers, have.LogEntriesForSlowFollowers)
	want.ElectionTick, want.HeartbeatTick = cmp.Or(want.ElectionTick, have.ElectionTick), cmp.Or(want.HeartbeatTick, have.HeartbeatTick)
}

// validateCluster refuses changes that nothing would follow from.
func validateCluster(want, have swarm.Spec) error {
	a := at{object: "cluster spec"}
	switch {
	case want.Name != have.Name:
		return a.field("Name").bad(want.Name, "the only allowed name is %q", have.Name)
	case want.CAConfig.NodeCertExpiry < minCertLife:
		return a.field("CAConfig.NodeCertExpiry").bad(want.CAConfig.NodeCertExpiry, "must be at least %s", minCertLife)
	case want.TaskDefaults.LogDriver != nil && (want.TaskDefaults.LogDriver.Name != "" || len(want.TaskDefaults.LogDriver.Options) > 0):
		return a.field("TaskDefaults.LogDriver").unbuilt(*want.TaskDefaults.LogDriver, "a default log driver of the cluster")
	case want.Dispatcher.HeartbeatPeriod < 0:
		return a.field("Dispatcher.HeartbeatPeriod").bad(want.Dispatcher.HeartbeatPeriod, "must be more than 0")
	case want.Dispatcher.HeartbeatPeriod != have.Dispatcher.HeartbeatPeriod:
		return a.field("Dispatcher.HeartbeatPeriod").unbuilt(want.Dispatcher.HeartbeatPeriod, "another heartbeat period than the default (%s)", have.Dispatcher.HeartbeatPeriod)
	}
	if err := validateRaft(a.field("Raft"), want.Raft, have.Raft); err != nil {
		return err
	}
	if h := want.Orchestration.TaskHistoryRetentionLimit; h != nil && *h > maxHistory {
		return a.field("Orchestration.TaskHistoryRetentionLimit").bad(*h, "must be at most %d; less than 0 keeps all", maxHistory)
	}
	return validateOptions(a.field("Labels"), onCluster, want.Labels)
}

// validateRaft refuses other settings than there are: elections and snapshots are tuned by measurement.
func validateRaft(a at, want, have swarm.RaftConfig) error {
	keep := func(n *uint64) uint64 {
		if n == nil {
			return 0
		}
		return *n
	}
	for _, f := range []struct {
		name       string
		want, have any
	}{
		{"SnapshotInterval", want.SnapshotInterval, have.SnapshotInterval}, {"KeepOldSnapshots", keep(want.KeepOldSnapshots), keep(have.KeepOldSnapshots)},
		{"LogEntriesForSlowFollowers", want.LogEntriesForSlowFollowers, have.LogEntriesForSlowFollowers},
		{"ElectionTick", want.ElectionTick, have.ElectionTick}, {"HeartbeatTick", want.HeartbeatTick, have.HeartbeatTick},
	} {
		if f.want != f.have {
			return a.field(f.name).unbuilt(f.want, "other Raft settings than the defaults (here: %v)", f.have)
		}
	}
	return nil
}

// GetCluster shows the cluster with its join tokens.
func (s *Server) GetCluster(ctx context.Context, _ *api.GetRequest) (*api.Object, error) {
	var c *store.Cluster
	err := s.read(ctx, func(tx store.ReadTx) error {
		c = tx.Cluster()
		return nil
	})
	if err == nil && c == nil {
		err = api.Errorf(errdefs.ErrUnavailable, "the cluster's state is not there yet; try again")
	}
	if err != nil {
		return nil, err
	}
	out, err := clusterObject(c)
	if err != nil {
		return nil, err
	}
	return object(out)
}

func clusterObject(c *store.Cluster) (*swarm.Swarm, error) {
	o := &swarm.Swarm{JoinTokens: swarm.JoinTokens{Worker: c.WorkerToken, Manager: c.ManagerToken}}
	o.ID, o.Meta, o.SubnetSize, o.DataPathPort = c.Id, meta(c.Meta), c.OverlayBits, c.DataPort
	if err := json.Unmarshal(c.SpecJson, &o.Spec); err != nil {
		return nil, api.Errorf(errdefs.ErrDataLoss, "cluster %s: its spec is not JSON: %v", c.Id, err)
	}
	o.RootRotationInProgress = c.Rotation != nil
	o.TLSInfo.TrustRoot = string(c.CaCertPem)
	o.TLSInfo.CertIssuerSubject, o.TLSInfo.CertIssuerPublicKey = ca.Issuer(c)
	pools := c.OverlayPools
	if len(pools) == 0 {
		pools = []string{c.OverlayPool}
	}
	for _, text := range pools {
		if p, err := netip.ParsePrefix(text); err == nil {
			o.DefaultAddrPool = append(o.DefaultAddrPool, p)
		}
	}
	return o, nil
}

// UpdateCluster changes the cluster's spec and makes new join tokens.
func (s *Server) UpdateCluster(ctx context.Context, r *api.UpdateRequest) (*api.Empty, error) {
	var want swarm.Spec
	if err := decode("cluster spec", r.SpecJson, &want); err != nil {
		return nil, err
	}
	plan, err := s.planUpdate(ctx, &want, r.Version)
	if err != nil {
		return nil, err
	}
	err = s.write(ctx, func(tx store.WriteTx) error {
		old := tx.Cluster()
		if err := checkVersion("the cluster", r.Version, old.GetMeta().GetVersion()); err != nil {
			return err
		}
		c, err := updatedCluster(old, want, r)
		if err != nil {
			return err
		}
		plan.Apply(c)
		tx.Add(expect("cluster", old.Id, r.Version))
		tx.Add(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("cluster updated", "worker_token_rotated", r.RotateWorkerToken, "manager_token_rotated", r.RotateManagerToken, "unlock_key_rotated", r.RotateUnlockKey, "authority", plan.Note())
	return &api.Empty{}, nil
}

// planUpdate completes and checks a spec, and works out what it means for the certificate authority, which may have to ask others.
func (s *Server) planUpdate(ctx context.Context, want *swarm.Spec, version uint64) (*ca.Plan, error) {
	var old *store.Cluster
	err := s.read(ctx, func(tx store.ReadTx) error {
		if old = tx.Cluster(); old == nil {
			return api.Errorf(errdefs.ErrUnavailable, "the cluster's state is not there yet; try again")
		}
		return checkVersion("the cluster", version, old.Meta.GetVersion())
	})
	if err != nil {
		return nil, api.NotDone(err) // whatever it is, nothing was changed
	}
	var have swarm.Spec
	if err := json.Unmarshal(old.SpecJson, &have); err != nil {
		return nil, api.Errorf(errdefs.ErrDataLoss, "cluster %s: its spec is not JSON: %v", old.Id, err)
	}
	fillCluster(want, have)
	if err := validateCluster(*want, have); err != nil {
		return nil, err
	}
	plan, err := s.cfg.Authority.PlanConfig(ctx, old, want.CAConfig)
	if errdefs.IsInvalidArgument(err) {
		return nil, at{object: "cluster spec"}.bad(nil, "%s", err)
	}
	if err != nil {
		return nil, err
	}
	want.CAConfig = plan.Config
	return plan, nil
}

// unlockKey is the key that follows old.
func unlockKey(old []byte, lock, rotate bool) ([]byte, error) {
	switch {
	case !lock && rotate:
		return nil, invalid("cannot rotate the unlock key: managers are not locked; turn that on with \"docker swarm update --autolock=true\"")
	case !lock:
		return nil, nil
	case len(old) == 0 || rotate:
		return keyring.NewUnlockKey(), nil
	}
	return old, nil
}

// GetUnlockKey shows the key that managers are unlocked with, empty while they are not locked.
func (s *Server) GetUnlockKey(ctx context.Context, _ *api.Empty) (*api.UnlockKey, error) {
	out := &api.UnlockKey{}
	err := s.read(ctx, func(tx store.ReadTx) error {
		if c := tx.Cluster(); c != nil {
			out.Text = keyring.FormatUnlockKey(c.UnlockKey)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func updatedCluster(old *store.Cluster, want swarm.Spec, r *api.UpdateRequest) (*api.ClusterRecord, error) {
	b, err := encode(want)
	if err != nil {
		return nil, err
	}
	c := proto.Clone(old).(*api.ClusterRecord)
	if !bytes.Equal(b, c.SpecJson) {
		c.SpecJson = b
	}
	if c.UnlockKey, err = unlockKey(c.UnlockKey, want.EncryptionConfig.AutoLockManagers, r.RotateUnlockKey); err != nil {
		return nil, err
	}
	root, _ := pem.Decode(c.CaCertPem)
	if root == nil {
		return nil, api.Errorf(errdefs.ErrDataLoss, "cluster %s: its root certificate is not PEM", old.Id)
	}
	if r.RotateWorkerToken {
		c.WorkerToken = api.NewJoinToken(root.Bytes).String()
	}
	if r.RotateManagerToken {
		c.ManagerToken = api.NewJoinToken(root.Bytes).String()
	}
	return c, nil
}
