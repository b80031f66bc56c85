package consensus

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// Followers notice the loss of their leader one after the other.
const (
	pulseStep   = 100 * time.Millisecond // between two followers
	pulseJitter = 40 * time.Millisecond
	pulseRanks  = 6 // of followers; beyond that many their steps are one
	pulseMin    = 5 * time.Millisecond
)

// pulseLoop makes a follower look at once when the heartbeat timeout is over. Raft itself looks at random times, once or twice the timeout
// apart, so that it sees the loss of a leader up to three timeouts late. A follower stands for election at the time it notices, and the
// others' votes are refused until they have noticed, too; so the followers have an order: the one that completes the majority wins at once,
// and two of them hardly ever stand at the same time.
func (n *Node) pulseLoop() {
	defer n.wg.Done()
	timer := time.NewTimer(n.cfg.Timing.Heartbeat)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-n.closed:
			return
		}
		timer.Reset(n.pulse(time.Now()))
	}
}

// pulse looks once, and returns when to look again.
func (n *Node) pulse(now time.Time) time.Duration {
	heartbeat := n.cfg.Timing.Heartbeat
	leader, id := n.raft.LeaderWithID()
	last := n.raft.LastContact()
	if n.raft.State() != raft.Follower || leader == "" || last.IsZero() {
		return heartbeat / 2
	}
	due := last.Add(heartbeat + n.pulseDelay(id))
	if woke := n.stalls.end(now); due.Before(woke.Add(heartbeat / 2)) {
		due = woke.Add(heartbeat / 2) // it was us who stood still: what the leader sent meanwhile is to be read first
	}
	if wait := due.Sub(now); wait > 0 {
		return max(wait, pulseMin)
	}
	// Raft looks when its timeout gets shorter.
	conf := n.raft.ReloadableConfig()
	for _, d := range []time.Duration{heartbeat - time.Millisecond, heartbeat} {
		conf.HeartbeatTimeout = d
		if err := n.raft.ReloadConfig(conf); err != nil {
			n.log.Warn("the loss of a leader will be noticed late", "error", err)
		}
	}
	return heartbeat / 2
}

// pulseDelay is this follower's place in the order in which followers notice.
func (n *Node) pulseDelay(leader raft.ServerID) time.Duration {
	f := n.raft.GetConfiguration()
	if f.Error() != nil { // raft is stopping
		return 0
	}
	var ids []raft.ServerID
	for _, s := range f.Configuration().Servers {
		if s.Suffrage == raft.Voter && s.ID != leader {
			ids = append(ids, s.ID)
		}
	}
	slices.Sort(ids)
	rank := min(max(slices.Index(ids, raft.ServerID(n.cfg.NodeID)), 0), pulseRanks)
	return time.Duration(rank)*pulseStep + rand.N(pulseJitter)
}
