package consensus

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/raft"

	"skein/manager/api"
)

// Peer is a manager of the group.
type Peer struct {
	ID    string
	Addr  string
	Voter bool
}

// HasState reports whether the log belongs to a group already.
func (n *Node) HasState() (bool, error) {
	has, err := raft.HasExistingState(n.logs, n.logs, n.snaps)
	if err != nil {
		return false, fmt.Errorf("read raft log in %s: %w", n.cfg.Dir, err)
	}
	return has, nil
}

// Bootstrap makes a new group with this node as its only member.
func (n *Node) Bootstrap() error {
	f := n.raft.BootstrapCluster(raft.Configuration{Servers: []raft.Server{
		{ID: raft.ServerID(n.cfg.NodeID), Address: raft.ServerAddress(n.cfg.Advertise)},
	}})
	switch err := f.Error(); err {
	case nil:
		return nil
	case raft.ErrCantBootstrap:
		return api.Errorf(errdefs.ErrFailedPrecondition, "bootstrap a cluster: the raft log in %s belongs to a cluster already", n.cfg.Dir)
	default:
		return fmt.Errorf("bootstrap a cluster: %w", err)
	}
}

// catchUpLook is how often a new manager is asked how far it is.
const catchUpLook = 25 * time.Millisecond

// AddVoter adds a manager, or gives one that moved its new address. Leader only. A manager that cannot be reached is refused, and a new one
// has no vote before it has the log: as a voter that does not answer, or only once it has received a large snapshot, it could cost the group
// its majority. When it does not get there in time, the error says so; it goes on as a member without a vote, and the call may be repeated.
func (n *Node) AddVoter(ctx context.Context, id, addr string) error {
	doing := fmt.Sprintf("add manager %s", id)
	if !n.IsLeader() {
		return n.notLeader(doing)
	}
	peers, err := n.Peers()
	if err != nil {
		return err
	}
	at := slices.IndexFunc(peers, func(p Peer) bool { return p.ID == id })
	if at >= 0 && peers[at] == (Peer{ID: id, Addr: addr, Voter: true}) {
		return nil
	}
	if id != n.cfg.NodeID {
		conn, err := n.cfg.Stream.Dial(raft.ServerAddress(addr), timeLeft(ctx))
		if err != nil {
			return unavailable("%s: the leader cannot reach it at %s (%v): check its address and firewall, and that it is running", doing, addr, err)
		}
		_ = conn.Close()
	}
	if at < 0 || !peers[at].Voter {
		f := n.raft.AddNonvoter(raft.ServerID(id), raft.ServerAddress(addr), 0, timeLeft(ctx))
		if err := wait(ctx, f); err != nil {
			return n.mapError(doing, err)
		}
		if err := n.catchUp(ctx, doing, id, addr); err != nil {
			return err
		}
	}
	f := n.raft.AddVoter(raft.ServerID(id), raft.ServerAddress(addr), 0, timeLeft(ctx))
	return n.mapError(doing, wait(ctx, f))
}

// catchUp returns when a manager has what the log had an election's time ago at most: then it follows as fast as the others. The context
// bounds it.
func (n *Node) catchUp(ctx context.Context, doing, id, addr string) error {
	look := time.NewTicker(catchUpLook)
	defer look.Stop()
	last := uint64(0)
	for began, target := time.Now(), n.raft.LastIndex(); ; {
		at, err := n.lastIndexOf(id, addr)
		switch {
		case err == nil && at >= target && time.Since(began) <= n.cfg.Timing.Election:
			return nil
		case err == nil && at >= target:
			began, target = time.Now(), n.raft.LastIndex()
		case !n.IsLeader():
			return n.notLeader(doing)
		}
		last = max(last, at)
		select {
		case <-look.C:
		case <-n.closed:
			return unavailable("%s: this manager is stopping", doing)
		case <-ctx.Done():
			return unavailable("%s: it is not a voter yet, its log has %d of %d entries: it goes on catching up; try again (%v)", doing, last, target, ctx.Err())
		}
	}
}

// lastIndexOf asks a manager for the end of its log, with the heartbeat of a leader, which this node is.
func (n *Node) lastIndexOf(id, addr string) (uint64, error) {
	term := n.raft.CurrentTerm()
	if !n.IsLeader() || n.raft.CurrentTerm() != term { // a heartbeat may carry only the term of a leadership of our own
		return 0, raft.ErrNotLeader
	}
	self := n.transport.EncodePeer(raft.ServerID(n.cfg.NodeID), n.transport.LocalAddr())
	req := &raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(n.cfg.NodeID), Addr: self},
		Term:      term, Leader: self,
	}
	var resp raft.AppendEntriesResponse
	if err := n.transport.AppendEntries(raft.ServerID(id), raft.ServerAddress(addr), req, &resp); err != nil {
		return 0, err
	}
	return resp.LastLog, nil
}

// RemoveServer takes a manager out of the group for good. Leader only; the leader may remove itself.
func (n *Node) RemoveServer(ctx context.Context, id string) error {
	doing := fmt.Sprintf("remove manager %s", id)
	peers, err := n.Peers()
	if err != nil {
		return err
	}
	at := slices.IndexFunc(peers, func(p Peer) bool { return p.ID == id })
	switch {
	case at < 0:
		return nil
	case len(peers) == 1:
		return api.Errorf(errdefs.ErrFailedPrecondition, "%s: it is the last manager: a cluster needs one", doing)
	}
	return n.mapError(doing, wait(ctx, n.raft.RemoveServer(raft.ServerID(id), 0, timeLeft(ctx))))
}

// Peers lists the managers of the group by id, this one included.
func (n *Node) Peers() ([]Peer, error) {
	f := n.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return nil, n.mapError("list managers", err)
	}
	var out []Peer
	for _, s := range f.Configuration().Servers {
		out = append(out, Peer{ID: string(s.ID), Addr: string(s.Address), Voter: s.Suffrage == raft.Voter})
	}
	slices.SortFunc(out, func(a, b Peer) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}

// IsLeader reports whether this node believes to lead. Only VerifyLeader and Linearizable make sure.
func (n *Node) IsLeader() bool { return n.raft.State() == raft.Leader }

// Term is the newest term this node knows: on the leader, its own.
func (n *Node) Term() uint64 { return n.raft.CurrentTerm() }

// LeaderID is the leader this node knows, or empty.
func (n *Node) LeaderID() string {
	_, id := n.raft.LeaderWithID()
	return string(id)
}

// LeaderAddr is the address the leader advertises, or empty.
func (n *Node) LeaderAddr() string {
	addr, _ := n.raft.LeaderWithID()
	return string(addr)
}

// TransferLeadership hands the leadership to the most up-to-date other manager.
func (n *Node) TransferLeadership(ctx context.Context) error {
	return n.mapError("hand over the leadership", wait(ctx, n.raft.LeadershipTransfer()))
}

// timeLeft bounds raft's own timeouts, which do not know contexts.
func timeLeft(ctx context.Context) time.Duration {
	const most = 10 * time.Second
	if t, ok := ctx.Deadline(); ok {
		return max(time.Millisecond, min(most, time.Until(t)))
	}
	return most
}
