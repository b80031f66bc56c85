package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// Plan is what follows for the certificate authority from a new spec of the cluster: what to change in the cluster's record, and the spec
// as it is to be kept, without keys.
type Plan struct {
	Config swarm.CAConfig
	change func(*api.ClusterRecord)
	note   string
}

// Apply makes the planned change in a copy of the record that the plan was made for.
func (p *Plan) Apply(c *api.ClusterRecord) { p.change(c) }

// Note says in a few words what the plan does, empty if nothing.
func (p *Plan) Note() string { return p.note }

// PlanConfig works out what a wanted configuration means. What takes a network (external authorities) happens here, before anything is
// changed; the record must not have changed when the plan is applied.
func (s *Server) PlanConfig(ctx context.Context, c *store.Cluster, want swarm.CAConfig) (*Plan, error) {
	if want.SigningCAKey != "" && want.SigningCACert == "" {
		return nil, invalid("CAConfig.SigningCAKey: if a signing CA key is provided, the signing CA cert must also be provided (--ca-cert)")
	}
	if err := checkExternals(want.ExternalCAs); err != nil {
		return nil, err
	}
	have, err := caConfig(c)
	if err != nil {
		return nil, err
	}
	p := &Plan{Config: want, change: func(*api.ClusterRecord) {}}
	p.Config.SigningCACert, p.Config.SigningCAKey = "", "" // the record has them
	forced := func(f func(*api.ClusterRecord)) func(*api.ClusterRecord) {
		return func(c *api.ClusterRecord) { c.ForceRotate = want.ForceRotate; f(c) }
	}
	var next *Root
	switch {
	case want.SigningCACert != "":
		if next, err = givenRoot(want, s.now()); err != nil {
			return nil, err
		}
		if abort, err := s.unchanged(ctx, c, next, want); err != nil || abort != nil {
			if abort != nil {
				p.change, p.note = forced(abort), "root certificate kept"
			}
			return p, err
		}
	case want.ForceRotate != c.ForceRotate:
		if next, err = NewRoot(c.Id, s.now()); err != nil {
			return nil, err
		}
	default:
		return p, s.reachable(ctx, c, have, want)
	}
	rot, err := s.newRotation(ctx, c, next, want)
	if err != nil {
		return nil, err
	}
	p.note = "root certificate is being replaced"
	p.change = forced(func(c *api.ClusterRecord) { c.Rotation = rot })
	return p, nil
}

func caConfig(c *store.Cluster) (swarm.CAConfig, error) {
	var spec swarm.Spec
	if err := json.Unmarshal(c.SpecJson, &spec); err != nil {
		return swarm.CAConfig{}, api.Errorf(errdefs.ErrDataLoss, "cluster %s: its spec is not JSON: %v", c.Id, err)
	}
	return spec.CAConfig, nil
}

