package world

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/loop"
	"skein/manager/orchestrator"
	"skein/manager/store"
)

// mutant is a controller with a planted defect: it sees another view, or wants other changes.
type mutant struct {
	loop.Controller
	see  func(store.ReadTx) store.ReadTx
	want func(store.ReadTx, loop.Changes) loop.Changes
}

func (m mutant) Step(view store.ReadTx, dirty loop.Keys, now time.Time) (loop.Changes, time.Time) {
	seen := view
	if m.see != nil {
		seen = m.see(view)
	}
	changes, wake := m.Controller.Step(seen, dirty, now)
	if m.want != nil {
		changes = m.want(view, changes)
	}
	return changes, wake
}

// mutate plants a defect in one of a term's controllers.
func mutate(name string, m mutant) Hooks {
	return Hooks{Controllers: func() []loop.Controller {
		out := orchestrator.Controllers()
		for i, c := range out {
			if c.Name() == name {
				planted := m
				planted.Controller = c
				out[i] = planted
			}
		}
		return out
	}}
}

// blind is a view that does not show some tasks.
type blind struct {
	store.ReadTx
	hide func(*store.Task) bool
}

func (b blind) without(ts []*store.Task) []*store.Task {
	return slices.DeleteFunc(slices.Clone(ts), b.hide)
}
func (b blind) Tasks() []*store.Task                   { return b.without(b.ReadTx.Tasks()) }
func (b blind) TasksByService(id string) []*store.Task { return b.without(b.ReadTx.TasksByService(id)) }

// otherSpec is a view that shows services with another spec.
type otherSpec struct {
	store.ReadTx
	change func(*swarm.ServiceSpec)
}

func (o otherSpec) Service(id string) *store.Service {
	svc := o.ReadTx.Service(id)
	if svc == nil {
		return nil
	}
	c, spec := *svc, *svc.Spec
	o.change(&spec)
	c.Spec, c.Revs = &spec, map[uint64]*swarm.ServiceSpec{}
	for n, r := range svc.Revs {
		rev := *r
		o.change(&rev)
		c.Revs[n] = &rev
	}
	c.Revs[svc.Revision] = c.Spec
	return &c
}

// active is a view in which no node is drained.
type active struct{ store.ReadTx }

func (a active) Node(id string) *store.Node {
	n := a.ReadTx.Node(id)
	if n == nil || n.Availability != "drain" {
		return n
	}
	c := proto.Clone(n).(*api.NodeRecord)
	c.Availability = "active"
	return c
}

func (a active) Nodes() []*store.Node {
	var out []*store.Node
	for _, n := range a.ReadTx.Nodes() {
		out = append(out, a.Node(n.Id))
	}
	return out
}

func each(f func(tx store.ReadTx, c *api.Change) bool) func(store.ReadTx, loop.Changes) loop.Changes {
	return func(tx store.ReadTx, changes loop.Changes) loop.Changes {
		var out loop.Changes
		for _, c := range changes {
			c.Txn.Changes = slices.DeleteFunc(c.Txn.Changes, func(ch *api.Change) bool { return !f(tx, ch) })
			if len(c.Txn.Changes) > 0 {
				out = append(out, c)
			}
		}
		return out
	}
}

func creates(f func(*api.TaskCreate_Item)) mutant {
	return mutant{want: each(func(_ store.ReadTx, c *api.Change) bool {
		for _, it := range c.GetCreateTasks().GetItems() {
			f(it)
		}
		return true
	})}
}

func placements(f func(tx store.ReadTx, p *api.TaskPlacement, i int)) mutant {
	return mutant{want: each(func(tx store.ReadTx, c *api.Change) bool {
		if p := c.GetPlaceTasks(); p != nil {
			for i := range p.TaskIds {
				f(tx, p, i)
			}
		}
		return true
	})}
}

// withoutQuarantine is a snapshot that forgets which addresses rest.
func withoutQuarantine(snapshot []byte) []byte {
	var out bytes.Buffer
	sum, chunks := sha256.New(), uint64(0)
	put := func(m *api.SnapshotChunk) {
		b, _ := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		framed := append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
		out.Write(framed)
		sum.Write(framed)
		chunks++
	}
	for len(snapshot) > 0 {
		size := binary.BigEndian.Uint32(snapshot)
		var m api.SnapshotChunk
		if proto.Unmarshal(snapshot[4:4+size], &m) != nil {
			return nil
		}
		snapshot = snapshot[4+size:]
		switch {
		case m.GetQuarantine() != nil:
		case m.GetEnd() != nil:
			put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_End{End: &api.SnapshotEnd{Chunks: chunks, Sha256: sum.Sum(nil)}}})
		default:
			put(&m)
		}
	}
	return out.Bytes()
}

