package orchestrator

import (
	"encoding/json"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/store"
)

// Labels that set how nodes are drained and given up. Control refuses values that do not parse; here they count as not set.
const (
	LabelDrainParallelism = "skein.drain.parallelism"
	LabelDrainOrder       = "skein.drain.order"
	LabelDownGrace        = "skein.node.down-grace"
	LabelOrphanAfter      = "skein.node.orphan-after"
	LabelReplaceRate      = "skein.replace.rate"
)

const (
	// defaultOrphanAfter is how long what ran on a node that is down may still run there.
	defaultOrphanAfter = 24 * time.Hour
	// leastRate is how many tasks of a service may be replaced in a second, at least.
	leastRate = 500
	// rateShare is the share of its slots, one in so many, that may be replaced in a second.
	rateShare = 10
)

// serviceOptions are those that a service sets for itself.
type serviceOptions struct {
	drainParallelism *int
	drainOrder       swarm.UpdateOrder
	downGrace        *time.Duration
	replaceRate      *int
}

func serviceOptionsOf(labels map[string]string) serviceOptions {
	return serviceOptions{
		drainParallelism: number(labels, LabelDrainParallelism), drainOrder: swarm.UpdateOrder(labels[LabelDrainOrder]),
		downGrace: duration(labels, LabelDownGrace), replaceRate: number(labels, LabelReplaceRate),
	}
}

// nodeOptions are those of a node.
type nodeOptions struct {
	drainParallelism       *int
	downGrace, orphanAfter *time.Duration
}

func nodeOptionsOf(n *store.Node) nodeOptions {
	return nodeOptions{drainParallelism: number(n.Labels, LabelDrainParallelism), downGrace: duration(n.Labels, LabelDownGrace),
		orphanAfter: duration(n.Labels, LabelOrphanAfter)}
}

// clusterOptions are those of all that say nothing of their own.
type clusterOptions struct {
	rec *store.Cluster
	nodeOptions
	replaceRate *int
	history     int // negative: no limit
}

// read takes the record in and reports whether any option changed.
func (c *clusterOptions) read(rec *store.Cluster) bool {
	if rec == c.rec && rec != nil {
		return false
	}
	var spec swarm.Spec
	if rec == nil || json.Unmarshal(rec.SpecJson, &spec) != nil {
		spec = swarm.Spec{}
	}
	next := clusterOptions{rec: rec, history: defaultHistory, replaceRate: number(spec.Labels, LabelReplaceRate)}
	next.nodeOptions = nodeOptionsOf(&store.Node{Labels: spec.Labels})
	if n := spec.Orchestration.TaskHistoryRetentionLimit; n != nil {
		next.history = int(*n)
	}
	same := c.rec != nil && equal(c.drainParallelism, next.drainParallelism) && equal(c.downGrace, next.downGrace) &&
		equal(c.orphanAfter, next.orphanAfter) && equal(c.replaceRate, next.replaceRate) && c.history == next.history
	*c = next
	return !same
}

func equal[T comparable](a, b *T) bool { return a == b || (a != nil && b != nil && *a == *b) }

func number(labels map[string]string, name string) *int {
	if n, err := strconv.Atoi(labels[name]); err == nil && n >= 0 {
		return &n
	}
	return nil
}

func duration(labels map[string]string, name string) *time.Duration {
	if d, err := time.ParseDuration(labels[name]); err == nil && d >= 0 {
		return &d
	}
	return nil
}

// downSince is 0 for a node that is not down.
func (n *knownNode) downSince() int64 { return downSince(n.rec) }

func downSince(rec *store.Node) int64 {
	switch rec.GetStatus().GetState() {
	case string(swarm.NodeStateDown), string(swarm.NodeStateDisconnected):
		if since := rec.Status.Since; since != 0 {
			return since
		}
		return max(1, rec.Meta.GetUpdated()) // from before nodes knew
	}
	return 0
}

// downGrace is how long the service's tasks stay where they are after their node went down.
func (p *pass) downGrace(n *knownNode) time.Duration {
	for _, set := range []*time.Duration{p.opts.downGrace, n.opts.downGrace, p.o.cluster.downGrace} {
		if set != nil {
			return *set
		}
	}
	return 0
}

// replaceRate is how many tasks of the service may be replaced in a second, 0 any number.
func (p *pass) replaceRate() int {
	for _, set := range []*int{p.opts.replaceRate, p.o.cluster.replaceRate} {
		if set != nil {
			return *set
		}
	}
	return max(leastRate, p.sum.filled.count/rateShare)
}
