package ca

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/store"
)

// grant is what a token gives.
type grant struct {
	role    string
	limited string // id of the limited token; empty: an unlimited one
}

// grantOf is what a token gives, if anything. Nothing is said of a token whose secret is wrong but that it is, and to a host that sends many
// not even that. A good token is taken from such a host, too: good nodes may share its address, and a limit adds nothing to 128 bits.
func (s *Server) grantOf(ctx context.Context, c *store.Cluster, token string) (grant, error) {
	caller, _ := authz.CallerFrom(ctx)
	why := ""
	tok, err := api.ParseJoinToken(token)
	switch {
	case err != nil:
		why = err.Error()
	case matches(c.WorkerToken, token):
		return grant{role: api.RoleWorker}, nil
	case matches(c.ManagerToken, token):
		return grant{role: api.RoleManager}, nil
	case !matchesDigest(c.WorkerToken, tok):
		why = "the join token is of another cluster, or from before its root certificate was rotated; run \"docker swarm join-token worker\" on a manager of this cluster for the current one"
	default:
		if l := limitedOf(c.LimitedTokens, token); l != nil {
			return grant{role: l.Role, limited: l.Id}, nil // register looks whether it is still good
		}
		why = "the join token's secret is wrong: it was mistyped or has been rotated; run \"docker swarm join-token worker\" (or manager) on a manager for the current one"
	}
	if wait := s.guesses.blocked(caller.Addr, s.now()); wait > 0 {
		return grant{}, api.Errorf(errdefs.ErrResourceExhausted, "join: too many wrong tokens from %s; try again in %s", caller.Addr, wait.Round(time.Second))
	}
	s.guesses.charge(caller.Addr, s.now())
	s.log.Info("join refused: wrong token", "addr", caller.Addr)
	return grant{}, api.Errorf(errdefs.ErrPermissionDenied, "join: %s", why)
}

// matches compares in constant time; a stored token that is malformed or empty matches nothing.
func matches(stored, given string) bool {
	t, err := api.ParseJoinToken(stored)
	return err == nil && t.Matches(given)
}

func matchesDigest(stored string, given api.JoinToken) bool {
	t, err := api.ParseJoinToken(stored)
	return err == nil && t.CADigest == given.CADigest
}

// limitedOf finds a limited token. It compares with each, in constant time.
func limitedOf(list []*api.LimitedToken, given string) (found *api.LimitedToken) {
	sum := sha256.Sum256([]byte(given))
	for _, l := range list {
		if subtle.ConstantTimeCompare(l.SecretSha256, sum[:]) == 1 {
			found = l
		}
	}
	return found
}

// States of a limited token.
const (
	TokenGood    = "good"
	TokenExpired = "expired"
	TokenUsedUp  = "used up"
	TokenRevoked = "revoked"
)

// TokenState is what has become of a limited token.
func TokenState(l *api.LimitedToken, now time.Time) string {
	switch {
	case l.Revoked != 0:
		return TokenRevoked
	case l.Expires != 0 && now.UnixNano() >= l.Expires:
		return TokenExpired
	case l.Uses != 0 && l.Used >= l.Uses:
		return TokenUsedUp
	}
	return TokenGood
}

// register puts the node into the store. A node that is there already keeps what it is; its addresses are brought up to date. A limited
// token is used by the transaction that makes the node, so that a join sent again does not use it twice.
func (s *Server) register(ctx context.Context, rec *store.Node, g grant) error {
	for try := 1; ; try++ {
		err := s.tryRegister(ctx, rec, g)
		raced := errdefs.IsConflict(err) || errdefs.IsAlreadyExists(err) // others join at the same time, or change the cluster
		if !raced || try == registerTries || ctx.Err() != nil {
			return err
		}
	}
}

// registerTries bounds how often a join gives way to others: nodes that use limited tokens at the same time change one record.
const registerTries = 100

func (s *Server) tryRegister(ctx context.Context, rec *store.Node, g grant) error {
	_, err := s.store.Update(ctx, func(tx store.WriteTx) error {
		put, version := proto.Clone(rec).(*store.Node), uint64(0)
		old := tx.Node(rec.Id)
		if old != nil {
			if old.Role != rec.Role {
				return api.Errorf(errdefs.ErrPermissionDenied, "join: node %s is a %s of this cluster already; change its role with \"docker node promote\" or \"demote\"", old.Id, old.Role)
			}
			put, version = proto.Clone(old).(*store.Node), old.Meta.GetVersion()
			put.Hostname, put.RpcAddr, put.UnderlayAddr = rec.Hostname, rec.RpcAddr, rec.UnderlayAddr
		}
		if err := oneFamily(tx, put); err != nil {
			return err
		}
		if g.limited != "" {
			if err := s.useToken(tx, g.limited, old != nil); err != nil {
				return err
			}
		}
		tx.Add(&api.Change{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "node", Id: rec.Id, Version: version}}})
		tx.Add(&api.Change{Kind: &api.Change_PutNode{PutNode: put}})
		return nil
	})
	return err
}

// useToken counts a use of a limited token, or says why it is not good any more. again says that the node is there already: it joined with
// the token, and did not get the answer.
func (s *Server) useToken(tx store.WriteTx, id string, again bool) error {
	old := tx.Cluster()
	c := proto.Clone(old).(*api.ClusterRecord)
	var l *api.LimitedToken
	for _, t := range c.LimitedTokens {
		if t.Id == id {
			l = t
		}
	}
	if l == nil {
		return refused(id, "it was removed")
	}
	switch TokenState(l, s.now()) {
	case TokenRevoked:
		return refused(id, "it was revoked on "+stamp(time.Unix(0, l.Revoked)))
	case TokenExpired:
		return refused(id, "it expired on "+stamp(time.Unix(0, l.Expires)))
	case TokenUsedUp:
		if !again {
			return refused(id, "it is used up")
		}
	}
	tx.Add(&api.Change{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "cluster", Id: old.Id, Version: old.Meta.GetVersion()}}})
	if again {
		return nil
	}
	l.Used++
	tx.Add(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})
	return nil
}

func refused(id, why string) error {
	return api.Errorf(errdefs.ErrPermissionDenied, "join: the join token %s is not good any more: %s; make another with \"skein swarm join-token create\", or use the one of \"docker swarm join-token worker\" (or manager)", id, why)
}

// oneFamily refuses a node whose tunnels no other node could reach: each node has tunnels to all others, of one family.
func oneFamily(tx store.WriteTx, rec *store.Node) error {
	own, err := netip.ParseAddr(rec.UnderlayAddr)
	if err != nil {
		return nil // nodeRecord has looked at what the node says
	}
	for _, n := range tx.Nodes() {
		a, err := netip.ParseAddr(n.UnderlayAddr)
		if n.Id == rec.Id || err != nil {
			continue
		}
		if a.Is4() != own.Is4() {
			return api.Errorf(errdefs.ErrInvalidArgument, "join: packets between containers go to %s on this node, but to %s on node %s, and they cannot be of different families: name an address of the cluster's family with --data-path-addr",
				own, a, n.Hostname)
		}
		return nil
	}
	return nil
}
