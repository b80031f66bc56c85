package consensus

import (
	"sync"

	"github.com/hashicorp/raft"
)

// Observer tells of changes that only raft sees: another leader, and managers that a leader loses and finds again.
type Observer struct {
	node *Node
	raft *raft.Observer
	in   chan raft.Observation
	done chan struct{}
	wg   sync.WaitGroup
	fire func()

	leader string // as told; run's alone

	mu   sync.Mutex
	lost map[string]bool
}

// Observe calls changed, which must not block, whenever the leader this manager knows of may be another one. Close it before the Node.
func (n *Node) Observe(changed func()) *Observer {
	// Not blocking raft: a notice that is dropped while 64 wait is followed by others, and every one makes the reader look anew.
	o := &Observer{node: n, in: make(chan raft.Observation, 64), done: make(chan struct{}), fire: changed, lost: map[string]bool{}}
	o.raft = raft.NewObserver(o.in, false, func(ob *raft.Observation) bool {
		switch ob.Data.(type) {
		case raft.LeaderObservation, raft.RaftState, raft.FailedHeartbeatObservation, raft.ResumedHeartbeatObservation:
			return true
		}
		return false
	})
	n.raft.RegisterObserver(o.raft)
	o.wg.Add(1)
	go o.run()
	return o
}

func (o *Observer) run() {
	defer o.wg.Done()
	for {
		select {
		case <-o.done:
			return
		case ob := <-o.in:
			o.take(ob.Data)
		}
	}
}

func (o *Observer) take(data any) {
	switch d := data.(type) {
	case raft.FailedHeartbeatObservation:
		o.set(string(d.PeerID), true)
		return
	case raft.ResumedHeartbeatObservation:
		o.set(string(d.PeerID), false)
		return
	case raft.LeaderObservation:
		o.tell(string(d.LeaderID))
	case raft.RaftState:
		o.mu.Lock()
		clear(o.lost) // of an earlier term; a new leader finds out by itself
		o.mu.Unlock()
	}
	o.fire()
}

// tell logs each change of the leader once.
func (o *Observer) tell(leader string) {
	if leader == o.leader {
		return
	}
	if o.leader = leader; leader == "" {
		o.node.log.Warn("no leader is known")
	} else {
		o.node.log.Info("a manager leads", "manager", leader, "self", leader == o.node.cfg.NodeID)
	}
}

func (o *Observer) set(id string, lost bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.lost[id] == lost {
		return
	}
	o.lost[id] = lost
	if lost {
		o.node.log.Warn("a manager does not answer: it is down, or cut off", "manager", id)
	} else {
		o.node.log.Info("a manager answers again", "manager", id)
	}
}

// Reachable reports whether this manager's heartbeats reach another. Known to a leader only.
func (o *Observer) Reachable(id string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !o.lost[id]
}

// Close ends the notices.
func (o *Observer) Close() {
	o.node.raft.DeregisterObserver(o.raft)
	close(o.done)
	o.wg.Wait()
}
