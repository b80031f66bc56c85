// Package check holds the invariants I1 to I15 of orchestration: what must hold after every entry of the log, and what must hold once all
// trouble is over. It judges by the store's records and by what really runs, and shares no code with what it judges but the records
// themselves. Used by test/sim and other tests that can show it a store.
package check

import (
	"fmt"
	"slices"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// Violation is one invariant that does not hold.
type Violation struct {
	Rule string // "I1" to "I15"
	Text string
}

func (v Violation) String() string { return v.Rule + ": " + v.Text }

// Bounds of what clocks of managers may differ: delays are told by the leader's clock, and leaders change.
const (
	skew = 7 * time.Second
	// rest is how long a released address rests.
	rest = 60 * time.Second
	// notice is how long decisions made before an event may still be committed after it.
	notice = 2 * time.Second
	// clockStep is what an entry may be younger than its time says.
	clockStep = 20 * time.Millisecond
)

// Checker follows a log entry by entry.
type Checker struct {
	now     time.Time
	level   uint32    // of the cluster's features
	term    time.Time // when the leader changed last
	tasks   map[string]*seen
	dead    map[string]struct{}
	nodes   map[string]*nodeSeen
	specs   map[string]*serviceSeen
	slots   map[slotKey]*slotSeen
	held    map[string]string    // address → task or service
	freed   map[string]time.Time // address → when it was released
	vnis    map[uint32]string
	indexes map[uint32]string
	found   []Violation
}

// New returns a checker of an empty log.
func New() *Checker {
	return &Checker{tasks: map[string]*seen{}, dead: map[string]struct{}{}, nodes: map[string]*nodeSeen{}, specs: map[string]*serviceSeen{}, slots: map[slotKey]*slotSeen{},
		held: map[string]string{}, freed: map[string]time.Time{}, vnis: map[uint32]string{}, indexes: map[uint32]string{}}
}

// seen is a task as it was last seen.
type seen struct {
	*store.Task
	spec   *swarm.ServiceSpec // of its revision
	made   time.Time
	placed time.Time
	ended  time.Time
	own    bool // it ended by itself
	ran    bool
	holds  []string
}

type nodeSeen struct {
	rec      *store.Node
	total    swarm.Resources
	engine   map[string]string
	os, arch string
	changed  time.Time // when availability, labels, role, resources or state changed
	state    time.Time
	down     time.Time // when it was last declared down
	tasks    map[string]*seen
}

type serviceSeen struct {
	rec        *store.Service
	startFirst time.Time // when a spec with start-first was last the current one or the one before
	changed    time.Time // when its revision changed
	holds      []string
	tasks      map[string]*seen
}

type slotKey struct {
	service string
	slot    uint64
	node    string
}

func keyOf(t *store.Task) slotKey {
	k := slotKey{service: t.ServiceID, slot: t.Slot}
	if t.Slot == 0 {
		k.node = t.NodeID
	}
	return k
}

type slotSeen struct {
	tasks map[string]*seen
	// ends by themselves of tasks of a revision that were replaced, and when.
	replaced map[uint64][]time.Time
	done     map[uint64]string // job: which task completed a revision
}

// Term notes that the leader, and with it the clock that tells delays, changed.
func (c *Checker) Term(now time.Time) { c.term = now }

// Tasks is how many tasks there ever were.
func (c *Checker) Tasks() int { return len(c.tasks) + len(c.dead) }

func (c *Checker) bad(rule, format string, args ...any) {
	c.found = append(c.found, Violation{rule, fmt.Sprintf(format, args...)})
}

// Entry looks at what an entry changed. Keys are the changed objects; with all, anything may have changed.
func (c *Checker) Entry(tx store.ReadTx, keys []store.Key, all bool, now time.Time) []Violation {
	c.found, c.now, c.level = nil, now, tx.Cluster().GetFeatureLevel()
	if all {
		keys = everything(tx)
	}
	var slots []slotKey
	for _, k := range keys {
		switch k.Kind {
		case store.KindNode:
			c.node(tx, k.ID)
		case store.KindService:
			c.service(tx, k.ID)
		case store.KindNetwork:
			c.network(tx, k.ID)
		}
	}
	before := c.updatesBefore(keys)
	for _, k := range keys { // all at once: what one task releases another may get in the same entry
		if k.Kind == store.KindTask {
			c.release(tx, k.ID)
		}
	}
	for _, k := range keys {
		if k.Kind != store.KindTask {
			continue
		}
		if s := c.task(tx, k.ID); s != nil {
			slots = append(slots, keyOf(s.Task))
		}
	}
	done := map[slotKey]bool{}
	for _, k := range slots {
		if !done[k] {
			done[k] = true
			c.slot(k)
		}
	}
	c.updatesAfter(before)
	return c.found
}

func everything(tx store.ReadTx) []store.Key {
	var keys []store.Key
	for _, n := range tx.Nodes() {
		keys = append(keys, store.Key{Kind: store.KindNode, ID: n.Id})
	}
	for _, n := range tx.Networks() {
		keys = append(keys, store.Key{Kind: store.KindNetwork, ID: n.Id})
	}
	for _, s := range tx.Services() {
		keys = append(keys, store.Key{Kind: store.KindService, ID: s.Id})
	}
	for _, t := range tx.Tasks() {
		keys = append(keys, store.Key{Kind: store.KindTask, ID: t.ID, ServiceID: t.ServiceID})
	}
	return keys
}

func (c *Checker) nodeOf(id string) *nodeSeen {
	n := c.nodes[id]
	if n == nil {
		n = &nodeSeen{tasks: map[string]*seen{}}
		c.nodes[id] = n
	}
	return n
}

func (c *Checker) serviceOf(id string) *serviceSeen {
	s := c.specs[id]
	if s == nil {
		s = &serviceSeen{tasks: map[string]*seen{}}
		c.specs[id] = s
	}
	return s
}

func (c *Checker) slotOf(k slotKey) *slotSeen {
	s := c.slots[k]
	if s == nil {
		s = &slotSeen{tasks: map[string]*seen{}, replaced: map[uint64][]time.Time{}, done: map[uint64]string{}}
		c.slots[k] = s
	}
	return s
}

func (c *Checker) node(tx store.ReadTx, id string) {
	n, rec := c.nodeOf(id), tx.Node(id)
	if rec == nil {
		if n.rec != nil {
			delete(c.indexes, n.rec.Index)
		}
		n.rec, n.changed, n.down = nil, c.now, c.now
		return
	}
	old := n.rec
	n.rec = rec
	n.describe()
	if old == nil || old.Availability != rec.Availability || old.Role != rec.Role || old.Hostname != rec.Hostname || !equalMaps(old.Labels, rec.Labels) ||
		string(old.DescriptionJson) != string(rec.DescriptionJson) {
		n.changed = c.now
	}
	if old.GetStatus().GetState() != rec.GetStatus().GetState() {
		n.state = c.now
		if rec.GetStatus().GetState() == "down" {
			n.down = c.now
		}
	}
	if owner := c.indexes[rec.Index]; owner != "" && owner != id {
		c.bad("I8", "node %s has index %d, which is that of node %s", id, rec.Index, owner)
	}
	c.indexes[rec.Index] = id
}

func (c *Checker) service(tx store.ReadTx, id string) {
	s, rec := c.serviceOf(id), tx.Service(id)
	old := s.rec
	s.rec = rec
	c.published(s, rec, id)
	if rec == nil {
		s.changed = c.now
		return
	}
	if old == nil || old.Revision != rec.Revision {
		s.changed = c.now
	}
	for _, spec := range rec.Revs {
		for _, u := range []*swarm.UpdateConfig{spec.UpdateConfig, spec.RollbackConfig} {
			if u != nil && u.Order == swarm.UpdateOrderStartFirst {
				s.startFirst = c.now
			}
		}
	}
}

// published is I8 for a service's addresses and ports; rec is nil when it is gone.
func (c *Checker) published(s *serviceSeen, rec *store.Service, id string) {
	var holds []string
	if rec != nil {
		for _, v := range rec.Vips {
			for _, a := range []string{v.Addr4, v.Addr6} {
				if a != "" {
					holds = append(holds, v.NetworkId+"|"+bare(a))
				}
			}
		}
		for _, p := range rec.Ports {
			if p.Mode != "host" && p.Published != 0 {
				holds = append(holds, fmt.Sprintf("ingress|%s/%d", p.Protocol, p.Published))
			}
		}
	}
	for _, a := range s.holds {
		if !slices.Contains(holds, a) {
			c.free(a, id)
		}
	}
	s.holds = holds
	for _, a := range s.holds {
		c.hold(a, id)
	}
}

func (c *Checker) network(tx store.ReadTx, id string) {
	for vni, owner := range c.vnis {
		if owner == id {
			delete(c.vnis, vni)
		}
	}
	n := tx.Network(id)
	if n == nil {
		return
	}
	if owner := c.vnis[n.Vni]; owner != "" {
		c.bad("I8", "networks %s and %s have the same VNI %d", owner, id, n.Vni)
	}
	c.vnis[n.Vni] = id
}

// hold notes who has an address or port.
func (c *Checker) hold(a, who string) {
	if owner, taken := c.held[a]; taken && owner != who {
		c.bad("I8", "%s is held by %s and given to %s", a, owner, who)
	}
	if at, was := c.freed[a]; was && c.now.Sub(at) < rest-skew && c.held[a] != who {
		c.bad("I8", "%s was released %v ago and is given to %s", a, c.now.Sub(at), who)
	}
	delete(c.freed, a)
	c.held[a] = who
}

func (c *Checker) free(a, who string) {
	if c.held[a] != who {
		return
	}
	delete(c.held, a)
	if a[0] != 'i' && a[0] != 'p' { // ports need no rest
		c.freed[a] = c.now
	}
}

func equalMaps(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if b[k] != v {
			return false
		}
	}
	return true
}

func live(t *store.Task) bool {
	return t.NodeID != "" && t.State >= api.TaskAssigned && t.State < api.TaskComplete
}

func ended(s api.TaskState) bool {
	return s == api.TaskComplete || s == api.TaskShutdown || s == api.TaskFailed || s == api.TaskRejected || s == api.TaskOrphaned
}
