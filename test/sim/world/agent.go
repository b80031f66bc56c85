package world

import (
	"encoding/json"
	"maps"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// node is one machine: its agent, and what really runs there.
type node struct {
	w    *World
	name string
	role string
	zone string
	mem  int64
	cpus int64
	up   bool // the machine
	cut  bool // from all managers
	boot int  // counts starts of the daemon
	skew time.Duration
	gone bool // removed from the cluster

	session  *session
	sequence uint64
	daemon   bool // it runs
	trying   bool
	tasks    map[string]*task // the agent's knowledge and workers
	deps     map[string]bool  // secrets and configs it holds
	holds    map[string]*container
	cutAt    int
	desc     []byte
}

// container is what really is there of a task, whatever anybody says.
type container struct {
	running bool
	ended   bool
	code    int
	since   time.Duration
	service string
}

// join makes a machine and its record, as package ca does.
func (w *World) join(name, role string) *node {
	if w.leader == nil {
		return nil
	}
	n := w.machine(name, role, string(rune('a'+w.r.IntN(3))))
	rec := &api.NodeRecord{Id: name, Hostname: name, Role: role, Availability: "active", Labels: map[string]string{"zone": n.zone},
		DescriptionJson: n.description(), Status: &api.NodeStatus{State: "unknown"}}
	_, results, err := w.leader.store.Batch(ctx, []*api.Txn{{Changes: []*api.Change{
		{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "node", Id: name}}}, {Kind: &api.Change_PutNode{PutNode: rec}}}}})
	if err != nil || results[0] != nil {
		return nil // should it be done all the same, adopt finds the record
	}
	w.add(n)
	return n
}

func (w *World) machine(name, role, zone string) *node {
	return &node{w: w, name: name, role: role, zone: zone, mem: int64(2+w.r.IntN(7)) << 30, cpus: 4, up: true, daemon: true,
		skew: w.between(-2*time.Second, 2*time.Second), tasks: map[string]*task{}, deps: map[string]bool{}, holds: map[string]*container{}}
}

func (w *World) add(n *node) {
	w.nodes[n.name] = n
	w.names = append(w.names, n.name)
	w.after(w.between(0, 300*time.Millisecond), n.connect)
}

func (n *node) description() []byte {
	if n.desc == nil {
		var d swarm.NodeDescription
		d.Hostname = n.name
		d.Platform = swarm.Platform{OS: "linux", Architecture: "x86_64"}
		d.Resources = swarm.Resources{NanoCPUs: n.cpus * 1e9, MemoryBytes: n.mem}
		d.Engine.Labels = map[string]string{"disk": pickByName(n.name)}
		n.desc, _ = json.Marshal(d) // plain data
	}
	return n.desc
}

func pickByName(name string) string {
	if name[len(name)-1]%2 == 0 {
		return "ssd"
	}
	return "hdd"
}

// connect looks for the leader until there is a session.
func (n *node) connect() {
	w := n.w
	if n.session != nil || n.gone || n.trying {
		return
	}
	n.trying = true
	boot := n.boot
	w.after(w.between(20*time.Millisecond, 600*time.Millisecond), func() {
		n.trying = false
		if n.session != nil || n.gone {
			return
		}
		if !n.up || !n.daemon || n.cut || n.boot != boot || w.leader == nil || w.leader.term == nil {
			if n.up && n.daemon {
				n.connect()
			}
			return
		}
		s := w.leader.term.disp.register(n, n.reports())
		if s == nil {
			n.remove()
			return
		}
		n.session, n.sequence = s, 0
		w.note("%s: session of %s", w.leader.name, n.name)
		s.greet()
		n.pokeAll()
	})
}

// remove takes a machine out of the cluster for good: what ran there is switched off.
func (n *node) remove() {
	n.w.note("%s finds that it was removed", n.name)
	n.gone = true
	n.daemon = false
	n.boot++
	clear(n.holds)
	clear(n.tasks)
	clear(n.deps)
}

// lose is the end of a session as the agent sees it.
func (n *node) lose(s *session) {
	if n.session != s {
		return
	}
	n.session = nil
	n.pokeAll()
	n.connect()
}

// setCut takes the node off the network.
func (n *node) setCut(d time.Duration) {
	if n.cut || n.gone {
		return
	}
	w := n.w
	n.cut = true
	n.cutAt++
	at := n.cutAt
	w.note("%s is cut off for %v", n.name, d)
	if s := n.session; s != nil {
		n.silence(s, func() bool { return n.cut && n.cutAt == at })
		w.after(w.between(lease, lease+time.Second), func() { // the agent hears nothing
			if n.cut && n.cutAt == at {
				n.lose(s)
			}
		})
	}
	w.after(d, func() {
		n.cut = false
		w.note("%s is back on the network", n.name)
		if s := n.session; s != nil {
			s.healed()
		}
		n.connect()
	})
}

