package dispatcher

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// Many nodes that fall silent at once are more likely cut off from the leader than dead: declaring them down would move all their tasks.
// Beyond a share of the nodes they are held back: fenced, given nothing new, their tasks left where they are.
const (
	// alwaysDown is how many may be declared down at once in any cluster.
	alwaysDown = 3
	// downWindow is how long a node that was declared down counts among those that went at once.
	downWindow = 30 * time.Second
	// missed is the silence of a node that has missed a beat.
	missed = heartbeat + heartbeat/4
	// settleWithin is how much later than the first of them others may have been heard that went at the same time.
	settleWithin = heartbeat + heartbeat/4

	// LabelDownShare and LabelDownHold are labels of the cluster: the share of nodes in percent that may be declared down at once, and the time
	// after which those that are held back count as down all the same.
	LabelDownShare = "skein.node.down-share"
	LabelDownHold  = "skein.node.down-hold"

	defaultDownShare = 33 // percent
	defaultDownHold  = 10 * time.Minute
)

// caution is what the cluster's spec says of nodes that fall silent together.
type caution struct {
	share int // percent of the nodes that may be declared down at once; 100: no limit
	hold  time.Duration
}

// cautionOf reads the labels; control has checked them.
func cautionOf(labels map[string]string) caution {
	c := caution{share: defaultDownShare, hold: defaultDownHold}
	if v, err := strconv.Atoi(labels[LabelDownShare]); err == nil && v >= 0 && v <= 100 {
		c.share = v
	}
	if v, err := time.ParseDuration(labels[LabelDownHold]); err == nil && v > 0 {
		c.hold = v
	}
	return c
}

// silence is since when nothing was heard of a node: of one that this leader never heard, since the term began.
func (d *Dispatcher) silence(n *node, now time.Time) time.Duration {
	if seen := n.seen.Load(); seen > 0 {
		return now.Sub(time.Unix(0, seen))
	}
	return now.Sub(d.began)
}

// tooMany reports whether a node that has been silent for so long went together with more nodes than may be declared down at once, and
// how many of how many those are.
func (d *Dispatcher) tooMany(silent time.Duration, now time.Time) (gone, of int, yes bool) {
	for _, n := range d.nodes {
		switch {
		case n.fenced && !n.held && now.Sub(n.lost) > downWindow:
			continue // down for long, or since before this term: it is not part of what is happening now
		case n.fenced:
			gone++
		case d.silence(n, now) >= max(missed, silent-settleWithin):
			gone++
		}
		of++
	}
	limit := max(alwaysDown, of*d.caution.share/100)
	return gone, of, d.caution.share < 100 && gone > limit
}

// absent declares a node down, or holds it back while too many others are silent with it.
func (d *Dispatcher) absent(n *node, why string, now time.Time) {
	if n.rec.Availability == "drain" { // its tasks go in any case, as somebody wants it
		d.down(n, why)
		return
	}
	gone, of, yes := d.tooMany(d.silence(n, now), now)
	if !yes {
		d.down(n, why)
		return
	}
	if !n.held {
		d.hold(n, fmt.Sprintf("%s; not declared down, since %d of %d nodes are silent at once, more than %d %%: their tasks stay for %v; drain or remove the nodes that are dead, or set the cluster's label %s",
			why, gone, of, d.caution.share, d.caution.hold, LabelDownShare))
	}
}

// hold fences a node without giving it up. It is looked at again with every beat it should have sent.
func (d *Dispatcher) hold(n *node, why string) {
	d.fence(n, why)
	n.held = true
	if now := time.Now(); now.Sub(d.heldSaid) > downWindow {
		d.heldSaid = now
		d.cfg.Log.Error("many nodes are silent at once: their tasks are left where they are", "first", n.id, "why", why)
	}
	d.writer.status(&api.NodeStatus{NodeId: n.id, State: nodeUnknown, Message: why})
	d.await(n, time.Now().Add(heartbeat))
	n.leased = true
}

// recheck looks at a node that is held back: it counts as down when it goes with few others now, when somebody drains it, or in the end.
func (d *Dispatcher) recheck(n *node, now time.Time) {
	if now.Sub(n.since) >= d.caution.hold {
		d.down(n, fmt.Sprintf("nothing heard for %v, and held back for %v since many nodes were silent", d.silence(n, now).Round(time.Second), d.caution.hold))
		return
	}
	d.absent(n, fmt.Sprintf("nothing heard for %v", d.silence(n, now).Round(time.Second)), now)
	if n.held {
		d.lease(n, now.Add(heartbeat))
	}
}

// refreshCluster takes over what the cluster's spec says.
func (d *Dispatcher) refreshCluster(tx store.ReadTx) {
	var spec swarm.Spec
	if c := tx.Cluster(); c == nil || json.Unmarshal(c.SpecJson, &spec) != nil {
		return
	}
	d.caution, d.drainTimeout = cautionOf(spec.Labels), drainTimeoutOf(spec.Labels)
}
