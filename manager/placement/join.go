package placement

import (
	"cmp"
	"encoding/json"
	"fmt"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/store"
	"skein/scheduler"
)

const (
	// settle is how long a node must have taken tasks before it is levelled to: longer than the few seconds in which a node that flaps is
	// declared down again, and nodes that join together are levelled to once.
	settle = 10 * time.Second
	// patience bounds how long a join waits for services that are busy, with an update say. They are looked at again every settle.
	patience = time.Hour
)

// joins levels services that wish so when nodes begin to take tasks: after they joined, came back, or were made active again. How far that
// is done is one instant in the cluster's record, so a new leader forgets none and repeats none.
type joins struct {
	cluster  *store.Cluster   // that was read
	standard string           // what services do that say nothing
	services map[string]bool  // that wish it
	recent   map[string]int64 // node → since when it takes tasks, of those that were not levelled to
	until    int64            // the cluster's
	done     map[string]int64 // service → the newest join it was levelled for, while others are busy
	retry    time.Time
}

// joined is since when a node takes tasks, 0 when it does not.
func joined(n *store.Node) int64 {
	if n == nil || stateOf(n) != scheduler.Ready {
		return 0
	}
	return max(n.GetStatus().GetSince(), n.ActiveSince)
}

// note takes in what changed.
func (j *joins) note(view store.ReadTx, dirty loop.Keys) {
	c := view.Cluster()
	all := dirty.All || j.services == nil
	if all {
		*j = joins{services: map[string]bool{}, done: map[string]int64{}}
	}
	if c != j.cluster {
		standard := standardOf(c)
		all = all || standard != j.standard || c.GetLevelledUntil() < j.until || j.until == 0
		j.cluster, j.standard, j.until = c, standard, c.GetLevelledUntil()
	}
	if all {
		j.recent = map[string]int64{}
		for _, n := range view.Nodes() {
			j.noteNode(n.Id, joined(n))
		}
		for _, svc := range view.Services() {
			j.noteService(svc.Id, svc)
		}
		return
	}
	for _, k := range dirty.Keys {
		switch k.Kind {
		case store.KindNode:
			j.noteNode(k.ID, joined(view.Node(k.ID)))
		case store.KindService:
			j.noteService(k.ID, view.Service(k.ID))
		}
	}
}

func (j *joins) noteNode(id string, since int64) {
	if since > j.until {
		j.recent[id] = since
	} else {
		delete(j.recent, id)
	}
}

func (j *joins) noteService(id string, svc *store.Service) {
	if svc != nil && mayMove(svc) && cmp.Or(svc.Spec.Labels[LabelRebalance], j.standard) == "join" {
		j.services[id] = true
		return
	}
	delete(j.services, id)
	delete(j.done, id)
}

// due is the newest join that has settled, and the instant at which the next one will have.
func (j *joins) due(now time.Time) (since int64, next time.Time) {
	for id, at := range j.recent {
		switch ready := time.Unix(0, at).Add(settle); {
		case at <= j.until:
			delete(j.recent, id)
		case now.Before(ready):
			next = earlier(next, ready)
		default:
			since = max(since, at)
		}
	}
	return since, next
}

// standardOf reads the cluster's label.
func standardOf(c *store.Cluster) string {
	var spec swarm.Spec
	if c == nil || json.Unmarshal(c.SpecJson, &spec) != nil {
		return ""
	}
	return spec.Labels[LabelRebalance]
}

// levelJoins marks the tasks that shall move because nodes joined.
func (p *Placement) levelJoins(view store.ReadTx, dirty loop.Keys, now time.Time) (loop.Changes, time.Time) {
	j := &p.joins
	j.note(view, dirty)
	switch {
	case j.cluster.GetFeatureLevel() < api.LevelPlacement:
		return nil, time.Time{}
	case len(j.services) == 0:
		if j.until == 0 {
			return nil, time.Time{}
		}
		return j.write(0), time.Time{}
	case j.until == 0: // what joined before anybody wished it moves nothing
		newest := int64(1)
		for _, at := range j.recent {
			newest = max(newest, at)
		}
		return j.write(newest), time.Time{}
	}
	since, next := j.due(now)
	if since == 0 {
		return nil, next
	}
	if now.Before(j.retry) {
		return nil, earlier(next, j.retry)
	}
	changes, busy := p.planJoins(view, since)
	if busy && now.Before(time.Unix(0, since).Add(patience)) {
		j.retry = now.Add(settle)
		return changes, earlier(next, j.retry)
	}
	clear(j.done)
	return append(changes, j.write(since)...), next
}

// planJoins makes the plan for the services that were not levelled for the join yet. One that moves is busy until it has nothing to move.
func (p *Placement) planJoins(view store.ReadTx, since int64) (changes loop.Changes, busy bool) {
	var undo []scheduler.Holding // from where to where, in turn
	for _, svc := range view.Services() {
		if !p.joins.services[svc.Id] || p.joins.done[svc.Id] >= since {
			continue
		}
		moves, later := p.level(view, svc)
		if busy = busy || later || len(moves) > 0; len(moves) == 0 {
			if !later {
				p.joins.done[svc.Id] = since
			}
			continue
		}
		move := &api.TaskMove{Reason: "moved to level the nodes: " + p.joins.who(view)}
		for _, m := range moves {
			move.TaskIds = append(move.TaskIds, m.Task.ID)
			from := p.held[m.Task.ID]
			to := from
			to.Node = m.To
			undo = append(undo, from, to)
		}
		txn := &api.Txn{Changes: []*api.Change{{Kind: &api.Change_MoveTasks{MoveTasks: move}}}}
		changes = append(changes, loop.Change{Txn: txn, Key: store.Key{Kind: store.KindService, ID: svc.Id}})
	}
	for i := 0; i < len(undo); i += 2 { // the mirror shows what is
		p.sched.Release(undo[i+1])
		p.sched.Hold(undo[i])
	}
	return changes, busy
}

// who names the nodes that joined.
func (j *joins) who(view store.ReadTx) string {
	if len(j.recent) > 1 {
		return fmt.Sprintf("%d nodes joined", len(j.recent))
	}
	for id := range j.recent {
		return "node " + cmp.Or(view.Node(id).GetHostname(), id) + " joined"
	}
	return "nodes joined"
}

// write notes up to when joins are done with.
func (j *joins) write(until int64) loop.Changes {
	c := proto.Clone(j.cluster).(*api.ClusterRecord)
	c.LevelledUntil = until
	return loop.Changes{{
		Txn: &api.Txn{Changes: []*api.Change{
			{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "cluster", Id: c.Id, Version: c.Meta.GetVersion()}}},
			{Kind: &api.Change_PutCluster{PutCluster: c}},
		}},
		Key: store.Key{Kind: store.KindCluster, ID: c.Id},
	}}
}