// silence has a session's lease end while still says that nothing is heard.
func (n *node) silence(s *session, still func() bool) {
	w := n.w
	w.after(w.between(lease-time.Second, lease+50*time.Millisecond), func() {
		if still() && s.d.sessions[n.name] == s && s.d.alive() {
			s.d.lost(n.name, "heartbeat failure")
		}
	})
}

// restart ends the daemon, and begins it again. Containers go on, unless the machine went with it. With fresh, the disk is empty.
func (n *node) restart(away time.Duration, machine, fresh bool) {
	if !n.daemon || n.gone {
		return
	}
	w := n.w
	w.note("%s: its daemon ends for %v (machine %v, fresh %v)", n.name, away, machine, fresh)
	n.daemon = false
	n.boot++
	if machine {
		for _, c := range n.holds {
			if c.running {
				c.running, c.ended, c.code = false, true, 137
			}
		}
	}
	if s := n.session; s != nil {
		n.session = nil
		if machine {
			n.silence(s, func() bool { return true })
		} else {
			w.after(10*time.Millisecond, s.end) // the connection is reset: the node stays ready for its lease
			d := s.d
			w.after(lease, func() {
				if d.alive() && d.sessions[n.name] == nil && !d.fenced[n.name] {
					d.lost(n.name, "heartbeat failure")
				}
			})
		}
	}
	boot := n.boot
	w.after(away, func() {
		if n.boot != boot || n.gone {
			return
		}
		n.daemon = true
		n.deps = map[string]bool{}
		if fresh {
			n.tasks = map[string]*task{}
			if machine {
				n.holds = map[string]*container{}
			}
		}
		for _, id := range keys(n.tasks) { // from its journal
			n.tasks[id].resume()
		}
		n.connect()
	})
}

// assign takes what a manager sent.
func (n *node) assign(sequence uint64, full bool, set []*assignment, removed []string) {
	if !full && sequence != n.sequence+1 {
		n.w.fail("%s: assignment update %d follows %d", n.name, sequence, n.sequence)
	}
	n.sequence = sequence
	wanted := map[string]bool{}
	for _, a := range set {
		wanted[a.id] = true
		n.take(a)
	}
	if full {
		for _, id := range keys(n.tasks) {
			if !wanted[id] {
				n.tasks[id].drop()
			}
		}
		for _, id := range keys(n.holds) { // orphans
			if n.tasks[id] == nil {
				delete(n.holds, id)
			}
		}
	}
	for _, id := range removed {
		if t := n.tasks[id]; t != nil {
			t.drop()
		}
	}
	n.forgetDeps()
}

func (n *node) take(a *assignment) {
	t := n.tasks[a.id]
	if t == nil {
		t = newTask(n, a)
		n.tasks[a.id] = t
		t.accept()
		return
	}
	if t.dropped {
		t.again = a
		return
	}
	c := *a
	if c.image == "" { // managers leave it out of ended tasks and removed services
		c.image, c.job, c.deps, c.mesh = t.a.image, t.a.job, t.a.deps, t.a.mesh
	}
	t.a = &c
	t.want()
	t.poke()
}

// forgetDeps drops the secrets that no task refers to.
func (n *node) forgetDeps() {
	needed := map[string]bool{}
	for _, t := range n.tasks {
		for _, id := range t.a.deps {
			needed[id] = true
		}
	}
	maps.DeleteFunc(n.deps, func(id string, _ bool) bool { return !needed[id] })
}

// reports are the newest of each task.
func (n *node) reports() []*api.TaskReport {
	var out []*api.TaskReport
	for _, id := range keys(n.tasks) {
		if r := n.tasks[id].last; r != nil {
			out = append(out, r)
		}
	}
	return out
}

// report says something to the managers. Without a session it waits for the next hello. Agents may say things twice, and late.
func (n *node) report(r *api.TaskReport) {
	s := n.session
	if s == nil {
		return
	}
	hear := func() { s.d.intake(n.name, []*api.TaskReport{r}) }
	s.toManager(hear)
	if n.w.chance(0.05) {
		n.w.after(n.w.between(0, 2*time.Second), func() {
			if n.session == s {
				s.toManager(hear)
			}
		})
	}
}

func (n *node) pokeAll() {
	for _, id := range keys(n.tasks) {
		n.tasks[id].poke()
	}
}

func (n *node) clock() time.Time { return n.w.time().Add(n.skew) }