// givenRoot is the user's root.
func givenRoot(want swarm.CAConfig, now time.Time) (*Root, error) {
	r, err := ParseRoot([]byte(want.SigningCACert), []byte(want.SigningCAKey))
	switch {
	case err != nil:
		return nil, invalid("CAConfig.SigningCACert and SigningCAKey (--ca-cert, --ca-key): %v", err)
	case now.After(r.cert.NotAfter) || now.Before(r.cert.NotBefore):
		return nil, invalid("CAConfig.SigningCACert (--ca-cert): the certificate is good from %s to %s, and now is %s", stamp(r.cert.NotBefore), stamp(r.cert.NotAfter), stamp(now))
	case r.cert.KeyUsage != 0 && r.cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, invalid("CAConfig.SigningCACert (--ca-cert): its key usage does not allow to sign certificates")
	}
	return r, nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// unchanged tells that the wanted root is the current one already, which ends a rotation, or that of the rotation under way. It returns what
// is to be changed then.
func (s *Server) unchanged(ctx context.Context, c *store.Cluster, next *Root, want swarm.CAConfig) (func(*api.ClusterRecord), error) {
	cert := next.CertPEM()
	keyPEM, err := next.KeyPEM()
	if err != nil {
		return nil, err
	}
	sameRoot := samePEM(c.CaCertPem, next.cert)
	samePlan := c.Rotation != nil && bytes.Equal(c.Rotation.CertPem, cert)
	if !sameRoot && !samePlan {
		return nil, nil
	}
	if err := s.canSign(ctx, c, next, want, sameRoot); err != nil {
		return nil, err
	}
	return func(c *api.ClusterRecord) {
		if sameRoot {
			c.Rotation, c.CaKeyPem = nil, keyPEM
			return
		}
		c.Rotation.KeyPem = keyPEM
	}, nil
}

// reachable checks external authorities that are new, when the root stays: one that does not sign is refused at once, not at the next
// renewal.
func (s *Server) reachable(ctx context.Context, c *store.Cluster, have, want swarm.CAConfig) error {
	a, err := json.Marshal(have.ExternalCAs)
	if err != nil {
		return err
	}
	b, err := json.Marshal(want.ExternalCAs)
	if err != nil || bytes.Equal(a, b) || len(have.ExternalCAs) == 0 && len(want.ExternalCAs) == 0 {
		return err
	}
	root, err := ParseRoot(c.CaCertPem, c.CaKeyPem)
	current := c.Rotation == nil
	if !current {
		root, err = ParseRoot(c.Rotation.CertPem, c.Rotation.KeyPem)
	}
	if err != nil {
		return api.Errorf(errdefs.ErrDataLoss, "cluster %s: %v", c.Id, err)
	}
	if current && len(want.ExternalCAs) > 0 && len(externalsOf(want.ExternalCAs, root.cert, current)) == 0 {
		return invalid("CAConfig.ExternalCAs: none of them is for the cluster's root certificate (%s): to change to another root, run \"docker swarm ca --rotate --ca-cert <its certificate> --external-ca ...\"", root.cert.Subject)
	}
	return s.canSign(ctx, c, root, want, current)
}

// canSign tries the authority that a configuration leads to.
func (s *Server) canSign(ctx context.Context, c *store.Cluster, root *Root, want swarm.CAConfig, current bool) error {
	a := &authority{root: root, trust: TrustOf(c), external: externalsOf(want.ExternalCAs, root.cert, current), life: NodeCertLife}
	if len(a.external) == 0 && root.key != nil {
		return nil
	}
	if len(a.external) == 0 {
		return invalid("CAConfig: there must be a key (--ca-key), or at least one external certificate authority (--external-ca protocol=cfssl,url=...,cacert=...), for the root certificate %s", root.cert.Subject)
	}
	req, err := probeRequest()
	if err != nil {
		return err
	}
	id := api.NodeIdentity{NodeID: api.NewID(), Role: api.RoleWorker, ClusterID: c.Id}
	if _, err := a.sign(ctx, s.external, req, id, s.now()); err != nil {
		return api.Errorf(errdefs.ErrInvalidArgument, "CAConfig.ExternalCAs: there must be at least one valid, reachable external CA for the root certificate %s: %v", root.cert.Subject, err)
	}
	return nil
}

// newRotation begins the change to another root. One that is under way is replaced: nodes still trust the root before both.
func (s *Server) newRotation(ctx context.Context, c *store.Cluster, next *Root, want swarm.CAConfig) (*api.RootRotation, error) {
	if c.FeatureLevel < api.LevelMembers { // a leader of an older version would not go on with it
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "the cluster's root certificate cannot be replaced before all managers run this version of Skein: the cluster is at feature level %d, this needs %d: upgrade all managers first",
			c.FeatureLevel, api.LevelMembers)
	}
	if err := s.canSign(ctx, c, next, want, false); err != nil {
		return nil, err
	}
	old, err := ParseRoot(c.CaCertPem, c.CaKeyPem)
	if err != nil {
		return nil, api.Errorf(errdefs.ErrDataLoss, "cluster %s: %v", c.Id, err)
	}
	cross, err := s.crossSign(ctx, c, old, next)
	if err != nil {
		return nil, err
	}
	now := s.now()
	have, err := caConfig(c)
	if err != nil {
		return nil, err
	}
	life := max(have.NodeCertExpiry, want.NodeCertExpiry, NodeCertLife) // it may have been longer before
	rot := &api.RootRotation{CertPem: next.CertPEM(), CrossPem: cross, WorkerToken: next.NewToken(), ManagerToken: next.NewToken(),
		Started: now.UnixNano(), Until: now.Add(life).UnixNano()}
	rot.KeyPem, err = next.KeyPEM()
	return rot, err
}

// crossSign has the current root vouch for the next one.
func (s *Server) crossSign(ctx context.Context, c *store.Cluster, old, next *Root) ([]byte, error) {
	if old.key != nil {
		return old.CrossSign(next, s.now())
	}
	if next.key == nil {
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "rotate the root certificate: neither the key of the current root nor that of the new one is here, so nobody can vouch for the new one: change to a root with a key first (docker swarm ca --rotate), then to the other external certificate authority")
	}
	have, err := caConfig(c)
	if err != nil {
		return nil, err
	}
	req, err := crossRequest(next)
	if err != nil {
		return nil, err
	}
	cert, err := s.external.sign(ctx, TrustOf(c), externalsOf(have.ExternalCAs, old.cert, true), req)
	if err != nil {
		return nil, fmt.Errorf("cross-sign the new root certificate with the current one, whose key the external certificate authority has (profile %q): %w", crossProfile, err)
	}
	if !cert.IsCA || !bytes.Equal(cert.RawSubject, next.cert.RawSubject) || !bytes.Equal(cert.RawSubjectPublicKeyInfo, next.cert.RawSubjectPublicKeyInfo) || cert.CheckSignatureFrom(old.cert) != nil {
		return nil, api.Errorf(errdefs.ErrUnavailable, "cross-sign the new root certificate: what the external certificate authority signed is not that of an authority with the new root's name and key: its profile %q must allow that", crossProfile)
	}
	return certPEM(cert.Raw), nil
}

func invalid(format string, args ...any) error {
	return api.Errorf(errdefs.ErrInvalidArgument, format, args...)
}
