package control

import (
	"context"
	"crypto/sha256"
	"encoding/pem"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/ca"
	"skein/manager/store"
)

// Bounds of limited join tokens. They are kept with the cluster's record, those that have ended so that a refusal can say why.
const (
	maxLimitedTokens = 100
	minTokenLife     = time.Minute
	maxTokenLife     = 365 * 24 * time.Hour
	maxTokenUses     = 10_000
	maxTokenText     = 256
)

// CreateJoinToken makes a join token that is limited in time, or uses, or both.
func (s *Server) CreateJoinToken(ctx context.Context, r *api.JoinTokenRequest) (*api.TokenInfo, error) {
	if err := validateTokenRequest(r); err != nil {
		return nil, err
	}
	var out *api.TokenInfo
	err := s.changeCluster(ctx, func(c *api.ClusterRecord) error {
		if c.FeatureLevel < api.LevelMembers { // a manager of an older version would refuse the token, or count no uses
			return api.Errorf(errdefs.ErrFailedPrecondition, "limited join tokens need feature level %d, the cluster has %d: upgrade all managers first", api.LevelMembers, c.FeatureLevel)
		}
		now := s.cfg.Now()
		root, _ := pem.Decode(c.CaCertPem)
		if root == nil {
			return api.Errorf(errdefs.ErrDataLoss, "cluster %s: its root certificate is not PEM", c.Id)
		}
		if c.Rotation != nil {
			return api.Errorf(errdefs.ErrFailedPrecondition, "join token: the cluster's root certificate is being replaced, which will end all tokens: try again when that is done (docker swarm ca)")
		}
		if err := makeRoom(c, now); err != nil {
			return err
		}
		token := api.NewJoinToken(root.Bytes).String()
		sum := sha256.Sum256([]byte(token))
		l := &api.LimitedToken{Id: api.NewID(), Role: r.Role, SecretSha256: sum[:], Created: now.UnixNano(), Uses: r.Uses, Description: r.Description}
		if r.TtlNanos > 0 {
			l.Expires = now.Add(time.Duration(r.TtlNanos)).UnixNano()
		}
		c.LimitedTokens = append(c.LimitedTokens, l)
		out = tokenInfo(l, now)
		out.Token = token
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("join token made", "token", out.Id, "role", out.Role, "uses", out.Uses, "expires", instant(out.Expires))
	return out, nil
}

func validateTokenRequest(r *api.JoinTokenRequest) error {
	a := at{object: "join token"}
	ttl := time.Duration(r.TtlNanos)
	switch {
	case !api.ValidRole(r.Role):
		return a.field("Role").bad(r.Role, "want worker or manager")
	case r.TtlNanos != 0 && (ttl < minTokenLife || ttl > maxTokenLife):
		return a.field("TTL").bad(ttl, "want %s to %s", minTokenLife, maxTokenLife)
	case r.Uses > maxTokenUses:
		return a.field("Uses").bad(r.Uses, "want 1 to %d", maxTokenUses)
	case r.TtlNanos == 0 && r.Uses == 0:
		return invalid("join token: want a limit in time (TTL, --ttl 1h), in uses (Uses, --uses 5), or both; the token of \"docker swarm join-token %s\" has none", r.Role)
	case len(r.Description) > maxTokenText || strings.ContainsFunc(r.Description, func(c rune) bool { return c < ' ' }):
		return a.field("Description").bad(r.Description, "want at most %d printable bytes", maxTokenText)
	}
	return nil
}

// makeRoom forgets the oldest of the tokens that have ended, if there are too many.
func makeRoom(c *api.ClusterRecord, now time.Time) error {
	for len(c.LimitedTokens) >= maxLimitedTokens {
		i := slices.IndexFunc(c.LimitedTokens, func(l *api.LimitedToken) bool { return ca.TokenState(l, now) != ca.TokenGood })
		if i < 0 {
			return api.Errorf(errdefs.ErrResourceExhausted, "join token: there are %d good ones already: revoke some with \"skein swarm join-token rm\"", maxLimitedTokens)
		}
		c.LimitedTokens = slices.Delete(c.LimitedTokens, i, i+1)
	}
	return nil
}

// changeCluster changes the cluster's record, again when somebody else did at the same time.
func (s *Server) changeCluster(ctx context.Context, f func(*api.ClusterRecord) error) error {
	const tries = 20
	for try := 1; ; try++ {
		err := s.write(ctx, func(tx store.WriteTx) error {
			old := tx.Cluster()
			if old == nil {
				return api.Errorf(errdefs.ErrUnavailable, "the cluster's state is not there yet; try again")
			}
			c := proto.Clone(old).(*api.ClusterRecord)
			if err := f(c); err != nil {
				return err
			}
			tx.Add(expect("cluster", old.Id, old.Meta.GetVersion()))
			tx.Add(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})
			return nil
		})
		if !errdefs.IsConflict(err) || try == tries || ctx.Err() != nil {
			return err
		}
	}
}

func tokenInfo(l *api.LimitedToken, now time.Time) *api.TokenInfo {
	return &api.TokenInfo{Id: l.Id, Role: l.Role, Created: l.Created, Expires: l.Expires, Uses: l.Uses, Used: l.Used, State: ca.TokenState(l, now), Description: l.Description}
}

// ListJoinTokens shows the limited join tokens, without their secrets: those are not kept.
func (s *Server) ListJoinTokens(ctx context.Context, _ *api.Empty) (*api.TokenInfos, error) {
	out := &api.TokenInfos{}
	err := s.read(ctx, func(tx store.ReadTx) error {
		for _, l := range tx.Cluster().GetLimitedTokens() {
			out.Tokens = append(out.Tokens, tokenInfo(l, s.cfg.Now()))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// RemoveJoinToken revokes a limited join token, named by its id or the begin of it. Nodes that joined with it stay.
func (s *Server) RemoveJoinToken(ctx context.Context, r *api.GetRequest) (*api.Empty, error) {
	id := ""
	err := s.changeCluster(ctx, func(c *api.ClusterRecord) error {
		var found *api.LimitedToken
		for _, l := range c.LimitedTokens {
			if r.Ref == "" || !strings.HasPrefix(l.Id, r.Ref) {
				continue
			}
			if found != nil {
				return api.Errorf(errdefs.ErrInvalidArgument, "join token %s is ambiguous (2 found): give more of its id", r.Ref)
			}
			found = l
		}
		if found == nil {
			return api.Errorf(errdefs.ErrNotFound, "join token %.80s not found: \"skein swarm join-token ls\" lists them", r.Ref)
		}
		if id = found.Id; found.Revoked == 0 {
			found.Revoked = s.cfg.Now().UnixNano()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("join token revoked", "token", id)
	return &api.Empty{}, nil
}