// TestCheckerFindsPlantedDefects: each of these defects is found within a few histories, by the rule that speaks of it.
func TestCheckerFindsPlantedDefects(t *testing.T) {
	for name, c := range map[string]struct {
		hooks Hooks
		want  string // one of these, separated by |
	}{
		"restart delay forgotten": {mutate("orchestrator", creates(func(it *api.TaskCreate_Item) { it.StartAfter, it.Desired = 0, uint32(api.TaskRunning) })), "I11|I4"},
		"successor started beside the old task": {mutate("orchestrator", creates(func(it *api.TaskCreate_Item) {
			if it.StartAfter == 0 {
				it.Desired = uint32(api.TaskRunning)
			}
		})), "I4"},
		"restart attempts forgotten": {mutate("orchestrator", mutant{see: func(tx store.ReadTx) store.ReadTx {
			return otherSpec{tx, func(s *swarm.ServiceSpec) {
				if p := s.TaskTemplate.RestartPolicy; p != nil {
					c := *p
					c.MaxAttempts, s.TaskTemplate.RestartPolicy = nil, &c
				}
			}}
		}}), "I11"},
		"jobs forget what is done": {mutate("orchestrator", mutant{see: func(tx store.ReadTx) store.ReadTx {
			return blind{tx, func(t *store.Task) bool { return t.State == api.TaskComplete }}
		}}), "I4|I11|I3|rest"},
		"parallelism ignored": {mutate("orchestrator", mutant{see: func(tx store.ReadTx) store.ReadTx {
			return otherSpec{tx, func(s *swarm.ServiceSpec) {
				for _, u := range []**swarm.UpdateConfig{&s.UpdateConfig, &s.RollbackConfig} {
					if *u != nil {
						c := **u
						c.Parallelism, *u = 0, &c
					}
				}
			}}
		}}), "I10"},
		"drained nodes keep their tasks": {mutate("orchestrator", mutant{see: func(tx store.ReadTx) store.ReadTx { return active{tx} }}), "I13|I7|I3"},
		"updates never end": {mutate("orchestrator", mutant{want: each(func(_ store.ReadTx, c *api.Change) bool {
			return c.GetUpdateStatus().GetCompleted() == 0
		})}), "I10|rest"},
		"removed tasks stay": {mutate("orchestrator", mutant{want: each(func(_ store.ReadTx, c *api.Change) bool {
			return c.GetDesireTasks().GetDesired() != uint32(api.TaskRemove)
		})}), "I3|I4|rest"},
		"constraints ignored": {mutate("placement", placements(func(tx store.ReadTx, p *api.TaskPlacement, i int) {
			if p.NodeIds[i] != "" {
				nodes := tx.Nodes()
				p.NodeIds[i] = nodes[int(tx.Version())%len(nodes)].Id
			}
		})), "I7|I6|I13"},
		"room ignored": {mutate("placement", placements(func(tx store.ReadTx, p *api.TaskPlacement, i int) {
			for j := range p.NodeIds {
				if p.NodeIds[j] != "" {
					p.NodeIds[i] = p.NodeIds[j]
					p.Refused[i] = ""
				}
			}
		})), "I6|I7|I11|I13"},
		"tasks without a node say nothing": {mutate("placement", mutant{want: each(func(_ store.ReadTx, c *api.Change) bool {
			return !strings.Contains(strings.Join(c.GetPlaceTasks().GetRefused(), ""), "no suitable node")
		})}), "I3"},
		"tasks forgotten by placement": {mutate("placement", mutant{want: each(func(tx store.ReadTx, c *api.Change) bool {
			return c.GetPlaceTasks() == nil || tx.Version()%3 != 0
		})}), "I3"},
		"history never deleted":               {mutate("reaper", mutant{want: func(store.ReadTx, loop.Changes) loop.Changes { return nil }}), "I12|I14"},
		"one manager applies less":            {Hooks{Applied: dropLast}, "differ"},
		"snapshots forget what rests":         {Hooks{Snapshot: withoutQuarantine}, "differ|I8"},
		"acknowledged before it is committed": {Hooks{LoseAcked: 60}, "acknowledged|I|rest"},
		"agents say too early that it runs":   {Hooks{EarlyRunning: true}, "I15"},
		"agents keep containers":              {Hooks{KeepContainers: true}, "I15"},
		"agents report an end that is none":   {Hooks{NoStop: true}, "I15|I4"},
		"secrets are sent to all":             {Hooks{SecretsEverywhere: true}, "I9"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for seed := uint64(1); seed <= 25; seed++ {
				r := Run(Config{Seed: seed, Busy: 40 * time.Second, Hooks: c.hooks})
				if r.Err == nil {
					continue
				}
				if !slices.ContainsFunc(strings.Split(c.want, "|"), func(rule string) bool { return strings.Contains(r.Err.Error(), rule) }) {
					t.Errorf("found, but not by %s: seed %d: %v", c.want, seed, r.Err)
				}
				t.Logf("found with seed %d: %.200v", seed, r.Err)
				return
			}
			t.Error("not found in 25 histories")
		})
	}
}

// dropLast is an Apply that differs on one manager.
func dropLast(manager int, entry []byte) []byte {
	var e api.Entry
	if manager != 1 || proto.Unmarshal(entry, &e) != nil || e.Txns[0].Changes[0].GetReportTask() == nil {
		return entry
	}
	e.Txns[0].Changes = nil
	b, _ := proto.Marshal(&e)
	return b
}
